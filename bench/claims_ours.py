"""What our records say about the quantities claims are made of: one `Observed` per number.

Read from finished or unfinished record folders; nothing is generated or timed here. A number of a
`random` record is a step cost only, as everywhere. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import metrics
from bench.store import HEADER, RunRecord, read_record
from bench.tables import REFERENCE, TableRow, table_rows
from bench.telemetry.summary import Cell
from bench.validity import COUNTS, SCORE, SPEED, Flag, flags_of, spoilers

Flags = Mapping[Cell, Sequence[Flag]]

SLOTS_HEADER = "slots_header.json"  # of a width record (bench/slots/record.py)
RECORDS_DIR = Path(__file__).resolve().parents[1] / "results" / "records"
# The paper's means, from its per-task cells.
GROUPS = {
    "humaneval_average": ("humaneval", "humaneval_plus"),
    "mbpp_average": ("mbpp", "mbpp_plus"),
    "average_3_groups": ("humaneval_average", "mbpp_average", "gsm8k_cot"),
    "average_5_tasks": ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "gsm8k_cot"),
}
PROBLEMS = {"humaneval": 164, "humaneval_plus": 164, "mbpp": 500, "mbpp_plus": 378,
            "gsm8k_cot": 1319}  # fmt: skip
LENGTHS = {"humaneval": 512, "humaneval_plus": 512, "mbpp": 512, "mbpp_plus": 512,
           "gsm8k_cot": 256}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One number of ours, in the unit of a claim's metric; bounds of a 95 % interval, or None.

    `shape` is the lower-case name of the weights without owner ("qwen3-8b"); `params` are the
    decoder's; `whole` is False when not every problem of the task ran to the paper's length;
    `n` counts problems; `spoiled` names the validity flags that keep the number out of comparisons.
    """

    record: str
    weights: str
    adapters: tuple[str, ...]
    tier: str
    shape: str
    device: str
    decoder: str
    label: str
    params: dict[str, Any]
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    whole: bool
    spoiled: tuple[str, ...]


def shape_of(weights: str) -> str:
    """Name without owner or `random:`, lower-case, without a -base ending."""
    return weights.split("/")[-1].removeprefix("random:").lower().removesuffix("-base")


def committed_records(folder: Path = RECORDS_DIR) -> tuple[Path, ...]:
    """The record folders under results/records/, of runs and of width curves, by name.

    Other folders there (peers, say) are neither.
    """
    found = {path.parent for name in (HEADER, SLOTS_HEADER) for path in folder.glob(f"*/{name}")}
    return tuple(sorted(found))


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """Those that hold a run; a folder that holds nothing known too, so that reading it says so."""
    return [f for f in folders if (f / HEADER).is_file() or not (f / SLOTS_HEADER).is_file()]


def observe_slots(folder: Path) -> list[Observed]:
    """A width record's step costs: seconds by width, and steps of decoders in AR steps.

    `params` of a latency holds its width, kv_len and part; batch 1 only.
    """
    from bench.profiles import parse_decoders
    from bench.slots.curves import points, slot_lines
    from bench.slots.record import read_slots

    record = read_slots(folder)
    found = [point for point in points(record) if point.batch == 1]
    device = record.header.environment.get("gpu") or record.header.device
    shared = {"record": record.name, "adapters": (), "tier": "random", "device": device,
              "task": "", "whole": True, "spoiled": ()}  # fmt: skip
    made = []
    for line in slot_lines(record, found):
        if line["median_s"] is not None:
            params = {name: line[name] for name in ("width", "kv_len", "part")}
            made.append(
                Observed(
                    weights=str(line["weights"]), shape=shape_of(str(line["weights"])),
                    decoder="ar", label=f"forward of {line['width']}", params=params,
                    metric="latency", value=1000 * float(str(line["median_s"])), low=None,
                    high=None, n=1, **shared,
                )
            )  # fmt: skip
    for point in found:
        if point.ratio is not None and point.what.startswith("tidar"):
            params = {"beta": 1, **dict(parse_decoders([point.what])[0].params)}
            made.append(
                Observed(
                    weights=point.weights, shape=shape_of(point.weights), decoder="tidar",
                    label=point.what, params={**params, "kv_len": point.kv_len},
                    metric="step_ratio", value=point.ratio.value, low=point.ratio.low,
                    high=point.ratio.high, n=point.samples, **shared,
                )
            )  # fmt: skip
    return made


def observe(record: RunRecord) -> list[Observed]:
    """Every claim-like number of one record: scores, T/NFE, speeds, step costs, their means."""
    found: list[Observed] = []
    rows, flags = table_rows(record), flags_of(record)
    for label in record.header.decoders:
        mine = [row for row in rows if row.decoder == label]
        if label == REFERENCE:
            found += [cell for row in mine for cell in _protocol(record, row)]
        cells = [cell for row in mine for cell in _of_row(record, row, flags)]
        found += cells + _means(cells)
        found += _step_ratio(record, label, flags)
    return found


def observe_all(folders: Sequence[Path]) -> list[Observed]:
    """`observe` or `observe_slots` over record folders; UserError for a folder that is none."""
    found: list[Observed] = []
    runs = run_folders(folders)
    for folder in folders:
        if (folder / SLOTS_HEADER).is_file():
            found += observe_slots(folder)
        if folder in runs:
            found += observe(read_record(folder))
    return found


def _observed(record: RunRecord, label: str, **values: Any) -> Observed:
    header = record.header
    facts = header.decoders[label]
    return Observed(
        record=record.name,
        weights=header.weights["name"],
        adapters=tuple(header.weights.get("adapters") or ()),
        tier=header.weights["tier"],
        shape=shape_of(header.weights["name"]),
        device=header.environment.get("gpu") or header.device,
        decoder=facts["name"],
        label=label,
        params=dict(facts["params"]),
        **{"low": None, "high": None, **values},
    )


