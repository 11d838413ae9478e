"""Attention over packed training rows: blocked and exact on a CPU, Flex Attention on CUDA.

Neither materialises the [N, N] mask. On a CPU a document's clean rows and mask rows are cut into
chunks; a chunk of mask rows reads only the clean keys that some block in it may see, and its own
blocks. Tested against the dense mask of `rows.visible`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_ref.training.rows import Rows

CHUNK_ROWS = 512

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Piece:
    """Queries [start, stop) read these key rows under this additive bias [rows, keys]."""

    queries: slice
    keys: Tensor | slice
    bias: Tensor


def attention(rows: Rows, *, kv_groups: int, dtype: torch.dtype) -> Attend:
    """The attention of these rows, prepared once a batch and used by every layer.

    Takes q [N, Hq, D] and k, v [N, Hkv, D]; gives [N, Hq, D]. `kv_groups` is Hq / Hkv.
    """
    if rows.ids.device.type == "cuda":
        return _flex(rows)
    return _blocked(rows, kv_groups, dtype)


def _blocked(rows: Rows, groups: int, dtype: torch.dtype) -> Attend:
    pieces = [
        piece
        for clean, masks in rows.documents
        for part in (clean, masks)
        for piece in _pieces(rows, clean, part, groups, dtype)
    ]
    order = torch.cat([torch.arange(p.queries.start, p.queries.stop) for p in pieces])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    in_order = bool((order == torch.arange(order.shape[0])).all())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
        outs = []
        for piece in pieces:
            width = piece.queries.stop - piece.queries.start
            # [Q, Hq, D] -> [Hkv, G*Q, D]: the heads of a group share keys and values.
            folded = q[piece.queries].transpose(0, 1).reshape(1, kv_heads, groups * width, size)
            keys = k[piece.keys].transpose(0, 1).unsqueeze(0)
            values = v[piece.keys].transpose(0, 1).unsqueeze(0)
            out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=piece.bias)
            outs.append(out.reshape(heads, width, size).transpose(0, 1))
        joined = torch.cat(outs)
        return joined if in_order else joined[inverse]

    return attend


def _pieces(
    rows: Rows, clean: slice, part: slice, groups: int, dtype: torch.dtype
) -> list[_Piece]:
    pieces = []
    start = part.start
    while start < part.stop:
        stop = min(start + CHUNK_ROWS, part.stop)
        of_masks = part is not clean
        if of_masks and stop < part.stop:  # cut between blocks: a block attends to itself
            while stop < part.stop and rows.block[stop] == rows.block[stop - 1]:
                stop += 1
        limit = int(rows.clean_before[start:stop].max())
        reach = min(clean.start + limit, clean.stop)
        keys: Tensor | slice = slice(clean.start, reach)
        index = torch.arange(clean.start, reach)
        if of_masks:
            index = torch.cat([index, torch.arange(start, stop)])
            keys = index
        bias = torch.zeros(stop - start, index.shape[0], dtype=dtype)
        bias.masked_fill_(~_visible(rows, slice(start, stop), index), float("-inf"))
        pieces.append(_Piece(slice(start, stop), keys, bias.repeat(groups, 1)))
        start = stop
    return pieces


def _visible(rows: Rows, queries: slice, keys: Tensor) -> Tensor:
    """[queries, keys] within one document."""
    is_clean = (rows.block[keys] < 0)[None, :]
    to_clean = is_clean & (rows.positions[keys][None, :] < rows.clean_before[queries][:, None])
    to_block = ~is_clean & (rows.block[keys][None, :] == rows.block[queries][:, None])
    return to_clean | to_block


def _flex(rows: Rows) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    document, block = rows.document, rows.block
    positions, bound = rows.positions, rows.clean_before

    def allow(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        to_clean = (block[k] < 0) & (positions[k] < bound[q])
        to_block = (block[k] >= 0) & (block[k] == block[q])
        return (document[q] == document[k]) & (to_clean | to_block)

    mask = create_block_mask(allow, None, None, rows.count, rows.count, device=rows.ids.device)
    compiled = _compiled_flex()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return attend


_FLEX: list[Callable[..., Tensor]] = []


def _compiled_flex() -> Callable[..., Tensor]:
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention, dynamic=True))
    return _FLEX[0]
