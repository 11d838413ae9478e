"""Matrix products, and whole layers of few rows, compiled by numba for the CPU.

torch's own products on two AVX2 cores read the weights at about half of what memory delivers for
one row, and compute at half of what the cores can for the 2 to 72 rows of TiDAR's steps. Here
weights are packed once in the order in which they are used, and the sums of 5 rows x 16 outputs
stay in registers: one row runs at the memory's speed, 20 rows near the cores'. Sums are float32 for
either dtype; a bfloat16 result is rounded once. A layer of one row (an AR step) is a few parallel
sections instead of some thirty torch operations, rounding bfloat16 where those do; a layer of few
rows (a TiDAR step) is the same, with a mask among the new tokens.

All in one file on purpose: numba's disk cache notices a change of the file a kernel is in, not of
those it calls.

Threads come from OpenMP: numba's "omp" layer binds to the runtime torch has loaded, so both share
one pool. Other layers would bring a second pool that competes for the cores; they are not used.

Importing this module imports numba (half a second); `tidar_ref.linear` does it from `prepare`. The
first use on a machine compiles, which is kept in numba's cache (NUMBA_CACHE_DIR moves it).
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic
from torch import Tensor

if TYPE_CHECKING:
    from tidar_ref.cache import KVCache
    from tidar_ref.model import Transformer

# Sums may be reordered and fused; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
DTYPES = (torch.float32, torch.bfloat16)


def compiled(function: Callable, **options: Any) -> Callable:
    """njit with the compiled code kept on disk, or in memory only if no folder can be written."""
    # Division as numpy's: a check for zero would keep loops from being vectorised.
    options = {"fastmath": FAST, "error_model": "numpy", **options}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "no locator available"
        return njit(**options)(function)


# Element access. A float32 array holds values, a uint16 array bfloat16 bits, a uint32 array two
# bfloat16 of neighbouring inputs of a weight (the even one in the low half).


def _bits(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.bitcast(value, ir.IntType(32))


def _rounded(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Bits of a float32 rounded to the nearest bfloat16, ties to even; low half is rubbish."""
    i32 = ir.IntType(32)
    bits = _bits(builder, value)
    odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
    return builder.add(builder.add(bits, ir.Constant(i32, 0x7FFF)), odd)


