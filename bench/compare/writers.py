"""A comparison as a table, as JUnit XML, and as github-action-benchmark's custom JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

from bench.compare.estimate import REGRESSION, UNDECIDED
from bench.compare.sides import REFERENCE, Side
from bench.compare.verdict import FLAGGED, Comparison, TimingRow
from bench.store import write_whole


def to_text(found: Comparison) -> str:
    """The table the command line prints: counters, timings, notes, verdict."""
    lines = [
        f"base: {found.base.name} ({_commit(found.base)})",
        f"head: {found.head.name} ({_commit(found.head)})",
        "",
        f"{'counters':34s} {'items':>7s} {'differ':>7s}",
    ]
    for row in found.counters:
        lines.append(f"{row.decoder:34s} {row.items:7d} {row.differing:7d}")
        lines += [f"    {example}" for example in row.examples]
    lines += [f"{name:34s}    LOST  {reason}" for name, reason in found.lost.items()]
    if found.timings:
        lines += [
            "",
            f"{'timings (speedup over ar)':34s} {'base':>9s} {'head':>9s}  head / base [95 %]"
            f"{'':8s}pairs  verdict (tolerance {found.tolerance:.0%})",
        ]
    lines += [_timing_line(row) for row in found.timings]
    notes = list(found.notes)
    if found.undecided:
        names = ", ".join(row.decoder for row in found.undecided)
        notes.append(f"undecided, the interval reaches across the tolerance: {names}")
    lines += ["", *(f"note: {note}" for note in notes)] if notes else []
    passed = f"no regression found, {len(found.undecided)} of {len(found.timings)} undecided"
    passed += f", {len(found.flagged)} flagged" if found.flagged else ""
    lines += ["", "REGRESSION" if found.regressed else passed]
    return "\n".join(lines) + "\n"


def _commit(side: Side) -> str:
    return f"commit {(side.commit or 'unknown')[:7]}" + (", local changes" if side.dirty else "")


def _timing_line(row: TimingRow) -> str:
    unit = " t/s" if row.decoder == REFERENCE else "x"
    name = "ar, direct" if row.decoder == REFERENCE else row.decoder
    levels = " ".join(
        f"{f'{value:.{1 if row.decoder == REFERENCE else 3}f}{unit}' if value else '-':>9s}"
        for value in (row.base, row.head)
    )
    pairs = row.change.n if row.change else 0
    mark = row.verdict.upper() if row.verdict == REGRESSION else row.verdict
    return f"{name:34s} {levels}  {_interval(row):26s}{pairs:5d}  {mark}"


def _interval(row: TimingRow) -> str:
    if row.change is None:
        return "-"
    bounds = (
        f" [{row.change.low:.3f}, {row.change.high:.3f}]"
        if row.change.low is not None and row.change.high is not None
        else " [too few pairs]"
    )
    return f"{row.change.value:.3f}{bounds}"


def to_junit(found: Comparison) -> str:
    """JUnit XML: a test case per decoder and kind; regressions fail, undecided and flagged ones are
    skipped."""
    cases: list[ElementTree.Element] = []
    for row in found.counters:
        case = _case("counters", row.decoder)
        if row.differing:
            message = f"{row.differing} of {row.items} items differ"
            _add(case, "failure", message, "\n".join(row.examples))
        cases.append(case)
    for name, reason in found.lost.items():
        case = _case("counters", name)
        _add(case, "failure", "head cannot build this decoder any more", reason)
        cases.append(case)
    for row in found.timings:
        case = _case("timings", row.decoder)
        message = f"{row.quantity}: head / base {_interval(row)}, tolerance {found.tolerance:g}"
        if row.verdict == REGRESSION:
            _add(case, "failure", message, message)
        elif row.verdict in (UNDECIDED, FLAGGED):
            _add(case, "skipped", f"{row.verdict}, {message}", "")
        cases.append(case)
    suite = ElementTree.Element(
        "testsuite",
        name="bench compare",
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors="0",
        skipped=str(sum(case.find("skipped") is not None for case in cases)),
        time="0",
    )
    facts = {
        "base": found.base.commit or "unknown",
        "head": found.head.commit or "unknown",
        "tolerance": f"{found.tolerance:g}",
    }
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in facts.items():
        ElementTree.SubElement(properties, "property", name=name, value=value)
    suite.extend(cases)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(kind: str, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=f"bench.{kind}", name=name, time="0")


def _add(case: ElementTree.Element, kind: str, message: str, text: str) -> None:
    ElementTree.SubElement(case, kind, message=message).text = text


def to_gab(found: Comparison) -> tuple[str, str]:
    """Two JSON arrays for github-action-benchmark, of head: customBiggerIsBetter (speedup over AR,
    T/NFE) and customSmallerIsBetter (ms per token)."""
    head, changes = found.head, {row.decoder: row for row in found.timings}
    bigger, smaller = [], []
    for name in head.counters:
        row = changes.get(name)
        extra = f"commit {head.commit}, {head.kind} record"
        # The action compares what it gets with its last run: a flagged speedup stays out of it.
        if head.levels.get(name) and name != REFERENCE and name not in head.flagged:
            more = f"\nhead / base {_interval(row)}: {row.verdict}" if row else ""
            bigger.append(_entry(f"speedup over ar: {name}", "x", head.levels[name], extra + more))
        bigger.append(_entry(f"T/NFE: {name}", "tokens/forward", head.t_per_nfe.get(name), extra))
        smaller.append(_entry(f"decode: {name}", "ms/token", head.ms_per_token.get(name), extra))
    return _array(bigger), _array(smaller)


def _entry(name: str, unit: str, value: float | None, extra: str) -> dict[str, object] | None:
    if value is None or not math.isfinite(value):
        return None
    return {"name": name, "unit": unit, "value": round(value, 6), "extra": extra}


def _array(entries: list[dict[str, object] | None]) -> str:
    return json.dumps([entry for entry in entries if entry], indent=1, ensure_ascii=False) + "\n"


def smaller_path(path: Path) -> Path:
    """Where the smaller-is-better half goes: gab.json -> gab.smaller.json."""
    return path.with_name(f"{path.stem}.smaller{path.suffix}")


def write(found: Comparison, *, junit: Path | None, gab: Path | None) -> list[Path]:
    """Write what was asked for; gives the files. The smaller-is-better JSON lies beside `gab`."""
    texts = {junit: to_junit(found)} if junit else {}
    if gab:
        bigger, smaller = to_gab(found)
        texts |= {gab: bigger, smaller_path(gab): smaller}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return list(texts)
