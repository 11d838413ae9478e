"""The records a run writes: one header, then one JSON line per measurement, step and score.

Plain frozen data, no torch. Units are in the field names, fractions are 0 to 1, absent is None.
Schema history: 1 (first; `draft_tokens`, `began_at`, `ended_at` and `tokens_processed` came later
and are None in the oldest records).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

SCHEMA_VERSION = 1

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What was run, on what, with what: written before the first measurement, never changed.

    `weights` is tidar_ref's WeightsSource as a dict, `data` maps a task to its DataSource and the
    number of shots, `plan` counts what a finished run holds. No field holds a machine's paths.
    """

    schema: int
    definitions: int
    created: str
    argv: tuple[str, ...]
    profile: dict[str, Any]
    environment: dict[str, Any]
    commit: str | None
    dirty: bool | None
    weights: dict[str, Any]
    data: dict[str, dict[str, Any]]
    problems: dict[str, tuple[str, ...]]
    decoders: dict[str, dict[str, Any]]
    dtype: str
    device: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One generation: (decoder, task, problem, repeat) is its key and occurs once in a record.

    output_tokens counts kept tokens (end-of-sequence or stop-completing token included),
    tokens_generated everything the decoder committed. acceptance_histogram[r] counts decode steps
    that committed r tokens; drafted_at and accepted_at count by draft position. forward_s and
    host_s exist only under the per_step clock. peak_memory_bytes: on CUDA what was allocated at
    most, on Linux the resident set of the whole process, else None. `text` is raw: before any
    task's filter. `drafted` and `accepted` are sums over the decode steps, and so is
    tokens_processed: query tokens sent through the target. began_at and ended_at are Unix seconds
    on the run's own clock, which the telemetry shares.
    """

    decoder: str
    task: str
    problem: str
    repeat: int
    prompt_sha: str
    prompt_tokens: int
    output_tokens: int
    tokens_generated: int
    decode_forwards: int
    prefill_forwards: int
    draft_forwards: int
    drafted: int
    accepted: int
    acceptance_histogram: tuple[int, ...]
    drafted_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    prefill_s: float
    decode_s: float
    forward_s: float | None
    host_s: float | None
    finish: str
    text: str
    token_ids_sha: str
    peak_memory_bytes: int | None
    began_at: float | None = None
    ended_at: float | None = None
    tokens_processed: int | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """(decoder, task, problem, repeat)."""
        return (self.decoder, self.task, self.problem, self.repeat)

    @property
    def decode_tokens(self) -> int:
        """Kept tokens that the prefill did not commit: all but one, unless the method denoises."""
        in_steps = sum(length * count for length, count in enumerate(self.acceptance_histogram))
        return max(0, self.output_tokens - (self.tokens_generated - in_steps))

    @property
    def pair(self) -> tuple[str, str, int]:
        """(task, problem, repeat): what two decoders share."""
        return (self.task, self.problem, self.repeat)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One prefill (index 0) or decode step (1..) of one generation, as the loop's ledger has it.

    `committed` is the token ids made final by the step, before truncation at a stop;
    `draft_tokens` the ids it verified, or None where the decoder or an old record does not tell.
    """

    decoder: str
    task: str
    problem: str
    repeat: int
    index: int
    committed: tuple[int, ...]
    target_forwards: int
    draft_forwards: int
    query_width: int
    kv_len: int
    drafted: int
    accepted: int
    step_s: float | None
    forward_s: float | None
    draft_tokens: tuple[int, ...] | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The key of the measurement this step belongs to."""
        return (self.decoder, self.task, self.problem, self.repeat)


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """One score of one decoder's texts on one task; per_problem values are in 0..1."""

    decoder: str
    task: str
    repeat: int
    metric: str
    variant: str
    harness: str
    headline: bool
    per_problem: dict[str, float]


def to_line(record: RunHeader | Measurement | StepRecord | ScoreRecord) -> str:
    """The record as one JSON line, newline included."""
    return json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False) + "\n"


def from_dict(kind: type[Record], values: dict[str, Any]) -> Record:
    """A record from parsed JSON; TypeError if a field is missing or unknown."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    plain = {
        name: tuple(value)
        if name in fields and str(fields[name].type).startswith("tuple") and value is not None
        else value
        for name, value in values.items()
    }
    return kind(**plain)


def ids_sha(token_ids: Sequence[int]) -> str:
    """First 16 hex digits of the sha256 of the ids, written in decimal with commas."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]
