"""The shape of a decoder-only transformer, as plain data (no torch: listing shapes stays fast)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the parameters' shapes and the arithmetic of one backbone.

    `family` is one of llama, qwen2, qwen3, and of the masked diffusion models llada (computes as a
    llama) and dream (as a qwen2); SmolLM2 is a llama, Qwen2.5 a qwen2. `rope_scaling` is the hub's
    "llama3" dictionary or None. Sizes are counts, `norm_eps` is absolute.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_position: int
    rope_scaling: dict | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")

    @property
    def parameter_count(self) -> int:
        """Number of weights, a tied embedding counted once."""
        h, d = self.hidden_size, self.head_dim
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * d
        layer = qkv_rows * h + h * self.num_heads * d + 3 * h * self.intermediate_size + 2 * h
        layer += qkv_rows if self.qkv_bias else 0
        layer += 2 * d if self.qk_norm else 0
        embeddings = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + h
