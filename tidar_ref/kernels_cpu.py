"""Matrix products of few rows, and a whole layer of one row, compiled by numba for the CPU.

torch's own products on two AVX2 cores read the weights at about half of what memory delivers for
one row, and fall behind much further between 2 and 72 rows, where TiDAR's steps lie. Here every
weight is read once, row by row as it is stored: one dot product per output for one row, blocks of
4 outputs x 3 rows held in registers for more. Sums are float32 for either dtype; a bfloat16 result
is rounded once. A layer of one row (an AR step) is five parallel sections instead of some thirty
torch operations, rounding bfloat16 where those do; a layer of few rows (a TiDAR step) is the same,
with a mask among the new tokens.

Threads come from OpenMP: numba's "omp" layer binds to the runtime torch has loaded, so both share
one pool. Other layers would bring a second pool that competes for the cores; they are not used.

Importing this module imports numba (half a second); `tidar_ref.linear` does it from `prepare`. The
first use on a machine compiles, which is kept in numba's cache (NUMBA_CACHE_DIR moves it).
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core.errors import NumbaError
from numba.extending import intrinsic, overload
from torch import Tensor

if TYPE_CHECKING:
    from tidar_ref.cache import KVCache
    from tidar_ref.model import Transformer

# Sums may be reordered and fused; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
DTYPES = (torch.float32, torch.bfloat16)
BLOCK = 32  # outputs whose weights stay in the L2 cache while all rows pass over them


def compiled(function: Callable, **options: Any) -> Callable:
    """njit with the compiled code kept on disk, or in memory only if no folder can be written."""
    try:
        return njit(cache=True, fastmath=FAST, **options)(function)
    except RuntimeError:  # numba: "no locator available"
        return njit(fastmath=FAST, **options)(function)


def chosen_by_type(stub: Callable) -> Callable[[Callable], Callable]:
    """numba's overload; it compares signatures, so the annotations have to go."""

    def register(choose: Callable) -> Callable:
        def typed(*arguments: Any) -> Callable:
            return _bare(choose(*arguments))

        typed.__signature__ = inspect.signature(_bare(choose))  # type: ignore[attr-defined]
        return overload(_bare(stub), jit_options={"fastmath": FAST})(typed)

    return register


def _bare(function: Callable) -> Callable:
    function.__annotations__ = {}
    return function


# Element access. A float32 array holds values, a uint16 array bfloat16 bits, a uint32 array two
# bfloat16 of one weight row (the even element in the low half).


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
    """float32 of the even bfloat16 in a uint32 pair, or of a uint16."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        i32 = ir.IntType(32)
        wide = builder.zext(args[0], i32) if args[0].type.width < 32 else args[0]
        return builder.bitcast(builder.shl(wide, ir.Constant(i32, 16)), ir.FloatType())

    return types.float32(pair), build


@intrinsic
def high(context: Any, pair: Any) -> Any:
    """float32 of the odd bfloat16 in a uint32 pair."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kept = builder.and_(args[0], ir.Constant(ir.IntType(32), 0xFFFF0000))
        return builder.bitcast(kept, ir.FloatType())

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


def _arranged(w: Any, x: Any) -> Any:
    """Rows x (float32) as `_outputs` wants them beside weights w; see the overload."""
    raise NotImplementedError


@chosen_by_type(_arranged)
def _arranged_for(w: Any, x: Any) -> Callable:
    if w.dtype == types.float32:
        return lambda w, x: x

    def split(w: Any, x: Any) -> Any:  # even elements first, then odd: a pair's halves
        half = w.shape[1]
        out = np.empty(x.shape, np.float32)
        for m in range(x.shape[0]):
            row, even, odd = x[m], out[m, :half], out[m, half:]
            for k in range(half):
                even[k] = row[2 * k]
                odd[k] = row[2 * k + 1]
        return out

    return split


def _outputs(w: Any, x: Any, bias: Any, y: Any, lo: int, hi: int) -> None:
    """y[:, lo:hi] = x w[lo:hi]^T + bias; an empty bias is none. See the overload."""
    raise NotImplementedError


