"""What speed buys: score against speedup, and the paper's Figures 4 to 6 with ours beside."""

from __future__ import annotations

from collections.abc import Sequence

from bench import validity
from bench.figures import Ours
from bench.report.markup import Figure, Part, Section, table
from bench.report.paper import paper_figure
from bench.report.plots import Point, Series, points
from bench.report.source import Source, noted
from bench.tables import REFERENCE, TableRow, table_rows
from bench.validity import COUNTS, SCORE, SPEED


def quality(sources: Sequence[Source], ours: Ours | None) -> Section:
    """Score against speedup, one figure per record and task; with `ours` the paper's figures."""
    parts: list[Part] = [
        "Up is better text, right is faster. `ar` stands at 1x by definition; a decoder that keeps "
        "its text stands level with it. Bars are 95 % intervals. Each figure holds one record and "
        "one task, so one weights tier. A point that a validity flag spoils says so: it is shown "
        "and not compared."
    ]
    for source in sources:
        if source.scored:
            rows, flags = table_rows(source.record), validity.flags_of(source.record)
            for task in source.record.header.problems:
                mine = [row for row in rows if row.task == task and row.score is not None]
                if any(row.speedup is not None for row in mine):
                    parts.append(_quality(source, task, mine, validity.Marks(flags)))
    if len(parts) == 1:
        parts.append("No record here holds both a score and a speedup.")
    if ours is not None:
        parts.append("### The paper's figures, ours beside them")
        parts += [paper_figure(name, ours) for name in ("figure4", "figure5", "figure6")]
    return Section(id="quality", title="Quality against speed", parts=parts)


def _quality(source: Source, task: str, rows: Sequence[TableRow], marks: validity.Marks) -> Figure:
    series, body = [], []
    for row in rows:
        speed = 1.0 if row.decoder == REFERENCE else row.speedup
        if speed is None or row.score is None:
            continue
        score, bounds = 100 * row.score, _times(row.score_low, row.score_high, 100)
        spread = _times(row.speedup_low, row.speedup_high, 1)
        mine, both = [(row.decoder, task)], [(row.decoder, task), (REFERENCE, task)]
        if row.decoder == REFERENCE:
            both = []  # 1x by definition
        spoiled = validity.spoilers((SCORE,), mine, marks.flags)
        spoiled += validity.spoilers((SPEED, COUNTS), both, marks.flags)
        label = "flagged" if spoiled else ""
        point = Point(x=speed, y=score, x_range=spread, y_range=bounds, label=label)
        series.append(Series(name=row.decoder, points=[point]))
        scored = f"{score:.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")
        faster = f"{speed:.2f}x" + (f" [{spread[0]:.2f}, {spread[1]:.2f}]" if spread else "")
        body.append(
            (
                row.decoder,
                marks.mark(scored, (SCORE,), *mine),
                marks.mark(faster, (SPEED, COUNTS), *both),
                str(row.n),
            )
        )
    caption = f"Score against speedup over ar: {task}, {source.record.name}"
    return Figure(
        caption=f"{caption}. {source.record.header.weights['name']}, {source.tier} tier.",
        svg=points(series, x="speedup over ar", y="score, %", alt=caption),
        numbers=noted(table(("decoder", "score %", "speedup", "n"), body), marks),
    )


def _times(low: float | None, high: float | None, scale: float) -> tuple[float, float] | None:
    return None if low is None or high is None else (scale * low, scale * high)