@intrinsic
def low(context: Any, pair: Any) -> Any:
    """float32 of the bfloat16 in the low half of a uint32."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        shifted = builder.shl(args[0], ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(shifted, ir.FloatType())

    return types.float32(pair), build


@intrinsic
def value_of(context: Any, stored: Any) -> Any:
    """float32 of a stored float32 or bfloat16 (uint16) element."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if stored == types.float32:
            return args[0]
        i32 = ir.IntType(32)
        wide = builder.shl(builder.zext(args[0], i32), ir.Constant(i32, 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(stored), build


@intrinsic
def as_stored(context: Any, value: Any, like: Any) -> Any:
    """A float32 as an element of the type of `like`: itself, or rounded to bfloat16 (uint16)."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if like == types.float32:
            return args[0]
        upper = builder.lshr(_rounded(builder, args[0]), ir.Constant(ir.IntType(32), 16))
        return builder.trunc(upper, ir.IntType(16))

    return like(types.float32, like), build


@intrinsic
def rounded(context: Any, value: Any, like: Any) -> Any:
    """A float32 rounded as storing it in the type of `like` would, kept as float32."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if like == types.float32:
            return args[0]
        mask = ir.Constant(ir.IntType(32), 0xFFFF0000)
        return builder.bitcast(builder.and_(_rounded(builder, args[0]), mask), ir.FloatType())

    return types.float32(types.float32, like), build


# The product. A weight [out, in] lies in panels of 16 outputs: for each input (of bfloat16: each
# pair of inputs) the 16 weights side by side. A tile multiplies a panel by up to 5 rows and holds
# all their sums in registers (5 x 2 of AVX2's 16 vectors), so nothing is added across lanes, every
# weight is read once for 5 rows, and a panel stays in the L1 cache while all rows pass over it.
PANEL, TILE_ROWS = 16, 5


def _tile(rows: int) -> Any:
    """The tile of that many rows: out[r] = x[first + r] times a panel of w, by vectors of 8.

    tile(w, panel, x, first, pairs, out, ahead, stride): w [panels, in, 16] float32 or
    [panels, in / 2, 16] uint32; x [., in], out [5, 16] float32; pairs = in / 2; all by rows without
    gaps. With every pair the cache line `ahead` bytes into the panel is fetched, and ahead grows by
    stride.
    """
    i32, i64, byte = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    floats, words = ir.VectorType(ir.FloatType(), 8), ir.VectorType(i32, 8)
    fetching = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    # One or two rows: even and odd inputs have sums of their own, for a single chain each would
    # leave the units waiting. Three rows would not fit the registers so.
    chains = 2 if rows <= 2 else 1

    def tile(
        context: Any, w: Any, panel: Any, x: Any, first: Any, pairs: Any, out: Any, ahead: Any,
        stride: Any,
    ) -> Any:  # fmt: skip
        paired = w.dtype != types.float32

        def build(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            weights, inputs, output = (
                context.make_array(signature.args[i])(context, b, args[i]).data for i in (0, 2, 5)
            )
            panel, first, pairs, ahead, stride = (args[i] for i in (1, 3, 4, 6, 7))

            def number(value: int) -> ir.Constant:
                return ir.Constant(i64, value)

            def eight(pointer: ir.Value, kind: ir.Type) -> ir.Value:
                return b.bitcast(pointer, kind.as_pointer())

            def line(k: ir.Value, odd: int) -> list[ir.Value]:
                """16 weights of one input as two vectors."""
                at = b.gep(weights, [b.mul(pair if paired else k, number(PANEL))])
                at = [b.gep(at, [number(8 * v)]) for v in range(2)]
                if not paired:
                    return [b.load(eight(part, floats), align=4) for part in at]
                found = [b.load(eight(part, words), align=4) for part in at]
                by = ir.Constant(words, [ir.Constant(i32, 0xFFFF0000 if odd else 16)] * 8)
                return [b.bitcast((b.and_ if odd else b.shl)(two, by), floats) for two in found]

            def spread(pointer: ir.Value) -> ir.Value:
                """One number in all lanes."""
                lane = ir.Constant(floats, ir.Undefined)
                lane = b.insert_element(lane, b.load(pointer), ir.Constant(i32, 0))
                return b.shuffle_vector(lane, lane, ir.Constant(words, [ir.Constant(i32, 0)] * 8))

            inner = b.mul(pairs, number(2))
            lines = pairs if paired else inner
            weights = b.gep(weights, [b.mul(panel, b.mul(lines, number(PANEL)))])
            inputs = b.gep(inputs, [b.mul(first, inner)])
            row_starts = [b.gep(inputs, [b.mul(number(row), inner)]) for row in range(rows)]
            fetch = cgutils.get_or_insert_function(b.module, fetching, "llvm.prefetch.p0i8")

            before, loop, done = b.block, b.append_basic_block(), b.append_basic_block()
            b.branch(loop)
            b.position_at_end(loop)
            pair, soon = b.phi(i64), b.phi(i64)
            sums = [[b.phi(floats) for _ in range(2 * chains)] for _ in range(rows)]
            added = [list(row) for row in sums]
            place = b.gep(b.bitcast(weights, byte), [soon])
            b.call(fetch, [place, *(ir.Constant(i32, hint) for hint in (0, 2, 1))])  # read, L2
            for odd in range(2):
                k = b.add(b.mul(pair, number(2)), number(odd))
                vectors = line(k, odd)
                for row in range(rows):
                    value = spread(b.gep(row_starts[row], [k]))
                    for v in range(2):
                        at = v + 2 * odd * (chains - 1)
                        term = b.fmul(value, vectors[v], flags=("contract",))
                        added[row][at] = b.fadd(added[row][at], term, flags=("contract",))
            zero = ir.Constant(floats, [ir.Constant(ir.FloatType(), 0.0)] * 8)
            counters = (
                (pair, number(0), b.add(pair, number(1))),
                (soon, ahead, b.add(soon, stride)),
            )
            for phi, start, new in counters:
                phi.add_incoming(start, before)
                phi.add_incoming(new, loop)
            for phi, new in zip(chain(*sums), chain(*added), strict=True):
                phi.add_incoming(zero, before)
                phi.add_incoming(new, loop)
            b.cbranch(b.icmp_signed("<", counters[0][2], pairs), loop, done)
            b.position_at_end(done)
            for row in range(rows):
                for v in range(2):
                    whole = added[row][v]
                    if chains == 2:
                        whole = b.fadd(whole, added[row][v + 2])
                    place = b.gep(output, [number(row * PANEL + 8 * v)])
                    b.store(whole, eight(place, floats), align=4)
            return context.get_dummy_value()

        return types.void(w, panel, x, first, pairs, out, ahead, stride), build

    return intrinsic(tile)


tile_1, tile_2, tile_3, tile_4, tile_5 = (_tile(rows) for rows in range(1, TILE_ROWS + 1))


def _panels(w: Any, x: Any, bias: Any, y: Any, lo: int, hi: int) -> None:
    """y[:, 16 lo : 16 hi] = x w^T + bias with panels lo..hi of w; an empty bias is none."""
    like = y[0, 0]
    rows, pairs, outputs = x.shape[0], x.shape[1] // 2, y.shape[1]
    biased = bias.shape[0] > 0
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    out = np.empty((TILE_ROWS, PANEL), np.float32)
    size = 4 * PANEL * w.shape[1]  # bytes of a panel; every tile fetches its share of the next one
    stride = size // pairs // tiles
    for panel in range(lo, hi):
        left = panel * PANEL
        for tile in range(tiles):  # of like heights: a tile of one row would wait for its sums
            ahead = size + tile * stride * pairs
            first = rows * tile // tiles
            height = rows * (tile + 1) // tiles - first
            if height == 5:
                tile_5(w, panel, x, first, pairs, out, ahead, stride)
            elif height == 4:
                tile_4(w, panel, x, first, pairs, out, ahead, stride)
            elif height == 3:
                tile_3(w, panel, x, first, pairs, out, ahead, stride)
            elif height == 2:
                tile_2(w, panel, x, first, pairs, out, ahead, stride)
            else:
                tile_1(w, panel, x, first, pairs, out, ahead, stride)
            if biased:
                for r in range(height):
                    for n in range(min(PANEL, outputs - left)):
                        out[r, n] += value_of(bias[left + n])
            for r in range(height):
                target = y[first + r]
                if left + PANEL <= outputs:  # a fixed count: one vector loop
                    for n in range(PANEL):
                        target[left + n] = as_stored(out[r, n], like)
                else:
                    for n in range(outputs - left):
                        target[left + n] = as_stored(out[r, n], like)


_panels = compiled(_panels)


def _product(w: Any, x: Any, bias: Any, y: Any, parts: int) -> None:
    """y = x w^T + bias on `parts` threads; w in panels, x, y [rows, ...] float32 or bfloat16
    bits."""
    rows, inner = x.shape
    values = np.empty((rows, inner), np.float32)
    for m in range(rows):
        for k in range(inner):
            values[m, k] = value_of(x[m, k])
    panels = w.shape[0]
    if parts == 1:
        _panels(w, values, bias, y, 0, panels)
        return
    for part in prange(parts):
        _panels(w, values, bias, y, panels * part // parts, panels * (part + 1) // parts)


product = compiled(_product, parallel=True)


def _normed(x: Any, weight: Any, eps: float, out: Any) -> None:
    """RMSNorm of one row [n]; bfloat16 is rounded before and after the weight, as torch does."""
    like = x[0]
    squares = np.float32(0)
    for i in range(x.shape[0]):
        squares += value_of(x[i]) * value_of(x[i])
    scale = np.float32(1 / math.sqrt(squares / np.float32(x.shape[0]) + np.float32(eps)))
    for i in range(x.shape[0]):
        out[i] = as_stored(rounded(value_of(x[i]) * scale, like) * value_of(weight[i]), like)


def _rotated(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Rotary embedding of one head [D], as `tidar_ref.model.rotate`; out is not x."""
    like = x[0]
    half = x.shape[0] // 2
    for i in range(x.shape[0]):
        other = value_of(x[i + half] if i < half else x[i - half])
        kept = rounded(value_of(x[i]) * value_of(cos[i]), like)
        out[i] = as_stored(kept + other * value_of(sin[i]), like)


def _attended(q: Any, keys: Any, values: Any, length: int, lo: int, hi: int, out: Any) -> None:
    """Attention of query heads lo..hi over the first `length` slots; q [Hq, D], out [Hq * D]."""
    like = q[0, 0]
    size = q.shape[1]
    groups = q.shape[0] // keys.shape[0]
    scale = np.float32(1 / math.sqrt(size))
    query, total = np.empty(size, np.float32), np.empty(size, np.float32)
    scores = np.empty(length, np.float32)
    for head in range(lo, hi):
        for i in range(size):
            query[i] = value_of(q[head, i]) * scale
            total[i] = np.float32(0)
        seen_k, seen_v = keys[head // groups], values[head // groups]
        top = np.float32(-np.inf)
        for slot in range(length):
            k = seen_k[slot]
            s = np.float32(0)
            for i in range(size):
                s += query[i] * value_of(k[i])
            scores[slot] = s
            top = max(top, s)
        weights = np.float32(0)
        for slot in range(length):
            v = seen_v[slot]
            p = np.float32(math.exp(scores[slot] - top))
            weights += p
            for i in range(size):
                total[i] += p * value_of(v[i])
        for i in range(size):
            out[head * size + i] = as_stored(total[i] / weights, like)


_normed, _rotated, _attended = compiled(_normed), compiled(_rotated), compiled(_attended)


def _exp(x: Any) -> Any:
    """e^x for x <= 0 to 2^-19 of itself, written so that a loop of it is vectorised."""
    x = max(x, np.float32(-87.0))
    steps = np.int32(np.float32(1.44269504) * x - np.float32(0.5))  # to the nearest, x <= 0
    r = x - np.float32(steps) * np.float32(0.69314718)
    series = np.float32(1 / 720)
    for term in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        series = series * r + np.float32(term)
    return series * low(np.uint32(np.uint32(steps + 127) << 7))  # 2^steps by its bits


_exp = compiled(_exp)


def _attended_rows(
    q: Any, keys: Any, values: Any, mask: Any, length: int, lo: int, hi: int, out: Any
) -> None:
    """Attention of the rows lo..hi; q [R, Hq, D], out [R, Hq * D].

    mask [R, S]: of the last S slots, 0 for those a row sees and -inf for others. Both products are
    `_panels`: keys and values are widened into panels once for all rows and heads of a group.
    """
    like, none = q[0, 0, 0], np.empty(0, np.float32)
    size, rows = q.shape[2], hi - lo
    groups = q.shape[1] // keys.shape[0]
    scale = np.float32(1 / math.sqrt(size))
    free, seen = length - mask.shape[1], mask.shape[1]
    blocks, sides = (length + PANEL - 1) // PANEL, (size + PANEL - 1) // PANEL
    turned = np.zeros((blocks, size, PANEL), np.float32)  # slots side by side
    plain = np.zeros((sides, blocks * PANEL, PANEL), np.float32)  # a slot's numbers side by side
    query = np.empty((rows * groups, size), np.float32)
    scores = np.empty((rows * groups, blocks * PANEL), np.float32)
    total = np.empty((rows * groups, size), np.float32)
    for kv in range(keys.shape[0]):
        for slot in range(length):
            k, v, target = keys[kv, slot], values[kv, slot], turned[slot // PANEL]
            for i in range(size):
                target[i, slot % PANEL] = value_of(k[i])
            for side in range(sides):
                line, left = plain[side, slot], side * PANEL
                for i in range(min(PANEL, size - left)):
                    line[i] = value_of(v[left + i])
        for row in range(rows):
            for group in range(groups):
                asked, x = query[row * groups + group], q[lo + row, kv * groups + group]
                for i in range(size):
                    asked[i] = value_of(x[i]) * scale
        _panels(turned, query, none, scores, 0, blocks)
        for row in range(rows):
            hidden = mask[lo + row]
            for group in range(groups):
                p = scores[row * groups + group]
                for j in range(seen):
                    p[free + j] += hidden[j]
                top = np.float32(-np.inf)
                for slot in range(length):
                    top = max(top, p[slot])
                for slot in range(length):
                    p[slot] = _exp(p[slot] - top)
                for j in range(seen):  # e^-87 is not nothing: what is hidden weighs 0
                    if hidden[j] < np.float32(0):
                        p[free + j] = np.float32(0)
                weights = np.float32(0)
                for slot in range(length):
                    weights += p[slot]
                for slot in range(length):
                    p[slot] /= weights
                for slot in range(length, p.shape[0]):
                    p[slot] = np.float32(0)
        _panels(plain, scores, none, total, 0, sides)
        for row in range(rows):
            for group in range(groups):
                weighted, left = total[row * groups + group], (kv * groups + group) * size
                target = out[lo + row, left : left + size]
                for i in range(size):
                    target[i] = as_stored(weighted[i], like)


_attended_rows = compiled(_attended_rows)


def _attend_rows(
    q: Any, keys: Any, values: Any, mask: Any, length: int, out: Any, parts: int
) -> None:
    rows = q.shape[0]  # not heads: three of them would not halve
    if parts == 1:
        _attended_rows(q, keys, values, mask, length, 0, rows, out)
        return
    for part in prange(parts):
        lo, hi = rows * part // parts, rows * (part + 1) // parts
        _attended_rows(q, keys, values, mask, length, lo, hi, out)


attend_rows = compiled(_attend_rows, parallel=True)


def _attend(q: Any, keys: Any, values: Any, length: int, out: Any, parts: int) -> None:
    heads = q.shape[0]
    if parts == 1:
        _attended(q, keys, values, length, 0, heads, out)
        return
    for part in prange(parts):
        _attended(q, keys, values, length, heads * part // parts, heads * (part + 1) // parts, out)


attend = compiled(_attend, parallel=True)


def _add(x: Any, y: Any) -> None:
    """x += y."""
    for i in range(x.shape[0]):
        x[i] = as_stored(value_of(x[i]) + value_of(y[i]), x[i])


def _gated(gate_up: Any, out: Any) -> None:
    """out [n] = silu(gate) * up of gate_up [2 n]."""
    count, like, one = out.shape[0], out[0], np.float32(1)
    gates, ups = gate_up[:count], gate_up[count:]
    for i in range(count):
        x = value_of(gates[i])
        e = _exp(-abs(x))
        act = rounded(x * (one if x >= np.float32(0) else e) / (one + e), like)
        out[i] = as_stored(act * value_of(ups[i]), like)


_add, _gated = compiled(_add), compiled(_gated)


def _add_low_rank(x: Any, a: Any, b: Any, masks: Any, y: Any, parts: int) -> None:
    """y += x a^T b^T on the rows `masks`; a, b in panels, rank filled up to whole panels."""
    count, like, none = masks.shape[0], y[0, 0], np.empty(0, np.float32)
    chosen = np.empty((count, x.shape[1]), np.float32)
    for row in range(count):
        for k in range(x.shape[1]):
            chosen[row, k] = value_of(x[masks[row], k])
    inner = np.empty((count, a.shape[0] * PANEL), np.float32)
    more = np.empty((count, y.shape[1]), np.float32)
    product(a, chosen, none, inner, parts)
    product(b, inner, none, more, parts)
    for row in range(count):
        target = y[masks[row]]
        for n in range(target.shape[0]):
            target[n] = as_stored(value_of(target[n]) + rounded(more[row, n], like), like)


_add_low_rank = compiled(_add_low_rank)


def _gate(gate_up: Any, out: Any, parts: int) -> None:
    rows = out.shape[0]
    if parts == 1 or rows == 1:
        for row in range(rows):
            _gated(gate_up[row], out[row])
        return
    for row in prange(rows):
        _gated(gate_up[row], out[row])


gate = compiled(_gate, parallel=True)


def _attention_half(
    hidden: Any,
    attn_norm: Any,
    qkv: Any,
    qkv_bias: Any,
    q_norm: Any,
    k_norm: Any,
    o: Any,
    none: Any,
    low_rank: Any,
    masks: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    mask: Any,
    at: int,
    count: int,
    eps: float,
    parts: int,
) -> None:
    """hidden [R, H] += attention; the arguments are those of `_layer`."""
    rows, size, kv_heads = hidden.shape[0], cos.shape[1], keys.shape[0]
    normed = np.empty_like(hidden)
    heads = np.empty((rows, (count + 2 * kv_heads) * size), hidden.dtype)
    for row in range(rows):
        _normed(hidden[row], attn_norm, eps, normed[row])
    product(qkv, normed, qkv_bias, heads, parts)
    if masks.shape[0] > 0:
        _add_low_rank(normed, low_rank[0], low_rank[1], masks, heads, parts)
    split = heads.reshape(rows, -1, size)  # [R, Hq + 2 Hkv, D]
    queries = np.empty((rows, count, size), hidden.dtype)
    for row in range(rows):
        for head in range(count + kv_heads):
            x = split[row, head]
            if q_norm.shape[0] > 0:
                _normed(x, q_norm if head < count else k_norm, eps, x)
            target = queries[row, head] if head < count else keys[head - count, at + row]
            _rotated(x, cos[row], sin[row], target)
        for head in range(kv_heads):
            values[head, at + row] = split[row, count + kv_heads + head]
    out = np.empty((rows, count * size), hidden.dtype)
    if rows == 1:
        attend(queries[0], keys, values, at + 1, out[0], parts)
    else:
        attend_rows(queries, keys, values, mask, at + rows, out, parts)
    product(o, out, none, normed, parts)
    if masks.shape[0] > 0:
        _add_low_rank(out, low_rank[2], low_rank[3], masks, normed, parts)
    for row in range(rows):
        _add(hidden[row], normed[row])


def _mlp_half(
    hidden: Any,
    mlp_norm: Any,
    gate_up: Any,
    down: Any,
    none: Any,
    low_rank: Any,
    masks: Any,
    width: int,
    eps: float,
    parts: int,
) -> None:
    """hidden [R, H] += MLP; the arguments are those of `_layer`."""
    rows = hidden.shape[0]
    normed = np.empty_like(hidden)
    for row in range(rows):
        _normed(hidden[row], mlp_norm, eps, normed[row])
    inner = np.empty((rows, 2 * width), hidden.dtype)
    product(gate_up, normed, none, inner, parts)
    if masks.shape[0] > 0:
        _add_low_rank(normed, low_rank[4], low_rank[5], masks, inner, parts)
    active = np.empty((rows, width), hidden.dtype)
    gate(inner, active, parts)
    product(down, active, none, normed, parts)
    if masks.shape[0] > 0:
        _add_low_rank(active, low_rank[6], low_rank[7], masks, normed, parts)
    for row in range(rows):
        _add(hidden[row], normed[row])


attention_half, mlp_half = compiled(_attention_half), compiled(_mlp_half)


def _layer(
    hidden: Any,
    attn_norm: Any,
    qkv: Any,
    qkv_bias: Any,
    q_norm: Any,
    k_norm: Any,
    o: Any,
    mlp_norm: Any,
    gate_up: Any,
    down: Any,
    none: Any,
    low_rank: Any,
    masks: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    mask: Any,
    at: int,
    count: int,
    width: int,
    eps: float,
    parts: int,
) -> None:
    """One layer on hidden [R, H], in place; the new K/V go to slots `at`.. of [Hkv, slots, D].

    As `tidar_ref.model.Layer`; an empty q_norm, k_norm or bias is none. cos, sin [R, D]; mask
    [R, S] float32, of the last S slots 0 for those a row sees and -inf for others; for one row
    all are seen. count: query heads; width: of the MLP. low_rank: A and B of an adapter beside
    qkv, o, gate_up and down, for the rows `masks`.
    """
    attention_half(
        hidden, attn_norm, qkv, qkv_bias, q_norm, k_norm, o, none, low_rank, masks, cos, sin,
        keys, values, mask, at, count, eps, parts,
    )  # fmt: skip
    mlp_half(hidden, mlp_norm, gate_up, down, none, low_rank, masks, width, eps, parts)


layer = compiled(_layer)


class Unavailable(Exception):
    """Why the compiled kernels cannot be used here; the message goes into the route's name."""


@functools.cache
def start(dtype: torch.dtype) -> None:
    """Load the thread pool and compile (or fetch from numba's cache) the products of `dtype`, once.

    Raises Unavailable if the OpenMP layer is missing or another layer already runs.
    """
    numba.config.THREADING_LAYER = "omp"
    began = time.perf_counter()
    misses = sum(layer.stats.cache_misses.values())
    try:
        _smallest_layer(dtype)
        threads = numba.threading_layer()
    except (ValueError, NumbaError, OSError) as error:
        raise Unavailable(f"numba failed: {str(error).splitlines()[0]}") from error
    if threads != "omp":
        raise Unavailable(f"numba runs on its {threads} threads")
    if sum(layer.stats.cache_misses.values()) > misses:
        spent = time.perf_counter() - began
        print(f"compiled CPU kernels in {spent:.0f} s, kept for later runs", file=sys.stderr)


def _smallest_layer(dtype: torch.dtype) -> None:
    """Call `layer` and through it every kernel, with one head of two numbers."""

    def zeros(*shape: int) -> np.ndarray:
        return view(torch.zeros(*shape, dtype=dtype))

    def weight(outputs: int) -> np.ndarray:
        return packed(torch.zeros(outputs, 2, dtype=dtype))

    two, none, cache = zeros(2), zeros(0), zeros(1, 1, 2)
    attention = (two, weight(6), none, none, none, weight(2))
    mlp = (two, weight(4), weight(2), none)
    adapter = ((packed(torch.zeros(0, 2, dtype=dtype)),) * 8, np.zeros(0, np.int64))
    rotary, mask = (zeros(1, 2), zeros(1, 2)), np.zeros((1, 1), np.float32)
    cached = (cache, zeros(1, 1, 2), mask, 0)
    layer(zeros(1, 2), *attention, *mlp, *adapter, *rotary, *cached, 1, 2, 1e-5, parts())


def parts() -> int:
    """Threads to use now: torch's number, so that `torch.set_num_threads` rules both."""
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
    return wanted


def view(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as numpy: float32, or bfloat16 bits as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def packed(weight: Tensor) -> np.ndarray:
    """A weight [out, in] in panels of 16 outputs, zeros past the last: float32 [panels, in, 16], or
    uint32 [panels, in / 2, 16] with two bfloat16 each."""
    weight = weight.detach()
    outputs, inner = weight.shape
    count = (outputs + PANEL - 1) // PANEL
    each = 2 if weight.dtype == torch.bfloat16 else 1
    whole = weight.new_zeros(count, inner // each, PANEL, each)
    # A view of the target, in the order of the source: packed by one copy.
    target = whole.permute(0, 2, 1, 3)
    source = weight.view(outputs, inner // each, each)
    full = outputs // PANEL
    target[:full] = source[: full * PANEL].view(full, PANEL, inner // each, each)
    target[full:, : outputs - full * PANEL] = source[full * PANEL :]
    flat = whole.view(count, inner // each, PANEL * each)
    return (flat.view(torch.uint32) if each == 2 else flat).numpy()


def _packed_adapter(
    low_rank: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> tuple[np.ndarray, ...]:
    """A and B of qkv, o, gate_up and down in panels; the rank is filled up to whole panels."""
    found = []
    for name in ("qkv", "o", "gate_up", "down"):
        a, b = (part.to(dtype) for part in low_rank[name])
        more = -a.shape[0] % PANEL
        found += [F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))]
    return tuple(packed(part.contiguous()) for part in found)


def fits(weight: Tensor) -> bool:
    """Whether the kernels take this weight: on the CPU, by rows, pairs complete."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.shape[1] % 2 == 0
    )


def make_product(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The product with this weight, or None if the kernels do not take it."""
    return Product(weight, bias) if fits(weight) else None


class Product:
    """x [rows, in] -> x w^T + bias [rows, out] in the weight's dtype. Keeps a copy of the weight.

    A copy of a module is left without, until prepared itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.outputs = weight.shape[0]
        self.weight = packed(weight)
        self.bias = view(weight.new_empty(0) if bias is None else bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self.outputs)
        product(self.weight, view(x.contiguous()), self.bias, view(y), parts())
        return y

    def __deepcopy__(self, memo: dict) -> None:
        return None


class FewRows:
    """All layers of a model for few new tokens of one sequence. Shares its products' weights.

    mark: called where a layer begins, between its halves and where it ends (`bench.slots.split`);
    the halves are then called one by one.
    """

    mark: Callable[[], None] | None = None

    def __init__(self, model: Transformer) -> None:
        config = model.config
        self.sizes = config.num_heads, config.intermediate_size, config.norm_eps
        none = view(model.embed.weight.new_empty(0))
        nothing = (packed(model.embed.weight.new_empty(0, 2)),) * 8
        self.no_rows = np.zeros(0, np.int64)
        self.layers = [
            (
                view(layer.attn_norm.weight),
                layer.qkv.kernel.weight,
                layer.qkv.kernel.bias,
                none if layer.q_norm is None else view(layer.q_norm.weight),
                none if layer.k_norm is None else view(layer.k_norm.weight),
                layer.o.kernel.weight,
                view(layer.mlp_norm.weight),
                layer.gate_up.kernel.weight,
                layer.down.kernel.weight,
                none,
                _packed_adapter(layer.low_rank, model.dtype) if layer.low_rank else nothing,
            )
            for layer in model.layers
        ]

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        new_mask: Tensor | None,
        taps: dict[int, Tensor] | None = None,
        is_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden [Q, H] -> [Q, H], in place; cos, sin [Q, D]. Writes K/V behind the committed ones.

        new_mask [Q, S] as in `tidar_ref.model.attention_bias`; None for one token. taps as in
        `Transformer.forward`. is_mask [Q]: rows on which an attached mask adapter acts.
        """
        width = hidden.shape[0]
        at = cache.room_for(width)
        mask = torch.zeros(width, width if new_mask is None else new_mask.shape[-1])
        if new_mask is not None:
            mask.masked_fill_(~new_mask, float("-inf"))
        rows, threads, seen = view(hidden), parts(), mask.numpy()
        rotary = view(cos), view(sin)
        masks = self.no_rows if is_mask is None else is_mask.nonzero()[:, 0].numpy()
        keys, values = view(cache.k)[:, 0], view(cache.v)[:, 0]  # [layers, Hkv, slots, D]
        for index, weights in enumerate(self.layers):
            if taps is not None:
                taps[index] = hidden.clone()[None]
            cached = keys[index], values[index], seen, at
            if self.mark is None:
                layer(rows, *weights, masks, *rotary, *cached, *self.sizes, threads)
            else:
                self._halves(rows, weights, (masks, *rotary, *cached), threads)
        if taps is not None:
            taps[len(self.layers)] = hidden.clone()[None]
        return hidden

    def _halves(self, rows: np.ndarray, weights: tuple, rest: tuple, threads: int) -> None:
        """The same layer, marked."""
        assert self.mark is not None
        (*attention, mlp_norm, gate_up, down, none, low_rank), masks = weights, rest[0]
        count, width, eps = self.sizes
        self.mark()
        attention_half(rows, *attention, none, low_rank, *rest, count, eps, threads)
        self.mark()
        mlp_half(rows, mlp_norm, gate_up, down, none, low_rank, masks, width, eps, threads)
        self.mark()

    def __deepcopy__(self, memo: dict) -> None:
        return None