@chosen_by_type(_outputs)
def _outputs_for(w: Any, x: Any, bias: Any, y: Any, lo: Any, hi: Any) -> Callable:
    return _outputs_float32 if w.dtype == types.float32 else _outputs_pairs


def _outputs_float32(w: Any, x: Any, bias: Any, y: Any, lo: int, hi: int) -> None:
    zero = np.float32(0)
    like = y[0, 0]
    rows, inner = x.shape
    biased = bias.shape[0] > 0
    if rows == 1:
        x0 = x[0]
        for n in range(lo, hi):
            wn = w[n]
            s = zero
            for k in range(inner):
                s += wn[k] * x0[k]
            if biased:
                s += value_of(bias[n])
            y[0, n] = as_stored(s, like)
        return
    sums = np.empty((3, 4), np.float32)
    for block in range(lo, hi, BLOCK):
        end = min(hi, block + BLOCK)
        for m in range(0, rows, 3):
            x0, x1, x2 = x[m], x[min(m + 1, rows - 1)], x[min(m + 2, rows - 1)]
            for n in range(block, end, 4):
                w0, w1 = w[n], w[min(n + 1, end - 1)]
                w2, w3 = w[min(n + 2, end - 1)], w[min(n + 3, end - 1)]
                a0 = a1 = a2 = a3 = zero
                b0 = b1 = b2 = b3 = zero
                c0 = c1 = c2 = c3 = zero
                for k in range(inner):
                    p, q, r = x0[k], x1[k], x2[k]
                    v = w0[k]
                    a0 += v * p
                    b0 += v * q
                    c0 += v * r
                    v = w1[k]
                    a1 += v * p
                    b1 += v * q
                    c1 += v * r
                    v = w2[k]
                    a2 += v * p
                    b2 += v * q
                    c2 += v * r
                    v = w3[k]
                    a3 += v * p
                    b3 += v * q
                    c3 += v * r
                sums[0, 0], sums[0, 1], sums[0, 2], sums[0, 3] = a0, a1, a2, a3
                sums[1, 0], sums[1, 1], sums[1, 2], sums[1, 3] = b0, b1, b2, b3
                sums[2, 0], sums[2, 1], sums[2, 2], sums[2, 3] = c0, c1, c2, c3
                for i in range(min(3, rows - m)):
                    for j in range(min(4, end - n)):
                        s = sums[i, j]
                        if biased:
                            s += value_of(bias[n + j])
                        y[m + i, n + j] = as_stored(s, like)


def _outputs_pairs(w: Any, x: Any, bias: Any, y: Any, lo: int, hi: int) -> None:
    zero = np.float32(0)
    like = y[0, 0]
    rows, half = x.shape[0], w.shape[1]
    biased = bias.shape[0] > 0
    if rows == 1:
        even, odd = x[0, :half], x[0, half:]
        for n in range(lo, hi):
            wn = w[n]
            s = zero
            for k in range(half):
                pair = wn[k]
                s += low(pair) * even[k] + high(pair) * odd[k]
            if biased:
                s += value_of(bias[n])
            y[0, n] = as_stored(s, like)
        return
    # More rows: widen a block of weights once, in the order of the split rows, then as float32.
    wide = np.empty((BLOCK, 2 * half), np.float32)
    none = np.empty(0, np.float32)
    out = np.empty((rows, BLOCK), np.float32)
    for block in range(lo, hi, BLOCK):
        count = min(BLOCK, hi - block)
        for n in range(count):
            wn, even, odd = w[block + n], wide[n, :half], wide[n, half:]
            for k in range(half):
                pair = wn[k]
                even[k] = low(pair)
                odd[k] = high(pair)
        _outputs(wide, x, none, out, 0, count)
        for m in range(rows):
            for n in range(count):
                s = out[m, n]
                if biased:
                    s += value_of(bias[block + n])
                y[m, block + n] = as_stored(s, like)


