"""FLOPs and bytes of one forward in closed form, and what a measured time makes of them.

Counted from the shape alone; tests compare with torch's own counter on tiny models. The model of
traffic is the least a forward can do: every weight read once, the cached keys and values read once,
the new ones written and read once, one embedding row a token, logits written once. Activations
between operations are taken to stay on the chip. No torch, no clock.

Shapes: B sequences of `width` new tokens behind `kv_len` cached ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.peaks import Peak
from tidar_ref.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Step(Protocol):
    """What a ledger line must have here: bench.records.StepRecord does."""

    @property
    def committed(self) -> Sequence[int]: ...
    @property
    def target_forwards(self) -> int: ...
    @property
    def query_width(self) -> int: ...
    @property
    def kv_len(self) -> int: ...
    @property
    def drafted(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """FLOPs (a multiply-add is two) and bytes of one forward, by part.

    attention_flops counts every pair of query and key the kernel computes, masked ones too.
    """

    layer_flops: int
    attention_flops: int
    head_flops: int
    layer_bytes: int
    head_bytes: int
    kv_bytes: int
    token_bytes: int

    @property
    def flops(self) -> int:
        """All of them (count)."""
        return self.layer_flops + self.attention_flops + self.head_flops

    @property
    def bytes(self) -> int:
        """All that must move through memory."""
        return self.layer_bytes + self.head_bytes + self.kv_bytes + self.token_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes


def layer_parameters(config: ModelConfig) -> int:
    """Weights of the matrices of all layers (count): qkv, o, gate, up, down; no norm, no bias."""
    h, d = config.hidden_size, config.head_dim
    qkv = (config.num_heads + 2 * config.num_kv_heads) * d * h
    return config.num_layers * (qkv + config.num_heads * d * h + 3 * h * config.intermediate_size)


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """What one forward reads of the weights: all but an untied embedding table."""
    spare = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size
    return (config.parameter_count - spare) * ITEM_BYTES[dtype]


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * ITEM_BYTES[dtype]


def forward_cost(
    config: ModelConfig,
    *,
    width: int,
    kv_len: int,
    batch: int = 1,
    head_rows: int | None = None,
    dtype: str = "bfloat16",
) -> ForwardCost:
    """Cost of one forward; head_rows: logits rows a sequence (None: all `width` of them)."""
    rows = width if head_rows is None else head_rows
    item, tokens = ITEM_BYTES[dtype], batch * width
    table = config.vocab_size * config.hidden_size
    pairs = width * (kv_len + width)
    per_pair = 4 * config.num_layers * config.num_heads * config.head_dim  # q.k and p.v
    head_bytes = (table + batch * rows * config.vocab_size) * item if rows else 0
    return ForwardCost(
        layer_flops=2 * layer_parameters(config) * tokens,
        attention_flops=per_pair * batch * pairs,
        head_flops=2 * table * batch * rows,
        layer_bytes=weight_bytes(config, dtype) - table * item,
        head_bytes=head_bytes,
        kv_bytes=kv_bytes_per_token(config, dtype) * batch * (kv_len + 2 * width),
        token_bytes=tokens * config.hidden_size * item,
    )


def mbu(cost: ForwardCost, seconds: float, bytes_per_s: float) -> float:
    """Model bandwidth utilisation: bytes that had to move over bytes that could have (0 to 1)."""
    return cost.bytes / (seconds * bytes_per_s)


def mfu(cost: ForwardCost, seconds: float, flops_per_s: float) -> float:
    """Model FLOPs utilisation of everything processed, rejected work included (0 to 1)."""
    return cost.flops / (seconds * flops_per_s)


def floor_s(cost: ForwardCost, bytes_per_s: float, flops_per_s: float) -> float:
    """The roofline: no forward is faster than its traffic or its arithmetic at peak (seconds)."""
    return max(cost.bytes / bytes_per_s, cost.flops / flops_per_s)


def memory_floor_tokens_per_s(
    config: ModelConfig, *, kv_len: int, bytes_per_s: float, batch: int = 1, dtype: str = "bfloat16"
) -> float:
    """Tokens/s of autoregressive decoding if only memory bandwidth limited it, all sequences."""
    return batch * bytes_per_s / forward_cost(
        config, width=1, kv_len=kv_len, batch=batch, dtype=dtype
    ).bytes  # fmt: skip


def ridge_width(peak: Peak, dtype: str = "bfloat16") -> float:
    """Query width at which reading a weight and multiplying with it take equally long (tokens)."""
    return ITEM_BYTES[dtype] * peak.flops_per_s / (2 * peak.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class WorkPerToken:
    """Work of decode steps over the tokens they committed: drafts, masks and rejects included."""

    committed: int
    tokens_processed: float
    flops: float
    bytes: float


def head_rows(step: Step) -> int:
    """Logits rows of a step: the tested drafts, their successor, and the next draft's tokens.

    AR (drafted = 0): 1. TiDAR at beta = 1 (drafted = K-1): K to verify and K-1 to draft.
    """
    return 2 * step.drafted + 1


def work_per_token(
    steps: Sequence[Step],
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    rows: Callable[[Step], int] = head_rows,
) -> WorkPerToken | None:
    """Tokens processed, FLOPs and bytes per committed token over decode steps; None if none."""
    committed = sum(len(step.committed) for step in steps)
    if not committed:
        return None
    processed = flops = moved = 0
    for step in steps:
        cost = forward_cost(
            config,
            width=step.query_width,
            kv_len=step.kv_len,
            head_rows=rows(step),
            dtype=dtype,
        )
        processed += step.target_forwards * step.query_width
        flops += step.target_forwards * cost.flops
        moved += step.target_forwards * cost.bytes
    return WorkPerToken(
        committed=committed,
        tokens_processed=processed / committed,
        flops=flops / committed,
        bytes=moved / committed,
    )
