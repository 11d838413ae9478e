"""Tables of a width record, as Markdown and CSV, and its `slots.jsonl`. No torch, no clock."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import roofline
from bench.metrics import Interval
from bench.peaks import find_peak
from bench.slots import watched
from bench.slots.bars import bars
from bench.slots.curves import TOLERANCES, Point, curves, free_slots, points, slot_lines
from bench.slots.predict import predicted_speedups, step_ratios
from bench.slots.record import OK, SlotsRecord, read_slots
from bench.store import write_whole
from tidar_ref.config import ModelConfig

PAGE, CELLS, SLOTS = "slots.md", "slots.csv", "slots.jsonl"


def write_page(folder: Path) -> str:
    """Make slots.md, slots.csv and slots.jsonl of a record again; gives the page."""
    record = read_slots(folder)
    found = points(record)
    text = to_markdown(record, found)
    device = _section("The device while each job ran (medians)", watched.HEAD, watched.rows(folder))
    text += "".join(f"{line}\n" for line in device)
    write_whole(folder / PAGE, text)
    write_whole(folder / CELLS, to_csv(record, found))
    lines = slot_lines(record, found)
    write_whole(folder / SLOTS, "".join(json.dumps(line) + "\n" for line in lines))
    return text


def to_markdown(record: SlotsRecord, found: Sequence[Point]) -> str:
    """The whole page."""
    env, plan = record.header.environment, record.plan
    machine = env["gpu"] or f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores"
    planned = plan.visits
    lines = [f"# {plan.name}: {record.name}", ""]
    lines.append(f"{machine}; torch {env['versions'].get('torch')}; commit {record.header.commit}"
                 f"{' with local changes' if record.header.dirty else ''}.")  # fmt: skip
    lines.append(
        f"{len(record.visits)} visits stored, {planned} planned (a cell that cannot run is visited "
        "once). Eager forwards; steps named graphs=N are CUDA graph replays, N between two reads, "
        "steps named static=N the same code uncaptured. Brackets: 95 % bootstrap over rounds. "
        "Masks: at widths K(K+1) TiDAR's decode mask, else causal among the new tokens; all see "
        "the whole prefix. The head of a bare forward has all its rows."
    )
    flushed = {visit.flushed for visit in record.visits if visit.status == OK}
    words = {
        True: "the cache was overwritten before every sample",
        False: "the weights are at least four times the last-level cache, nothing was flushed",
    }
    lines.append("Cache: " + "; ".join(sorted(words[bool(f)] for f in flushed)) + ".")
    routes = {name: model.get("kernels") for name, model in record.models.items()}
    if any(routes.values()):
        said = (f"{name} by {route or 'a route not noted'}" for name, route in routes.items())
        lines.append(f"Products of few rows: {'; '.join(said)}.")
    lines += _ceilings(record)
    lines += _free(found)
    lines += _widths(record, found)
    lines += _splits(found)
    lines += _steps(found)
    lines += _routes(found)
    lines += _bars(record, found)
    lines += _paper(found)
    lines += _missing(found)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body] if body else []


def _section(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = _table(head, rows)
    return ["", f"## {title}", "", *table] if table else []


def _bounds(interval: Interval | None, scale: float = 1.0) -> str:
    if interval is None:
        return ""
    text = f"{scale * interval.value:.3g}" if scale != 1 else f"{interval.value:.2f}"
    if interval.low is None or interval.high is None:
        return text
    form = (lambda x: f"{scale * x:.3g}") if scale != 1 else (lambda x: f"{x:.2f}")
    return f"{text} [{form(interval.low)}, {form(interval.high)}]"


def _ceilings(record: SlotsRecord) -> list[str]:
    peak = find_peak(record.header.environment["gpu"])
    rows = []
    if peak:
        note = "" if peak.checked else ", from memory"
        name = f"published peak of {peak.name} ({peak.source}{note})"
        rows.append((name, f"{peak.bytes_per_s / 1e9:.0f}", f"{peak.flops_per_s / 1e12:.1f}"))
    if record.ceilings:
        made = record.ceilings
        sides = " (rehearsal sizes: means nothing)" if made["rehearsal"] else ""
        for name in ("copy", "read", "one_row_product"):
            rate = made[f"{name}_bytes_per_s"] / 1e9
            rows.append((f"measured {name.replace('_', ' ')}, {made['dtype']}{sides}",
                         f"{rate:.1f}", ""))  # fmt: skip
        own = made.get("matrix_dtype", made["dtype"])  # once always the record's
        rows.append((f"measured {made['matrix_side']}-square product, {own}{sides}",
                     "", f"{made['matrix_flops_per_s'] / 1e12:.3g}"))  # fmt: skip
    return _section("Ceilings", ("what", "GB/s", "TFLOP/s"), rows)


def _free(found: Sequence[Point]) -> list[str]:
    rows = []
    for (job, kv_len), curve in curves(found).items():
        for tolerance in TOLERANCES:
            for head in (True, False):
                free = free_slots(curve, tolerance, head=head)
                if free:
                    rows.append((job, curve[0].weights, str(kv_len), f"{tolerance:.0%}",
                                 "whole forward" if head else "without head", str(free.width),
                                 str(free.first_slower or "none"), str(free.largest)))  # fmt: skip
    head_row = ("job", "weights", "KV", "tolerance", "of", "free slots", "first slower", "largest")
    return _section("Free slots (largest measured width within tolerance)", head_row, rows)


def rates(record: SlotsRecord) -> tuple[float | None, float | None, str]:
    """(bytes/s, FLOP/s, whose) that utilisation is counted against: published, else measured."""
    peak = find_peak(record.header.environment["gpu"])
    if peak:
        return peak.bytes_per_s, peak.flops_per_s, "published"
    if record.ceilings:
        made = record.ceilings
        return made["read_bytes_per_s"], made["matrix_flops_per_s"], "measured"
    return None, None, "unknown"


def cost_of(record: SlotsRecord, point: Point) -> roofline.ForwardCost | None:
    """Counted cost of a bare forward; None for decoders, whose head rows are their own."""
    model = record.models.get(point.weights)
    if model is None or point.status != OK or not point.what.startswith("forward:"):
        return None
    return roofline.forward_cost(
        ModelConfig(**model["config"]),
        width=point.width or 1,
        kv_len=point.kv_len,
        batch=point.batch,
        dtype=point.dtype,
    )


def _widths(record: SlotsRecord, found: Sequence[Point]) -> list[str]:
    bytes_per_s, flops_per_s, whose = rates(record)
    lines: list[str] = []
    for (job, kv_len), curve in curves(found).items():
        rows = []
        for point in curve:
            cost = cost_of(record, point)
            if cost is None or point.latency is None:
                continue
            seconds = point.latency.value
            rows.append((
                str(point.width), _bounds(point.latency, 1000), _bounds(point.ratio),
                _bounds(point.without_head, 1000), f"{cost.flops / 1e9:.3g}",
                f"{cost.bytes / 1e6:.4g}", f"{cost.intensity:.1f}",
                f"{roofline.mbu(cost, seconds, bytes_per_s):.1%}" if bytes_per_s else "",
                f"{roofline.mfu(cost, seconds, flops_per_s):.1%}" if flops_per_s else "",
                str(point.samples),
            ))  # fmt: skip
        title = f"{job}: {curve[0].weights}, {curve[0].dtype}, batch {curve[0].batch}, KV {kv_len}"
        head = ("width", "ms", "over width 1", "ms without head", "GFLOP", "MB", "FLOP/byte",
                f"MBU ({whose})", f"MFU ({whose})", "n")  # fmt: skip
        lines += _section(title, head, rows)
    return lines


def _splits(found: Sequence[Point]) -> list[str]:
    rows = []
    for point in found:
        if point.split and point.latency:
            split = point.split
            parts = (split.attention_s, split.mlp_s, split.head_s, split.rest_s, split.total_s)
            rows.append((point.job, str(point.kv_len), str(point.width),
                         *(f"{1000 * s:.3g}" for s in parts),
                         f"{split.total_s / point.latency.value:.2f}"))  # fmt: skip
    head = ("job", "KV", "width", "attention ms", "MLP ms", "head ms", "rest ms", "sum ms",
            "sum over plain median")  # fmt: skip
    return _section("Where the time goes (hooks, a pass of its own)", head, rows)


def _steps(found: Sequence[Point]) -> list[str]:
    rows = []
    for point in found:
        if point.status == OK and not point.what.startswith("forward:") and point.latency:
            tokens = point.ratio.value if point.ratio else None
            rows.append((point.job, point.weights, point.what, str(point.batch), str(point.kv_len),
                         f"{point.forwards} x {point.width}", _bounds(point.latency, 1000),
                         f"{1000 * (point.host_s or 0):.3g}", _bounds(point.ratio),
                         f"{tokens:.2f}" if tokens else ""))  # fmt: skip
    head = ("job", "weights", "decoder", "batch", "KV", "forwards x width", "ms", "host ms",
            "in ar steps", "pays above tokens/step")  # fmt: skip
    return _section("Decoders' steps", head, rows)


def _routes(found: Sequence[Point]) -> list[str]:
    """The same cell by each route of attention, and compiled: only cells with more than one."""
    cells: dict[tuple[str, ...], dict[str, Point]] = {}
    for p in found:
        if p.status == OK and p.latency:
            key = (p.weights, p.dtype, p.what, str(p.batch), str(p.kv_len))
            cells.setdefault(key, {}).setdefault(p.route, p)
    rows = []
    for key, by_route in cells.items():
        if len(by_route) > 1:
            best = min(p.latency.value for p in by_route.values() if p.latency)
            rows += [
                (*key, route, _bounds(p.latency, 1000), f"{p.latency.value / best:.2f}")
                for route, p in by_route.items() if p.latency
            ]  # fmt: skip
    head = ("weights", "dtype", "cell", "batch", "KV", "route", "ms", "over the fastest")
    return _section("Routes of the same cell", head, rows)


def _bars(record: SlotsRecord, found: Sequence[Point]) -> list[str]:
    """Only where captured steps were planned: a record without them has no say."""
    if not any("graphs=" in label for job in record.plan.jobs for label in job.decoders):
        return []
    rows = []
    for bar in bars(record, found):
        value = "" if bar.value is None else f"{bar.value:.3g}"
        if bar.low is not None and bar.high is not None:
            value += f" [{bar.low:.3g}, {bar.high:.3g}]"
        rows.append((bar.what, bar.limit, value, bar.verdict))
    return _section("Bars of graphed steps", ("what", "bar", "ours", "verdict"), rows)


def _paper(found: Sequence[Point]) -> list[str]:
    def interval(low: float | None, high: float | None) -> str:
        return "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"

    lines = _section(
        "The paper's step costs (derived from its Figure 4) and ours, in AR steps",
        ("system", "paper, derived", "our decoder", "KV", "ours"),
        [(r.system, f"{r.derived:.2f}", r.decoder, str(r.kv_len),
          f"{r.measured:.2f}{interval(r.low, r.high)}") for r in step_ratios(found)],
    )  # fmt: skip
    return lines + _section(
        "Speedups predicted (published T/NFE over our step cost), not measured",
        ("source", "system", "task", "T/NFE", "published", "KV", "predicted"),
        [(r.source, r.system, r.task, f"{r.t_per_nfe:.2f}", f"{r.published:.2f}x", str(r.kv_len),
          f"predicted {r.predicted:.2f}x{interval(r.low, r.high)}")
         for r in predicted_speedups(found)],
    )  # fmt: skip


def _missing(found: Sequence[Point]) -> list[str]:
    rows = [
        (p.job, p.what, str(p.batch), str(p.kv_len), p.status, p.detail or "")
        for p in found if p.status != OK
    ]  # fmt: skip
    return _section("Not measured", ("job", "cell", "batch", "KV", "status", "why"), rows)


def to_csv(record: SlotsRecord, found: Sequence[Point]) -> str:
    """One line a cell, every number of it (seconds)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    pairs = ("latency_s", "ratio", "without_head_s", "without_head_ratio")
    parts = ("attention_s", "mlp_s", "head_s", "rest_s")
    writer.writerow(
        ["job", "weights", "dtype", "cell", "batch", "kv_len", "status", "width", "forwards",
         "samples", *(f"{p}{e}" for p in pairs for e in ("", "_low", "_high")), "host_s", *parts,
         "flops", "bytes"]
    )  # fmt: skip
    for p in found:
        cells: list[object] = [p.job, p.weights, p.dtype, p.what, p.batch, p.kv_len, p.status,
                               p.width, p.forwards, p.samples]  # fmt: skip
        for interval in (p.latency, p.ratio, p.without_head, p.without_head_ratio):
            cells += [interval.value, interval.low, interval.high] if interval else [None] * 3
        cost = cost_of(record, p)
        cells.append(p.host_s)
        cells += [getattr(p.split, name) if p.split else None for name in parts]
        cells += [cost.flops, cost.bytes] if cost else [None, None]
        writer.writerow(cells)
    return out.getvalue()
