"""`bench autotune`: which K and which outcomes would be fastest on a record's machine and weights.

Acceptance comes from the record's dense TiDAR run, seconds from a width curve: a record of `bench
slots`, a CSV file, or the run's own step times; the model is in `bench.prediction`. Predictions
stand beside what was measured, where it was. No torch.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench import metrics, validity
from bench.prediction import Prediction, WidthCurve, hazards, predict, search
from bench.records import Measurement
from bench.slots.tuning import Widths, beside_steps, read_tuning
from bench.store import RunRecord, read_record, read_steps
from bench.validity import COUNTS, SPEED, lettered
from tidar_ref.errors import UserError

DENSE = ("tidar", "tidar_two_forward")


def read_widths(path: Path) -> WidthCurve:
    """A curve from a CSV file with columns `width` (tokens) and `seconds`."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return WidthCurve({int(r["width"]): float(r["seconds"]) for r in rows}, path.name)
    except OSError as error:
        raise UserError(
            f"cannot read width curve {path} ({error.strerror}); name a CSV file"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no width curve ({error}); write columns width and seconds"
        ) from error


def own_widths(record: RunRecord, widths: Mapping[str, int]) -> WidthCurve:
    """A curve from the record itself: mean step seconds of `ar` and `tidar` at their widths.

    Steps include the host's share, so this is the cost of steps and not of bare forwards.
    """
    seconds = {}
    for label, width in widths.items():
        if record.header.decoders[label]["name"] in ("ar", "tidar"):
            rows = [row for row in record.measurements if row.decoder == label]
            forwards = sum(row.decode_forwards for row in rows)
            if forwards:
                seconds[width] = sum(row.decode_s for row in rows) / forwards
    return WidthCurve(seconds, f"step times of {record.name}")


def report(
    folder: Path,
    *,
    widths: Path | None = None,
    decoder: str | None = None,
    task: str | None = None,
    top: int = 10,
    kv_len: int | None = None,
    job: str | None = None,
) -> str:
    """Markdown: what to run on the machine and weights of a record, and predictions beside
    what the record measured. UserError if the record has no dense run to learn from.

    widths: a CSV file, or the folder of a width record, of which `job` and `kv_len` choose the
    curve (default: the one that fits the run, at the run's mean KV length).
    """
    record = read_record(folder)
    label = decoder or _widest(record)
    rows = _rows(record, label, task)
    params = record.header.decoders[label]["params"]
    c = hazards(metrics.acceptance_histogram(rows), params["block_len"])
    if (kv_len or job) and not (widths and widths.is_dir()):
        raise UserError("--kv and --job choose a curve of a width record: add --widths FOLDER")
    measured = None
    if widths is None:
        curve = own_widths(record, _widths_of(folder, record))
    elif widths.is_dir():
        near = _mean_kv(folder, label, task) if kv_len is None else kv_len
        measured = read_tuning(widths, record.header, kv_len=near, job=job)
        curve = measured.curve
    else:
        curve = read_widths(widths)
    found = search(c, curve, beta=params.get("beta", 1.0))
    base = next(p for p in found if p.decoder == "ar")
    marks = validity.Marks(validity.flags_of(record))
    return "\n".join(
        [
            f"# Auto-tuning from {record.name}",
            "",
            f"Acceptance: {label} on {task or 'all tasks'}, {len(rows)} outputs. "
            f"Width curve: {curve.source}, {curve.widths[0]} to {curve.widths[-1]} tokens.",
            *_not_comparable(measured),
            "",
            f"| right given right before it, slot | {' | '.join(map(str, range(1, len(c) + 1)))} |",
            "| --- |" + " --- |" * len(c),
            "| share of steps | " + " | ".join(f"{share:.2f}" for share in c) + " |",
            "",
            "Predicted, fastest first:",
            "",
            "| decoder | width | tokens/step | T/NFE | ms/step | tokens/s | speedup |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(_predicted(p, base) for p in found[:top]),
            "",
            "Predicted beside measured (this record):",
            "",
            "| decoder | tokens/step | measured | tokens/s | measured | speedup | measured |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *_beside(record, label, task, c, curve, base, marks),
            "",
            *lettered(marks),
            "",
            *_measured_steps(measured, c),
        ]
    )


def _mean_kv(folder: Path, label: str, task: str | None) -> float:
    """Mean KV length that a decoder's decode steps read (tokens)."""
    lengths = [
        step.kv_len
        for step in read_steps(folder)
        if step.index and step.decoder == label and task in (None, step.task)
    ]
    return sum(lengths) / len(lengths)


