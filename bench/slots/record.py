"""The record of width curves: a header, then one line per visit of a cell. No torch.

Written with the line discipline of `bench.store`: a kill loses at most the visit in flight. The
same command again continues; another plan, machine or commit is refused. `slots.jsonl`, the points
other readers take, is made from the visits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.records import from_dict
from bench.slots.plan import Job, Plan
from bench.store import LineFile, first_difference, read_rows, repair_rows, write_whole
from tidar_ref.errors import UserError

SCHEMA = 1
HEADER, VISITS, SPLITS, MODELS = (
    "slots_header.json",
    "visits.jsonl",
    "splits.jsonl",
    "slots_models.json",
)
SESSIONS, CEILINGS = "slots_sessions.jsonl", "ceilings.json"
WINDOWS = "slots_windows.jsonl"  # when each job ran, on telemetry's clock
MUST_MATCH = ("schema", "plan", "device", "commit", "dirty")
ENVIRONMENT_MUST_MATCH = ("cpu", "threads", "gpu", "versions")

OK = "ok"


@dataclass(frozen=True, kw_only=True)
class SlotsHeader:
    """What is measured, on what machine; written first, never changed."""

    schema: int
    created: str
    argv: tuple[str, ...]
    plan: dict[str, Any]
    environment: dict[str, Any]
    commit: str | None
    dirty: bool | None
    device: str


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The samples of one visit of one cell; (job, what, kv_len, round) occurs once.

    status "ok", or why there are no samples: "no memory", "no positions", "no decoder", "not
    applicable"; detail in words. steps: run in one sample, whose seconds are those of one;
    captured: they were CUDA graph replays. width: query tokens a sequence and forward. total_s: by
    CUDA events, on a CPU by the host clock; head_s: the LM head in it (bare forwards only); host_s:
    by the host clock, synchronised at both ends. flushed: the cache was overwritten before every
    sample.
    """

    job: str
    what: str
    kv_len: int
    batch: int
    round: int
    status: str
    detail: str | None = None
    width: int | None = None
    forwards: int | None = None
    head_rows: int | None = None
    mask: str | None = None
    flushed: bool | None = None
    steps: int = 1
    captured: bool = False
    total_s: tuple[float, ...] = ()
    head_s: tuple[float, ...] = ()
    host_s: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.job, self.what, self.kv_len)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Medians of an instrumented pass over a bare forward (seconds); the parts sum to total_s."""

    job: str
    what: str
    kv_len: int
    batch: int
    width: int
    n: int
    total_s: float
    attention_s: float
    mlp_s: float
    head_s: float
    rest_s: float

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.job, self.what, self.kv_len)


@dataclass(frozen=True, kw_only=True)
class SlotsRecord:
    """A record folder in memory. models: weights as named in the plan -> source and config."""

    name: str
    header: SlotsHeader
    plan: Plan
    visits: tuple[Visit, ...]
    splits: tuple[Split, ...]
    models: dict[str, dict[str, Any]]
    ceilings: dict[str, Any] | None

    def job(self, name: str) -> Job:
        return next(job for job in self.plan.jobs if job.name == name)


def to_line(record: Visit | Split) -> str:
    """The record as one JSON line, newline included."""
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"


def plan_of(header: SlotsHeader) -> Plan:
    """The plan a header states."""
    jobs = tuple(from_dict(Job, values) for values in header.plan["jobs"])
    return Plan(**{**header.plan, "jobs": jobs})


class SlotsStore:
    """The writing side; `open` begins a record or continues one, then `close`."""

    def __init__(self, folder: Path, visits: list[Visit], splits: list[Split]) -> None:
        self.folder = folder
        self.done = {(*visit.key, visit.round) for visit in visits}
        self.failed = {v.key for v in visits if v.status != OK}
        self.split = {split.key for split in splits}
        self._visits = LineFile(folder / VISITS)
        self._splits = LineFile(folder / SPLITS)
        self._sessions = LineFile(folder / SESSIONS)
        self._windows = LineFile(folder / WINDOWS)

    @classmethod
    def open(cls, folder: Path, header: SlotsHeader) -> SlotsStore:
        """UserError if `folder` holds other things, or a record of other settings."""
        if (folder / HEADER).exists():
            found = difference(read_header(folder), header)
            if found:
                raise UserError(
                    f"cannot continue {folder}: {found}; use the settings it was begun with, or "
                    "name another folder with --out"
                )
            return cls(
                folder, repair_rows(folder / VISITS, Visit), repair_rows(folder / SPLITS, Split)
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty and no width record; name another with --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}; name another") from error
        write_whole(folder / HEADER, json.dumps(asdict(header), indent=1, ensure_ascii=False))
        return cls(folder, [], [])

    def append(self, visit: Visit) -> None:
        self._visits.append(to_line(visit))
        self.done.add((*visit.key, visit.round))
        if visit.status != OK:
            self.failed.add(visit.key)

    def append_split(self, split: Split) -> None:
        self._splits.append(to_line(split))
        self.split.add(split.key)

    def note_session(self, values: dict[str, Any]) -> None:
        self._sessions.append(json.dumps(values, ensure_ascii=False) + "\n")

    def note_window(self, job: str, began: float, ended: float) -> None:
        """Unix seconds between which the job ran, for cutting telemetry."""
        window = {"job": job, "began": round(began, 3), "ended": round(ended, 3)}
        self._windows.append(json.dumps(window) + "\n")

    def note_model(self, weights: str, values: dict[str, Any]) -> None:
        known = _json(self.folder / MODELS) or {}
        if known.get(weights) != values:
            write_whole(self.folder / MODELS, json.dumps({**known, weights: values}, indent=1))

    def note_ceilings(self, values: dict[str, Any]) -> None:
        write_whole(self.folder / CEILINGS, json.dumps(values, indent=1))

    def close(self) -> None:
        for file in (self._visits, self._splits, self._sessions, self._windows):
            file.close()


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def difference(stored: SlotsHeader, wanted: SlotsHeader) -> str | None:
    """The first setting that differs, in words; None when all match."""
    a, b = (json.loads(json.dumps(asdict(header))) for header in (stored, wanted))
    for name in MUST_MATCH:
        if found := first_difference(name, a[name], b[name]):
            return found
    for name in ENVIRONMENT_MUST_MATCH:
        before, after = a["environment"].get(name), b["environment"].get(name)
        if found := first_difference(f"environment.{name}", before, after):
            return found
    return None


def read_header(folder: Path) -> SlotsHeader:
    """UserError if `folder` holds no width record, or one of another schema."""
    path = folder / HEADER
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable {HEADER} ({error}); name another") from error
    if values.get("schema") != SCHEMA:
        raise UserError(
            f"{folder} has schema {values.get('schema')!r}, not {SCHEMA}; measure again"
        )
    return from_dict(SlotsHeader, values)


def read_slots(folder: Path) -> SlotsRecord:
    """A record folder, finished or not. Changes nothing."""
    header = read_header(folder)
    return SlotsRecord(
        name=folder.resolve().name,
        header=header,
        plan=plan_of(header),
        visits=tuple(row for row, _ in read_rows(folder / VISITS, Visit)),
        splits=tuple(row for row, _ in read_rows(folder / SPLITS, Split)),
        models=_json(folder / MODELS) or {},
        ceilings=_json(folder / CEILINGS),
    )
