"""Records as tidy pandas frames: `bench.load(folder)` or `bench.load([folder, ...])`.

One row is one generation, one step, one problem's score, one width point, one claim, one record.
Units and meanings of all columns are in COLUMNS, which is also docs/frames.md. Absent values are
missing, never zero. pandas is imported on use; nothing is computed here that metrics.py defines
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.claims import load_claims
from bench.claims_ours import observe_all, run_folders
from bench.claims_verdict import judge_all, to_rows
from bench.records import Measurement, ScoreRecord, StepRecord
from bench.store import RunRecord, planned_keys, read_record, read_steps
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

SLOTS = "slots.jsonl"

_RUN = {
    "record": ("", "name of the record folder"),
    "weights": ("", "name of the weights"),
    "tier": ("", "weights' tier: random, embedded, small, paper or local"),
    "dtype": ("", "number format of the weights in the run"),
    "device": ("", "GPU's name, or the device"),
}
_KEY = {
    "decoder": ("", "label of the decoder, as --decoders takes it"),
    "task": ("", "task"),
    "problem": ("", "problem id"),
    "repeat": ("", "repeat, from 0"),
}
_METHOD = {
    "method": ("", "name of the decoder without its parameters"),
    "block_len": ("tokens", "K; missing for a decoder without blocks"),
    "beta": ("", "weight of AR logits in verification; missing where it has no meaning"),
}
_LEDGER = {
    "target_forwards": ("forwards", "forwards of the benchmarked network"),
    "draft_forwards": ("forwards", "forwards of a separate drafter"),
    "drafted": ("tokens", "draft tokens verified"),
    "accepted": ("tokens", "draft tokens that were right"),
    "forward_s": ("s", "backbone and head inside it; only under the per_step clock"),
}
# frame -> column -> (unit, meaning), in the frames' own order of columns.
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "measurements": {
        **_RUN,
        **_METHOD,
        **_KEY,
        "prompt_sha": ("", "first 16 hex digits of the prompt's sha256"),
        "prompt_tokens": ("tokens", "length of the prompt"),
        "output_tokens": ("tokens", "tokens kept"),
        "tokens_generated": ("tokens", "tokens committed, also behind the cut"),
        "decode_forwards": ("forwards", "decode forwards of the target"),
        "prefill_forwards": ("forwards", "forwards of the prefill"),
        "draft_forwards": _LEDGER["draft_forwards"],
        "drafted": _LEDGER["drafted"],
        "accepted": _LEDGER["accepted"],
        "acceptance_histogram": ("steps", "tuple; entry r counts steps that committed r tokens"),
        "drafted_at": ("tokens", "tuple; drafted by place in the draft"),
        "accepted_at": ("tokens", "tuple; accepted by place in the draft"),
        "prefill_s": ("s", "from the call to the first token"),
        "decode_s": ("s", "decode time"),
        "forward_s": _LEDGER["forward_s"],
        "host_s": ("s", "decode time outside the forward; only under the per_step clock"),
        "finish": ("", "eos, stop or length"),
        "text": ("", "generated text before any filter"),
        "token_ids_sha": ("", "first 16 hex digits of the sha256 of the kept token ids"),
        "peak_memory_bytes": ("bytes", "the most: allocated on CUDA, else the process's on Linux"),
        "began_at": ("s", "Unix time at which the generation began; missing in old records"),
        "ended_at": ("s", "Unix time at which it ended; missing in old records"),
        "tokens_processed": ("tokens", "query tokens of the decode steps; missing in old records"),
        "decode_tokens": ("tokens", "kept tokens that the prefill did not commit"),
        "t_per_nfe": ("tokens/forward", "decode tokens / decode forwards of this output"),
        "tokens_per_s": ("tokens/s", "decode tokens / decode seconds of this output"),
        "step_ms": ("ms", "decode seconds / decode forwards, in milliseconds"),
    },
    "steps": {
        **_RUN,
        **_METHOD,
        **_KEY,
        "index": ("", "0 is the prefill, decode steps count from 1"),
        "committed": ("token ids", "tuple; tokens the step made final, before the cut"),
        "target_forwards": _LEDGER["target_forwards"],
        "draft_forwards": _LEDGER["draft_forwards"],
        "query_width": ("tokens", "new tokens sent through the target"),
        "kv_len": ("tokens", "length of the cached prefix the forward read"),
        "drafted": _LEDGER["drafted"],
        "accepted": _LEDGER["accepted"],
        "step_s": ("s", "the step; only under the per_step clock"),
        "forward_s": _LEDGER["forward_s"],
        "draft_tokens": ("token ids", "tuple; the ids the step verified, where told"),
        "committed_tokens": ("tokens", "how many tokens the step made final"),
    },
    "scores": {
        **_RUN,
        **_METHOD,
        **_KEY,
        "metric": ("", "the grading library's own name"),
        "variant": ("", "raw, sanitised or repaired text"),
        "harness": ("", "who graded, with version"),
        "headline": ("", "True for the metric the tables show"),
        "score": ("fraction", "this problem's score, 0 to 1"),
    },
    "slots": {
        "record": ("", "name of the record folder"),
        "weights": ("", "name of the weights, or random:<shape>"),
        "dtype": ("", "number format"),
        "width": ("tokens", "query tokens in one forward"),
        "kv_len": ("tokens", "cached tokens the forward reads"),
        "batch": ("sequences", "sequences in the forward"),
        "part": ("", "total, attention, mlp, head or rest"),
        "median_s": ("s", "median seconds of one forward"),
        "status": ("", "ok, or why there is no time"),
    },
    "claims": {
        "id": ("", "unique name of the claim"),
        "kind": ("", "paper, site or published"),
        "source": ("", "table, figure or page"),
        "page": ("", "page of the paper where known"),
        "system": ("", "the source's system, under our spelling"),
        "weights": ("", "hub ids joined by +; empty if not published"),
        "size": ("parameters", "size as the source writes it"),
        "decoder": ("", "our name of the method; empty if we have none"),
        "block_len": ("tokens", "K"),
        "beta": ("", "weight of AR logits"),
        "alpha": ("", "weight of the AR loss in training"),
        "threshold": ("fraction", "confidence above which a diffusion decoder commits"),
        "task": ("", "task, or a mean over tasks"),
        "width": ("tokens", "query tokens"),
        "kv_len": ("tokens", "cached tokens"),
        "setting": ("", "what has no column, key=value joined by ;"),
        "metric": ("", "what is claimed"),
        "unit": ("", "unit of value, tolerance, ours, ours_low, ours_high and difference"),
        "value": ("see unit", "the claimed number"),
        "tolerance": ("see unit", "how far a reproduction may lie"),
        "certainty": ("", "text, vector figure, bars or derived"),
        "mark": ("", "provenance of the reading"),
        "note": ("", "inferences made in reading"),
        "ours": ("see unit", "our number beside it"),
        "ours_low": ("see unit", "lower bound of its 95 % interval"),
        "ours_high": ("see unit", "upper bound of its 95 % interval"),
        "ours_n": ("problems", "problems behind it"),
        "ours_weights": ("", "weights behind it"),
        "ours_decoder": ("", "label of the decoder behind it"),
        "ours_record": ("", "record behind it"),
        "ours_flags": ("", "validity flags that spoil it, with blanks between"),
        "verdict": ("", "see docs/metrics.md"),
        "difference": ("see unit", "ours minus value, where comparable"),
        "reason": ("", "why this verdict"),
        "needs": ("", "what a measurement would take"),
    },
    "header": {
        **_RUN,
        "schema": ("", "record schema"),
        "definitions": ("", "version of docs/metrics.md"),
        "created": ("", "when, UTC, ISO 8601"),
        "profile": ("", "profile's name"),
        "clock": ("", "total or per_step"),
        "stopping": ("", "task or fixed"),
        "max_new_tokens": ("tokens", "cap on new tokens; missing: each task's own"),
        "commit": ("", "git commit of the code"),
        "dirty": ("", "True if the code had local changes"),
        "cpu": ("", "processor"),
        "threads": ("", "threads torch used"),
        "gpu": ("", "GPU's name; missing without one"),
        "torch": ("", "version of torch"),
        "weights_sha256": ("", "sha256 of the weights; missing for random ones"),
        "parameters": ("", "number of parameters"),
        "adapters": ("", "tuple; names and hashes of adapters on the base"),
        "seed": ("", "seed of the run"),
        "planned": ("generations", "what a finished run holds"),
        "done": ("generations", "what is there"),
    },
}


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames of one or more records; columns as in COLUMNS. Empty frames keep their columns.

    `claims` holds every claim with these records' numbers beside it (not the committed records').
    `slots` may have further columns: all that its record holds.
    """

    measurements: DataFrame
    steps: DataFrame
    scores: DataFrame
    slots: DataFrame
    claims: DataFrame
    header: DataFrame


