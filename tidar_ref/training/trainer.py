"""The training loop: budgets, schedule, accumulation, checkpoints, ranks. Knows no task and no file
format of data; it is given examples and a folder.

What a step sees depends on (seed, step) only, so a resumed run repeats an unbroken one, and ranks
split the same batch: gradients of every rank add up to those of one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tidar_ref.errors import UserError
from tidar_ref.training.eagle import HeadNetwork
from tidar_ref.training.network import TrainingNetwork, objective_loss
from tidar_ref.training.rows import IGNORE, Example, Objective, Rows, build_rows

STATE_FILE, LOG_FILE = "state.pt", "loss.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Budget and optimiser. At least one of steps, minutes, tokens; the first one reached ends it.

    batch: documents per optimiser step (over all ranks), cut into micro-batches of `micro_batch`.
    tokens counts clean tokens once (as the paper counts its 50B). Learning rate: linear warm-up,
    then a cosine to min_lr_ratio of it; with a budget of minutes alone the schedule follows the
    clock, and then two runs differ. Adam betas, decay and clipping are ours (tidar.md, section 10).
    """

    steps: int | None = None
    minutes: float | None = None
    tokens: int | None = None
    batch: int = 8
    micro_batch: int = 8
    lr: float = 1e-5
    min_lr_ratio: float = 0.3
    warmup: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    autocast: bool = False
    seed: int = 0
    save_every_s: float = 120.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None and self.tokens is None:
            raise UserError("training has no budget: give steps, minutes or tokens")
        if self.batch < 1 or self.micro_batch < 1:
            raise UserError(f"batch {self.batch}, micro-batch {self.micro_batch}: at least 1 each")


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """One optimiser step. Losses are means over targets (nats); None if the term has no target.

    draft_accuracy: share of drafts guessed right (mask rows; of a draft head its first unroll).
    tokens: clean tokens seen so far. flops: what the step needed (count), mfu: its share of the
    devices' peak (0 to 1); None where the trainer was told no way to count, or no peak.
    """

    step: int
    ar_loss: float | None
    diffusion_loss: float | None
    draft_accuracy: float | None
    grad_norm: float
    lr: float
    tokens: int
    rows: int
    seconds: float
    flops: float | None = None
    mfu: float | None = None


@dataclass(frozen=True, kw_only=True)
class Meter:
    """How arithmetic is counted: FLOPs of a packed forward with its backward, and one device's peak
    in FLOP/s (None: not known)."""

    flops: Callable[[Rows], float]
    peak: float | None = None


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


