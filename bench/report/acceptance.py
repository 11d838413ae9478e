"""Acceptance as figures: how many tokens a step made final, and how right each draft place is."""

from __future__ import annotations

from collections.abc import Sequence

from bench import metrics
from bench.report.markup import Figure, Part, Section, table
from bench.report.plots import Point, Series, bars, points
from bench.report.source import Source, rows_of


def acceptance(sources: Sequence[Source]) -> Section:
    """Histogram and per-position acceptance of every record whose counts mean something."""
    parts: list[Part] = [
        "Counts are exact: they come from the step ledger, not from a clock. A draft token behind "
        "a wrong one counts as drafted and not accepted, so acceptance by position can only fall."
    ]
    for source in sources:
        drafting = [
            label
            for label in source.record.header.decoders
            if metrics.acceptance_rate(rows_of(source.record, label)) is not None
        ]
        if source.scored and drafting:
            parts.append(f"### {source.record.name}")
            parts += [_histogram(source, drafting), _by_position(source, drafting)]
    if len(parts) == 1:
        parts.append("No record here has a decoder that drafts, on weights whose counts mean much.")
    return Section(id="acceptance", title="Acceptance", parts=parts)


def _histogram(source: Source, labels: Sequence[str]) -> Figure:
    counts = {
        label: metrics.acceptance_histogram(rows_of(source.record, label)) for label in labels
    }
    width = max(map(len, counts.values()))
    low = 0 if any(c and c[0] for c in counts.values()) else 1
    names = [str(r) for r in range(low, width)]
    shares = [
        (label, [100 * n / sum(c) for n in (*c, *[0] * (width - len(c)))][low:])
        for label, c in counts.items()
    ]
    caption = f"Steps by the number of tokens they made final, {source.record.name}"
    means = ", ".join(
        f"{metrics.acceptance_length(rows_of(source.record, label)):.2f} by `{label}`"
        for label in labels
    )
    body = [
        (r, *(f"{counts[label][int(r)] if int(r) < len(counts[label]) else 0}" for label in labels))
        for r in names
    ]
    return Figure(
        caption=f"{caption}. Mean tokens per step: {means}.",
        svg=bars(names, shares, x="tokens made final by a step", y="steps, %", alt=caption),
        numbers=table(("tokens", *(f"steps of {label}" for label in labels)), body),
    )


def _by_position(source: Source, labels: Sequence[str]) -> Figure:
    rates = {label: metrics.acceptance_rate_at(rows_of(source.record, label)) for label in labels}
    series = [
        Series(
            name=label,
            joined=True,
            points=[
                Point(x=place, y=100 * rate)
                for place, rate in enumerate(values, start=1)
                if rate is not None
            ],
        )
        for label, values in rates.items()
    ]
    width = max(map(len, rates.values()))
    body = [
        (
            str(place + 1),
            *(
                f"{100 * values[place]:.1f} %"
                if place < len(values) and values[place] is not None
                else ""
                for values in rates.values()
            ),
        )
        for place in range(width)
    ]
    caption = f"Drafts accepted by their place in the draft, {source.record.name}"
    return Figure(
        caption=f"{caption}. Place 1 is the first token that is checked.",
        svg=points(series, x="place in the draft", y="accepted, %", places=width, alt=caption),
        numbers=table(("place", *labels), body),
    )
