"""Latency against token slots of a width record, drawn as the paper's Figure 1.

A panel per KV length of the plan's Figure 1 job: total and parts, the decoders' own steps at their
widths, and the paper's points where the shape is the paper's (Qwen3-32B).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.claims import PAPER_DIR, load_file
from bench.figures.latency import LOOKS
from bench.figures.style import BLACK, finish, ours_look, panels, save, styled
from bench.slots.curves import Point, points
from bench.slots.record import OK, SlotsRecord, read_slots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER_SHAPE = "qwen3-32b"
PANELS = 3
LEGEND_INCHES = 2.8  # what "step of " and a decoder's label take


def draw_slots(folder: Path, job: str | None = None) -> list[Path]:
    """slots.svg and slots.png in the record folder; nothing if the job has no forwards yet.

    job: which one, drawn as slots-<job>.*; by default the plan's Figure 1.
    """
    record = read_slots(folder)
    stem = f"slots-{job}" if job else "slots"
    job = job or record.plan.figure1
    mine = [p for p in points(record) if p.job == job and p.status == OK]
    lengths = sorted({p.kv_len for p in mine if p.what.startswith("forward:")})[:PANELS]
    if not lengths:
        return []
    written = []
    width = max(7.4, 3.7 * len(lengths))  # the title and notes of one panel need two
    with styled():
        figure, axes = panels(1, len(lengths), width=width, height=4.2)
        for axis, kv_len in zip(axes[0], lengths, strict=True):
            _panel(axis, [p for p in mine if p.kv_len == kv_len], kv_len)
        columns = int(width // LEGEND_INCHES)
        finish(figure, _title(record, mine[0]), _notes(mine[0]), list(axes[0]), columns)
        for kind in ("svg", "png"):
            path = folder / f"{stem}.{kind}"
            save(figure, path, kind)
            written.append(path)
    return written


def _panel(axis: Axes, mine: list[Point], kv_len: int) -> None:
    forwards = sorted(
        (p for p in mine if p.what.startswith("forward:")), key=lambda p: p.width or 0
    )
    totals = [(p.width, 1000 * p.latency.value) for p in forwards if p.latency]
    axis.plot(*zip(*totals, strict=True), label="total", **LOOKS["total"])
    for part in ("mlp", "attention", "head"):
        seconds = [(p.width, 1000 * getattr(p.split, f"{part}_s")) for p in forwards if p.split]
        if seconds:
            axis.plot(*zip(*seconds, strict=True), label=part, **LOOKS[part])
    for index, point in enumerate(p for p in mine if not p.what.startswith("forward:")):
        if point.latency and point.width:
            axis.plot([point.width], [1000 * point.latency.value], label=f"step of {point.what}",
                      **ours_look(index))  # fmt: skip
    if PAPER_SHAPE in mine[0].weights and mine[0].batch == 1:
        paper = sorted(
            (claim.width, claim.value)
            for claim in load_file(PAPER_DIR / "figure1.csv")
            if claim.settings.get("part") == "total" and claim.kv_len == kv_len
        )
        if paper:
            axis.plot(*zip(*paper, strict=True), label="paper: total (one H100)", color=BLACK,
                      linestyle=":", marker="x")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(title=f"past KV {kv_len}", xlabel="token slots in one forward", ylabel="ms")
    ticks = [1, 4, 16, 64, 256]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])


def _title(record: SlotsRecord, point: Point) -> str:
    env = record.header.environment
    return f"{point.weights}, {point.dtype}, batch {point.batch}: {env['gpu'] or env['cpu']}"


def _notes(point: Point) -> list[str]:
    return ["total: median of bare forwards with all head rows; parts: a separate pass with hooks; "
            f"job {point.job}"]  # fmt: skip
