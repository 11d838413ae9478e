"""What the samples say about each cell (a decoder on a task): windows cut out, then arithmetic.

A window is one generation, or several of the same cell that followed each other without a pause.
Energy is the difference of the counter, read at both ends by interpolation; where the counter did
not answer it is the integral of power, and says so. Nothing is subtracted: the idle power stands
beside it. Pure arithmetic on lines already read; a value that cannot be had is None with a reason.
"""

from __future__ import annotations

import bisect
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import Measurement

Cell = tuple[str, str]  # decoder, task
Span = tuple[float, float]  # Unix seconds, begin and end

MERGE_GAP_S = 0.5  # a pause between two generations that is still the same window
SHORTEST_WINDOW_S = 5.0
LARGEST_GAP_S = 1.0  # without a sample for this long (or 3 intervals) energy is not told
# Counters whose mean, median and largest value are told; the rest of a sample has its own use.
DESCRIBED = (
    "gpu_util",
    "memory_util",
    "memory_used_bytes",
    "power_w",
    "power_instant_w",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "temperature_c",
    "sm_active",
    "sm_occupancy",
    "tensor_active",
    "tensor_half_active",
    "dram_active",
)


@dataclass(frozen=True, kw_only=True)
class Stat:
    """Of one counter's samples in a cell's windows; 5th and 95th percentile bound its drift."""

    mean: float
    median: float
    largest: float
    p5: float
    p95: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules over some windows; `source` is energy_counter, power_integral, rapl or None."""

    joules: float | None
    source: str | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class CellTelemetry:
    """One cell. `clock_reasons` maps a reason's name to the share of samples that had it."""

    windows: int
    seconds: float
    samples: int
    stats: dict[str, Stat]
    clock_reasons: dict[str, float]
    foreign_processes: int | None
    energy: Energy


@dataclass(frozen=True, kw_only=True)
class RunTelemetry:
    """All cells; `counters` answered at least once, `absent` tells why others did not."""

    cells: dict[Cell, CellTelemetry]
    idle: CellTelemetry | None
    counters: frozenset[str]
    absent: dict[str, str]


def read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The whole lines of a telemetry file in order of time; () where there is none.

    A line that a killed sampler left torn is skipped: the samples around it stand for themselves.
    """
    if not path.exists():
        return ()
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("t"), int | float):
            lines.append(values)
    return tuple(sorted(lines, key=lambda values: values["t"]))


def windows(measurements: Iterable[Measurement]) -> dict[Cell, list[Span]]:
    """Each cell's windows; a measurement without its times (older records) gives none."""
    timed = [
        (row.began_at, row.ended_at, (row.decoder, row.task))
        for row in measurements
        if row.began_at is not None and row.ended_at is not None
    ]
    found: dict[Cell, list[Span]] = {}
    previous: Cell | None = None
    for begin, end, cell in sorted(timed):
        mine = found.setdefault(cell, [])
        if cell == previous and begin - mine[-1][1] <= MERGE_GAP_S:
            mine[-1] = (mine[-1][0], end)
        else:
            mine.append((begin, end))
        previous = cell
    return found


def summarise_run(
    lines: Sequence[Mapping[str, Any]],
    measurements: Iterable[Measurement],
    sessions: Sequence[Mapping[str, Any]] = (),
) -> RunTelemetry:
    """All cells that have times, and the idle windows the sessions noted."""
    samples = [line for line in lines if line["kind"] == "sample"]
    starts = [line for line in lines if line["kind"] == "start"]
    interval = max((line["interval_s"] for line in starts), default=0.0)
    absent: dict[str, str] = {}
    for line in lines:
        if line["kind"] == "start":
            absent = {**line["absent"], **absent}
        elif line["kind"] == "absent":
            absent.setdefault(line["counter"], line["reason"])
    idle = [
        (float(begin), float(end))
        for session in sessions
        if (pair := session.get("telemetry", {}).get("idle"))
        for begin, end in [pair]
    ]
    counters = {name for line in samples for name in line} - {"kind", "t"}
    return RunTelemetry(
        cells={
            cell: summarise(samples, spans, interval)
            for cell, spans in windows(measurements).items()
        },
        idle=summarise(samples, idle, interval) if idle else None,
        counters=frozenset(counters),
        absent=absent,
    )


def summarise(
    samples: Sequence[Mapping[str, Any]], spans: Sequence[Span], interval_s: float
) -> CellTelemetry:
    """The samples (in order of time) that lie in the spans, and the energy between their ends."""
    times = [line["t"] for line in samples]
    inside = [line for span in spans for line in samples[slice(*_range(times, span))]]
    stats = {name: stat for name in DESCRIBED if (stat := _stat(inside, name))}
    reasons = [line["clock_reasons"] for line in inside if "clock_reasons" in line]
    foreign = [line["foreign_processes"] for line in inside if "foreign_processes" in line]
    return CellTelemetry(
        windows=len(spans),
        seconds=sum(end - begin for begin, end in spans),
        samples=len(inside),
        stats=stats,
        clock_reasons=_shares(reasons),
        foreign_processes=max(foreign, default=None),
        energy=energy(samples, spans, interval_s),
    )