def load(paths: str | Path | Sequence[str | Path]) -> Frames:
    """Read one record folder or several; a width record fills `slots` and `claims` only.

    UserError for a folder that is no record, or no folder at all.
    """
    single = isinstance(paths, str | Path)
    folders = [Path(paths)] if single else [Path(path) for path in paths]  # type: ignore[arg-type]
    if not folders:
        raise UserError("bench.load got no record folder; name at least one")
    records = [
        (folder, read_record(folder))
        for folder in run_folders(folders)
    ]
    observed = observe_all(folders)
    rows: dict[str, list[dict[str, Any]]] = {
        "measurements": [_measurement(r, m) for _, r in records for m in r.measurements],
        "steps": [_step(r, s) for folder, r in records for s in read_steps(folder)],
        "scores": [row for _, r in records for s in r.scores for row in _scores(r, s)],
        "slots": [
            {"record": folder.resolve().name, **row}
            for folder in folders
            for row in slot_rows(folder)
        ],
        "claims": to_rows(judge_all(load_claims(), observed)),
        "header": [_header(r) for _, r in records],
    }
    return Frames(**{name: _frame(name, found) for name, found in rows.items()})


def _frame(name: str, rows: list[dict[str, Any]]) -> DataFrame:
    import pandas as pd

    extra = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS[name])
    return pd.DataFrame(rows, columns=[*COLUMNS[name], *extra])


