"""Two sides to one answer: which counters differ, which speedups fell, and the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.compare.estimate import PASS, REGRESSION, UNDECIDED, Change, change, verdict
from bench.compare.sides import REFERENCE, Side, first_difference
from tidar_ref.errors import UserError

TOLERANCE = 0.05
FLAGGED = "flagged"  # every pair is spoiled on one side: levels are shown, nothing is compared
EXAMPLES = 3  # differing counters named per decoder
OVER_AR, DIRECT = "speedup over ar", "speed, head against base"


@dataclass(frozen=True, kw_only=True)
class CounterRow:
    """All items (prompts or problems) of one decoder both sides have.

    differing counts the items in which any counter differs; examples names some of them.
    """

    decoder: str
    items: int
    differing: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TimingRow:
    """One timed quantity: base and head are speedups over AR (x), or speeds (tokens/s) for AR."""

    decoder: str
    quantity: str
    base: float | None
    head: float | None
    change: Change | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The whole answer. lost: decoders base measured and head cannot build, with the reason."""

    base: Side
    head: Side
    tolerance: float
    counters: tuple[CounterRow, ...]
    timings: tuple[TimingRow, ...]
    lost: dict[str, str]
    notes: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """A counter differs, a speed fell by more than the tolerance, or a decoder is lost."""
        return (
            bool(self.lost)
            or any(row.differing for row in self.counters)
            or any(row.verdict == REGRESSION for row in self.timings)
        )

    @property
    def undecided(self) -> tuple[TimingRow, ...]:
        """Timings whose interval reaches across the tolerance: more turns are needed."""
        return tuple(row for row in self.timings if row.verdict == UNDECIDED)

    @property
    def flagged(self) -> tuple[TimingRow, ...]:
        """Timings of which a validity flag left no pair to compare."""
        return tuple(row for row in self.timings if row.verdict == FLAGGED)

    def exit_code(self, *, strict: bool = False) -> int:
        """1 for a regression (`strict`: also for an undecided or flagged timing), else 0."""
        return int(self.regressed or (strict and bool(self.undecided or self.flagged)))


def compare(base: Side, head: Side, *, tolerance: float = TOLERANCE) -> Comparison:
    """Compare two sides; UserError if they are unlike, share nothing, or the tolerance is odd."""
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance {tolerance:g} is not a share; give one between 0 and 1")
    unlike = first_difference(base, head)
    if unlike:
        raise UserError(f"not comparable: {unlike}; measure both in one environment")
    shared = [name for name in base.counters if name in head.counters]
    rows = tuple(_counter_row(name, base, head) for name in shared)
    if not any(row.items for row in rows):
        raise UserError(
            f"{base.name} and {head.name} share no decoder with a common prompt or problem; "
            "measure the same ones in both"
        )
    return Comparison(
        base=base,
        head=head,
        tolerance=tolerance,
        counters=rows,
        timings=tuple(_timing_rows(shared, base, head, tolerance)),
        lost={name: head.absent[name] for name in base.counters if name in head.absent},
        notes=tuple(_notes(base, head)),
    )


def _counter_row(decoder: str, base: Side, head: Side) -> CounterRow:
    ours, theirs = base.counters[decoder], head.counters[decoder]
    items = [item for item in ours if item in theirs]
    found = [(item, counter_differences(ours[item], theirs[item])) for item in items]
    differing = [f"{item}: {words[0]}" for item, words in found if words]
    return CounterRow(
        decoder=decoder,
        items=len(items),
        differing=len(differing),
        examples=tuple(differing[:EXAMPLES]),
    )


def counter_differences(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    """ "name base -> head" for every counter that is not exactly equal, or on one side only."""
    return [
        f"{name} {_short(base.get(name))} -> {_short(head.get(name))}"
        for name in dict.fromkeys((*base, *head))
        if base.get(name) != head.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _timing_rows(
    shared: list[str], base: Side, head: Side, tolerance: float
) -> Iterator[TimingRow]:
    if base.session and base.session == head.session:
        pairs = [pair for pair in base.ar_log_s if pair in head.ar_log_s]
        # Base minus head: seconds that grow are speed that falls.
        found = change([base.ar_log_s[pair] - head.ar_log_s[pair] for pair in pairs])
        yield TimingRow(
            decoder=REFERENCE,
            quantity=DIRECT,
            base=_rate(base.ms_per_token.get(REFERENCE)),
            head=_rate(head.ms_per_token.get(REFERENCE)),
            change=found,
            verdict=verdict(found, tolerance),
        )
    for name in shared:
        if name == REFERENCE:
            continue
        ours, theirs = base.speedups.get(name, {}), head.speedups.get(name, {})
        found = change([theirs[pair] - ours[pair] for pair in ours if pair in theirs])
        yield TimingRow(
            decoder=name,
            quantity=OVER_AR,
            base=base.levels.get(name),
            head=head.levels.get(name),
            change=found,
            verdict=FLAGGED if found is None and _flags(name, base, head)
            else verdict(found, tolerance),
        )  # fmt: skip


def _flags(decoder: str, base: Side, head: Side) -> str:
    """What keeps tasks of a decoder out of the timings, as words; empty if nothing does."""
    found = []
    for side in (base, head):
        for task, flags in side.flagged.get(decoder, {}).items():
            found.append(f"{task} in {side.name} ({', '.join(flags)})")
    return ", ".join(found)


def _rate(ms_per_token: float | None) -> float | None:
    return 1000 / ms_per_token if ms_per_token else None


def _notes(base: Side, head: Side) -> Iterator[str]:
    for one, other in ((base, head), (head, base)):
        only = [name for name in one.counters if name not in other.counters]
        if only:
            yield f"only in {one.name}: {', '.join(only)}"
        missing = sorted(
            {
                item
                for name, items in one.counters.items()
                if name in other.counters
                for item in items
            }
            - {item for items in other.counters.values() for item in items}
        )
        if missing:
            yield f"{len(missing)} items only in {one.name}, first {missing[0]}: not compared"
    for name in base.counters:
        if name in head.counters and (flags := _flags(name, base, head)):
            yield f"flagged, timing of {name} not compared: {flags}"
    if not (base.session and base.session == head.session):
        yield (
            "ar itself is not compared: speedups over ar hide a slower ar, and seconds of two "
            "sessions do not compare (`make regress BASE=...` interleaves both)"
        )


def all_decided(comparison: Comparison) -> bool:
    """Every timing passed or regressed: more turns would change nothing."""
    return all(row.verdict in (PASS, REGRESSION) for row in comparison.timings)
