"""From visits to numbers: medians, intervals, ratios, free slots, split. Arithmetic only, no torch.

Intervals are 95 % bootstrap percentiles over rounds (a round's samples stay together); a ratio's
draws pick the same rounds for both cells. Fewer than two rounds give no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.metrics import BOOTSTRAP_SEED, Interval
from bench.slots.plan import FORWARD, Cell
from bench.slots.record import OK, SlotsRecord, Split, Visit

DRAWS = 1000
TOLERANCES = (0.05, 0.25)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured cell. latency: seconds; ratio: over width 1, or over `ar`'s step; n of an
    interval counts rounds. without_head: the same of a forward less its LM head. status "ok"."""

    job: str
    weights: str
    dtype: str
    what: str
    kv_len: int
    batch: int
    status: str
    detail: str | None
    width: int | None = None
    forwards: int | None = None
    samples: int = 0
    latency: Interval | None = None
    ratio: Interval | None = None
    without_head: Interval | None = None
    without_head_ratio: Interval | None = None
    host_s: float | None = None
    split: Split | None = None
    captured: bool = False
    attention: str = "sdpa"
    compiled: bool = False

    @property
    def route(self) -> str:
        """The attention of its forwards, and whether their layers were compiled."""
        return self.attention + (" compiled" if self.compiled else "")

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.job, self.what, self.kv_len)


@dataclass(frozen=True, kw_only=True)
class FreeSlots:
    """The largest measured width within a tolerance, the smallest beyond it, the largest tried.

    Within: the lower bound of the ratio's interval is at most 1 + tolerance. Never interpolated.
    """

    tolerance: float
    width: int
    first_slower: int | None
    largest: int


def points(record: SlotsRecord) -> list[Point]:
    """Every planned cell that was visited, in the plan's order."""
    by_cell: dict[tuple[str, str, int], list[Visit]] = {}
    for visit in record.visits:
        by_cell.setdefault(visit.key, []).append(visit)
    splits = {split.key: split for split in record.splits}
    found = []
    for job in record.plan.jobs:
        for cell in job.cells:
            visits = by_cell.get(cell.key)
            if visits:
                reference = by_cell.get((cell.job, reference_of(cell), cell.kv_len), [])
                found.append(_point(record, cell, visits, reference, splits.get(cell.key)))
    return found


def reference_of(cell: Cell) -> str:
    """What a cell's time is put over: width 1, or the `ar` step run the same way."""
    if cell.width:
        return f"{FORWARD}1"
    mode = step_mode(cell.what)
    return f"ar:{mode}" if mode else "ar"


def step_mode(label: str) -> str | None:
    """The word graphs=N or static=N of a decoder's label; None where every step is eager."""
    params = label.partition(":")[2].split(",")
    return next((p for p in params if p.startswith(("graphs=", "static="))), None)


def _point(
    record: SlotsRecord,
    cell: Cell,
    visits: list[Visit],
    reference: list[Visit],
    split: Split | None,
) -> Point:
    job, first = record.job(cell.job), visits[0]
    place = {
        "job": job.name, "weights": job.weights, "dtype": job.dtype, "what": cell.what,
        "kv_len": cell.kv_len, "batch": job.batch, "attention": job.attention,
        "compiled": job.compiled,
    }  # fmt: skip
    bad = next((visit for visit in visits if visit.status != OK), None)
    if bad:
        return Point(**place, status=bad.status, detail=bad.detail, width=cell.width)
    mine, theirs = _rounds(visits, head=True), _rounds(reference, head=True)
    bare, bare_theirs = _rounds(visits, head=False), _rounds(reference, head=False)
    return Point(
        **place,
        status=OK,
        detail=None,
        width=first.width,
        forwards=first.forwards,
        samples=sum(len(visit.total_s) for visit in visits),
        latency=median_interval(list(mine.values())),
        ratio=ratio_interval(mine, theirs),
        without_head=median_interval(list(bare.values())) if cell.width else None,
        without_head_ratio=ratio_interval(bare, bare_theirs) if cell.width else None,
        host_s=float(np.median([s for visit in visits for s in visit.host_s])),
        split=split,
        captured=first.captured,
    )


