"""A record as the report takes it, and what more than one section asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.records import Measurement
from bench.store import RunRecord
from bench.validity import Marks, lettered


@dataclass(frozen=True, kw_only=True)
class Source:
    """A record with the folder it was read from."""

    folder: Path
    record: RunRecord

    @property
    def tier(self) -> str:
        return self.record.header.weights["tier"]

    @property
    def scored(self) -> bool:
        """Whether T/NFE, acceptance and scores of these weights mean anything."""
        return self.tier != "random"


def rows_of(record: RunRecord, decoder: str) -> list[Measurement]:
    """The measurements of one decoder."""
    return [row for row in record.measurements if row.decoder == decoder]


def noted(numbers: str, marks: Marks) -> str:
    """A figure's table with the notes of the letters on its numbers."""
    return "\n\n".join([numbers, *(["\n".join(lettered(marks))] if lettered(marks) else [])])
