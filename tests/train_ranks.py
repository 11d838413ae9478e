"""One rank of tests/test_ranks.py: trains a tiny model and leaves what it found in result.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import oracles
import tiny
import torch
import torch.distributed as dist
from test_training import MASK, example

from tidar_ref.training.network import TrainingNetwork
from tidar_ref.training.rows import Objective
from tidar_ref.training.trainer import TrainConfig, Trainer, shard


def trainer_in(folder: Path) -> Trainer:
    config = oracles.tiny_config("qwen3", vocab=16)
    model = tiny.model_of(config, oracles.random_state(config, 3, std=0.1))
    network = TrainingNetwork(model, mask_token_id=MASK)
    if dist.get_world_size() > 1:
        network = shard(network)
    return Trainer(
        network,
        [example(2, 8, seed) for seed in range(9)],
        Objective(block_lens=(3, 4), grids=2),
        TrainConfig(steps=4, batch=4, micro_batch=1, lr=1e-3),
        folder,
    )


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    trainer = trainer_in(folder)
    logs = []
    trainer.run(logs.append)
    sums = {
        name: float(whole(value.detach()).double().sum())
        for name, value in trainer.network.trained().items()
    }
    again = trainer_in(folder)
    again.resume()
    if trainer.rank == 0:
        result = {
            "world": trainer.world,
            "logs": [asdict(log) for log in logs],
            "weights": sums,
            "resumed_at": again.progress.step,
        }
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
