"""Validity flags: what speaks against a cell, from the record alone.

A flag says which of a cell's numbers it spoils. A spoiled number is shown with a mark, and is not
compared: neither it nor anything divided by it counts as a measured difference. A flag that spoils
nothing is a statement ("no p90 from 14 samples", "nobody looked at the clocks"). Pure arithmetic
on the parts of a record; no clock, no torch. What each flag means in words: docs/telemetry.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.records import Measurement
from bench.store import RunRecord, planned_keys
from bench.telemetry.summary import SHORTEST_WINDOW_S, Cell, CellTelemetry, RunTelemetry
from bench.telemetry.summary import summarise_run as telemetry_of_lines

# Seconds and steps; joules; grades; tokens and forwards. tokens/s and speedup are speed and counts.
SPEED, ENERGY, SCORE, COUNTS = "speed", "energy", "score", "counts"
PERCENTILES = {90: 64, 99: 662}  # samples below which a percentile is not told
CLOCK_MOVES = 0.03  # of the median; baselines differ between 2 and 3 %
THROTTLE_REASONS = (
    "hw_slowdown",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
)
# The counters a GPU cell needs before "not throttled, steady, alone" can be said at all.
WATCHED = ("clock_reasons", "sm_clock_mhz", "foreign_processes", "energy_j")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """`name` is one of FLAGS; `reason` has the numbers; `spoils` the kinds of number."""

    name: str
    reason: str
    spoils: tuple[str, ...] = ()


FLAGS = (
    "throttled",
    "clock_drift",
    "foreign_process",
    "too_few_samples",
    "counter_unavailable",
    "eos_never_reached",
    "window_too_short",
    "interrupted",
    "resumed",
)


def percentile(samples: Sequence[float], q: int) -> float | None:
    """The q-th percentile (90 or 99) by nearest rank, in the samples' unit; None if too few."""
    if len(samples) < PERCENTILES[q]:
        return None
    return sorted(samples)[math.ceil(q / 100 * len(samples)) - 1]


def telemetry_of(record: RunRecord) -> RunTelemetry:
    """The record's telemetry, cut to its cells; empty where nobody watched."""
    return telemetry_of_lines(record.telemetry, record.measurements, record.sessions)


def flags_of(
    record: RunRecord, watched: RunTelemetry | None = None
) -> dict[Cell, tuple[Flag, ...]]:
    """The flags of every (decoder, task) cell of the record, in the order of FLAGS."""
    watched = watched or telemetry_of(record)
    planned = planned_keys(record.header)
    clock = _run_clock(watched)
    return {
        (decoder, task): cell_flags(
            rows=[r for r in record.measurements if (r.decoder, r.task) == (decoder, task)],
            planned=sum((key[0], key[1]) == (decoder, task) for key in planned),
            stopping=record.header.profile["stopping"],
            sessions=_sessions_of(record, (decoder, task)),
            seen=watched.cells.get((decoder, task)),
            run=watched,
            run_clock_mhz=clock,
            on_gpu=record.header.device == "cuda",
        )
        for decoder in record.header.decoders
        for task in record.header.problems
    }


def cell_flags(
    *,
    rows: Sequence[Measurement],
    planned: int,
    stopping: str,
    sessions: int,
    seen: CellTelemetry | None,
    run: RunTelemetry,
    run_clock_mhz: float | None,
    on_gpu: bool,
) -> tuple[Flag, ...]:
    """One cell's flags. `sessions` counts the processes its rows come from."""
    found = [
        *(_device_flags(seen, run_clock_mhz) if seen else ()),
        *_sample_flags(rows),
        *_unavailable(seen, run, on_gpu),
        *_eos(rows, stopping),
        *(_window(seen) if seen else ()),
    ]
    if len(rows) < planned:
        found.append(
            Flag(
                name="interrupted",
                reason=f"{len(rows)} of {planned} generations",
                spoils=(SPEED, ENERGY, SCORE, COUNTS),
            )
        )
    if sessions > 1:
        found.append(
            Flag(
                name="resumed",
                reason=f"measured by {sessions} processes, one after the other",
                spoils=(SPEED, ENERGY),
            )
        )
    return tuple(found)


def _device_flags(seen: CellTelemetry, run_clock_mhz: float | None) -> list[Flag]:
    """What the device's counters say against the cell's times."""
    found = []
    slowed = {name: seen.clock_reasons[name] for name in THROTTLE_REASONS
              if name in seen.clock_reasons}  # fmt: skip
    if slowed:
        shares = ", ".join(f"{name} in {share:.0%} of samples" for name, share in slowed.items())
        found.append(Flag(name="throttled", reason=shares, spoils=(SPEED, ENERGY)))
    clock = seen.stats.get("sm_clock_mhz")
    if clock and clock.median > 0:
        spread = (clock.p95 - clock.p5) / clock.median
        away = abs(clock.median / run_clock_mhz - 1) if run_clock_mhz else 0.0
        if max(spread, away) > CLOCK_MOVES:
            reason = (
                f"SM clock {clock.p5:.0f} to {clock.p95:.0f} MHz in this cell (5th to 95th "
                f"percentile), median {clock.median:.0f}"
                + (f", {run_clock_mhz:.0f} over the run" if run_clock_mhz else "")
            )
            found.append(Flag(name="clock_drift", reason=reason, spoils=(SPEED, ENERGY)))
    if seen.foreign_processes:
        found.append(
            Flag(
                name="foreign_process",
                reason=f"{seen.foreign_processes} other compute process(es) on the device",
                spoils=(SPEED, ENERGY),
            )
        )
    return found


