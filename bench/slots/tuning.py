"""A width record as the width curve of `bench autotune`: which cells, and what does not match. No
torch.

The LM head is taken out of every forward and added again for the rows a decoder's step sends
through it. Steps the record measured stand beside the predicted ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.prediction import WidthCurve, predict
from bench.profiles import parse_decoders
from bench.records import RunHeader
from bench.slots.curves import Point, curves, points
from bench.slots.record import OK, SlotsRecord, read_slots
from tidar_ref.errors import UserError

PREDICTABLE = ("ar", "tidar", "tidar_two_forward")


@dataclass(frozen=True, kw_only=True)
class Widths:
    """A curve of one job behind kv_len cached tokens, the same job's measured steps there, and in
    words how it differs from the run it is used for (empty: times are comparable)."""

    curve: WidthCurve
    job: str
    kv_len: int
    steps: tuple[Point, ...]
    differs: tuple[str, ...]


def read_tuning(
    folder: Path, header: RunHeader, *, kv_len: float, job: str | None = None
) -> Widths:
    """The curve of the job that fits the run best, at the measured KV length nearest to `kv_len`.

    A job of one sequence; of several the one with the run's parameter count and number format,
    else one must be named. UserError if there is none.
    """
    record = read_slots(folder)
    found = points(record)
    measured = {
        key: {p.width: p for p in rows if p.status == OK and p.latency and p.without_head}
        for key, rows in curves(found).items()
        if record.job(key[0]).batch == 1
    }
    measured = {key: rows for key, rows in measured.items() if 1 in rows and len(rows) > 1}
    name = _job(record, header, list(dict.fromkeys(name for name, _ in measured)), job)
    at = min((kv for n, kv in measured if n == name), key=lambda kv: (abs(kv - kv_len), kv))
    rows = measured[name, at]
    seconds = {width: p.without_head.value for width, p in rows.items()}
    head = {width: max(p.latency.value - seconds[width], 0.0) for width, p in rows.items()}
    source = f"{record.name}, {name}, {at} cached tokens"
    return Widths(
        curve=WidthCurve(seconds, source, head=head),
        job=name,
        kv_len=at,
        steps=tuple(
            p
            for p in found
            if (p.job, p.kv_len, p.status) == (name, at, OK)
            and p.what.partition(":")[0] in PREDICTABLE
        ),  # fmt: skip
        differs=tuple(_differences(record, name, header)),
    )


def _job(record: SlotsRecord, header: RunHeader, names: list[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in names:
            raise UserError(
                f"width record {record.name} has no curve of one sequence called {asked!r}:"
                f" its are {', '.join(names) or 'none'}"
            )
        return asked
    if not names:
        raise UserError(
            f"width record {record.name} has no widths from 1 for one sequence: measure them with"
            " `bench slots --batch 1`"
        )
    fitting = [name for name in names if not list(_other_model(record, name, header))]
    chosen = fitting or names
    if len(chosen) > 1:
        raise UserError(
            f"{len(chosen)} curves of {record.name} fit {header.weights['name']} equally:"
            f" name one with --job: {', '.join(chosen)}"
        )
    return chosen[0]


def _other_model(record: SlotsRecord, name: str, header: RunHeader) -> Iterator[str]:
    job = record.job(name)
    count = record.models.get(job.weights, {}).get("source", {}).get("parameters")
    if count != header.weights["parameters"]:
        yield f"weights: {job.weights}, not {header.weights['name']}"
    if job.dtype != header.dtype:
        yield f"number format: {job.dtype}, not {header.dtype}"


def _differences(record: SlotsRecord, name: str, header: RunHeader) -> Iterator[str]:
    yield from _other_model(record, name, header)
    model = record.models.get(record.job(name).weights, {})
    theirs = {**record.header.environment, "kernels": model.get("kernels")}
    ours = header.environment
    for what in ("gpu", "cpu", "threads", "kernels"):
        if theirs.get(what) != ours.get(what):
            said, wanted = (str(env.get(what) or "none noted") for env in (theirs, ours))
            yield f"{what}: {said}, not {wanted}"


def beside_steps(widths: Widths, c: tuple[float, ...]) -> Iterator[str]:
    """Table rows: predicted step and tokens/s, and those of the step the record measured."""
    for point in widths.steps:
        [spec] = parse_decoders([point.what])
        params = {"beta": 1.0, **dict(spec.params)} if spec.name == "tidar" else dict(spec.params)
        assert point.latency is not None
        try:
            if spec.name != "ar" and "block_len" not in params:
                raise UserError("its label names no block_len")
            p = predict(spec.name, params, c, widths.curve)
        except UserError as error:
            yield f"| {point.what} | not predicted: {error} | | | |"
            continue
        yield (
            f"| {point.what} | {1000 * p.step_s:.1f} | {1000 * point.latency.value:.1f} | "
            f"{p.tokens_per_s:.1f} | {p.tokens_per_step / point.latency.value:.1f} |"
        )