def _rounds(visits: Sequence[Visit], *, head: bool) -> dict[int, np.ndarray]:
    """Round -> samples (seconds), less the head's share if `head` is False."""
    out = {}
    for visit in visits:
        if visit.status == OK:
            total = np.array(visit.total_s)
            out[visit.round] = (
                total - np.array(visit.head_s) if visit.head_s and not head else total
            )
    return out


def median_interval(rounds: Sequence[np.ndarray]) -> Interval:
    """Median of all samples; rounds are drawn with replacement for the interval."""
    value = float(np.median(np.concatenate(rounds)))
    if len(rounds) < 2:
        return Interval(value=value, low=None, high=None, n=len(rounds))
    low, high = np.percentile(_drawn_medians(rounds, _picks(len(rounds))), [2.5, 97.5])
    return Interval(value=value, low=float(low), high=float(high), n=len(rounds))


def ratio_interval(mine: dict[int, np.ndarray], theirs: dict[int, np.ndarray]) -> Interval | None:
    """Median over median on the rounds both have; the same rounds are drawn for both."""
    shared = sorted(set(mine) & set(theirs))
    if not shared:
        return None
    top, bottom = [mine[r] for r in shared], [theirs[r] for r in shared]
    value = float(np.median(np.concatenate(top)) / np.median(np.concatenate(bottom)))
    if len(shared) < 2:
        return Interval(value=value, low=None, high=None, n=len(shared))
    picks = _picks(len(shared))
    draws = _drawn_medians(top, picks) / _drawn_medians(bottom, picks)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value=value, low=float(low), high=float(high), n=len(shared))


def _picks(rounds: int) -> np.ndarray:
    """[draws, rounds] indices of rounds, drawn with replacement; always the same."""
    return np.random.default_rng(BOOTSTRAP_SEED).integers(0, rounds, size=(DRAWS, rounds))


def _drawn_medians(rounds: Sequence[np.ndarray], picks: np.ndarray) -> np.ndarray:
    """Median of the pooled samples of each draw; every visit of a cell has as many samples."""
    return np.median(np.stack(rounds)[picks].reshape(len(picks), -1), axis=1)


def free_slots(curve: Sequence[Point], tolerance: float, *, head: bool = True) -> FreeSlots | None:
    """Of the forwards of one job and KV length; None without a measured width 1 or interval."""
    bounds = {}
    for point in curve:
        ratio = point.ratio if head else point.without_head_ratio
        if point.width and ratio is not None and point.what.startswith("forward:"):
            if ratio.low is None:
                return None
            bounds[point.width] = ratio.low
    if 1 not in bounds:
        return None
    free = [width for width, low in bounds.items() if low <= 1 + tolerance]
    slower = [width for width, low in bounds.items() if low > 1 + tolerance]
    return FreeSlots(
        tolerance=tolerance,
        width=max(free),
        first_slower=min(slower, default=None),
        largest=max(bounds),
    )


def curves(found: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    """(job, KV length) -> its forwards by width."""
    out: dict[tuple[str, int], list[Point]] = {}
    for point in found:
        if point.what.startswith("forward:"):
            out.setdefault((point.job, point.kv_len), []).append(point)
    return {key: sorted(rows, key=lambda p: p.width or 0) for key, rows in out.items()}


def slot_lines(record: SlotsRecord, found: Sequence[Point]) -> list[dict[str, object]]:
    """Rows of slots.jsonl (docs/frames.md): the plan's Figure 1 job, one line a cell and part."""
    rows: list[dict[str, object]] = []
    for point in found:
        if point.job != record.plan.figure1 or not point.what.startswith("forward:"):
            continue
        place = {
            "weights": point.weights, "dtype": point.dtype, "width": point.width,
            "kv_len": point.kv_len, "batch": point.batch, "status": point.status,
        }  # fmt: skip
        seconds = {"total": point.latency.value if point.latency else None}
        if point.split:
            seconds |= {
                p: getattr(point.split, f"{p}_s") for p in ("attention", "mlp", "head", "rest")
            }
        rows += [{**place, "part": part, "median_s": value} for part, value in seconds.items()]
    return rows