def _sample_flags(rows: Sequence[Measurement]) -> list[Flag]:
    missing = [f"p{q} needs {need}" for q, need in PERCENTILES.items() if len(rows) < need]
    if not missing:
        return []
    return [Flag(name="too_few_samples", reason=f"{len(rows)} samples; {', '.join(missing)}")]


def _unavailable(seen: CellTelemetry | None, run: RunTelemetry, on_gpu: bool) -> list[Flag]:
    """What was not watched; says why, and spoils nothing: absent numbers are absent already."""
    if not run.counters:
        why = "; ".join(f"{name}: {reason}" for name, reason in run.absent.items())
        return [Flag(name="counter_unavailable", reason=why or "no telemetry was recorded")]
    if seen is None or not seen.samples:
        return [Flag(name="counter_unavailable", reason="no sample lies in this cell's windows")]
    missing = {name: "no value" for name in WATCHED if on_gpu and name not in run.counters}
    missing = {**missing, **run.absent}
    if seen.energy.source is None and "energy" not in missing:
        missing["energy"] = seen.energy.reason or "no value"
    if not missing:
        return []
    why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    return [Flag(name="counter_unavailable", reason=why)]


def _eos(rows: Sequence[Measurement], stopping: str) -> list[Flag]:
    """Every text was cut: scores are of torsos, and what follows an answer inflates acceptance.

    A run of fixed length ignores the end of sequence on purpose and is not flagged.
    """
    if stopping == "fixed" or not rows or any(row.finish != "length" for row in rows):
        return []
    reason = f"all {len(rows)} outputs were cut by the length limit"
    return [Flag(name="eos_never_reached", reason=reason, spoils=(SCORE, COUNTS))]


def _window(seen: CellTelemetry) -> list[Flag]:
    """The counters move every 0.1 s and power is a mean of a second: short windows blur."""
    mean = seen.seconds / seen.windows if seen.windows else 0.0
    if seen.energy.source is None or mean >= SHORTEST_WINDOW_S:
        return []
    reason = (
        f"{seen.windows} windows of {mean:.1f} s in the mean; {SHORTEST_WINDOW_S:.0f} s are needed"
    )
    return [Flag(name="window_too_short", reason=reason, spoils=(ENERGY,))]


def _run_clock(watched: RunTelemetry) -> float | None:
    """Median over the cells of their median SM clock, MHz."""
    clocks = sorted(
        cell.stats["sm_clock_mhz"].median
        for cell in watched.cells.values()
        if "sm_clock_mhz" in cell.stats
    )
    return clocks[len(clocks) // 2] if clocks else None


def _sessions_of(record: RunRecord, cell: Cell) -> int:
    """From how many processes the cell's rows come; the file's order is the order of measuring."""
    borders = [session.get("already_done", 0) for session in record.sessions]
    numbers = {
        sum(index >= border for border in borders)
        for index, row in enumerate(record.measurements)
        if (row.decoder, row.task) == cell
    }
    return max(1, len(numbers))


def spoilers(
    kinds: Sequence[str], cells: Sequence[Cell], flags: Mapping[Cell, Sequence[Flag]]
) -> tuple[str, ...]:
    """Names of the flags that spoil a number of these kinds made from these cells; () is clean."""
    names = [flag.name for cell in cells for flag in flags.get(cell, ())
             if set(kinds) & set(flag.spoils)]  # fmt: skip
    return tuple(dict.fromkeys(names))


class Marks:
    """Letters for the flags of one page: `mark` puts them on numbers, `notes` explains them."""

    def __init__(self, flags: Mapping[Cell, Sequence[Flag]]) -> None:
        self.flags = flags
        self._letters: dict[str, str] = {}

    def mark(self, text: str, kinds: Sequence[str], *cells: Cell) -> str:
        """`text` with the letters of what spoils it; an empty text stays empty."""
        names = spoilers(kinds, cells, self.flags) if text else ()
        for name in names:
            self._letters.setdefault(name, chr(ord("a") + len(self._letters)))
        return text + "".join(f" ({self._letters[name]})" for name in names)

    def notes(self) -> list[str]:
        """One line per letter used, then what was noted without spoiling a number."""
        lines = [
            f"- ({letter}) **{name}**, shown and not compared: {self._reasons(name)}"
            for name, letter in self._letters.items()
        ]
        rest = dict.fromkeys(flag.name for found in self.flags.values() for flag in found)
        return lines + [
            f"- noted, {name}: {self._reasons(name)}" for name in rest if name not in self._letters
        ]

    def _reasons(self, name: str) -> str:
        """Each reason once, with its cells unless all share it."""
        cells: dict[str, list[Cell]] = {}
        for cell, found in self.flags.items():
            for flag in found:
                if flag.name == name:
                    cells.setdefault(flag.reason, []).append(cell)
        if len(cells) == 1 and len(next(iter(cells.values()))) == len(self.flags):
            return next(iter(cells))
        parts = []
        for reason, mine in cells.items():
            names = ", ".join(f"{task} {decoder}" for decoder, task in mine)
            parts.append(f"{names if len(mine) <= 3 else f'{len(mine)} cells'}: {reason}")
        return "; ".join(parts)


def lettered(marks: Marks) -> list[str]:
    """The notes of the letters that were put on numbers."""
    return [line for line in marks.notes() if line.startswith("- (")]
