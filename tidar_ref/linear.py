"""Matrix products and norms that pick the fastest route on a CPU; torch's plain ones elsewhere.

`Transformer.prepare` chooses the routes; `kernel_route` names them. Measured on two AVX2 cores with
torch 2.13 and SmolLM2-135M:
- products compiled by numba (`tidar_ref.kernels_cpu`), for bfloat16 without native instructions and
  for float32 up to KERNEL_UP_TO_ROWS rows, beyond which torch's is as fast: at the memory's speed
  for one row, near the cores' from 20 rows on. They keep a packed copy of the weight (memory for
  time): after a change of weights, prepare again;
- bfloat16 without native instructions and without numba, from WIDE_FROM_ROWS rows: the built-in
  product is 3 to 10 times slower than converting the few activations and multiplying in float32.
  That route keeps a float32 copy; products are accumulated in float32 and rounded once;
- torch's RMSNorm is a chain of small operations there, about a tenth of an AR step in all: for one
  row the sum of squares is one dot product.

Parameters stay as loaded; training and checkpoints see plain ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tidar_ref.kernels_cpu import Product

WIDE_FROM_ROWS = 6
KERNEL_UP_TO_ROWS = 128


class Fast(nn.Module):
    """Mixin of modules with one matrix product: its routes besides torch's plain one."""

    kernel: Product | None = None  # compiled product
    wide: Tensor | None = None  # else of an emulated weight: a float32 copy
    no_kernel = "not prepared"  # why kernel is None

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [rows, in] -> x weight^T + bias [rows, out] on the route for that many rows."""
        few = x.shape[0] <= KERNEL_UP_TO_ROWS or weight.dtype != torch.float32
        if self.kernel is not None and few and not torch.is_grad_enabled():
            return self.kernel(x)
        if self.wide is not None and x.shape[0] >= WIDE_FROM_ROWS:
            bias = None if bias is None else bias.float()
            return F.linear(x.float(), self.wide, bias).to(x.dtype)
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def choose(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set the routes for inference with this weight; again if it is replaced."""
        self.forget()
        if weight.device.type != "cpu":
            self.no_kernel = "not on a CPU"
            return
        slow = emulated(weight.dtype)
        if weight.dtype != torch.float32 and not slow:
            self.no_kernel = f"this CPU multiplies {weight.dtype} itself".replace("torch.", "")
            return
        make, self.no_kernel = kernel_maker(weight.dtype)
        if make is not None:
            self.kernel = make(weight, bias)
            self.no_kernel = "odd width or layout" if self.kernel is None else ""
        if slow and self.kernel is None:
            self.wide = weight.float()

    def forget(self) -> None:
        """Back to torch's plain product."""
        self.kernel = self.wide = None
        self.no_kernel = "not prepared"

    def _apply(self, fn: Callable, recurse: bool = True) -> Fast:
        self.forget()  # moved or converted: the routes would multiply by the old weight
        return super()._apply(fn, recurse)


class Linear(Fast, nn.Linear):
    """nn.Linear by the chosen route; x [..., in]."""

    def reset_parameters(self) -> None:
        """Nothing: weights are loaded or filled by `Transformer.init_random`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:  # every product inside a layer
            return self.multiply(x, self.weight, self.bias)
        y = self.multiply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.view(*x.shape[:-1], -1)

    def prepare(self) -> None:
        """Choose the routes for inference; call again if weights change."""
        self.choose(self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with a shorter chain of operations for a single row on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() != x.shape[-1] or torch.is_grad_enabled():
            return super().forward(x)
        row = x.float()
        flat = row.view(-1)
        scale = torch.dot(flat, flat).mul_(1 / flat.shape[0]).add_(self.eps).rsqrt_()
        return (row * scale).to(x.dtype) * self.weight


class TiedHead(Fast):
    """LM head that shares the embedding table: hidden [..., H] -> logits [..., V]."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple: the table is registered, saved and moved once

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self._embed[0].weight
        logits = self.multiply(hidden.reshape(-1, hidden.shape[-1]), weight, None)
        return logits.view(*hidden.shape[:-1], -1)

    def prepare(self) -> None:
        """As Linear.prepare."""
        self.choose(self._embed[0].weight, None)


def emulated(dtype: torch.dtype) -> bool:
    """True if this CPU has no instructions for `dtype` products and torch emulates them."""
    if dtype == torch.float32:
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def kernel_maker(
    dtype: torch.dtype,
) -> tuple[Callable[[Tensor, Tensor | None], Product | None] | None, str]:
    """(maker of compiled products, "") or (None, why there are none). Imports and compiles here."""
    try:
        from tidar_ref import kernels_cpu
    except ImportError as error:
        return None, f"no numba: {error}"
    try:
        kernels_cpu.start(dtype)
    except kernels_cpu.Unavailable as error:
        return None, str(error)
    return kernels_cpu.make_product, ""


def kernel_route(model: nn.Module) -> str:
    """What multiplies few rows in this model: "numba omp", "torch (why)", or the share of both."""
    found = [module for module in model.modules() if isinstance(module, Fast)]
    reasons = sorted({module.no_kernel for module in found if module.kernel is None})
    count = sum(module.kernel is not None for module in found)
    if count == len(found):
        return "numba omp"
    if not count:
        return f"torch ({', '.join(reasons)})"
    return f"numba omp in {count} of {len(found)} products, torch in others ({', '.join(reasons)})"