def _share(count: int, part: int, parts: int) -> tuple[int, int]:
    """The part-th of `parts` shares of 0..count, in whole fours."""
    fours = (count + 3) // 4
    return min(count, fours * part // parts * 4), min(count, fours * (part + 1) // parts * 4)


_share = compiled(_share)


def _product(w: Any, x: Any, bias: Any, y: Any, parts: int) -> None:
    """y = x w^T + bias on `parts` threads; x, y [rows, ...] float32 or bfloat16 bits."""
    rows, inner = x.shape
    values = np.empty((rows, inner), np.float32)
    for m in range(rows):
        for k in range(inner):
            values[m, k] = value_of(x[m, k])
    ready = _arranged(w, values)
    outputs = y.shape[1]
    if parts == 1:
        _outputs(w, ready, bias, y, 0, outputs)
        return
    for part in prange(parts):
        lo, hi = _share(outputs, part, parts)
        _outputs(w, ready, bias, y, lo, hi)


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

    mask [R, S]: of the last S slots, 0 for those a row sees and -inf for others. Keys and values
    are widened once, keys turned: slots then run along the vectors, so no sum crosses lanes.
    """
    like = q[0, 0, 0]
    heads, size = q.shape[1], q.shape[2]
    groups = heads // keys.shape[0]
    scale = np.float32(1 / math.sqrt(size))
    free, seen = length - mask.shape[1], mask.shape[1]
    wide, long = (size + 3) // 4 * 4, (length + 3) // 4 * 4
    turned, plain = np.zeros((wide, long), np.float32), np.zeros((long, size), np.float32)
    query, total = np.zeros(wide, np.float32), np.empty(size, np.float32)
    scores = np.empty(long, np.float32)
    for kv in range(keys.shape[0]):
        for slot in range(length):
            k, v, target = keys[kv, slot], values[kv, slot], plain[slot]
            for i in range(size):
                turned[i, slot] = value_of(k[i])
                target[i] = value_of(v[i])
        for row in range(lo, hi):
            hidden = mask[row]
            for head in range(kv * groups, (kv + 1) * groups):
                for i in range(size):
                    query[i] = value_of(q[row, head, i]) * scale
                    total[i] = np.float32(0)
                scores[:] = np.float32(0)
                for i in range(0, wide, 4):
                    q0, q1, q2, q3 = query[i], query[i + 1], query[i + 2], query[i + 3]
                    k0, k1, k2, k3 = turned[i], turned[i + 1], turned[i + 2], turned[i + 3]
                    for slot in range(long):
                        more = q0 * k0[slot] + q1 * k1[slot] + q2 * k2[slot] + q3 * k3[slot]
                        scores[slot] += more
                for j in range(seen):
                    scores[free + j] += hidden[j]
                top = np.float32(-np.inf)
                for slot in range(length):
                    top = max(top, scores[slot])
                weights = np.float32(0)
                for slot in range(length):
                    p = _exp(scores[slot] - top)
                    scores[slot] = p
                for j in range(seen):  # e^-87 is not nothing: what is hidden weighs 0
                    if hidden[j] < np.float32(0):
                        scores[free + j] = np.float32(0)
                for slot in range(length):
                    weights += scores[slot]
                for slot in range(length, long):
                    scores[slot] = np.float32(0)
                for slot in range(0, long, 4):
                    p0, p1 = scores[slot], scores[slot + 1]
                    p2, p3 = scores[slot + 2], scores[slot + 3]
                    v0, v1, v2, v3 = plain[slot], plain[slot + 1], plain[slot + 2], plain[slot + 3]
                    for i in range(size):
                        total[i] += p0 * v0[i] + p1 * v1[i] + p2 * v2[i] + p3 * v3[i]
                for i in range(size):
                    out[row, head * size + i] = as_stored(total[i] / weights, like)


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
    count, like = out.shape[0], out[0]
    for i in range(count):
        gate = value_of(gate_up[i])
        act = rounded(gate / (np.float32(1) + np.float32(math.exp(-gate))), like)
        out[i] = as_stored(act * value_of(gate_up[count + i]), like)


_add, _gated = compiled(_add), compiled(_gated)


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
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    mask: Any,
    at: int,
    eps: float,
    parts: int,
) -> None:
    """One layer on hidden [R, H], in place; the new K/V go to slots `at`.. of [Hkv, slots, D].

    As `tidar_ref.model.Layer`; an empty q_norm, k_norm or bias is none. cos, sin [R, D]; mask
    [R, S] float32, of the last S slots 0 for those a row sees and -inf for others; for one row
    all are seen.
    """
    rows, size, kv_heads = hidden.shape[0], cos.shape[1], keys.shape[0]
    normed = np.empty_like(hidden)
    heads = np.empty((rows, qkv.shape[0]), hidden.dtype)
    for row in range(rows):
        _normed(hidden[row], attn_norm, eps, normed[row])
    product(qkv, normed, qkv_bias, heads, parts)
    split = heads.reshape(rows, -1, size)  # [R, Hq + 2 Hkv, D]
    count = split.shape[1] - 2 * kv_heads
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
    for row in range(rows):
        _add(hidden[row], normed[row])
        _normed(hidden[row], mlp_norm, eps, normed[row])
    inner = np.empty((rows, gate_up.shape[0]), hidden.dtype)
    product(gate_up, normed, none, inner, parts)
    active = np.empty((rows, gate_up.shape[0] // 2), hidden.dtype)
    for row in range(rows):
        _gated(inner[row], active[row])
    product(down, active, none, normed, parts)
    for row in range(rows):
        _add(hidden[row], normed[row])


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
        return weight_view(torch.zeros(outputs, 2, dtype=dtype))

    two, none, cache = zeros(2), zeros(0), zeros(1, 1, 2)
    attention = (two, weight(6), none, none, none, weight(2))
    mlp = (two, weight(4), weight(2), none)
    rotary, mask = (zeros(1, 2), zeros(1, 2)), np.zeros((1, 1), np.float32)
    cached = (cache, zeros(1, 1, 2), mask, 0)
    layer(zeros(1, 2), *attention, *mlp, *rotary, *cached, 1e-5, parts())


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


def weight_view(weight: Tensor) -> np.ndarray:
    """A weight [out, in]: float32, or uint32 [out, in/2] with two bfloat16 each."""
    weight = weight.detach()
    return (weight.view(torch.uint32) if weight.dtype == torch.bfloat16 else weight).numpy()


def fits(weight: Tensor) -> bool:
    """Whether the kernels take this weight: on the CPU, by rows, pairs complete."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.shape[1] % 2 == 0
        and weight.data_ptr() % 4 == 0
    )


