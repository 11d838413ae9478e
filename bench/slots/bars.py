"""The bars of fast decoding, answered from a width record. Arithmetic only, no torch.

Each names the captured steps it needs. A bar is passed or failed only by an interval that lies on
one side of it; what the record does not hold is said to be open, and static steps (a rehearsal)
answer nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import roofline
from bench.peaks import find_peak
from bench.slots.curves import Point
from bench.slots.record import OK, SlotsRecord
from tidar_ref.config import ModelConfig

KV = 1024
AR_SHARE, HOST_SHARE = 0.75, 0.02
STEP_BARS = (("qwen3-8b", 16, 1.25), ("qwen2.5-1.5b", 16, 1.35), ("qwen3-8b", 8, 1.1))


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: what, the limit, our value with its bounds (None where not measured), a verdict."""

    what: str
    limit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = "open: not measured"


def bars(record: SlotsRecord, found: Sequence[Point]) -> list[Bar]:
    """All bars of graphed steps on an H100, passed, failed or open."""
    out = [_floor_share(record, found)]
    for shape, block_len, limit in STEP_BARS:
        point = graphed(found, shape, "tidar", block_len)
        what = f"graphed dense TiDAR K={block_len} in graphed ar steps, {shape}, KV {KV}"
        out.append(
            _judged(
                _routed(what, point),
                f"at most {limit:g}",
                point.ratio.value,
                point.ratio.low,
                point.ratio.high,
                at_most=limit,
            )
            if point and point.ratio
            else Bar(what=what, limit=f"at most {limit:g}")
        )
    out += [_host_share(found, "ar", None), _host_share(found, "tidar", 16)]
    return out


def graphed(found: Sequence[Point], shape: str, name: str, block_len: int | None) -> Point | None:
    """The fastest captured step of a plain decoder at this shape, batch 1, KV 1024: any route."""
    mine = []
    for point in found:
        head, _, params = point.what.partition(":")
        words = set(params.split(","))
        plain = {w for w in words if not w.startswith("graphs=")}
        wanted = {f"block_len={block_len}"} if block_len else set()
        if (
            point.status == OK and point.captured and point.batch == 1 and point.kv_len == KV
            and head == name and plain == wanted and point.weights == f"random:{shape}"
            and point.latency
        ):  # fmt: skip
            mine.append(point)
    return min(mine, key=lambda p: p.latency.value if p.latency else 0.0, default=None)


def _routed(what: str, point: Point) -> str:
    return what if point.route == "sdpa" else f"{what} ({point.route})"


def _floor_share(record: SlotsRecord, found: Sequence[Point]) -> Bar:
    what = f"graphed ar at qwen3-8b, KV {KV}: share of the memory floor (published bandwidth)"
    limit = f"at least {AR_SHARE:.0%}"
    point, peak = graphed(found, "qwen3-8b", "ar", None), find_peak(_gpu(record))
    if point is None or point.latency is None or peak is None:
        return Bar(what=what, limit=limit)
    config = ModelConfig(**record.models[point.weights]["config"])
    cost = roofline.forward_cost(config, width=1, kv_len=KV, batch=1, dtype=point.dtype)
    seconds = cost.bytes / peak.bytes_per_s
    slow, fast = point.latency.high, point.latency.low
    return _judged(
        _routed(what, point),
        limit,
        seconds / point.latency.value,
        seconds / slow if slow else None,
        seconds / fast if fast else None,
        at_least=AR_SHARE,
    )


def _host_share(found: Sequence[Point], name: str, block_len: int | None) -> Bar:
    """Host clock over device events of the same steps, less 1: what the host adds."""
    label = name if block_len is None else f"{name} K={block_len}"
    what = f"host share of a graphed {label} step, qwen3-8b (host clock over events, less 1)"
    point = graphed(found, "qwen3-8b", name, block_len)
    if point is None or point.latency is None or point.host_s is None:
        return Bar(what=what, limit=f"under {HOST_SHARE:.0%}")
    share = point.host_s / point.latency.value - 1
    return Bar(
        what=_routed(what, point),
        limit=f"under {HOST_SHARE:.0%}",
        value=share,
        verdict=f"{'passed' if share < HOST_SHARE else 'failed'} (medians, no interval)",
    )


def _judged(
    what: str,
    limit: str,
    value: float,
    low: float | None,
    high: float | None,
    *,
    at_most: float = float("inf"),
    at_least: float = float("-inf"),
) -> Bar:
    if low is None or high is None:
        verdict = "open: one round gives no interval"
    elif high <= at_most and low >= at_least:
        verdict = "passed"
    elif low > at_most or high < at_least:
        verdict = "failed"
    else:
        verdict = "open: the interval holds the limit"
    return Bar(what=what, limit=limit, value=value, low=low, high=high, verdict=verdict)


def _gpu(record: SlotsRecord) -> str | None:
    return record.header.environment["gpu"]
