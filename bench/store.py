"""The record folder: write as the run goes, survive being killed, continue, read back.

Order on disk is what makes a kill -9 harmless: the header is whole before anything else exists, a
generation's step lines are on disk before its measurement line, and the measurement line is what
counts. On resume a torn last line is cut off and step lines without their measurement are dropped,
so a key is either complete or not there. Reading a folder changes nothing in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.records import (
    SCHEMA_VERSION,
    Measurement,
    RunHeader,
    ScoreRecord,
    StepRecord,
    from_dict,
    to_line,
)
from bench.telemetry.summary import read_lines
from tidar_ref.errors import UserError

HEADER, MEASUREMENTS, STEPS, SCORES = (
    "header.json",
    "measurements.jsonl",
    "steps.jsonl",
    "scores.jsonl",
)
SESSIONS = "sessions.jsonl"
VOCABULARY = "vocabulary.json"
TELEMETRY = "telemetry.jsonl"  # written by the sampler's process; see bench/telemetry

# Two headers that differ here describe two different experiments.
MUST_MATCH = (
    "definitions",
    "profile",
    "weights",
    "data",
    "problems",
    "decoders",
    "dtype",
    "device",
    "seed",
    "commit",
)
ENVIRONMENT_MUST_MATCH = ("cpu", "threads", "gpu", "versions")

Key = tuple[str, str, str, int]
Record = TypeVar("Record", Measurement, StepRecord, ScoreRecord)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A record folder in memory; `name` is the folder's name.

    `sessions` and `telemetry` are their files' lines as they are; older records have none.
    """

    name: str
    header: RunHeader
    measurements: tuple[Measurement, ...]
    scores: tuple[ScoreRecord, ...]
    sessions: tuple[dict[str, Any], ...] = ()
    telemetry: tuple[dict[str, Any], ...] = ()

    @property
    def complete(self) -> bool:
        """Every planned generation is there."""
        return set(planned_keys(self.header)) == {row.key for row in self.measurements}


def planned_keys(header: RunHeader) -> list[Key]:
    """Every key a finished run holds, in running order: decoders alternate on each problem."""
    return [
        (decoder, task, problem, repeat)
        for repeat in range(header.profile["repeats"])
        for task, problems in header.problems.items()
        for problem in problems
        for decoder in header.decoders
    ]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there in full or not at all; UserError if it cannot be."""
    draft = path.with_name(path.name + ".part")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(
        f"cannot write {path}: {reason}; free space or name another folder with --out, "
        "then run again (a run that has begun continues with --resume FOLDER)"
    )


class LineFile:
    """Append-only lines; a line that cannot be written in full leaves no trace of itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(self, text: str) -> None:
        """Append and fsync; UserError when the disk refuses, the file then as before."""
        size = os.fstat(self._fd).st_size
        data = text.encode("utf-8")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        os.close(self._fd)


class RunStore:
    """The writing side of one record folder; use `create` or `resume`, then `close`."""

    def __init__(self, folder: Path, header: RunHeader, done: Sequence[Measurement]) -> None:
        self.folder = folder
        self.header = header
        self.measurements = list(done)
        self.done: set[Key] = {row.key for row in done}
        self._steps = LineFile(folder / STEPS)
        self._measurements = LineFile(folder / MEASUREMENTS)
        self._sessions = LineFile(folder / SESSIONS)

    @classmethod
    def create(cls, folder: Path, header: RunHeader) -> RunStore:
        """A new record; UserError if the folder has content or cannot be made."""
        check_free(folder)
        existed = folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        try:
            write_whole(folder / HEADER, json.dumps(asdict(header), indent=1, ensure_ascii=False))
            return cls(folder, header, ())
        except UserError:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    @classmethod
    def resume(cls, folder: Path, header: RunHeader) -> RunStore:
        """Continue a record made with the same settings; cuts off what a kill left half-written.

        UserError names the first field in which the stored header differs from `header`.
        """
        stored = read_header(folder)
        difference = header_difference(stored, header)
        if difference:
            raise UserError(
                f"cannot resume {folder}: {difference}; run with the settings it was begun with, "
                "or start anew with --fresh"
            )
        measurements = repair_rows(folder / MEASUREMENTS, Measurement)
        done = {row.key for row in measurements}
        if len(done) != len(measurements):
            raise UserError(f"{folder / MEASUREMENTS} holds a key twice; start anew with --fresh")
        steps = repair_rows(folder / STEPS, StepRecord)
        kept = [step for step in steps if step.key in done]
        if len(kept) != len(steps):
            write_whole(folder / STEPS, "".join(map(to_line, kept)))
        (folder / SCORES).unlink(missing_ok=True)  # they will be computed again, over all texts
        return cls(folder, stored, measurements)

    def append(self, measurement: Measurement, steps: Iterable[StepRecord]) -> None:
        """Store one finished generation: its steps first, then the line that makes it count."""
        if measurement.key in self.done:
            raise ValueError(f"key {measurement.key} is already in {self.folder}")
        self._steps.append("".join(map(to_line, steps)))
        self._measurements.append(to_line(measurement))
        self.done.add(measurement.key)
        self.measurements.append(measurement)

    def note_session(self, values: dict[str, Any]) -> None:
        """One line per process that worked on this record: when, warm-up, what it continued."""
        self._sessions.append(json.dumps(values, ensure_ascii=False) + "\n")

    def write_scores(self, scores: Iterable[ScoreRecord]) -> None:
        """Store all scores at once; their presence says that the run was finished."""
        write_whole(self.folder / SCORES, "".join(map(to_line, scores)))

    def write_vocabulary(self, pieces: dict[int, str]) -> None:
        """Store the text of the token ids that occur in the ledger."""
        text = json.dumps({str(token): piece for token, piece in pieces.items()}, indent=0)
        write_whole(self.folder / VOCABULARY, text + "\n")

    def close(self) -> None:
        for file in (self._steps, self._measurements, self._sessions):
            file.close()