def _not_comparable(measured: Widths | None) -> list[str]:
    if measured is None or not measured.differs:
        return []
    words = "; ".join(measured.differs)
    return ["", f"The curve is of something else than the run, so seconds differ ({words})."]


def _measured_steps(measured: Widths | None, c: tuple[float, ...]) -> list[str]:
    if measured is None or not measured.steps:
        return []
    return [
        f"Predicted beside the steps measured in the width record ({measured.job}, "
        f"{measured.kv_len} cached tokens):",
        "",
        "| decoder | ms/step | measured | tokens/s | with measured step |",
        "| --- | --- | --- | --- | --- |",
        *beside_steps(measured, c),
        "",
    ]


def _widest(record: RunRecord) -> str:
    dense = {
        label: made["params"]["block_len"]
        for label, made in record.header.decoders.items()
        if made["name"] in DENSE and "outcomes" not in made["params"]
    }
    if not dense:
        raise UserError(
            f"record {record.name} has no tidar run with all outcomes to learn acceptance from: "
            "run tidar:block_len=16 or another K"
        )
    return max(dense, key=lambda label: dense[label])


def _rows(record: RunRecord, label: str, task: str | None) -> list[Measurement]:
    made = record.header.decoders.get(label)
    if made is None or made["name"] not in DENSE or "outcomes" in made["params"]:
        raise UserError(
            f"decoder {label!r} is no tidar run with all outcomes in {record.name}; its decoders "
            f"are {' '.join(record.header.decoders)}"
        )
    rows = [r for r in record.measurements if r.decoder == label and task in (None, r.task)]
    if not any(sum(row.acceptance_histogram) for row in rows):
        raise UserError(f"{label} has no decode steps on {task or 'any task'} in {record.name}")
    return rows


def _widths_of(folder: Path, record: RunRecord) -> dict[str, int]:
    """Query width of a decode step of each decoder (the ledger's, constant for these)."""
    found: dict[str, int] = {}
    for step in read_steps(folder):
        if step.index and step.decoder in record.header.decoders:
            found.setdefault(step.decoder, step.query_width)
    return found


def _predicted(p: Prediction, base: Prediction) -> str:
    return (
        f"| {p.decoder} | {p.query_width} | {p.tokens_per_step:.2f} | "
        f"{p.tokens_per_step / p.forwards_per_step:.2f} | {1000 * p.step_s:.1f} | "
        f"{p.tokens_per_s:.1f} | {p.tokens_per_s / base.tokens_per_s:.2f}x |"
    )


def _beside(
    record: RunRecord,
    learned: str,
    task: str | None,
    c: tuple[float, ...],
    curve: WidthCurve,
    base: Prediction,
    marks: validity.Marks,
) -> Iterator[str]:
    """Rows of the decoders on the weights that `learned` ran on; flagged numbers say so."""
    decoders = record.header.decoders
    weights = decoders[learned].get("weights")
    chosen = [row for row in record.measurements if task in (None, row.task)]
    tasks = [name for name in record.header.problems if task in (None, name)]
    mine = {
        label: [row for row in chosen if row.decoder == label]
        for label, made in decoders.items()
        if made.get("weights") == weights and made["name"] in ("ar", *DENSE)
    }
    ar = next((label for label in mine if decoders[label]["name"] == "ar"), None)
    for label, rows in mine.items():
        if not rows:
            continue
        made = decoders[label]
        try:
            p = predict(made["name"], made["params"], c, curve)
        except UserError as error:
            yield f"| {label} | not predicted: {error} | | | | | |"
            continue
        faster = metrics.speedup(rows, mine[ar]) if ar and label != ar else None
        own = [(label, name) for name in tasks]
        both = [(name, t) for name in (label, ar or label) for t in tasks]
        length = _cell(metrics.acceptance_length(rows), ".2f")
        rate = _cell(metrics.tokens_per_s(rows), ".1f")
        ratio = _cell(faster.value if faster else None, ".2f", "x")
        yield (
            f"| {label} | {p.tokens_per_step:.2f} | {marks.mark(length, (COUNTS,), *own)} | "
            f"{p.tokens_per_s:.1f} | {marks.mark(rate, (SPEED,), *own)} | "
            f"{p.tokens_per_s / base.tokens_per_s:.2f}x | "
            f"{marks.mark(ratio, (SPEED, COUNTS), *both)} |"
        )


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
