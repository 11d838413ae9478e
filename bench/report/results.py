"""The tables of `bench tables` on the page, random weights apart from every score."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markup import Section
from bench.report.source import Source
from bench.tables import to_markdown


def results(sources: Sequence[Source]) -> Section:
    """The tables `bench tables` makes, record by record."""
    return Section(
        id="results",
        title="Results",
        parts=[_tables(source) for source in sources if source.scored]
        or ["No record here has weights whose scores and counts mean anything."],
    )


def _tables(source: Source) -> str:
    """The record's page of tables, less the device's, which has a section of its own."""
    chunks = to_markdown(source.record).split("\n## ")
    return "\n## ".join(chunk for chunk in chunks if not chunk.startswith("Device\n"))


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
        parts=[say, *map(_tables, random)],
    )
