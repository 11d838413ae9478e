"""Matrix products and norms that pick the fastest route on a CPU; torch's plain ones elsewhere.

Measured on two AVX2 cores with torch 2.13 (the route is chosen by `Transformer.prepare`):
- float32, one to three rows: a weight stored column by column reads 1.6x faster when it has more
  outputs than inputs, and costs nothing at other widths;
- bfloat16 without native instructions: from 6 rows on the built-in product is 3 to 10 times slower
  than converting the few activations and multiplying in float32. That route keeps a float32 copy
  of the weight (memory for time); products are accumulated in float32 and rounded once;
- torch's RMSNorm is a chain of small operations there, about a tenth of an AR step in all: for one
  row the sum of squares is one dot product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE_FROM_ROWS = 6


class Linear(nn.Linear):
    """nn.Linear on 2-D input [rows, in]; `wide` is the float32 copy for many rows, or None."""

    wide: Tensor | None = None

    def reset_parameters(self) -> None:
        """Nothing: weights are loaded or filled by `Transformer.init_random`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.wide is not None and x.shape[0] >= WIDE_FROM_ROWS:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.wide, bias).to(x.dtype)
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def prepare(self) -> None:
        """Choose layout or copy for inference on this CPU; call again if weights change."""
        self.wide = None
        if self.weight.device.type != "cpu":
            return
        if self.weight.dtype == torch.float32 and self.out_features > self.in_features:
            self.weight.data = by_columns(self.weight.data)
        elif emulated(self.weight.dtype):
            self.wide = self.weight.float()


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with a shorter chain of operations for a single row on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() != x.shape[-1] or torch.is_grad_enabled():
            return super().forward(x)
        row = x.float()
        flat = row.view(-1)
        scale = torch.dot(flat, flat).mul_(1 / flat.shape[0]).add_(self.eps).rsqrt_()
        return (row * scale).to(x.dtype) * self.weight


class TiedHead(nn.Module):
    """LM head that shares the embedding table: hidden [..., H] -> logits [..., V]."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple: the table is registered, saved and moved once
        self.fast: Tensor | None = None  # float32: the table by columns; bfloat16: in float32

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self._embed[0].weight
        if self.fast is None:
            return F.linear(hidden, weight)
        rows = hidden.numel() // hidden.shape[-1]
        if weight.dtype == torch.float32 or rows >= WIDE_FROM_ROWS:
            return F.linear(hidden.float(), self.fast).to(hidden.dtype)
        return F.linear(hidden, weight)

    @torch.no_grad()
    def prepare(self) -> None:
        """As Linear.prepare; the table itself stays by rows for the embedding look-up."""
        weight = self._embed[0].weight
        self.fast = None
        if weight.device.type != "cpu":
            return
        if weight.dtype == torch.float32:
            self.fast = by_columns(weight.data)
        elif emulated(weight.dtype):
            self.fast = weight.float()


def by_columns(weight: Tensor) -> Tensor:
    """The same matrix [out, in] stored column by column."""
    return weight.t().contiguous().t()


def emulated(dtype: torch.dtype) -> bool:
    """True if this CPU has no instructions for `dtype` products and torch emulates them."""
    if dtype == torch.float32:
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
