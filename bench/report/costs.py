"""What speed costs and what it buys: quality against speed, width curves, utilisation, energy."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markup import Figure, Part, Section, table
from bench.report.plots import Point, Series, points
from bench.report.sections import Source, rows_of
from bench.store import read_steps
from bench.tables import REFERENCE, TableRow, table_rows

TELEMETRY = "telemetry.jsonl"


def quality(sources: Sequence[Source]) -> Section:
    """Score against speedup, one figure per record and task."""
    parts: list[Part] = [
        "Up is better text, right is faster. `ar` stands at 1x by definition; a decoder that keeps "
        "its text stands level with it. Bars are 95 % intervals. Each figure holds one record and "
        "one task, so one weights tier."
    ]
    for source in sources:
        if source.scored:
            rows = table_rows(source.record)
            for task in source.record.header.problems:
                mine = [row for row in rows if row.task == task and row.score is not None]
                if any(row.speedup is not None for row in mine):
                    parts.append(_quality(source, task, mine))
    if len(parts) == 1:
        parts.append("No record here holds both a score and a speedup.")
    return Section(id="quality", title="Quality against speed", parts=parts)


def _quality(source: Source, task: str, rows: Sequence[TableRow]) -> Figure:
    series, body = [], []
    for row in rows:
        speed = 1.0 if row.decoder == REFERENCE else row.speedup
        if speed is None or row.score is None:
            continue
        score, bounds = 100 * row.score, _times(row.score_low, row.score_high, 100)
        spread = _times(row.speedup_low, row.speedup_high, 1)
        point = Point(x=speed, y=score, x_range=spread, y_range=bounds)
        series.append(Series(name=row.decoder, points=[point]))
        body.append(
            (
                row.decoder,
                f"{score:.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else ""),
                f"{speed:.2f}x" + (f" [{spread[0]:.2f}, {spread[1]:.2f}]" if spread else ""),
                str(row.n),
            )
        )
    caption = f"Score against speedup over ar: {task}, {source.record.name}"
    return Figure(
        caption=f"{caption}. {source.record.header.weights['name']}, {source.tier} tier.",
        svg=points(series, x="speedup over ar", y="score, %", alt=caption),
        numbers=table(("decoder", "score %", "speedup", "n"), body),
    )


def _times(low: float | None, high: float | None, scale: float) -> tuple[float, float] | None:
    return None if low is None or high is None else (scale * low, scale * high)


def widths(sources: Sequence[Source]) -> Section:
    """Step time over query width: each decoder's operating point, per record."""
    parts: list[Part] = [
        "A wider forward carries more query tokens: `ar` sends 1, dense `tidar` K(K+1). Where the "
        "time hardly grows, the extra tokens are free, and that is what TiDAR lives on; where it "
        "grows with the width, a step must commit that many more tokens to pay for itself. Step "
        "times hold the host's share and grow with the length of the text; a record without a "
        "width curve of its own has the decoders' operating points only."
    ]
    for source in sources:
        figure = _operating_points(source)
        if figure:
            parts.append(figure)
    return Section(id="widths", title="Step time by query width", parts=parts)


def _operating_points(source: Source) -> Figure | None:
    record = source.record
    used = _mean_widths(source)
    series, body = [], []
    reference = step_ms(source, REFERENCE)
    for decoder in record.header.decoders:
        mean, width = step_ms(source, decoder), used.get(decoder)
        if mean is None or not width:
            continue
        series.append(Series(name=decoder, points=[Point(x=width, y=mean)]))
        ratio = f"{mean / reference:.2f}" if reference and decoder != REFERENCE else ""
        body.append((decoder, f"{width:g}", f"{mean:.1f}", ratio))
    if not series:
        return None
    caption = f"Mean step time by query width, {record.name}"
    header = record.header
    where = header.environment.get("gpu") or header.environment.get("cpu")
    return Figure(
        caption=f"{caption}. {header.weights['name']}, {header.dtype}, {where}.",
        svg=points(
            series, x="query tokens in a step (log scale)", y="ms per step", x_log2=True, alt=caption
        ),
        numbers=table(("decoder", "query width", "ms per step", "AR steps"), body),
    )


def step_ms(source: Source, decoder: str) -> float | None:
    """Mean milliseconds of a decode forward of this decoder, all tasks together."""
    rows = rows_of(source.record, decoder)
    forwards = sum(row.decode_forwards for row in rows)
    return 1000 * sum(row.decode_s for row in rows) / forwards if forwards else None


def _mean_widths(source: Source) -> dict[str, float]:
    """Mean query width of each decoder's decode steps."""
    sums: dict[str, tuple[int, int]] = {}
    for step in read_steps(source.folder):
        if step.index:
            total, count = sums.get(step.decoder, (0, 0))
            sums[step.decoder] = (total + step.query_width, count + 1)
    return {decoder: total / count for decoder, (total, count) in sums.items()}


def utilisation(sources: Sequence[Source]) -> Section:
    """Energy and device counters of each record that watched them, and why the others have none."""
    parts: list[Part] = [
        "Utilisation says how busy a device was, not how well it was used; energy covers the whole "
        "device, with nothing subtracted."
    ]
    for source in sources:
        parts.append(f"### {source.record.name}\n\n{_telemetry(source)}")
    return Section(id="utilisation", title="Utilisation and energy", parts=parts)


def _telemetry(source: Source) -> str:
    path = source.folder / TELEMETRY
    if not path.exists():
        return (
            f"Not measured: this record has no `{TELEMETRY}`. It comes from a version without "
            "telemetry, or the run was told not to watch."
        )
    return ""
