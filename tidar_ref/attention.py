"""Attention in two parts: the committed prefix without a pattern, the new tokens with theirs.

A mask over prefix and new tokens is mostly ones, costs a read of Q x L numbers and keeps the
fastest kernels away. Here the prefix goes through a kernel that needs none, the few new tokens
through a small masked product, and both are merged by their log-sum-exp: a softmax over the union
of two key sets is the average of the two softmaxes, weighted with exp(lse).

Shapes: q [B, H, R, D] where R are the folded rows of a head group, keys and values [B, H, L, D].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tidar_ref.cache import KVCache


class TwoPart:
    """One forward's patterns, made once for all layers; called with each layer's q, keys, values.

    new_mask [Q, S] or [B, Q, S], S >= Q, as in `Transformer.forward`; None means Q = 1. The keys'
    places are those `OpenSlots` writes to.
    """

    def __init__(
        self,
        cache: KVCache,
        new_mask: Tensor | None,
        width: int,
        groups: int,
        dtype: torch.dtype,
    ) -> None:
        device = cache.k.device
        if new_mask is None:
            new_mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        seen, batch = new_mask.shape[-1], len(cache.lengths)
        new = new_mask if new_mask.dim() == 3 else new_mask[None]
        self.new_bias = _bias(new, dtype).repeat(1, groups, 1)[:, None]  # [B or 1, 1, G*Q, S]
        self.prefix_bias: Tensor | None = None
        self.empty: Tensor | None = None  # [B, 1, 1]: rows without a prefix
        self.index: Tensor | None = None
        if cache.uniform:
            self.free, self.end = cache.lengths[0] - (seen - width), cache.lengths[0] + width
            return
        # Lengths differ, or only the device knows them: hide what lies behind each prefix (one
        # number a key, not one a query and key), and gather the new tokens' keys.
        free = cache.kv_len - (seen - width)
        slots = torch.arange(max(cache.lengths), device=device)
        self.free, self.end = max(cache.lengths), max(cache.lengths) + width
        self.prefix_bias = _bias(slots[None] < free[:, None], dtype)[:, None, None]
        self.empty = (free <= 0)[:, None, None]
        places = free[:, None] + torch.arange(seen, device=device)
        self.index = places[:, None, :, None].expand(batch, 1, seen, 1)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, H, R, D]: what attention over all visible keys gives."""
        if self.index is None:
            new_keys, new_values = (
                keys[:, :, self.free : self.end],
                values[:, :, self.free : self.end],
            )
        else:
            index = self.index.expand(-1, keys.shape[1], -1, keys.shape[3])
            new_keys, new_values = keys.gather(2, index), values.gather(2, index)
        new = masked_part(q, new_keys, new_values, self.new_bias)
        if self.free == 0:
            return new[0].to(q.dtype)
        out, lse = part(q, keys[:, :, : self.free], values[:, :, : self.free], self.prefix_bias)
        if self.empty is not None:  # what a kernel gives for no key at all is its own affair
            out = out.masked_fill(self.empty[..., None], 0.0)
            lse = lse.masked_fill(self.empty, float("-inf"))
        return merge((out, lse), new).to(q.dtype)


def part(q: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [B, H, R] in float32) of attention over these keys.

    key_bias [B, 1, 1, L] or None: the same for every query. On CUDA in half precision the kernels
    of `scaled_dot_product_attention` that return the log-sum-exp; elsewhere two matrix products.
    """
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
    if q.is_cuda and half and key_bias is None:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, keys, values, 0.0, False, False
        )
        return out, lse[..., : q.shape[2]].float()
    if q.is_cuda and half and keys.shape[2] % 8 == 0:  # the kernel's alignment of a bias
        bias = key_bias.expand(q.shape[0], q.shape[1], q.shape[2], keys.shape[2])
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, keys, values, bias, True
        )
        return out, lse[..., : q.shape[2]].float()
    return masked_part(q, keys, values, key_bias)


def masked_part(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by two matrix products, scores and softmax in float32; bias broadcasts to scores.

    A row that sees no key has log-sum-exp -inf and output 0, so that merging ignores it.
    """
    scores = (q @ keys.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(dim=-1)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = (scores - shift[..., None]).exp()
    return weights.to(values.dtype) @ values, lse


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the union of two disjoint key sets, float32; one of them sees a key."""
    total = torch.logaddexp(a[1], b[1])
    wa, wb = ((lse - total).exp()[..., None] for lse in (a[1], b[1]))
    return a[0].float() * wa + b[0].float() * wb


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, float("-inf"))
