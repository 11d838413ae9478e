"""FLOPs of training in closed form, and GPU hours of the paper's own runs from them. No torch.

A multiply-add is two. Counted is what a step needs: every row through every layer, the pairs of
query and key the mask allows, logits of the rows that have a label. A backward pass costs as much
again for the gradient of a product's input, and once more for that of its weight where it learns.
What is computed twice to save memory, or masked away, is not counted, so MFU is model utilisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.peaks import Peak, find_peak
from bench.recipes import Recipe
from bench.roofline import layer_parameters
from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError
from tidar_ref.shapes import shape

if TYPE_CHECKING:
    from tidar_ref.training.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Work:
    """Counts of one packed forward: rows, visible pairs by kind of query, and rows with a label."""

    clean: int
    masks: int
    clean_pairs: int
    mask_pairs: int
    clean_targets: int
    mask_targets: int


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What learns. rank: of adapters, None in a full fine-tune; gated: on mask rows only.

    tables: embedding and output table learn too (in a full fine-tune that does not freeze them).
    """

    rank: int | None = None
    gated: bool = False
    tables: bool = False


def work_of(rows: Rows, *, ar_loss: bool = True) -> Work:
    """Counts of packed rows; ar_loss False: the clean rows' logits are not computed."""
    n = rows.clean
    wanted = rows.labels >= 0
    blocks = rows.block[n:].unique(return_counts=True)[1]
    return Work(
        clean=n,
        masks=rows.count - n,
        clean_pairs=int(rows.clean_before[:n].sum()),
        mask_pairs=int(rows.clean_before[n:].sum() + (blocks**2).sum()),
        clean_targets=int(wanted[:n].sum()) if ar_loss else 0,
        mask_targets=int(wanted[n:].sum()),
    )


def training_flops(config: ModelConfig, work: Work, learning: Learning) -> int:
    """Forward and backward of one packed forward (count)."""
    layer = 2 * layer_parameters(config)
    pair = 4 * config.num_layers * config.num_heads * config.head_dim  # q.k and p.v
    head = 2 * config.vocab_size * config.hidden_size
    products = 3 if learning.rank is None else 2
    adapter = 3 * 2 * (learning.rank or 0) * _widths(config)
    # Clean rows of a gated adapter run forward only.
    clean = (1, 1, 0) if learning.gated else (products, 3, adapter)
    return (
        work.clean * (clean[0] * layer + clean[2])
        + work.masks * (products * layer + adapter)
        + (clean[1] * work.clean_pairs + 3 * work.mask_pairs) * pair
        + (work.clean_targets + work.mask_targets) * (3 if learning.tables else 2) * head
    )


def _widths(config: ModelConfig) -> int:
    """Inputs plus outputs of the four fused products, over all layers: adapter weights per rank."""
    h, d, inner = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv = config.num_heads * d, config.num_kv_heads * d
    return config.num_layers * ((h + q + 2 * kv) + (q + h) + (h + 2 * inner) + (inner + h))


def counter(recipe: Recipe, config: ModelConfig) -> Callable[[Rows], float] | None:
    """What counts a recipe's FLOPs of packed rows; None: a draft head's are not counted."""
    if recipe.head is not None:
        return None
    settings = recipe.adapter or {}
    gated = settings.get("placement") == "mask"
    learning = Learning(
        rank=settings["rank"] if settings else None,
        gated=gated,
        tables=not settings and recipe.learn == "all",
    )
    ar_loss = not gated and recipe.objective.get("alpha", 1.0) > 0
    return lambda rows: training_flops(config, work_of(rows, ar_loss=ar_loss), learning)


def peak_for(recipe: Recipe, gpu: str | None) -> Peak | None:
    """The 16-bit peak of a GPU (its name) where the recipe's products run in 16 bits, else None."""
    halves = recipe.dtype == "bfloat16" or recipe.train.get("autocast", False)
    return find_peak(gpu) if halves else None


# --- the paper's runs --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """A training run of the paper (section 4): clean tokens, block length, longest sequence."""

    name: str
    shape: str
    tokens: float
    block_len: int
    length: int = 4096


# How the first of them would start on a node of 8 GPUs; nothing of this size has been run here.
LAUNCH = """\
torchrun --nproc-per-node 8 -m bench train --recipe smollm2-tidar-full \\
    --weights Qwen/Qwen2.5-1.5B --block-lens 16 --tokens 50000000000 --lr 1e-5 --device cuda"""
PAPER_RUNS = (
    # The three block lengths differ by a few thousandths of the attention.
    PaperRun(name="1.5B, each of K = 4, 8, 16", shape="qwen2.5-1.5b", tokens=50e9, block_len=16),
    PaperRun(name="8B, K = 16", shape="qwen3-8b", tokens=150e9, block_len=16),
)


def flops_per_token(config: ModelConfig, *, length: int, block_len: int) -> float:
    """FLOPs per clean token of the paper's recipe: a full fine-tune on plain text of `length`
    tokens, every token once clean and once masked, both losses (sections 2.1 to 2.4)."""
    blocks = -(-length // block_len)
    work = Work(
        clean=length,
        masks=blocks * block_len,
        clean_pairs=length * (length + 1) // 2,
        mask_pairs=blocks * (blocks - 1) // 2 * block_len**2 + blocks * block_len**2,
        clean_targets=length - 1,
        mask_targets=length,
    )
    return training_flops(config, work, Learning(tables=True)) / length


def gpu_hours(run: PaperRun, peak: Peak, mfu: float) -> float:
    """Hours of one GPU at this share of its peak; UserError for a share outside (0, 1]."""
    if not 0 < mfu <= 1:
        raise UserError(f"MFU {mfu} is no share: give more than 0 and at most 1")
    config = shape(run.shape).config
    each = flops_per_token(config, length=run.length, block_len=run.block_len)
    return each * run.tokens / (mfu * peak.flops_per_s) / 3600


def estimate(*, mfu: float, gpu: str, gpus: int = 8) -> str:
    """Markdown: GPU hours of the paper's runs. An estimate, and every assumption is in it."""
    peak = find_peak(gpu)
    if peak is None:
        raise UserError(f"no peak is known for GPU {gpu!r}: name one of bench/peaks.py, like h100")
    if gpus < 1:
        raise UserError(f"{gpus} GPUs train nothing: give at least 1")
    rows = []
    for run in PAPER_RUNS:
        hours = gpu_hours(run, peak, mfu)
        each = flops_per_token(shape(run.shape).config, length=run.length, block_len=run.block_len)
        rows.append(
            f"| {run.name} | {run.tokens / 1e9:.0f}B | {each / 1e9:.1f} |"
            f" {each * run.tokens:.2e} | {hours:,.0f} | {hours / gpus / 24:.1f} |"
        )
    return "\n".join(
        [
            "# Estimate: the paper's training runs",
            "",
            f"Not measured. Assumed: MFU {mfu:.0%} of {peak.name}'s dense bfloat16 peak"
            f" ({peak.flops_per_s / 1e12:.0f} TFLOP/s), plain text in sequences of"
            f" {PAPER_RUNS[0].length} clean tokens, every token once clean and once masked, all"
            " parameters learn, nothing computed twice.",
            "",
            f"| run | tokens | GFLOPs a token | FLOPs | GPU hours | days on {gpus} GPUs |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
