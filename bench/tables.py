"""A record folder's tables, in Markdown and CSV: what was measured, the paper's number beside it.

One row is one decoder on one task. A cell that was not measured, or that the weights cannot carry,
is empty: random weights have step times only, never a score, T/NFE or speedup. No torch, no clock.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench import metrics, validity
from bench.metrics import Interval
from bench.records import Measurement, ScoreRecord
from bench.store import RunRecord, planned_keys, read_record, write_whole
from bench.telemetry import cells
from bench.telemetry.summary import Cell, RunTelemetry
from bench.validity import COUNTS, SCORE, SPEED, Flag, Marks

TIER_LABELS = {
    "random": "random weights: step times only; scores, T/NFE and speedup mean nothing and are "
    "left out",
    "embedded": "embedded tier (SmolLM2-135M-Instruct): real counting at toy quality",
    "small": "small tier: not the paper's weights",
    "paper": "weights the paper names",
    "local": "weights from a local folder: what they are is the caller's claim",
}
NOT_TRAINED = "not trained for TiDAR, so its drafts are poor"

# The reference of every speedup and every equal-output count.
REFERENCE = "ar"


def weights_label(weights: Mapping[str, Any]) -> str:
    """The tier in words, and whether anything was trained for TiDAR on top (a header's weights)."""
    label = TIER_LABELS[weights["tier"]]
    if adapters := weights.get("adapters"):
        # Twelve digits tell them apart; the header and the report's Environment have all.
        names = re.sub(r"(?<=sha256 )([0-9a-f]{12})[0-9a-f]+", r"\1", "; ".join(adapters))
        return f"{label}; with adapters trained by this project: {names}"
    return f"{label}; {NOT_TRAINED}" if weights["tier"] in ("embedded", "small") else label


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One decoder on one task. Scores are fractions, paper_score is in %; None is not measured.

    `flags` are names with blanks between; `*_compared` is False where a flag of this cell or of ar
    spoils the comparison, None where there is none.
    """

    task: str
    shots: int
    ours: bool
    decoder: str
    tier: str
    n: int
    planned: int
    score_metric: str | None
    score: float | None
    score_low: float | None
    score_high: float | None
    score_minus_ar: float | None
    score_minus_ar_low: float | None
    score_minus_ar_high: float | None
    t_per_nfe: float | None
    acceptance_length: float | None
    acceptance_rate: float | None
    tokens_per_s: float | None
    step_ms: float | None
    prefill_s: float | None
    host_share: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    draft_forwards_per_token: float | None
    tokens_processed_per_token: float | None
    peak_memory_bytes: int | None
    stopped_by_length: int
    equal_to_ar: int | None
    compared_to_ar: int | None
    paper_system: str | None
    paper_score: float | None
    paper_t_per_nfe: float | None
    latency_p90_s: float | None
    latency_p99_s: float | None
    joules_per_token: float | None
    joules_per_correct: float | None
    flags: str
    speedup_compared: bool | None
    score_compared: bool | None


def table_rows(record: RunRecord) -> list[TableRow]:
    """All rows, tasks in running order, decoders in their order inside each task."""
    planned = planned_keys(record.header)
    run = validity.telemetry_of(record)
    flags = validity.flags_of(record, run)
    rows = []
    for task in record.header.problems:
        for decoder in record.header.decoders:
            count = sum(key[0] == decoder and key[1] == task for key in planned)
            rows.append(_row(record, task, decoder, count, run, flags))
    return rows


def _row(
    record: RunRecord,
    task: str,
    decoder: str,
    planned: int,
    run: RunTelemetry,
    flags: dict[Cell, tuple[Flag, ...]],
) -> TableRow:
    header = record.header
    mine = [row for row in record.measurements if (row.task, row.decoder) == (task, decoder)]
    reference = [row for row in record.measurements if (row.task, row.decoder) == (task, REFERENCE)]
    real = header.weights["tier"] != "random"
    headline = _headline(record, task, decoder) if real else None
    base = _headline(record, task, REFERENCE) if real else None
    is_reference = decoder == REFERENCE
    score = metrics.score_interval(headline.per_problem) if headline else None
    gap = None
    if headline and base and not is_reference:
        gap = metrics.score_difference(headline.per_problem, base.per_problem)
    faster = None if is_reference or not real else metrics.speedup(mine, reference)
    # Fixed-length runs are past the model's own ending: speed only, for every decoder alike.
    equal = None if is_reference or not reference else metrics.equal_outputs(mine, reference)
    steps = sum(row.decode_forwards for row in mine)
    cell, pair = (decoder, task), ((decoder, task), (REFERENCE, task))
    seen = run.cells.get(cell)
    latency = [row.prefill_s + row.decode_s for row in mine]
    system, paper_score, paper_ratio = _paper(record, task, header.decoders[decoder])
    return TableRow(
        task=task,
        shots=header.data[task]["shots"],
        ours=header.data[task]["ours"],
        decoder=decoder,
        tier=header.weights["tier"],
        n=len(mine),
        planned=planned,
        score_metric=f"{headline.metric}, {headline.variant}" if headline else None,
        score=score.value if score else None,
        score_low=score.low if score else None,
        score_high=score.high if score else None,
        score_minus_ar=gap.value if gap else None,
        score_minus_ar_low=gap.low if gap else None,
        score_minus_ar_high=gap.high if gap else None,
        t_per_nfe=metrics.tokens_per_nfe(mine) if real else None,
        acceptance_length=metrics.acceptance_length(mine) if real else None,
        acceptance_rate=metrics.acceptance_rate(mine) if real else None,
        tokens_per_s=metrics.tokens_per_s(mine) if real else None,
        step_ms=1000 * sum(row.decode_s for row in mine) / steps if steps else None,
        prefill_s=metrics.prefill_s(mine),
        host_share=metrics.host_share(mine),
        speedup=faster.value if faster else None,
        speedup_low=faster.low if faster else None,
        speedup_high=faster.high if faster else None,
        draft_forwards_per_token=metrics.draft_forwards_per_token(mine) if real else None,
        tokens_processed_per_token=metrics.tokens_processed_per_token(mine) if real else None,
        peak_memory_bytes=metrics.peak_memory_bytes(mine),
        stopped_by_length=sum(row.finish == "length" for row in mine),
        equal_to_ar=equal[0] if equal else None,
        compared_to_ar=equal[1] if equal else None,
        paper_system=system,
        paper_score=paper_score,
        paper_t_per_nfe=paper_ratio,
        latency_p90_s=validity.percentile(latency, 90),
        latency_p99_s=validity.percentile(latency, 99),
        joules_per_token=cells.joules_per_token(mine, seen) if real else None,
        joules_per_correct=(
            cells.joules_per_correct(mine, cells.scores_of(record, cell), seen) if real else None
        ),
        flags=" ".join(flag.name for flag in flags[cell]),
        speedup_compared=not validity.spoilers((SPEED, COUNTS), pair, flags) if faster else None,
        score_compared=not validity.spoilers((SCORE,), pair, flags) if gap else None,
    )


def _headline(record: RunRecord, task: str, decoder: str) -> ScoreRecord | None:
    """The task's headline score of the first repeat (greedy repeats differ in time only)."""
    for score in record.scores:
        if (score.task, score.decoder, score.repeat) == (task, decoder, 0) and score.headline:
            return score
    return None


def _paper(
    record: RunRecord, task: str, decoder: Mapping[str, Any]
) -> tuple[str | None, float | None, float | None]:
    """The paper's system of this kind, its score in % and its T/NFE; None where it has no cell."""
    from bench.paper import TIDAR_1P5B, TIDAR_8B, paper_value

    large = (record.header.weights.get("parameters") or 0) > 4e9
    system = {
        "ar": "Qwen3 8B" if large else "Qwen2.5 1.5B",
        "tidar": TIDAR_8B if large else TIDAR_1P5B,
    }.get(decoder["name"])
    if "outcomes" in decoder["params"]:  # the paper drafts every outcome
        system = None
    if system is None or record.header.weights["tier"] == "random":
        return None, None, None
    score, ratio = (paper_value(task, metric, system) for metric in ("score", "t_per_nfe"))
    if score is None and ratio is None:
        return None, None, None
    return system, score.value if score else None, ratio.value if ratio else None


def to_csv(rows: list[TableRow]) -> str:
    """The rows with every digit; an empty cell is None."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(TableRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def to_markdown(record: RunRecord) -> str:
    """The whole page: what ran, main table, flags, device, every score, acceptance, divergence."""
    rows = table_rows(record)
    run = validity.telemetry_of(record)
    marks = Marks(validity.flags_of(record, run))
    main, device = _main_table(rows, marks), _device_table(record, run, marks)
    parts = [_heading(record), main, "\n".join(marks.notes()), _work_table(rows), device]
    if record.header.weights["tier"] != "random":
        parts += [_score_table(record), _acceptance_table(record)]
    parts.append("\n".join(divergence_lines(record)))
    parts.append(
        "Brackets: 95 % intervals (scores: Wilson; differences and speedups: paired bootstrap over "
        "problems). T/NFE, tokens/s and speedup are decode only. The paper's values are its own "
        "weights on its own hardware and all problems."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(record: RunRecord) -> str:
    header = record.header
    env = header.environment
    where = env.get("gpu") or f"{env.get('cpu')}, {env.get('threads')} threads"
    done, planned = len(record.measurements), len(planned_keys(header))
    cap = header.profile["max_new_tokens"]
    lines = [
        f"# {record.name}",
        "",
        f"- weights: {header.weights['name']}, **{weights_label(header.weights)}**",
        f"- machine: {where}; {header.dtype}; torch {env.get('versions', {}).get('torch')}",
        f"- profile {header.profile['name']}, commit {(header.commit or 'unknown')[:7]}"
        + (" with local changes" if header.dirty else ""),
        f"- length limit: {f'{cap} new tokens' if cap else 'each task has its own'}"
        + ("; fixed length, not scored" if header.profile["stopping"] == "fixed" else ""),
    ]
    for task, data in header.data.items():
        origin = data["path"]
        if data["ours"]:
            origin = (
                "**our own problems, not a benchmark**"
                if data["kind"] == "own"
                else f"{origin}, **asked and graded our own way: not the benchmark of that name**"
            )
        lines.append(f"- {task}: {len(header.problems[task])} problems, {data['kind']}: {origin}")
    if done < planned:
        lines.append(f"- **unfinished: {done} of {planned} generations**")
    return "\n".join(lines)


def _main_table(rows: list[TableRow], marks: Marks) -> str:
    head = (
        "task",
        "decoder",
        "n",
        "score %",
        "minus ar",
        "T/NFE",
        "tokens/s",
        "ms/step",
        "speedup",
        "cut by length",
        "paper: score (T/NFE), system",
    )
    return _markdown(head, [_main_line(row, marks) for row in rows])


def _main_line(row: TableRow, marks: Marks) -> tuple[str, ...]:
    mine, ar = (row.decoder, row.task), (REFERENCE, row.task)
    score = _cell(row.score, row.score_low, row.score_high, scale=100, digits=1)
    gap = _cell(
        row.score_minus_ar, row.score_minus_ar_low, row.score_minus_ar_high, scale=100, digits=1
    )
    faster = _cell(row.speedup, row.speedup_low, row.speedup_high, suffix="x")
    return (
        f"{row.task} ({row.shots}-shot)" + (" (ours)" if row.ours else ""),
        row.decoder,
        str(row.n) if row.n == row.planned else f"{row.n} of {row.planned}",
        marks.mark(score, (SCORE,), mine),
        marks.mark(gap, (SCORE,), mine, ar),
        marks.mark(_cell(row.t_per_nfe), (COUNTS,), mine),
        marks.mark(_cell(row.tokens_per_s, digits=1), (SPEED, COUNTS), mine),
        marks.mark(_cell(row.step_ms, digits=1), (SPEED,), mine),
        marks.mark(faster, (SPEED, COUNTS), mine, ar),
        f"{row.stopped_by_length} of {row.n}",
        _paper_cell(row),
    )


def _work_table(rows: list[TableRow]) -> str:
    """What a token costs; nothing for records that did not count it."""
    if not any(row.tokens_processed_per_token for row in rows):
        return ""
    head = ("task", "decoder", "tokens processed", "draft forwards", "peak memory, MiB")
    body = [
        (
            row.task,
            row.decoder,
            _cell(row.tokens_processed_per_token),
            _cell(row.draft_forwards_per_token),
            "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f}",
        )
        for row in rows
    ]
    note = (
        "Per kept decode token: query tokens through the target (`ar`: 1; what a token costs in"
        " compute, rejected work included) and forwards of a separate drafter. Memory on a CPU is"
        " the process's, with the weights of all decoders in it."
    )
    return "## Work per token\n\n" + _markdown(head, body) + "\n\n" + note


def _device_table(record: RunRecord, run: RunTelemetry, marks: Marks) -> str:
    body = cells.device_body(record, run, marks)
    if not body:
        return ""
    return "## Device\n\n" + _markdown(cells.HEAD, body) + "\n\n" + cells.remarks(run)


def _paper_cell(row: TableRow) -> str:
    if row.paper_system is None:
        return ""
    ratio = f" ({row.paper_t_per_nfe:.2f})" if row.paper_t_per_nfe is not None else ""
    score = f"{row.paper_score:.2f}" if row.paper_score is not None else ""
    return f"{score}{ratio}, {row.paper_system}".strip(" ,")


def _score_table(record: RunRecord) -> str:
    if not record.scores:
        return ""
    body = []
    for score in record.scores:
        interval = metrics.score_interval(score.per_problem)
        if score.repeat == 0 and interval:
            body.append(
                (
                    score.task,
                    score.decoder,
                    score.metric,
                    score.variant,
                    score.harness,
                    str(interval.n),
                    _interval(interval, scale=100, digits=1),
                )
            )
    head = ("task", "decoder", "metric", "text", "scored by", "n", "%")
    return "## Every score\n\n" + _markdown(head, body)


def _acceptance_table(record: RunRecord) -> str:
    body = []
    for decoder in record.header.decoders:
        mine = _of(record, decoder)
        histogram = metrics.acceptance_histogram(mine)
        rates = metrics.acceptance_rate_at(mine)
        body.append(
            (
                decoder,
                _cell(metrics.acceptance_length(mine)),
                _cell(metrics.acceptance_rate(mine), scale=100, digits=1, suffix=" %"),
                " ".join(_cell(rate, scale=100, digits=0) or "-" for rate in rates),
                " ".join(f"{length}:{count}" for length, count in enumerate(histogram) if count),
            )
        )
    head = (
        "decoder",
        "tokens per step",
        "accepted of drafted",
        "by position %",
        "steps that committed r (r:steps)",
    )
    return "## Acceptance, all tasks\n\n" + _markdown(head, body)


def divergence_lines(record: RunRecord) -> list[str]:
    """For each lossless decoder, how many of its outputs are AR's exactly, token ids and text."""
    reference = _of(record, REFERENCE)
    lines = []
    for decoder, facts in record.header.decoders.items():
        if decoder == REFERENCE or not facts["lossless"] or not reference:
            continue
        equal, compared = metrics.equal_outputs(_of(record, decoder), reference)
        line = f"- {decoder}: {equal} of {compared} outputs equal those of ar exactly"
        if equal < compared:
            line += (
                " (float32: this is a defect)"
                if record.header.dtype == "float32"
                else f" ({record.header.dtype}: near-ties may fall differently)"
            )
        lines.append(line)
    return lines


def _of(record: RunRecord, decoder: str) -> list[Measurement]:
    return [row for row in record.measurements if row.decoder == decoder]


def _cell(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    scale: float = 1,
    digits: int = 2,
    suffix: str = "",
) -> str:
    if value is None:
        return ""
    text = f"{value * scale:.{digits}f}{suffix}"
    if low is None or high is None:
        return text
    return f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def _interval(interval: Interval, *, scale: float, digits: int) -> str:
    return _cell(interval.value, interval.low, interval.high, scale=scale, digits=digits)


def _markdown(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_tables(folder: Path) -> str:
    """Write tables.md, tables.csv and cells.json into a record folder; gives the Markdown."""
    record = read_record(folder)
    page = to_markdown(record)
    write_whole(folder / "tables.csv", to_csv(table_rows(record)))
    run = validity.telemetry_of(record)
    for_programs = cells.as_json(run, validity.flags_of(record, run))
    write_whole(folder / "cells.json", json.dumps(for_programs, indent=1, ensure_ascii=False))
    write_whole(folder / "tables.md", page)
    return page
