"""pytest-benchmark: one step of every decoder, and building its masks. Never part of `make test`.

TIDAR_BENCH_PERF_WEIGHTS names other weights than random:tiny, TIDAR_BENCH_PERF_DEVICE a device.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch

from bench.profiles import DecoderSpec, parse_decoders
from bench.registry import build_decoder, decoder_names
from bench.regress import VARIANTS
from tidar_ref import masks
from tidar_ref.checkpoint import LoadedModel, load
from tidar_ref.decoding import StepTrace
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

pytestmark = pytest.mark.perf

WEIGHTS = os.environ.get("TIDAR_BENCH_PERF_WEIGHTS", "random:tiny")
DEVICE = os.environ.get("TIDAR_BENCH_PERF_DEVICE", "cpu")
SPECS = {spec.label: spec for spec in parse_decoders([*decoder_names(), *VARIANTS])}
PROMPT = [1 + index % 7 for index in range(64)]
ROUNDS, WARMUP = 30, 3


@cache
def loaded() -> LoadedModel:
    return load(WEIGHTS, device=DEVICE)


@pytest.mark.parametrize("label", SPECS)
def test_step(benchmark: Any, label: str) -> None:
    """A step on a fresh state behind a 64-token prompt, so that every round does the same work."""
    decoder = _build(SPECS[label])
    benchmark.group = f"one step, {WEIGHTS}, {DEVICE}"

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        state, _ = decoder.prefill([PROMPT], max_new_tokens=32, sampling=Sampling())
        _synchronise()
        return (state,), {}

    def step(state: Any) -> StepTrace:
        trace = decoder.step(state)
        _synchronise()
        return trace

    with torch.inference_mode():
        trace = benchmark.pedantic(step, setup=fresh, rounds=ROUNDS, warmup_rounds=WARMUP)
    benchmark.extra_info.update(
        query_width=trace.query_width, forwards=trace.target_forwards + trace.draft_forwards
    )
    read = trace.kv_len[0] + trace.query_width  # a whole canvas is read without a cache
    assert trace.target_forwards >= 1 and read >= len(PROMPT)


def _build(spec: DecoderSpec) -> Any:
    try:
        return build_decoder(spec, loaded().model, mask_token_id=loaded().source.mask_token_id)
    except UserError as error:
        pytest.skip(str(error))


def _synchronise() -> None:
    if DEVICE.startswith("cuda"):
        torch.cuda.synchronize()


@pytest.mark.parametrize("block_len", [4, 8, 16])
def test_decode_mask(benchmark: Any, block_len: int) -> None:
    """The pattern of one dense decode forward and its positions."""
    benchmark.group = "masks"
    mask, positions = benchmark(
        lambda: (masks.decode_mask(block_len), masks.decode_positions(block_len))
    )
    assert len(mask) == len(positions) == block_len * (block_len + 1)


@pytest.mark.parametrize("prompt_len", [64, 1024])
def test_prefill_mask(benchmark: Any, prompt_len: int) -> None:
    """The pattern of the fused prefill, K = 8."""
    benchmark.group = "masks"
    assert len(benchmark(masks.prefill_mask, prompt_len, 8)) == prompt_len + 8
