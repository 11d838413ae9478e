"""What the device said while each job of a width record ran: telemetry in job windows. No torch.

A job's window is all its visits with what lies between them (warm-up, captures, random numbers), so
it tells clocks, throttling and strangers, not the power of one step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.slots.record import WINDOWS
from bench.store import TELEMETRY
from bench.telemetry.summary import CellTelemetry, Stat, read_lines, summarise

Row = tuple[str, ...]
HEAD = ("job", "s", "samples", "SM clock MHz, median [p5, p95]", "power W", "SM active",
        "DRAM active", "memory GB", "foreign processes", "clock reasons")  # fmt: skip


def job_telemetry(folder: Path) -> dict[str, CellTelemetry]:
    """Job -> counters in its windows; empty where nobody watched."""
    lines = read_lines(folder / TELEMETRY)
    samples = [line for line in lines if line["kind"] == "sample"]
    interval = max((line["interval_s"] for line in lines if line["kind"] == "start"), default=0.0)
    spans: dict[str, list[tuple[float, float]]] = {}
    for window in _windows(folder):
        spans.setdefault(window["job"], []).append((window["began"], window["ended"]))
    return {job: summarise(samples, mine, interval) for job, mine in spans.items() if samples}


def rows(folder: Path) -> list[Row]:
    """Table rows under `HEAD`; a counter that gave nothing stays empty."""
    return [_row(job, cell) for job, cell in job_telemetry(folder).items()]


def _windows(folder: Path) -> list[dict[str, Any]]:
    path = folder / WINDOWS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _row(job: str, cell: CellTelemetry) -> Row:
    clock = cell.stats.get("sm_clock_mhz")
    reasons = ", ".join(f"{name} {share:.0%}" for name, share in cell.clock_reasons.items())
    return (
        job,
        f"{cell.seconds:.1f}",
        str(cell.samples),
        f"{clock.median:.0f} [{clock.p5:.0f}, {clock.p95:.0f}]" if clock else "",
        _median(cell.stats, ("power_instant_w", "power_w")),
        _median(cell.stats, ("sm_active",), percent=True),
        _median(cell.stats, ("dram_active",), percent=True),
        _median(cell.stats, ("memory_used_bytes",), scale=1e-9),
        "" if cell.foreign_processes is None else str(cell.foreign_processes),
        reasons,
    )


def _median(
    stats: Mapping[str, Stat], names: tuple[str, ...], *, scale: float = 1.0, percent: bool = False
) -> str:
    stat = next((stats[name] for name in names if name in stats), None)
    if stat is None:
        return ""
    return f"{stat.median:.1%}" if percent else f"{stat.median * scale:.4g}"
