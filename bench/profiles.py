"""What a run consists of: named profiles, plain data. A new run is a `replace` of one of these.

Limits and lengths are chosen for the machine a profile is meant for; every one is written into
the record, and a table says how many outputs the length limit cut short.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tidar_ref.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder by name with its parameters, e.g. tidar with block_len=4, beta=1.0.

    The parameter `weights` is the run's, not the decoder's: it names an adapter that this decoder
    alone has on the run's backbone, for a method that is trained in its own way.
    """

    name: str
    params: tuple[tuple[str, int | float | str], ...] = ()

    @property
    def weights(self) -> str | None:
        """The adapter of its own, or None: the run's weights."""
        own = dict(self.params).get("weights")
        return None if own is None else str(own)

    @property
    def own_params(self) -> dict[str, int | float | str]:
        """What the decoder itself is built with."""
        return {key: value for key, value in self.params if key != "weights"}

    @property
    def label(self) -> str:
        """`tidar:block_len=4,beta=1`: what --decoders takes and what records and tables show."""
        text = ",".join(f"{key}={_number(value)}" for key, value in self.params)
        return f"{self.name}:{text}" if text else self.name


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task by name and how many of its first problems to run (None: all)."""

    name: str
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One experiment.

    max_new_tokens None means each problem's own limit; a number caps it (count). stopping "task"
    respects end-of-sequence and stop strings, "fixed" runs every generation to its limit (a speed
    run: texts are not scored). clock "total" times whole generations, "per_step" also splits each
    step and costs a little. A task that has no data here is replaced by `fallback[task]`.
    """

    name: str
    purpose: str
    weights: str
    decoders: tuple[DecoderSpec, ...]
    tasks: tuple[TaskSpec, ...]
    dtype: str = "float32"
    device: str = "auto"
    style: str = "base"
    max_new_tokens: int | None = None
    repeats: int = 1
    warmup_tokens: int = 16
    warmup_max_rounds: int = 5
    seed: int = 0
    clock: str = "total"
    stopping: str = "task"
    fallback: tuple[tuple[str, str], ...] = ()


def _number(value: int | float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def tidar(block_len: int, beta: float = 1.0) -> DecoderSpec:
    """TiDAR with K = block_len drafts and the weight beta of AR logits in verification."""
    return DecoderSpec(name="tidar", params=(("block_len", block_len), ("beta", beta)))


AR = DecoderSpec(name="ar")
OWN_INSTEAD = (
    ("humaneval", "own_code"),
    ("mbpp", "own_code"),
    ("mbpp_plus", "own_code"),
    ("gsm8k_cot", "own_math"),
    ("gsm8k_chain", "own_templates"),
)
# Block diffusion is trained in its own way: an adapter of its own on the same backbone.
BLOCK_WEIGHTS = (("weights", "smollm2-block-diffusion"),)
PAPER_TASKS = ("humaneval", "mbpp", "mbpp_plus", "gsm8k_cot")

SMOKE = Profile(
    name="smoke",
    purpose="the whole chain in under a minute; random weights, so no number means anything",
    weights="random:tiny",
    decoders=(AR, tidar(4)),
    tasks=(TaskSpec(name="own_code", limit=3), TaskSpec(name="own_math", limit=4)),
    max_new_tokens=32,
    device="cpu",
)
EMBEDDED = Profile(
    name="embedded",
    purpose="weights from a package, trained for TiDAR here; two CPU cores, no hub: toy quality",
    weights="embedded+smollm2-tidar",
    decoders=(
        AR,
        tidar(4),
        tidar(8),
        # Few token slots are free on a CPU: the likeliest outcome alone is the fastest there.
        DecoderSpec(name="tidar", params=(("block_len", 4), ("beta", 1), ("outcomes", 4))),
        DecoderSpec(name="tidar_two_forward", params=(("block_len", 4),)),
        DecoderSpec(name="prompt_lookup"),
        DecoderSpec(name="eagle3", params=(("head", "smollm2-eagle3"), ("depth", 3))),
        DecoderSpec(name="block_diffusion", params=(*BLOCK_WEIGHTS, ("block_len", 4))),
        DecoderSpec(
            name="masked_diffusion", params=(*BLOCK_WEIGHTS, ("block_len", 4), ("cache", "dual"))
        ),
    ),
    tasks=(
        TaskSpec(name="own_templates", limit=12),
        TaskSpec(name="gsm8k_chain", limit=8),
        TaskSpec(name="humaneval", limit=2),
        TaskSpec(name="mbpp", limit=2),
        TaskSpec(name="gsm8k_cot", limit=2),
    ),
    dtype="bfloat16",
    max_new_tokens=64,
    fallback=OWN_INSTEAD,
)
SMALL = Profile(
    name="small",
    purpose="Qwen2.5-Coder-0.5B-Instruct: a table with scores well above zero",
    weights="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    decoders=(AR, tidar(4), tidar(8), tidar(16)),
    tasks=tuple(TaskSpec(name=name) for name in PAPER_TASKS),
    dtype="bfloat16",
    fallback=OWN_INSTEAD,
)
PAPER = dataclasses.replace(
    SMALL,
    name="paper",
    purpose="the paper's own 1.5B base, all problems, K = 4, 8, 16 (needs a GPU and the hub)",
    weights="Qwen/Qwen2.5-1.5B",
    fallback=(),
)

PROFILES: dict[str, Profile] = {
    profile.name: profile for profile in (SMOKE, EMBEDDED, SMALL, PAPER)
}


def get_profile(name: str) -> Profile:
    """The profile of that name; UserError lists the known ones."""
    if name not in PROFILES:
        raise UserError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def parse_decoders(words: list[str]) -> tuple[DecoderSpec, ...]:
    """`["ar,tidar:block_len=4,beta=1", "tidar:block_len=8"]` to specs, in that order.

    A comma part that has "=" and no ":" continues the parameters before it.
    """
    found: list[tuple[str, list[tuple[str, int | float | str]]]] = []
    for part in (part.strip() for word in words for part in word.split(",")):
        if not part:
            continue
        name, colon, rest = part.partition(":")
        if not colon and "=" in part:
            if not found:
                raise UserError(f"parameter {part!r} has no decoder before it; write name:{part}")
            found[-1][1].append(_parameter(part))
        else:
            found.append((name, [_parameter(rest)] if rest else []))
    specs = tuple(DecoderSpec(name=name, params=tuple(params)) for name, params in found)
    if not specs:
        raise UserError("--decoders names no decoder; write for example --decoders ar,tidar")
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"decoder {label!r} is named twice; name it once")
    return specs


def _parameter(text: str) -> tuple[str, int | float | str]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise UserError(f"decoder parameter {text!r} is not of the form key=value")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value
