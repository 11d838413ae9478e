"""Costs in closed form against torch's own counter, parameter bytes and numbers done by hand."""

from __future__ import annotations

import oracles
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import peaks, roofline
from bench.records import StepRecord
from tidar_ref.cache import KVCache
from tidar_ref.config import ModelConfig
from tidar_ref.masks import causal_mask
from tidar_ref.model import Transformer
from tidar_ref.shapes import SHAPES, shape

FAMILIES = ("llama", "qwen2", "qwen3")


def config_of(family: str) -> ModelConfig:
    return oracles.tiny_config(family, vocab=16)


def counted_flops(config: ModelConfig, batch: int, width: int, kv_len: int, rows: int) -> int:
    """What torch counts in one real forward of the backbone and its head."""
    model = Transformer(config).init_random(0).eval()
    cache = KVCache(
        config, batch=batch, max_len=kv_len, scratch=width, dtype=model.dtype, device="cpu"
    )
    cache.advance([kv_len] * batch)
    ids = torch.zeros(batch, width, dtype=torch.int64)
    positions = kv_len + torch.arange(width).expand(batch, width)
    # The plain attention: torch's counter does not know the CPU's fused one.
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        hidden = model(ids, positions, cache, causal_mask(width))
        model.lm_head(hidden[:, :rows])
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "width", "kv_len", "rows"), [(1, 1, 7, 1), (3, 6, 5, 2)])
def test_flops_equal_torchs_count(
    family: str, batch: int, width: int, kv_len: int, rows: int
) -> None:
    config = config_of(family)
    cost = roofline.forward_cost(
        config, width=width, kv_len=kv_len, batch=batch, head_rows=rows, dtype="float32"
    )
    assert cost.flops == counted_flops(config, batch, width, kv_len, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_bytes_equal_the_parameters(family: str) -> None:
    config = config_of(family)
    model = Transformer(config, dtype=torch.bfloat16)
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tied_embeddings:
        read -= model.embed.weight.numel() * 2
    assert roofline.weight_bytes(config, "bfloat16") == read
    cost = roofline.forward_cost(config, width=1, kv_len=0)
    logits = 2 * config.vocab_size
    assert cost.layer_bytes + cost.head_bytes == read + logits
    cache = KVCache(config, batch=1, max_len=9, scratch=0, dtype=model.dtype, device="cpu")
    assert 9 * roofline.kv_bytes_per_token(config, "bfloat16") == sum(
        t.numel() * t.element_size() for t in (cache.k, cache.v)
    )


def test_no_head_rows_read_no_head() -> None:
    config = config_of("llama")
    cost = roofline.forward_cost(config, width=4, kv_len=3, head_rows=0)
    assert cost.head_flops == cost.head_bytes == 0
    assert cost.layer_flops == 2 * 4 * roofline.layer_parameters(config)


def test_published_sizes() -> None:
    """The reference's hand numbers: 0.147 MB of KV a token, 15.1 GB read, 221 tokens/s at 8B."""
    config = shape("qwen3-8b").config
    assert roofline.kv_bytes_per_token(config, "bfloat16") == 147_456
    assert roofline.weight_bytes(config, "bfloat16") / 1e9 == pytest.approx(15.14, abs=0.02)
    h100 = peaks.find_peak("NVIDIA H100 80GB HBM3")
    assert h100 is not None and h100.name == "H100 SXM"
    rate = roofline.memory_floor_tokens_per_s(config, kv_len=0, bytes_per_s=h100.bytes_per_s)
    assert rate == pytest.approx(221, abs=1)
    assert roofline.ridge_width(h100) == pytest.approx(295, abs=1)


def test_utilisation_by_hand() -> None:
    cost = roofline.ForwardCost(
        layer_flops=60, attention_flops=30, head_flops=10,
        layer_bytes=20, head_bytes=10, kv_bytes=8, token_bytes=2,
    )  # fmt: skip
    assert (cost.flops, cost.bytes, cost.intensity) == (100, 40, 2.5)
    assert roofline.mbu(cost, seconds=2.0, bytes_per_s=80.0) == 0.25
    assert roofline.mfu(cost, seconds=2.0, flops_per_s=500.0) == 0.1
    assert roofline.floor_s(cost, bytes_per_s=80.0, flops_per_s=500.0) == 0.5
    assert roofline.floor_s(cost, bytes_per_s=80.0, flops_per_s=100.0) == 1.0


def step(committed: int, width: int, kv_len: int, drafted: int, forwards: int = 1) -> StepRecord:
    return StepRecord(
        decoder="d", task="t", problem="1", repeat=0, index=1, committed=(5,) * committed,
        target_forwards=forwards, draft_forwards=0, query_width=width, kv_len=kv_len,
        drafted=drafted, accepted=0, step_s=None, forward_s=None,
    )  # fmt: skip


def test_work_per_token_counts_rejected_work() -> None:
    config = config_of("qwen3")
    steps = [step(3, 20, 10, 3), step(1, 20, 13, 3)]
    work = roofline.work_per_token(steps, config)
    assert work is not None and work.committed == 4
    assert work.tokens_processed == 10.0  # 40 tokens went through for 4
    costs = [roofline.forward_cost(config, width=20, kv_len=n, head_rows=7).flops for n in (10, 13)]
    assert work.flops == sum(costs) / 4
    twice = roofline.work_per_token([step(2, 4, 10, 3, forwards=2)], config)
    assert twice is not None and twice.tokens_processed == 4.0
    assert roofline.work_per_token([], config) is None
    ar = roofline.work_per_token([step(1, 1, 10, 0)], config)
    assert ar is not None
    assert ar.flops == roofline.forward_cost(config, width=1, kv_len=10).flops


@pytest.mark.parametrize(
    ("driver", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GB200", "GB200"),
        ("AMD EPYC", None),
        (None, None),
    ],
)
def test_device_names(driver: str | None, entry: str | None) -> None:
    found = peaks.find_peak(driver)
    assert (found.name if found else None) == entry


def test_every_shape_can_be_counted() -> None:
    for name in SHAPES:
        cost = roofline.forward_cost(shape(name).config, width=272, kv_len=1024)
        assert cost.flops > 0 and cost.bytes > 0
