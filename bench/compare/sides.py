"""One side of a comparison, read from a regress record or from a run's record folder.

Both kinds become the same thing: facts that must agree, counters by item, log speedups by pair.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import metrics, validity
from bench.compare import regress_record
from bench.compare.regress_record import RegressRecord
from bench.records import Measurement, StepRecord
from bench.store import HEADER, RunRecord, read_record, read_steps
from tidar_ref.errors import UserError

REFERENCE = "ar"
# What of a measurement is a clock, a memory reading, or the key itself; all the rest is counted.
NOT_COUNTED = {
    *("decoder", "task", "problem", "repeat", "text"),
    *("prefill_s", "decode_s", "forward_s", "host_s", "peak_memory_bytes"),
    *("began_at", "ended_at"),
    "tokens_processed",  # the step ledger's widths, which are compared; old records lack the sum
}
ENVIRONMENT = (
    *("python", "machine", "cpu", "cores", "threads", "gpu", "gpu_driver", "cuda", "versions"),
)
PROFILE = ("stopping", "style", "max_new_tokens", "clock")
WEIGHTS = ("tier", "name", "sha256", "mask_token_id")


@dataclass(frozen=True, kw_only=True)
class Side:
    """facts: dotted field -> value, all of which must agree before anything is compared.

    counters: decoder -> item -> counts. speedups: decoder -> pair -> log(speedup over AR).
    ar_log_s: pair -> log seconds of AR, comparable only within one `session`. levels, ms_per_token
    and t_per_nfe: decoder -> speedup over AR (x), decode time (ms) and tokens per forward, to show.
    absent: decoder -> why this side lacks it. flagged: decoder -> task -> the validity flags that
    keep its speedup out of comparisons; its pairs are not in `speedups`.
    """

    name: str
    kind: str
    commit: str | None
    dirty: bool | None
    session: str | None
    facts: dict[str, Any]
    counters: dict[str, dict[str, dict[str, Any]]]
    speedups: dict[str, dict[Any, float]]
    ar_log_s: dict[Any, float]
    levels: dict[str, float | None]
    ms_per_token: dict[str, float | None]
    t_per_nfe: dict[str, float | None]
    absent: dict[str, str] = field(default_factory=dict)
    flagged: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)


def read(path: Path) -> Side:
    """A regress record (file, or folder with regress.json) or a run's record folder."""
    if path.is_dir() and (path / HEADER).exists():
        return from_run(read_record(path), read_steps(path))
    if path.is_dir():
        path = path / regress_record.FILE
        if not path.exists():
            raise UserError(
                f"{path.parent} holds neither {HEADER} nor {regress_record.FILE}; name a folder "
                "that `bench run` or `bench regress` wrote"
            )
    return from_regress(regress_record.read(path), path.stem)


def from_regress(record: RegressRecord, name: str) -> Side:
    """A regress record as a side; pairs are (process, index)."""
    speedups: dict[str, dict[Any, float]] = {}
    ar_log_s: dict[Any, list[float]] = {}
    own_s: dict[str, list[float]] = {}
    for turn in record.turns:
        speedups.setdefault(turn.decoder, {})[turn.place] = math.log(turn.speedup)
        ar_log_s.setdefault(turn.place, []).append(math.log(min(turn.ar_s)))
        own_s.setdefault(turn.decoder, []).append(min(turn.own_s))
        own_s.setdefault(REFERENCE, []).append(min(turn.ar_s))
    timed, prompt = record.settings["timed_tokens"], record.settings["timed_prompt"]
    tokens = {  # less what the prefill makes: one token, but for the denoisers
        name: timed - items[prompt]["output_tokens"] + items[prompt]["decode_tokens"]
        for name, items in record.counters.items()
        if prompt in items
    }
    return Side(
        name=name,
        kind=record.kind,
        commit=record.commit,
        dirty=record.dirty,
        session=record.session,
        facts={
            "kind": record.kind,
            "definitions": record.definitions,
            **_flat("settings", record.settings),
            **_environment(record.environment),
        },
        counters=record.counters,
        speedups=speedups,
        ar_log_s={place: statistics.median(values) for place, values in ar_log_s.items()},
        levels={d: regress_record.typical_speedup(record, d) for d in record.decoders},
        ms_per_token={
            name: 1000 * statistics.median(own_s[name]) / count
            for name, count in tokens.items()
            if name in own_s and count
        },
        t_per_nfe={d: _counted_ratio(items) for d, items in record.counters.items()},
        absent=dict(record.not_measured),
    )