def _range(times: Sequence[float], span: Span) -> tuple[int, int]:
    return bisect.bisect_left(times, span[0]), bisect.bisect_right(times, span[1])


def _stat(lines: Sequence[Mapping[str, Any]], name: str) -> Stat | None:
    values = sorted(float(line[name]) for line in lines if name in line)
    if not values:
        return None
    last = len(values) - 1
    return Stat(
        mean=statistics.fmean(values),
        median=statistics.median(values),
        largest=values[-1],
        p5=values[round(0.05 * last)],
        p95=values[round(0.95 * last)],
        n=len(values),
    )


def _shares(bits: Sequence[int]) -> dict[str, float]:
    from bench.telemetry.nvml import reason_names

    names = [name for value in bits for name in reason_names(value)]
    return {name: names.count(name) / len(bits) for name in dict.fromkeys(names)}


def energy(
    samples: Sequence[Mapping[str, Any]], spans: Sequence[Span], interval_s: float
) -> Energy:
    """Joules over all spans by the best source that covers every one of them."""
    if not spans:
        return Energy(joules=None, source=None, reason="no generation has its times")
    largest_gap = max(LARGEST_GAP_S, 3 * interval_s)
    reason = "no energy counter answered"
    for source, name in (("energy_counter", "energy_j"), ("rapl", "rapl_energy_j")):
        points = [(line["t"], line[name]) for line in samples if name in line]
        if points:
            joules, reason = _by_counter(points, spans, largest_gap)
            if joules is not None:
                return Energy(joules=joules, source=source)
    powered = False
    # The instant field where it answers: the other power reading is a mean over a second.
    for name in ("power_instant_w", "power_w"):
        points = [(line["t"], line[name]) for line in samples if name in line]
        if points:
            powered = True
            joules, why = _by_power(points, spans, largest_gap)
            if joules is not None:
                return Energy(
                    joules=joules, source="power_integral", reason=f"{name} integrated: {reason}"
                )
            reason = why
    return Energy(
        joules=None,
        source=None,
        reason=reason if powered else f"{reason}, nor did power",
    )


def _around(
    points: Sequence[tuple[float, float]], times: Sequence[float], span: Span, largest_gap: float
) -> tuple[list[tuple[float, float]], str]:
    """The points within the span and the neighbours outside; [] with the reason if a gap shows."""
    first, last = bisect.bisect_right(times, span[0]) - 1, bisect.bisect_left(times, span[1])
    if first < 0 or last >= len(points):
        return [], "samples do not cover every window"
    chosen = list(points[first : last + 1])
    gap = max((b[0] - a[0] for a, b in zip(chosen, chosen[1:], strict=False)), default=0.0)
    if gap > largest_gap:
        return [], f"{gap:.1f} s without a sample in a window"
    return chosen, ""


def _at(points: Sequence[tuple[float, float]], t: float) -> float:
    """The value at t by a straight line between the two neighbours."""
    index = min(max(bisect.bisect_left([p[0] for p in points], t), 1), len(points) - 1)
    (t0, v0), (t1, v1) = points[index - 1], points[index]
    return v0 if t1 == t0 else v0 + (v1 - v0) * (t - t0) / (t1 - t0)


def _by_counter(
    points: Sequence[tuple[float, float]], spans: Sequence[Span], largest_gap: float
) -> tuple[float | None, str]:
    total, times = 0.0, [t for t, _ in points]
    for begin, end in spans:
        near, reason = _around(points, times, (begin, end), largest_gap)
        if len(near) < 2:
            return None, reason or "samples do not cover every window"
        if any(b[1] < a[1] for a, b in zip(near, near[1:], strict=False)):
            return None, "the energy counter went back (driver reloaded) in a window"
        total += _at(near, end) - _at(near, begin)
    if total <= 0:  # some virtual machines show a counter that stands still
        return None, "the energy counter did not move"
    return total, ""


def _by_power(
    points: Sequence[tuple[float, float]], spans: Sequence[Span], largest_gap: float
) -> tuple[float | None, str]:
    """Trapezoids between the samples, the ends interpolated."""
    total, times = 0.0, [t for t, _ in points]
    for begin, end in spans:
        near, reason = _around(points, times, (begin, end), largest_gap)
        if len(near) < 2:
            return None, reason or "samples do not cover every window"
        line = [(begin, _at(near, begin))]
        line += [point for point in near if begin < point[0] < end]
        line += [(end, _at(near, end))]
        total += sum(
            (b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(line, line[1:], strict=False)
        )
    return total, ""
