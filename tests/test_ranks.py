"""Two gloo ranks under torchrun with FSDP2 train what one rank trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("train_ranks.py")


def train(folder: Path, ranks: int) -> dict:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc-per-node={ranks}", str(SCRIPT), str(folder)]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    one, two = (train(tmp_path / str(ranks), ranks) for ranks in (1, 2))
    assert (one["world"], two["world"]) == (1, 2)
    for first, second in zip(one["logs"], two["logs"], strict=True):
        for name in ("ar_loss", "diffusion_loss", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=2e-4), name
        assert (first["tokens"], first["rows"]) == (second["tokens"], second["rows"])
    for name, value in one["weights"].items():
        assert two["weights"][name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    assert two["resumed_at"] == 4