class Trainer:
    """Trains a network on examples until the budget is spent, or a signal asks to stop.

    folder: state.pt (all that resuming needs) and loss.jsonl (one line a step). meter: count FLOPs.
    """

    def __init__(
        self,
        network: TrainingNetwork | HeadNetwork,
        examples: Sequence[Example],
        objective: Objective,
        config: TrainConfig,
        folder: Path,
        *,
        meter: Meter | None = None,
    ) -> None:
        if not examples:
            raise UserError("no training example is left: check the data sources of the recipe")
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if ranked() else (0, 1)
        if config.batch % self.world:
            raise UserError(f"batch {config.batch} does not split over {self.world} ranks evenly")
        self.network, self.examples = network, examples
        self.objective, self.config, self.folder = objective, config, folder
        self.device, self.meter = network.embed.weight.device, meter
        parameters = list(network.trained().values())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.progress = Progress()
        self.stopping = False
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def state_path(self) -> Path:
        return self.folder / (STATE_FILE if self.world == 1 else f"rank{self.rank}-{STATE_FILE}")

    def resume(self) -> bool:
        """Load the folder's checkpoint if there is one; the log is cut back to its step."""
        if not self.state_path.exists():
            return False
        state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        if state["world"] != self.world:
            raise UserError(
                f"checkpoint was written by {state['world']} ranks, this run has {self.world}:"
                " start as many, or use a new --out"
            )
        trained = self.network.trained()
        with torch.no_grad():
            for name, value in state["parameters"].items():
                _local(trained[name]).copy_(value)
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = state["optimizer"]
        self.optimizer.load_state_dict(optimizer)
        self.progress = Progress(**state["progress"])
        log = self.folder / LOG_FILE
        if self.rank == 0 and log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(lines[: self.progress.step]), encoding="utf-8")
        return True

    def save(self) -> None:
        """Write the checkpoint beside the old one, then take its place."""
        state = {
            "world": self.world,
            "parameters": {n: _local(p).detach().cpu() for n, p in self.network.trained().items()},
            "optimizer": self.optimizer.state_dict()["state"],
            "progress": asdict(self.progress),
        }
        new = self.state_path.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, self.state_path)

    def run(self, on_step: Callable[[StepLog], None] | None = None) -> Progress:
        """Train to the end of the budget; a checkpoint is written regularly and at the end.

        SIGTERM and SIGINT end the run after the current step, with a checkpoint; `stopping` tells.
        """
        saved = time.monotonic()
        with self._signals():
            while not self._finished() and not self.stopping:
                log = self.step()
                if self.rank == 0:
                    with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(log)) + "\n")
                if on_step is not None:
                    on_step(log)
                if time.monotonic() - saved > self.config.save_every_s:
                    self.save()
                    saved = time.monotonic()
                self._agree_to_stop()
            self.save()
        return self.progress

    def step(self) -> StepLog:
        """One optimiser step on the batch that (seed, step) names."""
        started = time.monotonic()
        config, progress = self.config, self.progress
        lr = config.lr * self.rate_at(self.spent())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = list(self._micro_batches())
        # One all-reduce: the batch's targets, tokens, rows, weight of the mask targets, FLOPs.
        *counts, weight, flops = self._summed([self._counts(rows) for rows in parts])
        ar_rows, diffusion_rows, tokens, row_count = (int(value) for value in counts)
        if self.objective.kind == "eagle3":  # its drafts learn the labels of the clean rows
            ar_rows, diffusion_rows, weight = 0, ar_rows, float(ar_rows)
        sums = torch.zeros(3, dtype=torch.float64)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if config.autocast else None
        for rows in parts:
            with autocast or nullcontext():
                losses = self.network(rows.to(self.device), self.objective)
            loss = objective_loss(losses, self.objective, ar_rows=ar_rows, diffusion_weight=weight)
            # FSDP averages gradients over ranks; ours are shares of one sum.
            (loss * self.world).backward()
            sums += torch.tensor(
                [losses.ar_sum.item(), losses.diffusion_sum.item(), losses.hits],
                dtype=torch.float64,
            )
        ar_sum, diffusion_sum, hits = self._summed([sums])
        parameters = list(self.network.trained().values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        progress.step += 1
        progress.tokens += tokens
        progress.elapsed_s += seconds
        frozen = self.network.gated or not ar_rows
        return StepLog(
            step=progress.step,
            ar_loss=None if frozen else ar_sum / ar_rows,
            diffusion_loss=diffusion_sum / weight if diffusion_rows else None,
            draft_accuracy=hits / diffusion_rows if diffusion_rows else None,
            grad_norm=float(norm),
            lr=lr,
            tokens=progress.tokens,
            rows=row_count,
            seconds=seconds,
            flops=flops if self.meter else None,
            mfu=(
                flops / (seconds * self.world * self.meter.peak)
                if self.meter and self.meter.peak
                else None
            ),
        )

    def spent(self) -> float:
        """Share of the budget used, 0 to 1."""
        config, done = self.config, self.progress
        shares = [
            done.step / config.steps if config.steps else 0.0,
            done.elapsed_s / (60 * config.minutes) if config.minutes else 0.0,
            done.tokens / config.tokens if config.tokens else 0.0,
        ]
        return min(max(shares), 1.0)

    def rate_at(self, spent: float) -> float:
        """Learning rate as a share of its maximum: linear warm-up, then a cosine."""
        config = self.config
        if spent < config.warmup:
            # Half a step in, so that the very first step learns something.
            return max(spent / config.warmup, 0.05)
        turn = (spent - config.warmup) / max(1 - config.warmup, 1e-9)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (
            1 + math.cos(math.pi * turn)
        )

    def batch_indices(self, step: int) -> list[int]:
        """Which examples step number `step` (from 0) sees, all ranks together.

        Epochs are permutations by (seed, epoch); a batch may span two of them.
        """
        count, batch = len(self.examples), self.config.batch
        indices, orders = [], {}
        for position in range(step * batch, (step + 1) * batch):
            epoch, place = divmod(position, count)
            if epoch not in orders:
                seeded = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(count, generator=seeded)
            indices.append(int(orders[epoch][place]))
        return indices

    def _micro_batches(self) -> Iterator[Rows]:
        step, config = self.progress.step, self.config
        indices = self.batch_indices(step)
        mine = range(self.rank, config.batch, self.world)
        for start in range(0, len(mine), config.micro_batch):
            places = mine[start : start + config.micro_batch]
            yield build_rows(
                [self.examples[indices[place]] for place in places],
                self.objective,
                mask_token_id=self.network.mask_token_id,
                seeds=[(config.seed * 7919 + step) * 65_537 + place for place in places],
            )

    def _finished(self) -> bool:
        return self.spent() >= 1.0

    def _counts(self, rows: Rows) -> Tensor:
        wanted = rows.labels != IGNORE
        ar = int(wanted[: rows.clean].sum())
        masks = wanted[rows.clean :]
        weight = float(rows.weights[rows.clean :][masks].sum())
        flops = self.meter.flops(rows) if self.meter else 0.0
        counts = [ar, int(masks.sum()), rows.clean, rows.count, weight, flops]
        return torch.tensor(counts, dtype=torch.float64)

    def _summed(self, parts: Sequence[Tensor]) -> list[float]:
        total = torch.stack(list(parts)).sum(0)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def _agree_to_stop(self) -> None:
        """All ranks stop, and reach the budget of minutes, at the same step."""
        if self.world > 1:
            told = torch.tensor([float(self.stopping), self.progress.elapsed_s], device=self.device)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
            self.stopping, self.progress.elapsed_s = bool(told[0]), float(told[1])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(number: int, frame: Any) -> None:
            if self.stopping:  # asked twice: now
                raise KeyboardInterrupt
            self.stopping = True

        try:
            old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: the caller handles signals
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def ranked() -> bool:
    """True in a process group of torch.distributed (torchrun)."""
    return dist.is_available() and dist.is_initialized()


def shard(network: TrainingNetwork) -> TrainingNetwork:
    """FSDP2 over all ranks: every layer its own unit, embeddings and norm the root's."""
    from torch.distributed.fsdp import fully_shard

    for layer in network.layers:
        fully_shard(layer)
    fully_shard(network)
    return network


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
