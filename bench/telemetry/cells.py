"""Telemetry of the cells as numbers for tables: joules per token and answer, the device's columns.

Energy is that of whole generations, prefill included, and nothing is subtracted; the idle power
stands beside it. Tokens are kept output tokens, so work on rejected or cut tokens is paid for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.records import Measurement, ScoreRecord
from bench.store import RunRecord
from bench.telemetry.summary import Cell, CellTelemetry, RunTelemetry
from bench.validity import COUNTS, ENERGY, SCORE, SPEED, Flag, Marks

HEAD = (
    "task",
    "decoder",
    "windows",
    "s",
    "W (largest)",
    "J/token",
    "J/correct",
    "SM MHz",
    "GPU util %",
    "SM active %",
    "SM occupancy %",
    "tensor %",
    "DRAM %",
)


def joules_per_token(rows: Sequence[Measurement], seen: CellTelemetry | None) -> float | None:
    """Joules over kept output tokens; None unless energy is known for every row."""
    tokens = sum(row.output_tokens for row in rows)
    if not _whole(rows, seen) or not tokens or seen is None or seen.energy.joules is None:
        return None
    return seen.energy.joules / tokens


def joules_per_correct(
    rows: Sequence[Measurement], scores: Sequence[ScoreRecord], seen: CellTelemetry | None
) -> float | None:
    """Joules over the sum of headline scores of all repeats; None where nothing is correct."""
    headlines = [score for score in scores if score.headline]
    correct = sum(sum(score.per_problem.values()) for score in headlines)
    scored = {(problem, score.repeat) for score in headlines for problem in score.per_problem}
    complete = scored == {(row.problem, row.repeat) for row in rows}
    if not _whole(rows, seen) or not complete or correct <= 0:
        return None
    return None if seen is None or seen.energy.joules is None else seen.energy.joules / correct


def _whole(rows: Sequence[Measurement], seen: CellTelemetry | None) -> bool:
    return seen is not None and all(row.began_at is not None for row in rows)


def scores_of(record: RunRecord, cell: Cell) -> list[ScoreRecord]:
    """The cell's scores, all metrics and repeats."""
    return [score for score in record.scores if (score.decoder, score.task) == cell]


def device_body(record: RunRecord, run: RunTelemetry, marks: Marks) -> list[tuple[str, ...]]:
    """One line per watched cell, for HEAD; empty where no counter answered."""
    if not run.counters:
        return []
    real = record.header.weights["tier"] != "random"
    body = []
    for task in record.header.problems:
        for decoder in record.header.decoders:
            cell = (decoder, task)
            if cell in run.cells:
                rows = [r for r in record.measurements if (r.decoder, r.task) == cell]
                body.append(_line(cell, run.cells[cell], rows if real else [], record, marks))
    return body


def _line(
    cell: Cell,
    seen: CellTelemetry,
    rows: Sequence[Measurement],
    record: RunRecord,
    marks: Marks,
) -> tuple[str, ...]:
    per_token = joules_per_token(rows, seen)
    per_correct = joules_per_correct(rows, scores_of(record, cell), seen)
    decoder, task = cell
    return (
        task,
        decoder,
        str(seen.windows),
        f"{seen.seconds:.1f}",
        _power(seen),
        marks.mark(_number(per_token, 3), (ENERGY, COUNTS), cell),
        marks.mark(_number(per_correct, 1), (ENERGY, SCORE), cell),
        marks.mark(_median(seen, "sm_clock_mhz", scale=1), (SPEED,), cell),
        *(
            _median(seen, name, scale=100)
            for name in ("gpu_util", "sm_active", "sm_occupancy", "tensor_active", "dram_active")
        ),
    )


def _power(seen: CellTelemetry) -> str:
    """Mean power from the energy where it is a counter's, with the largest reading beside it."""
    stat = seen.stats.get("power_instant_w") or seen.stats.get("power_w")
    joules = seen.energy.joules
    mean = joules / seen.seconds if joules is not None and seen.seconds > 0 else None
    if mean is None:
        return f"({stat.largest:.0f})" if stat else ""
    return f"{mean:.0f}" + (f" ({stat.largest:.0f})" if stat else "")


def _median(seen: CellTelemetry, name: str, *, scale: float) -> str:
    stat = seen.stats.get(name)
    return f"{stat.median * scale:.0f}" if stat else ""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def remarks(run: RunTelemetry) -> str:
    """What to know about the device table: idle power, where the energy comes from."""
    sources = sorted({c.energy.source for c in run.cells.values() if c.energy.source})
    text = f"Energy: {', '.join(sources) or 'not measured'}; nothing is subtracted."
    idle = run.idle
    if idle and idle.energy.joules is not None and idle.seconds > 0:
        text += f" Idle before the run: {idle.energy.joules / idle.seconds:.0f} W."
    return (
        text + " Counters are medians of samples. GPU util only says that some kernel was "
        "resident; SM active, occupancy, tensor and DRAM are GPM's."
    )


def as_json(run: RunTelemetry, flags: Mapping[Cell, Sequence[Flag]]) -> dict[str, Any]:
    """Everything here for programs: flags with their reasons, summaries, what is absent."""
    return {
        "cells": [
            {
                "decoder": cell[0],
                "task": cell[1],
                "flags": [asdict(flag) for flag in found],
                "telemetry": asdict(run.cells[cell]) if cell in run.cells else None,
            }
            for cell, found in flags.items()
        ],
        "idle": asdict(run.idle) if run.idle else None,
        "counters": sorted(run.counters),
        "absent": run.absent,
    }
