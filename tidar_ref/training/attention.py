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
    """Queries of one part of a document and the keys they read under this additive bias.

    clean_keys: the first so many clean keys of the document; own_keys: which rows of the
    document's mask part, None for clean queries. Bias [groups * queries, keys].
    """

    document: int
    width: int
    clean_keys: int
    own_keys: slice | None
    bias: Tensor


def attention(rows: Rows, *, kv_groups: int, dtype: torch.dtype) -> Attend:
    """The attention of these rows, prepared once a batch and used by every layer.

    Takes q [N, Hq, D] and k, v [N, Hkv, D]; gives [N, Hq, D]. `kv_groups` is Hq / Hkv.
    """
    if rows.ids.device.type == "cuda":
        return _flex(rows)
    return _blocked(rows, kv_groups, dtype)


def _blocked(rows: Rows, groups: int, dtype: torch.dtype) -> Attend:
    # In row order, so that the pieces' outputs join without a permutation.
    pieces = [
        piece
        for part in (0, 1)
        for number in range(len(rows.documents))
        for piece in _pieces(rows, number, part, groups, dtype)
    ]
    widths = [piece.width for piece in pieces]
    spans = [span.stop - span.start for part in zip(*rows.documents, strict=True) for span in part]
    count = len(rows.documents)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
        # One split each: its backward is one concatenation, not a zero-filled tensor per slice.
        keys, values = k.split(spans), v.split(spans)
        outs = []
        for piece, queries in zip(pieces, q.split(widths), strict=True):
            # [Q, Hq, D] -> [Hkv, G*Q, D]: the heads of a group share keys and values.
            folded = queries.transpose(0, 1).reshape(1, kv_heads, groups * piece.width, size)
            seen = []
            for side in (keys, values):
                rows_seen = side[piece.document][: piece.clean_keys]
                if piece.own_keys is not None:
                    own = side[count + piece.document][piece.own_keys]
                    rows_seen = torch.cat([rows_seen, own])
                seen.append(rows_seen.transpose(0, 1).unsqueeze(0))
            out = F.scaled_dot_product_attention(folded, *seen, attn_mask=piece.bias)
            outs.append(out.reshape(heads, piece.width, size).transpose(0, 1))
        return torch.cat(outs)

    return attend


def _pieces(rows: Rows, number: int, part: int, groups: int, dtype: torch.dtype) -> list[_Piece]:
    clean, own = rows.documents[number][0], rows.documents[number][part]
    pieces, start = [], own.start
    while start < own.stop:
        stop = min(start + CHUNK_ROWS, own.stop)
        while part and stop < own.stop and rows.block[stop] == rows.block[stop - 1]:
            stop += 1  # cut between blocks: a block attends to itself
        reach = min(int(rows.clean_before[start:stop].max()), clean.stop - clean.start)
        index = torch.arange(clean.start, clean.start + reach)
        if part:
            index = torch.cat([index, torch.arange(start, stop)])
        bias = torch.zeros(stop - start, index.shape[0], dtype=dtype)
        bias.masked_fill_(~_visible(rows, slice(start, stop), index), float("-inf"))
        pieces.append(
            _Piece(
                document=number,
                width=stop - start,
                clean_keys=reach,
                own_keys=slice(start - own.start, stop - own.start) if part else None,
                bias=bias.repeat(groups, 1),
            )
        )
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
