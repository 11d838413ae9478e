"""FLOPs of training steps against torch's own counter, visible pairs, and estimates by hand."""

from __future__ import annotations

from pathlib import Path

import oracles
import pytest
import tiny
from test_training import MASK, example, rows_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import cli
from bench.peaks import find_peak
from bench.recipes import get_recipe
from bench.training_cost import (
    LAUNCH,
    PAPER_RUNS,
    Learning,
    counter,
    estimate,
    flops_per_token,
    gpu_hours,
    peak_for,
    training_flops,
    work_of,
)
from tidar_ref.errors import UserError
from tidar_ref.shapes import shape
from tidar_ref.training.adapters import AdapterConfig
from tidar_ref.training.network import TrainingNetwork, objective_loss
from tidar_ref.training.rows import Objective, Rows, visible

OBJECTIVES = {
    "tidar": Objective(block_lens=(3, 4), grids=2),
    "ar": Objective(kind="ar"),
    "block_diffusion": Objective(kind="block_diffusion", block_lens=(4,)),
    "no AR loss": Objective(block_lens=(3,), alpha=0.0),
}


def documents(objective: Objective) -> Rows:
    return rows_of([example(2, 9, 1), example(0, 7, 2), example(4, 5, 3)], objective)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pairs_are_those_the_mask_allows(name: str) -> None:
    rows = documents(OBJECTIVES[name])
    allowed, work = visible(rows), work_of(rows)
    assert work.clean_pairs == int(allowed[: rows.clean].sum())
    assert work.mask_pairs == int(allowed[rows.clean :].sum())
    assert work.clean + work.masks == rows.count


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("how", ["all", "products", "everywhere", "gated"])
def test_products_equal_torchs_count(name: str, how: str) -> None:
    """All matrix products but attention's, whose rectangles on a CPU hold masked pairs too."""
    objective = OBJECTIVES[name]
    if how == "gated" and name in ("ar", "block_diffusion"):
        pytest.skip("a gated adapter trains drafts of causal rows")
    config = oracles.tiny_config("qwen3", vocab=16)
    settings = {"everywhere": "all", "gated": "mask"}.get(how)
    adapters = AdapterConfig(rank=3, placement=settings) if settings else None
    network = TrainingNetwork(
        tiny.model_of(config, oracles.random_state(config, 3)),
        mask_token_id=MASK,
        adapters=adapters,
        products_only=how == "products",
    )
    rows = documents(objective)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as torchs:
        losses = network(rows, objective)
        objective_loss(losses, objective, ar_rows=1, diffusion_weight=1.0).backward()
    counted = torchs.get_flop_counts()["Global"]
    products = sum(v for op, v in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = sum(v for op, v in counted.items() if str(op) == "aten.bmm")
    assert sum(counted.values()) == products + attention

    learning = Learning(rank=3 if settings else None, gated=how == "gated", tables=how == "all")
    work = work_of(rows, ar_loss=how != "gated" and objective.alpha > 0)
    ours = training_flops(config, work, learning)
    clean = work.clean_pairs * (1 if how == "gated" else 3)
    pairs = 4 * config.num_layers * config.num_heads * config.head_dim
    ours_attention = pairs * (clean + 3 * work.mask_pairs)
    assert ours - ours_attention == products
    assert ours_attention <= attention


def test_a_recipe_counts_what_it_trains() -> None:
    config = shape("tiny").config
    rows = documents(OBJECTIVES["tidar"])
    count = {
        name: counter(get_recipe(name), config)
        for name in ("smollm2-tidar", "smollm2-tidar-full", "smollm2-tidar-gated")
    }
    assert count["smollm2-tidar"](rows) == training_flops(config, work_of(rows), Learning(rank=32))
    assert count["smollm2-tidar-full"](rows) == training_flops(config, work_of(rows), Learning())
    assert count["smollm2-tidar-gated"](rows) == training_flops(
        config, work_of(rows, ar_loss=False), Learning(rank=64, gated=True)
    )
    assert counter(get_recipe("smollm2-eagle3"), config) is None


def test_a_peak_needs_16_bit_products_and_a_known_gpu() -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    assert peak_for(get_recipe("h100-smollm2-k8"), h100) == find_peak(h100)
    assert peak_for(get_recipe("h100-qwen0.5b-k8"), h100) == find_peak(h100)
    assert peak_for(get_recipe("smollm2-tidar"), h100) is None  # float32
    assert peak_for(get_recipe("h100-smollm2-k8"), None) is None


def test_flops_per_token_are_those_of_real_rows() -> None:
    config = shape("tiny-qwen3").config
    rows = rows_of([example(0, 24)], Objective(block_lens=(4,), random_offset=False))
    exact = training_flops(config, work_of(rows), Learning(tables=True)) / 24
    assert flops_per_token(config, length=24, block_len=4) == exact


def test_hours_by_hand() -> None:
    """1.5B: 1.31e9 weights in layers, twice 6 FLOPs a token each, plus attention and logits."""
    small, large = PAPER_RUNS
    assert (small.tokens, large.tokens) == (50e9, 150e9)
    h100 = find_peak("h100")
    assert h100 is not None
    config = shape(small.shape).config
    layers = 12 * (config.parameter_count - config.vocab_size * config.hidden_size)
    logits = 12 * config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * 4096
    each = flops_per_token(config, length=4096, block_len=16)
    assert each == pytest.approx(layers + logits + attention, rel=0.01)
    hours = gpu_hours(small, h100, 0.4)
    assert hours == pytest.approx(each * 50e9 / (0.4 * 989e12) / 3600)
    assert 600 < hours < 900 and 9e3 < gpu_hours(large, h100, 0.4) < 12e3
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match="is no share"):
            gpu_hours(small, h100, share)


def test_the_verb_prints_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--estimate"]) == 0
    text = capsys.readouterr().out
    assert "Estimate" in text and "Not measured" in text and "MFU 40%" in text
    assert cli.main(["train", "--estimate", "0.2"]) == 0
    halved = capsys.readouterr().out
    hours = [int(t.splitlines()[-1].split("|")[5].replace(",", "")) for t in (text, halved)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=1e-3)
    for words in (["--estimate", "7"], ["--estimate", "--recipe", "smollm2-tidar"], []):
        assert cli.main(["train", *words]) == 2


def test_no_torch() -> None:
    import test_house

    _, foreign = test_house.reached("bench.training_cost")
    assert not foreign & test_house.HEAVY


def test_the_docs_show_this_estimate() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text()
    table = [line for line in estimate(mfu=0.4, gpu="h100").splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(PAPER_RUNS) and "\n".join(table) in page
    for gpu, gpus, words in (("abacus", 8, "'abacus'"), ("h100", 0, "0 GPUs")):
        with pytest.raises(UserError, match=words):
            estimate(mfu=0.4, gpu=gpu, gpus=gpus)


def test_the_documents_launch_is_the_reports() -> None:
    assert LAUNCH in (Path(__file__).parents[1] / "docs" / "training.md").read_text()
