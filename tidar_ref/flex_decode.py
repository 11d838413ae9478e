"""Attention of a decode step by Flex Attention: one kernel, the pattern as a function.

The third route beside the backbone's masked `scaled_dot_product_attention` and the two parts of
`tidar_ref.attention`. Blocks of keys that every new token sees are named full, so their pattern is
not evaluated; only blocks that reach behind the shortest prefix are. On CUDA the kernel is compiled
once for all lengths; on a CPU the uncompiled reference runs, which is a proof and not a speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tidar_ref.cache import KVCache

BLOCK = 128  # keys and queries of a block; Flex's own default


class FlexDecode:
    """One forward's pattern, made once for all layers; called with each layer's q, keys, values.

    new_mask as in `Transformer.forward`. All sizes are the host's, all lengths the device's, so a
    captured forward stays right when the sequences grow inside one view of the cache.
    """

    def __init__(self, cache: KVCache, new_mask: Tensor | None, width: int) -> None:
        device, batch = cache.k.device, len(cache.lengths)
        if new_mask is None:
            new_mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        seen = new_mask.shape[-1]
        new = new_mask.expand(batch, width, seen).contiguous()
        free = cache.kv_len - (seen - width)  # [B]: keys that all new tokens see
        length = max(cache.lengths) + width

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            place = kv - free[b]
            among = new[b, q.clamp(max=width - 1), place.clamp(0, seen - 1)]
            return (place < 0) | ((place < seen) & among)

        blocks, rows = -(-length // BLOCK), -(-width // BLOCK)
        full = (free.clamp(min=0) // BLOCK).to(torch.int32)  # [B]
        index = torch.arange(blocks, dtype=torch.int32, device=device)
        shape = (batch, 1, rows)
        self.mask = BlockMask.from_kv_blocks(
            (blocks - full)[:, None, None].expand(shape).contiguous(),
            # The blocks behind the full ones first; what follows is not read.
            ((index + full[:, None]) % blocks)[:, None, None].expand(*shape, -1).contiguous(),
            full[:, None, None].expand(shape).contiguous(),
            index.expand(*shape, -1).contiguous(),
            BLOCK_SIZE=BLOCK,
            mask_mod=visible,
            seq_lengths=(width, length),
            compute_q_blocks=False,
        )

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [B, Hq, Q, D], keys and values [B, Hkv, L, D] -> [B, Hq, Q, D]."""
        attend = _compiled() if q.is_cuda else flex_attention
        return attend(q, keys, values, block_mask=self.mask, enable_gqa=True)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)
