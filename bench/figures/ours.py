"""What the figures need of our records: observed numbers, measurements, width points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.claims_ours import Observed, observe_all, run_folders
from bench.figures.style import ours_look
from bench.frames import slot_rows
from bench.store import RunRecord, read_record


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One of our points: panel, legend text (it names what flags the point), place, marker.

    The look is empty where a figure has its own.
    """

    panel: str
    name: str
    x: float
    y: float
    look: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Records with their numbers; `slots` maps a record's name to its width points (dicts)."""

    records: tuple[RunRecord, ...]
    observed: tuple[Observed, ...]
    slots: dict[str, list[dict[str, Any]]]

    def pairs(self, task: str, x: str, y: str) -> list[Spot]:
        """Per record and decoder, the numbers (x, y) of a task where both metrics are there.

        AR is its own reference: its speedup is 1 by definition.
        """
        order = list(dict.fromkeys(name_of(item) for item in self.observed))
        found: dict[tuple[str, str], dict[str, Observed]] = {}
        for item in self.observed:
            if item.task == task:
                found.setdefault((item.record, item.label), {})[item.metric] = item
        points = []
        for cells in found.values():
            if y not in cells:
                continue
            first = cells[y]
            if x in cells:
                across, flags = cells[x].value, (*cells[x].spoiled, *first.spoiled)
            elif x == "speedup" and first.decoder == "ar":
                across, flags = 1.0, first.spoiled
            else:
                continue
            name = name_of(first, tuple(dict.fromkeys(flags)))
            look = ours_look(order.index(name_of(first)), flagged=bool(flags))
            points.append(Spot(panel=task, name=name, x=across, y=first.value, look=look))
        return points


def gather(folders: Sequence[Path]) -> Ours:
    """Read record folders; none is allowed and gives figures of the paper alone."""
    folders = [Path(folder) for folder in folders]
    return Ours(
        records=tuple(read_record(folder) for folder in run_folders(folders)),
        observed=tuple(observe_all(folders)),
        slots={folder.resolve().name: rows for folder in folders if (rows := slot_rows(folder))},
    )


def name_of(item: Observed, flags: Sequence[str] = ()) -> str:
    """Legend text of one of our decoders: label, weights and tier, and the flags of a point."""
    spoiled = f"; flagged {', '.join(flags)}, not compared" if flags else ""
    return f"ours: {item.label} ({item.weights}, {item.tier}{spoiled})"
