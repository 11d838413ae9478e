"""Training recipes by name: which weights, which objective, which documents, how long.

Plain data, no torch at import. The embedded recipes are the recipe of the paper (section 2) at the
size of two CPU cores; they differ from each other in the objective or the adapter's placement only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tidar_ref.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Part of a mixture: a builder of bench.corpora and how many examples (None: all it has)."""

    name: str
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    weights: what `tidar_ref.checkpoint.load` takes. objective, adapter (None: all parameters) and
    train are the keyword arguments of the classes of tidar_ref.training. Documents of more than
    max_tokens are left out (counted in the card). distil: answers are written by the weights
    themselves (greedy) instead of taken from the sources.
    """

    name: str
    purpose: str
    weights: str
    objective: dict[str, Any]
    train: dict[str, Any]
    mixture: tuple[Source, ...]
    adapter: dict[str, Any] | None = field(default_factory=lambda: dict(rank=32, alpha=32.0))
    max_tokens: int = 4096
    distil: bool = False
    dtype: str = "float32"
    device: str = "auto"


CHAINS = (Source(name="gsm8k-chains", count=1_800), Source(name="templates", count=900))
SMOLLM2_TRAIN = dict(
    steps=300, batch=8, micro_batch=8, lr=2e-3, min_lr_ratio=0.05, warmup=0.05, weight_decay=0.0
)

SMOLLM2_AR = Recipe(
    name="smollm2-ar",
    purpose="the quality reference: the same documents and steps, next-token loss only",
    weights="embedded",
    objective=dict(kind="ar"),
    train=SMOLLM2_TRAIN,
    mixture=CHAINS,
    max_tokens=104,
    device="cpu",
)
SMOLLM2_TIDAR = dataclasses.replace(
    SMOLLM2_AR,
    name="smollm2-tidar",
    purpose="the paper's joint model on toy data; one adapter for K = 4 and K = 8",
    objective=dict(kind="tidar", block_lens=(4, 8), grids=2),
)
SMOLLM2_GATED = dataclasses.replace(
    SMOLLM2_AR,
    name="smollm2-tidar-gated",
    purpose="drafting alone, on mask rows only: the AR half is smollm2-ar, bit for bit",
    weights="embedded+smollm2-ar",
    objective=dict(kind="tidar", block_lens=(4, 8), grids=3),
    adapter=dict(rank=64, alpha=64.0, placement="mask"),
    distil=True,
)
SMOLLM2_BLOCK = dataclasses.replace(
    SMOLLM2_AR,
    name="smollm2-block-diffusion",
    purpose="the block-diffusion baseline of the same documents and steps, K = 4",
    objective=dict(kind="block_diffusion", block_lens=(4,), grids=1),
)
SMOLLM2_RANDOM_MASK = dataclasses.replace(
    SMOLLM2_TIDAR,
    name="smollm2-tidar-random-mask",
    purpose="ablation (Table 5): random masking ratios instead of all masks",
    objective=dict(kind="tidar", block_lens=(4, 8), grids=2, masking="random"),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        SMOLLM2_AR,
        SMOLLM2_TIDAR,
        SMOLLM2_GATED,
        SMOLLM2_BLOCK,
        SMOLLM2_RANDOM_MASK,
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; UserError lists the known ones."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
