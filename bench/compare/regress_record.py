"""What `bench regress` writes: one JSON file with counters and every timed turn of one checkout."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.records import from_dict
from bench.store import write_whole
from tidar_ref.errors import UserError

KIND, SCHEMA = "regress", 2
FILE = "regress.json"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """AR and one decoder timed in alternation: decode seconds of each generation.

    process counts restarts, index the turns of this decoder in that process; speedup is the fastest
    AR generation over the decoder's fastest (both make the same number of tokens).
    """

    decoder: str
    process: int
    index: int
    ar_s: tuple[float, ...]
    own_s: tuple[float, ...]
    speedup: float

    @property
    def place(self) -> tuple[int, int]:
        """(process, index): what a turn of base and one of head share."""
        return (self.process, self.index)


@dataclass(frozen=True, kw_only=True)
class RegressRecord:
    """One checkout, measured. session: shared by two records whose turns were interleaved."""

    kind: str
    schema: int
    definitions: int
    created: str
    commit: str | None
    dirty: bool | None
    session: str | None
    environment: dict[str, Any]
    settings: dict[str, Any]
    decoders: dict[str, dict[str, Any]]
    not_measured: dict[str, str]
    counters: dict[str, dict[str, dict[str, Any]]]
    turns: tuple[Turn, ...]


def make_turn(
    decoder: str, process: int, index: int, ar_s: list[float], own_s: list[float]
) -> Turn:
    """A turn from its seconds; UserError if the clock is too coarse for them."""
    if min(*ar_s, *own_s) <= 0:
        raise UserError(
            f"a generation of {decoder} took 0 s by this machine's clock; run the gate on another"
        )
    return Turn(
        decoder=decoder,
        process=process,
        index=index,
        ar_s=tuple(ar_s),
        own_s=tuple(own_s),
        speedup=min(ar_s) / min(own_s),
    )


def typical_speedup(record: RegressRecord, decoder: str) -> float | None:
    """Geometric median over turns of a decoder's speedup over AR (x)."""
    logs = [math.log(turn.speedup) for turn in record.turns if turn.decoder == decoder]
    return math.exp(statistics.median(logs)) if logs else None


def write(path: Path, record: RegressRecord) -> Path:
    """Write to `path` if it ends in .json, else to regress.json in that folder; gives the file."""
    file = path if path.suffix == ".json" else path / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {file.parent}: {error.strerror}; name another --out"
        ) from error
    write_whole(file, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    return file


def read(file: Path) -> RegressRecord:
    """A record from its file; UserError if it is not one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; name an existing record") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); measure it again") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise UserError(f"{file} is not a record of `bench regress`; name one, or a run folder")
    if values.get("schema") != SCHEMA:
        raise UserError(
            f"{file} has schema {values.get('schema')!r}, this program reads {SCHEMA}; measure it "
            "again"
        )
    try:
        turns = tuple(from_dict(Turn, turn) for turn in values.pop("turns"))
        record = from_dict(RegressRecord, {**values, "turns": turns})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); measure it again") from error
    return record