def from_run(record: RunRecord, steps: Iterable[StepRecord] = ()) -> Side:
    """A run record as a side; pairs are (task, problem, repeat)."""
    header, flagged = record.header, _flagged(record)
    widths: dict[Any, Counter[int]] = {}
    for step in steps:
        widths.setdefault(step.key, Counter())[step.query_width] += 1
    counters: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in header.decoders}
    rows: dict[str, list[Measurement]] = {name: [] for name in header.decoders}
    for row in record.measurements:
        counts = {k: _plain(v) for k, v in asdict(row).items() if k not in NOT_COUNTED}
        if row.key in widths:
            counts["query_widths"] = {str(w): n for w, n in sorted(widths[row.key].items())}
        counters[row.decoder][f"{row.task}/{row.problem}/{row.repeat}"] = counts
        rows[row.decoder].append(row)
    seconds = {
        name: {row.pair: _s_per_token(row) for row in mine if _s_per_token(row) is not None}
        for name, mine in rows.items()
    }
    reference = seconds.get(REFERENCE, {})
    rates = {name: metrics.tokens_per_s(mine) for name, mine in rows.items()}
    faster = {
        name: metrics.speedup(mine, rows.get(REFERENCE, [])) if name != REFERENCE else None
        for name, mine in rows.items()
    }
    return Side(
        name=record.name,
        kind="run",
        commit=header.commit,
        dirty=header.dirty,
        session=None,
        facts={
            "kind": "run",
            "definitions": header.definitions,
            "dtype": header.dtype,
            "device": header.device,
            "seed": header.seed,
            **{f"weights.{key}": header.weights.get(key) for key in WEIGHTS},
            **{f"profile.{key}": header.profile.get(key) for key in PROFILE},
            **{f"data.{task}.sha256": data["sha256"] for task, data in header.data.items()},
            **_environment(header.environment),
        },
        counters=counters,
        speedups={
            name: {
                pair: math.log(reference[pair] / own)
                for pair, own in mine.items()
                if pair in reference and pair[0] not in flagged.get(name, ())
            }
            for name, mine in seconds.items()
            if name != REFERENCE
        },
        ar_log_s={},
        levels={name: found.value if found else None for name, found in faster.items()},
        ms_per_token={name: 1000 / rate if rate else None for name, rate in rates.items()},
        t_per_nfe={name: metrics.tokens_per_nfe(mine) for name, mine in rows.items()},
        flagged=flagged,
    )


def _flagged(record: RunRecord) -> dict[str, dict[str, tuple[str, ...]]]:
    """Decoder -> task -> flags of its cell or of AR's that spoil the speedup; clean ones left out.

    Counters need no flag: they are compared item by item, whatever was cut or interrupted.
    """
    flags = validity.flags_of(record)
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in record.header.decoders:
        for task in record.header.problems:
            pair = ((name, task), (REFERENCE, task))
            names = validity.spoilers((validity.SPEED, validity.COUNTS), pair, flags)
            if names and name != REFERENCE:
                found.setdefault(name, {})[task] = names
    return found


def first_difference(base: Side, head: Side) -> str | None:
    """The first fact in which two sides are unlike, as words; None if all agree.

    A task only one of them ran and a package only one of them lists are no differences: such
    problems are not shared, and two checkouts in one interpreter may list different packages.
    """
    for name in [*base.facts, *(name for name in head.facts if name not in base.facts)]:
        both = name in base.facts and name in head.facts
        if name.startswith(("data.", "environment.versions.")) and not both:
            continue
        ours, theirs = base.facts.get(name), head.facts.get(name)
        if ours != theirs:
            return f"{name} is {ours!r} in {base.name} and {theirs!r} in {head.name}"
    return None


def _environment(values: Mapping[str, Any]) -> dict[str, Any]:
    return _flat("environment", {name: values.get(name) for name in ENVIRONMENT})


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(f"{prefix}.{name}", value))
        else:
            flat[f"{prefix}.{name}"] = value
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _s_per_token(row: Measurement) -> float | None:
    """Decode seconds per decode token; None where nothing was decoded."""
    tokens = metrics.decode_tokens([row])
    return row.decode_s / tokens if tokens and row.decode_s > 0 else None


def _counted_ratio(items: Mapping[str, Mapping[str, Any]]) -> float | None:
    forwards = sum(counts["decode_forwards"] for counts in items.values())
    tokens = sum(counts["decode_tokens"] for counts in items.values())
    return tokens / forwards if forwards else None