def _run(record: RunRecord) -> dict[str, Any]:
    header = record.header
    return {
        "record": record.name,
        "weights": header.weights["name"],
        "tier": header.weights["tier"],
        "dtype": header.dtype,
        "device": header.environment.get("gpu") or header.device,
    }


def _shared(record: RunRecord, label: str) -> dict[str, Any]:
    facts = record.header.decoders[label]
    params = facts["params"]
    return {
        **_run(record),
        "method": facts["name"],
        "block_len": params.get("block_len"),
        "beta": params.get("beta"),
    }


def _measurement(record: RunRecord, row: Measurement) -> dict[str, Any]:
    tokens, forwards = row.decode_tokens, row.decode_forwards
    return {
        **_shared(record, row.decoder),
        **asdict(row),
        "decode_tokens": tokens,
        "t_per_nfe": tokens / forwards if forwards else None,
        "tokens_per_s": tokens / row.decode_s if row.decode_s > 0 else None,
        "step_ms": 1000 * row.decode_s / forwards if forwards else None,
    }


def _step(record: RunRecord, step: StepRecord) -> dict[str, Any]:
    return {
        **_shared(record, step.decoder),
        **asdict(step),
        "committed_tokens": len(step.committed),
    }


def _scores(record: RunRecord, score: ScoreRecord) -> list[dict[str, Any]]:
    plain = asdict(score)
    per_problem = plain.pop("per_problem")
    return [
        {**_shared(record, score.decoder), **plain, "problem": problem, "score": value}
        for problem, value in per_problem.items()
    ]


def slot_rows(folder: Path) -> list[dict[str, Any]]:
    """The width points of a record folder, one dict each; empty where it holds none."""
    path = folder / SLOTS
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} line {number} is not a JSON object ({error}); measure again"
            ) from error
    return rows


def _header(record: RunRecord) -> dict[str, Any]:
    header, env, profile = record.header, record.header.environment, record.header.profile
    return {
        **_run(record),
        "schema": header.schema,
        "definitions": header.definitions,
        "created": header.created,
        "profile": profile.get("name"),
        "clock": profile.get("clock"),
        "stopping": profile.get("stopping"),
        "max_new_tokens": profile.get("max_new_tokens"),
        "commit": header.commit,
        "dirty": header.dirty,
        "cpu": env.get("cpu"),
        "threads": env.get("threads"),
        "gpu": env.get("gpu"),
        "torch": env.get("versions", {}).get("torch"),
        "weights_sha256": header.weights.get("sha256"),
        "parameters": header.weights.get("parameters"),
        "adapters": tuple(header.weights.get("adapters") or ()),
        "seed": header.seed,
        "planned": len(planned_keys(header)),
        "done": len(record.measurements),
    }


def describe() -> str:
    """The column tables of docs/frames.md, in Markdown."""
    parts = []
    for name, columns in COLUMNS.items():
        lines = [f"## {name}", "", "| column | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{column}` | {unit} | {text} |" for column, (unit, text) in columns.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
