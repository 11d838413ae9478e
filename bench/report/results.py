"""The tables of `bench tables` on the page, random weights apart from every score."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markup import Folded, Part, Section
from bench.report.source import Source
from bench.tables import to_markdown

LONG = ("Every score",)  # closed until asked for


def results(sources: Sequence[Source]) -> Section:
    """The tables `bench tables` makes, record by record."""
    return Section(
        id="results",
        title="Results",
        parts=[part for source in sources if source.scored for part in _tables(source)]
        or ["No record here has weights whose scores and counts mean anything."],
    )


def step_costs(sources: Sequence[Source]) -> Section | None:
    """Tables of the random-weight records, apart from every score; None without one."""
    random = [source for source in sources if not source.scored]
    if not random:
        return None
    say = (
        "These records have random weights. A step costs what it would cost with trained weights "
        "of this shape; everything else would be noise and is left out."
    )
    return Section(
        id="step-costs",
        title="Step costs on random weights",
        parts=[say, *(part for source in random for part in _tables(source))],
    )


def _tables(source: Source) -> list[Part]:
    """The record's page of tables, less the device's, which has a section of its own."""
    shown, folded = [], []
    for chunk in to_markdown(source.record).split("\n## "):
        title, _, text = chunk.partition("\n")
        if title in LONG:
            name = f"{title}, {source.record.name}"
            folded.append(Folded(title=name, markdown=text.strip()))
        elif title != "Device":
            shown.append(chunk)
    return ["\n## ".join(shown), *folded]
