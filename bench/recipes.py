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
    """Part of a mixture: a builder of bench.corpora and how many examples (None: all it has).

    seed: of the order they are taken in; another seed gives mostly other examples.
    """

    name: str
    count: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    weights: what `tidar_ref.checkpoint.load` takes. objective, adapter (None: all parameters) and
    train are the keyword arguments of the classes of tidar_ref.training. Documents of more than
    max_tokens are left out (counted in the card), plain text is cut. distil: names of the sources
    whose answers, of up to answer_tokens, the weights write themselves (greedy).
    learn, stored_rank: of a full fine-tune (adapter None): "products" trains what a low-rank
    difference can hold (the matrices of every layer, the mask token's row), "all" every parameter;
    the difference to the base is kept at this rank. compiled: torch.compile on all but attention.
    head: a draft head is trained beside the frozen weights instead of an adapter: draft_vocab and
    the keyword arguments of tidar_ref.training.eagle.EagleConfig.
    """

    name: str
    purpose: str
    weights: str
    objective: dict[str, Any]
    train: dict[str, Any]
    mixture: tuple[Source, ...]
    adapter: dict[str, Any] | None = field(default_factory=lambda: dict(rank=32, alpha=32.0))
    max_tokens: int = 4096
    distil: tuple[str, ...] = ()
    answer_tokens: int = 64
    dtype: str = "float32"
    device: str = "auto"
    head: dict[str, Any] | None = None
    learn: str = "products"
    stored_rank: int = 64
    compiled: bool = False


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
SMOLLM2_TIDAR_MORE = dataclasses.replace(
    SMOLLM2_TIDAR,
    name="smollm2-tidar-more",
    purpose="smollm2-tidar trained on, mostly on templates: a second adapter on top of the first",
    weights="embedded+smollm2-tidar",
    train={**{k: v for k, v in SMOLLM2_TRAIN.items() if k != "steps"}, "minutes": 45, "lr": 1e-3},
    mixture=(Source(name="gsm8k-chains", count=1_800), Source(name="templates", count=5_000)),
)
SMOLLM2_TIDAR_OWN = dataclasses.replace(
    SMOLLM2_TIDAR_MORE,
    name="smollm2-tidar-own",
    purpose="trained on with its own GSM8K chains, the very text it drafts, and new templates",
    weights="embedded+smollm2-tidar+smollm2-tidar-more",
    train={**SMOLLM2_TIDAR_MORE.train, "minutes": 75},
    mixture=(Source(name="gsm8k-chains", count=1_500), Source(name="templates", count=2_500)),
    distil=("gsm8k-chains",),
    max_tokens=112,
)
SMOLLM2_TIDAR_SUMS = dataclasses.replace(
    SMOLLM2_TIDAR_MORE,
    name="smollm2-tidar-sums",
    purpose="the AR half trained on, on new templates: what the next adapter's drafts then follow",
    weights="embedded+smollm2-tidar+smollm2-tidar-more+smollm2-tidar-own",
    objective=dict(kind="ar"),
    train={**SMOLLM2_TIDAR_MORE.train, "minutes": 30},
    mixture=(Source(name="templates", count=12_000, seed=1),),
)
SMOLLM2_TIDAR_LAST = dataclasses.replace(
    SMOLLM2_TIDAR_OWN,
    name="smollm2-tidar-last",
    purpose="the joint model once more, on other chains of its own and the new templates",
    weights="embedded+smollm2-tidar+smollm2-tidar-more+smollm2-tidar-own+smollm2-tidar-sums",
    mixture=(
        Source(name="gsm8k-chains", count=1_500, seed=1),
        Source(name="templates", count=1_500, seed=2),
    ),
)
SMOLLM2_TIDAR_ARRIVAL = dataclasses.replace(
    SMOLLM2_TIDAR_LAST,
    name="smollm2-tidar-arrival",
    purpose="the joint model once more, on answers of its own; drafts count if they are looked at",
    weights="embedded+smollm2-tidar-last",
    objective={**SMOLLM2_TIDAR.objective, "weighting": "arrival"},
    mixture=(
        Source(name="gsm8k-chains", count=3_000, seed=2),
        Source(name="templates", count=600, seed=3),
    ),
    distil=("gsm8k-chains", "templates"),
    max_tokens=160,
)
SMOLLM2_TIDAR_FRESH = dataclasses.replace(
    SMOLLM2_TIDAR_ARRIVAL,
    name="smollm2-tidar-fresh",
    purpose="the same on fresh chains of its own; templates with their true answers again",
    weights="embedded+smollm2-tidar-arrival",
    train={**SMOLLM2_TIDAR_MORE.train, "minutes": 30},
    mixture=(
        Source(name="gsm8k-chains", count=2_000, seed=3),
        Source(name="templates", count=500, seed=4),
    ),
    distil=("gsm8k-chains",),
)
SMOLLM2_TIDAR_ALIGNED = dataclasses.replace(
    SMOLLM2_TIDAR,
    name="smollm2-tidar-aligned",
    purpose="ablation: the paper's aligned block grid instead of a random offset",
    objective=dict(kind="tidar", block_lens=(4, 8), grids=2, random_offset=False),
)
SMOLLM2_FULL = dataclasses.replace(
    SMOLLM2_TIDAR,
    name="smollm2-tidar-full",
    purpose="the joint model by full fine-tuning of all matrices, kept as a low-rank difference",
    adapter=None,
    train={**SMOLLM2_TRAIN, "lr": 2e-4},
)
SMOLLM2_GATED = dataclasses.replace(
    SMOLLM2_AR,
    name="smollm2-tidar-gated",
    purpose="drafting alone, on mask rows only: the AR half is smollm2-ar, bit for bit",
    weights="embedded+smollm2-ar",
    objective=dict(kind="tidar", block_lens=(4, 8), grids=3),
    adapter=dict(rank=64, alpha=64.0, placement="mask"),
    train={**SMOLLM2_TRAIN, "steps": 100},
    mixture=(Source(name="gsm8k-chains", count=540), Source(name="templates", count=260)),
    distil=("gsm8k-chains", "templates"),
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
SMOLLM2_EAGLE3 = dataclasses.replace(
    SMOLLM2_TIDAR,
    name="smollm2-eagle3",
    purpose="an EAGLE-3 draft head for smollm2-tidar's AR half: the same documents and steps",
    weights="embedded+smollm2-tidar",
    objective=dict(kind="eagle3"),
    adapter=None,
    head=dict(draft_vocab=8192),
    train={**SMOLLM2_TRAIN, "lr": 1e-3, "clip": 0.5},
)

# On one H100: the embedded tier again on many more tokens. Five runs fit 25 minutes at 4.5 each.
H100_TRAIN = dict(
    minutes=4.5,
    batch=256,
    micro_batch=128,
    lr=2e-3,
    min_lr_ratio=0.05,
    warmup=0.05,
    weight_decay=0.0,
    autocast=True,
)
H100_MIX = (
    Source(name="gsm8k-chains"),
    Source(name="templates", count=120_000),
    Source(name="python", count=8_000),
)


def _h100(name: str, purpose: str, **objective: Any) -> Recipe:
    return dataclasses.replace(
        SMOLLM2_AR,
        name=f"h100-smollm2-{name}",
        purpose=purpose,
        objective=objective,
        train=H100_TRAIN,
        mixture=H100_MIX,
        max_tokens=256,
        device="cuda",
    )


H100_EMBEDDED = (
    _h100("ar", "the quality reference of the h100-smollm2 runs", kind="ar"),
    *(
        _h100(f"k{k}", f"the joint model, K = {k}", kind="tidar", block_lens=(k,), grids=2)
        for k in (4, 8, 16)
    ),
    _h100("block-diffusion", "the baseline, K = 8", kind="block_diffusion", block_lens=(8,)),
    _h100(
        "random-mask", "ablation, K = 8", kind="tidar", block_lens=(8,), grids=2, masking="random"
    ),
    *(
        _h100(f"alpha{a}", f"ablation, K = 16, alpha {a}", kind="tidar", block_lens=(16,), alpha=a)
        for a in (0.8, 1.2)
    ),
)
# On one H100, small tier: drafts for the base's own answers on mask rows (its scores stay), and
# the joint model beside its AR reference.
SMALL_MIX = (
    Source(name="gsm8k-chains"),
    Source(name="templates", count=4_000),
    Source(name="mbpp-clean"),
    Source(name="gpteacher"),
)
H100_SMALL_GATED = Recipe(
    name="h100-qwen0.5b-gated",
    purpose="drafts of Qwen2.5-Coder-0.5B-Instruct's own answers, K = 8 and 16, mask rows only",
    weights="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    objective=dict(kind="tidar", block_lens=(8, 16), grids=2),
    adapter=dict(rank=16, alpha=16.0, placement="mask"),
    train={**H100_TRAIN, "minutes": 15, "batch": 64, "micro_batch": 32},
    mixture=SMALL_MIX,
    max_tokens=512,
    distil=tuple(source.name for source in SMALL_MIX),
    answer_tokens=256,
    dtype="bfloat16",
    device="cuda",
)
H100_SMALL = tuple(
    dataclasses.replace(
        H100_SMALL_GATED,
        name=f"h100-qwen0.5b-{name}",
        purpose=purpose,
        objective=objective,
        adapter=dict(rank=16, alpha=16.0, placement="all"),
        train={**H100_SMALL_GATED.train, "minutes": 6, "lr": 5e-4},
    )
    for name, purpose, objective in (
        ("ar", "the quality reference of h100-qwen0.5b-k8", dict(kind="ar")),
        ("k8", "the joint model, K = 8", dict(kind="tidar", block_lens=(8,), grids=2)),
        ("k16", "the joint model, K = 16", dict(kind="tidar", block_lens=(16,), grids=2)),
    )
)

# The head's own H100 runs: for the drafts to beat, target and documents as the joint models'.
H100_HEADS = tuple(
    dataclasses.replace(
        of,
        name=name,
        purpose=purpose,
        objective=dict(kind="eagle3"),
        adapter=None,
        head=dict(draft_vocab=32_000),
        distil=distil,
        train={**of.train, "lr": 5e-4, "clip": 0.5},
    )
    for name, of, distil, purpose in (
        ("h100-smollm2-eagle3", H100_EMBEDDED[0], (), "an EAGLE-3 head for the embedded tier"),
        (
            "h100-qwen0.5b-eagle3",
            H100_SMALL_GATED,
            H100_SMALL_GATED.distil,
            "an EAGLE-3 head for Qwen2.5-Coder-0.5B-Instruct's own answers",
        ),
    )
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        SMOLLM2_AR,
        SMOLLM2_TIDAR,
        SMOLLM2_FULL,
        SMOLLM2_TIDAR_MORE,
        SMOLLM2_TIDAR_OWN,
        SMOLLM2_TIDAR_SUMS,
        SMOLLM2_TIDAR_LAST,
        SMOLLM2_TIDAR_ARRIVAL,
        SMOLLM2_TIDAR_FRESH,
        SMOLLM2_TIDAR_ALIGNED,
        SMOLLM2_GATED,
        SMOLLM2_BLOCK,
        SMOLLM2_RANDOM_MASK,
        SMOLLM2_EAGLE3,
        *H100_EMBEDDED,
        H100_SMALL_GATED,
        *H100_SMALL,
        *H100_HEADS,
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; UserError lists the known ones."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