def check_free(folder: Path) -> None:
    """UserError unless a new record could go to `folder`: it is not there, or an empty folder."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder} already exists and is not an empty folder; continue it with --resume "
                "or name another with --out"
            )
    except OSError as error:
        raise _cannot_write(folder, error) from error


def read_header(folder: Path) -> RunHeader:
    """The header of a record folder; UserError if it is not one, or of another schema."""
    path = folder / HEADER
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is not a record folder ({HEADER}: {error.strerror}); name a folder that "
            "`bench run` wrote"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); run again into a new folder") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA_VERSION:
        raise UserError(
            f"{folder} has record schema {schema!r} and this version reads {SCHEMA_VERSION}; use "
            "the commit named in its header, or run again"
        )
    try:
        return from_dict(
            RunHeader,
            {**values, "problems": {task: tuple(ids) for task, ids in values["problems"].items()}},
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} lacks a field ({error}); run again into a new folder") from error


def header_difference(stored: RunHeader, wanted: RunHeader) -> str | None:
    """The first setting that differs, as 'field was A, is now B'; None when all match."""

    def plain(value: Any) -> Any:
        return json.loads(json.dumps(value))

    for name in MUST_MATCH:
        found = first_difference(name, plain(getattr(stored, name)), plain(getattr(wanted, name)))
        if found:
            return found
    for name in ENVIRONMENT_MUST_MATCH:
        before, after = plain(stored.environment.get(name)), plain(wanted.environment.get(name))
        found = first_difference(f"environment.{name}", before, after)
        if found:
            return found
    return None


def first_difference(name: str, before: Any, after: Any) -> str | None:
    if before == after:
        if isinstance(before, dict) and list(before) != list(after):
            return f"{name} has another order"
        return None
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            found = first_difference(f"{name}.{key}", before.get(key), after.get(key))
            if found:
                return found
    return f"{name} was {_short(before)}, is now {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def read_rows(path: Path, kind: type[Record]) -> Iterator[tuple[Record, int]]:
    """Each whole line as a record, with the offset after it; a torn last line is left out."""
    if not path.exists():
        return
    data = path.read_bytes()
    offset = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        try:
            yield from_dict(kind, json.loads(line)), offset
        except (ValueError, TypeError) as error:
            if offset == len(data):  # a crash can leave a block of zero bytes with a newline
                return
            raise UserError(
                f"{path} line {number} is not a {kind.__name__} ({error}); delete the folder and "
                "run again"
            ) from error


def repair_rows(path: Path, kind: type[Record]) -> list[Record]:
    """Read a line file and cut off whatever follows its last whole line."""
    rows: list[Record] = []
    end = 0
    for row, end in read_rows(path, kind):  # noqa: B007 (end is used after the loop)
        rows.append(row)
    try:
        if path.exists() and path.stat().st_size != end:
            os.truncate(path, end)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return rows


def read_steps(folder: Path) -> Iterator[StepRecord]:
    """The per-step ledger, in the order in which it was written."""
    return (row for row, _ in read_rows(folder / STEPS, StepRecord))


def read_vocabulary(folder: Path) -> dict[int, str]:
    """Text of each token id of the ledger; empty for a record that holds none."""
    path = folder / VOCABULARY
    if not path.exists():
        return {}
    try:
        return {int(token): str(piece) for token, piece in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} maps no token ids to text ({error}); delete the file") from error


def read_record(folder: Path) -> RunRecord:
    """A record folder, finished or not; UserError if it cannot be read. Changes nothing."""
    header = read_header(folder)
    return RunRecord(
        name=folder.resolve().name,
        header=header,
        measurements=tuple(row for row, _ in read_rows(folder / MEASUREMENTS, Measurement)),
        scores=tuple(row for row, _ in read_rows(folder / SCORES, ScoreRecord)),
        sessions=_sessions(folder / SESSIONS),
        telemetry=read_lines(folder / TELEMETRY),
    )


def _sessions(path: Path) -> tuple[dict[str, Any], ...]:
    """The session lines; one that a kill left torn is skipped."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return tuple(values for values in found if isinstance(values, dict))


def find_unfinished(runs: Path, header: RunHeader) -> Path | None:
    """The newest folder under `runs` begun with these very settings and not scored yet."""
    if not runs.is_dir():
        return None
    for folder in sorted(runs.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        if (folder / SCORES).exists() or not (folder / HEADER).exists():
            continue
        try:
            stored = read_header(folder)
        except UserError:
            continue  # another schema, or not a record: not ours to continue
        if header_difference(stored, header) is None:
            return folder
    return None
