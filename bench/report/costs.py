"""What a step costs: time by query width, utilisation, energy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import validity
from bench.figures import Ours
from bench.report.markup import Figure, Folded, Part, Section, table
from bench.report.paper import paper_figure
from bench.report.plots import Point, Series, points
from bench.report.source import Source, noted, rows_of
from bench.store import read_steps
from bench.tables import REFERENCE
from bench.telemetry import cells
from bench.validity import SPEED, lettered


def widths(sources: Sequence[Source], curves: Sequence[Path], ours: Ours | None) -> Section:
    """Step time over query width: operating points, and the curve where a record holds one."""
    parts: list[Part] = [
        "A wider forward carries more query tokens: `ar` sends 1, dense `tidar` K(K+1). Where the "
        "time hardly grows, the extra tokens are free, and that is what TiDAR lives on; where it "
        "grows with the width, a step must commit that many more tokens to pay for itself. The "
        "decoders' own step times stand on the figure as points; they hold the host's share and "
        "a growing text, so they may lie above a bare forward."
    ]
    for source in sources:
        figure = _widths(source)
        if figure:
            parts.append(figure)
    for folder in curves:
        parts += _width_record(folder)
    if ours is not None:
        parts.append(paper_figure("figure1", ours))
    return Section(id="widths", title="Step time by query width", parts=parts)


def _widths(source: Source) -> Figure | None:
    record, header = source.record, source.record.header
    marks = validity.Marks(validity.flags_of(record))
    curves, curve_rows = _curves(source.folder)
    operating, rows = _operating_points(source, marks)
    if not curves and not operating:
        return None
    caption = f"Step time by query width, {record.name}"
    where = header.environment.get("gpu") or header.environment.get("cpu")
    numbers = noted(table(("decoder", "query width", "ms per step", "AR steps"), rows), marks)
    if curve_rows:
        numbers += "\n\nTable: width curve\n\n" + table(("KV length", "width", "ms"), curve_rows)
    missing = "" if curves else " The record holds no width curve, only the operating points."
    return Figure(
        caption=f"{caption}. {header.weights['name']}, {header.dtype}, {where}.{missing}",
        svg=points(
            [*operating, *curves], x="query tokens in a forward (log scale)", y="ms",
            x_log2=True, alt=caption,
        ),
        numbers=numbers,
    )  # fmt: skip


def _width_record(folder: Path) -> list[Part]:
    """The curve of a width record with the decoders' own steps on it, and its tables."""
    from bench.frames import slot_rows
    from bench.slots.curves import points as measured
    from bench.slots.page import to_markdown
    from bench.slots.record import OK, read_slots

    record = read_slots(folder)
    found = measured(record)
    curves, rows = _curves(folder)
    if not curves:
        return []
    steps = [
        p
        for p in found
        if p.job == record.plan.figure1 and p.status == OK and p.batch == 1
        and not p.what.startswith("forward:") and p.latency and p.width
    ]  # fmt: skip
    longest = max((p.kv_len for p in steps), default=0)
    spots = [
        Point(x=p.width, y=1000 * p.latency.value, label=p.what)
        for p in steps
        if p.kv_len == longest
    ]
    operating = [Series(name=f"steps of decoders, KV {longest}", points=spots)] if spots else []
    weights = ", ".join(dict.fromkeys(f"{r['weights']} {r['dtype']}" for r in slot_rows(folder)))
    env = record.header.environment
    caption = f"Width curve, {record.name}"
    drawn = points(
        [*curves, *operating], x="query tokens in a forward (log scale)", y="ms", x_log2=True,
        alt=caption,
    )  # fmt: skip
    numbers = table(("KV length", "width", "ms"), rows)
    if steps:
        body = [
            (p.what, str(p.kv_len), str(p.width), f"{1000 * p.latency.value:.2f}") for p in steps
        ]
        head = ("decoder", "KV length", "width", "ms")
        numbers += f"\n\nTable: steps of decoders\n\n{table(head, body)}"
    where = env.get("gpu") or env.get("cpu")
    return [
        Figure(caption=f"{caption}. {weights}, {where}.", svg=drawn, numbers=numbers),
        Folded(title=f"Tables of {record.name}", markdown=to_markdown(record, found)),
    ]


def _curves(folder: Path) -> tuple[list[Series], list[tuple[str, ...]]]:
    """One joined series per KV length of the record's width points: whole forwards at batch 1."""
    from bench.frames import slot_rows

    found: dict[int, list[Point]] = {}
    for row in slot_rows(folder):
        whole = row.get("part", "total") == "total" and row.get("batch", 1) == 1
        if whole and row.get("median_s") is not None:
            point = Point(x=row["width"], y=1000 * row["median_s"])
            found.setdefault(row.get("kv_len") or 0, []).append(point)
    series, body = [], []
    for kv_len, spots in sorted(found.items()):
        spots.sort(key=lambda point: point.x)
        series.append(Series(name=f"forward, KV {kv_len}", joined=True, points=spots))
        body += [(str(kv_len), f"{p.x:g}", f"{p.y:.2f}") for p in spots]
    return series, body


def _operating_points(
    source: Source, marks: validity.Marks
) -> tuple[list[Series], list[tuple[str, ...]]]:
    """Each decoder's mean query width and step time; a flagged time is drawn with that word."""
    used = _mean_widths(source)
    series, body = [], []
    reference = step_ms(source, REFERENCE)
    for decoder in source.record.header.decoders:
        mean, width = step_ms(source, decoder), used.get(decoder)
        if mean is None or not width:
            continue
        mine, ar = (
            [(name, task) for task in source.record.header.problems]
            for name in (decoder, REFERENCE)
        )
        label = "flagged" if validity.spoilers((SPEED,), mine, marks.flags) else ""
        series.append(Series(name=decoder, points=[Point(x=width, y=mean, label=label)]))
        ratio = f"{mean / reference:.2f}" if reference and decoder != REFERENCE else ""
        body.append(
            (
                decoder,
                f"{width:g}",
                marks.mark(f"{mean:.1f}", (SPEED,), *mine),
                marks.mark(ratio, (SPEED,), *mine, *ar),
            )
        )
    return series, body


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
    said: dict[str, list[str]] = {}
    for source in sources:
        said.setdefault(_telemetry(source), []).append(source.record.name)
    parts += [f"### {', '.join(names)}\n\n{text}" for text, names in said.items()]
    return Section(id="utilisation", title="Utilisation and energy", parts=parts)


def _telemetry(source: Source) -> str:
    record = source.record
    run = validity.telemetry_of(record)
    marks = validity.Marks(validity.flags_of(record, run))
    body = cells.device_body(record, run, marks)
    if not body:
        why = "; ".join(f"{name}: {reason}" for name, reason in run.absent.items())
        return f"Not measured: {why or 'no telemetry was recorded with this run'}."
    notes = "\n".join(lettered(marks))
    return f"{table(cells.HEAD, body)}\n\n{notes}\n\n{cells.remarks(run)}"