# What each number is made of: a flag that spoils one of these spoils the number.
MADE_OF = {
    "score": (SCORE,),
    "t_per_nfe": (COUNTS,),
    "acceptance_length": (COUNTS,),
    "tokens_per_s": (SPEED, COUNTS),
    "speedup": (SPEED, COUNTS),
    "step_ratio": (SPEED,),
}


def _of_row(record: RunRecord, row: TableRow, flags: Flags) -> list[Observed]:
    cell, both = (row.decoder, row.task), ((row.decoder, row.task), (REFERENCE, row.task))
    limit = record.header.profile["max_new_tokens"]
    whole = row.n >= PROBLEMS.get(row.task, row.n + 1) and not (
        limit and limit < LENGTHS.get(row.task, 0)
    )
    numbers: list[tuple[str, str, float | None, float | None, float | None]] = [
        (row.task, "score", _percent(row.score), _percent(row.score_low), _percent(row.score_high)),
        (row.task, "t_per_nfe", row.t_per_nfe, None, None),
        (row.task, "acceptance_length", row.acceptance_length, None, None),
        (row.task, "tokens_per_s", row.tokens_per_s, None, None),
        (row.task, "speedup", row.speedup, row.speedup_low, row.speedup_high),
    ]
    if row.task == "humaneval":
        # The same texts through evalplus: HumanEval+ has no generations of its own.
        plus = _plus(record, row.decoder)
        numbers += [("humaneval_plus", *number[1:]) for number in numbers[1:] if plus]
        if plus:
            numbers.append(("humaneval_plus", "score", *plus))
    return [
        _observed(
            record, row.decoder, task=task, metric=metric, value=value, low=low, high=high,
            n=row.n, whole=whole,
            spoiled=spoilers(MADE_OF[metric], both if metric == "speedup" else (cell,), flags),
        )
        for task, metric, value, low, high in numbers
        if value is not None
    ]  # fmt: skip


def _protocol(record: RunRecord, row: TableRow) -> list[Observed]:
    """Worked examples in a prompt and the length limit of a task, as Table 6 states them.

    Of the base style only; a record tells its limit where it set one or where it cut an output.
    """
    profile = record.header.profile
    if profile.get("style", "base") != "base":
        return []
    cut = [r.output_tokens for r in record.measurements if r.task == row.task
           and r.finish == "length"]  # fmt: skip
    cap = profile["max_new_tokens"]
    limit = max(cut) if cut else cap
    tasks = (row.task, "humaneval_plus") if row.task == "humaneval" else (row.task,)
    return [
        _observed(
            record, REFERENCE, task=task, metric=metric, value=float(value), n=row.n, spoiled=(),
            whole=metric == "shots" or not (cap and cap < LENGTHS.get(task, 0)),
        )
        for task in tasks
        for metric, value in (("shots", row.shots), ("length_limit", limit))
        if value is not None
    ]  # fmt: skip


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _plus(record: RunRecord, label: str) -> tuple[float, float | None, float | None] | None:
    for score in record.scores:
        key = (score.decoder, score.task, score.metric, score.variant, score.repeat)
        if key == (label, "humaneval", "evalplus_plus", "repaired", 0):
            interval = metrics.score_interval(score.per_problem)
            if interval and record.header.weights["tier"] != "random":
                return 100 * interval.value, _percent(interval.low), _percent(interval.high)
    return None


def _means(cells: list[Observed]) -> list[Observed]:
    """The paper's means where every part of one is there; they carry no interval."""
    found: dict[tuple[str, str], Observed] = {(cell.task, cell.metric): cell for cell in cells}
    made = []
    for group, parts in GROUPS.items():
        for metric in ("score", "t_per_nfe", "speedup"):
            there = [found[part, metric] for part in parts if (part, metric) in found]
            if len(there) == len(parts):
                values = {
                    "task": group,
                    "metric": metric,
                    "value": sum(cell.value for cell in there) / len(there),
                    "low": None,
                    "high": None,
                    "n": sum(cell.n for cell in there),
                    "whole": all(cell.whole for cell in there),
                    "spoiled": tuple(dict.fromkeys(n for cell in there for n in cell.spoiled)),
                }
                found[group, metric] = Observed(**{**there[0].__dict__, **values})
                made.append(found[group, metric])
    return made


def _step_ratio(record: RunRecord, label: str, flags: Flags) -> list[Observed]:
    """Seconds of a step over seconds of an AR step, on the (task, problem, repeat) both ran."""
    reference = {row.pair: row for row in record.measurements if row.decoder == REFERENCE}
    mine = [row for row in record.measurements if row.decoder == label and row.pair in reference]
    theirs = [reference[row.pair] for row in mine]
    if label == REFERENCE or not mine:
        return []
    forwards = sum(row.decode_forwards for row in mine), sum(r.decode_forwards for r in theirs)
    seconds = sum(row.decode_s for row in mine), sum(row.decode_s for row in theirs)
    if not all((*forwards, *seconds)):
        return []
    ratio = (seconds[0] / forwards[0]) / (seconds[1] / forwards[1])
    cells = [(name, task) for name in (label, REFERENCE) for task in {row.task for row in mine}]
    return [
        _observed(
            record, label, task="", metric="step_ratio", value=ratio, n=len(mine), whole=True,
            spoiled=spoilers(MADE_OF["step_ratio"], cells, flags),
        )
    ]  # fmt: skip