def make_product(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The product with this weight, or None if the kernels do not take it."""
    return Product(weight, bias) if fits(weight) else None


class Product:
    """x [rows, in] -> x w^T + bias [rows, out] in the weight's dtype. Shares the weight's memory.

    A copy of a module does not share it: it is left without, until prepared itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.outputs = weight.shape[0]
        self.weight = weight_view(weight)
        self.bias = view(weight.new_empty(0) if bias is None else bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self.outputs)
        product(self.weight, view(x.contiguous()), self.bias, view(y), parts())
        return y

    def __deepcopy__(self, memo: dict) -> None:
        return None


class FewRows:
    """All layers of a model for few new tokens of one sequence. Shares the weights' memory."""

    def __init__(self, model: Transformer) -> None:
        self.eps = model.config.norm_eps
        none = view(model.embed.weight.new_empty(0))
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
    ) -> Tensor:
        """hidden [Q, H] -> [Q, H], in place; cos, sin [Q, D]. Writes K/V behind the committed ones.

        new_mask [Q, S] as in `tidar_ref.model.attention_bias`; None for one token. taps as in
        `Transformer.forward`.
        """
        width = hidden.shape[0]
        at = cache.room_for(width)
        mask = torch.zeros(width, width if new_mask is None else new_mask.shape[-1])
        if new_mask is not None:
            mask.masked_fill_(~new_mask, float("-inf"))
        rows, threads, seen = view(hidden), parts(), mask.numpy()
        rotary = view(cos), view(sin)
        keys, values = view(cache.k)[:, 0], view(cache.v)[:, 0]  # [layers, Hkv, slots, D]
        for index, weights in enumerate(self.layers):
            if taps is not None:
                taps[index] = hidden.clone()[None]
            cached = keys[index], values[index], seen, at
            layer(rows, *weights, *rotary, *cached, self.eps, threads)
        if taps is not None:
            taps[len(self.layers)] = hidden.clone()[None]
        return hidden

    def __deepcopy__(self, memo: dict) -> None:
        return None
