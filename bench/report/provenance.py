"""What speaks against a number, where it was measured, and how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bench.report.markup import Part, Section, table
from bench.report.source import Source
from bench.slots.record import read_header
from bench.store import MEASUREMENTS, SCORES, STEPS
from bench.telemetry.summary import Cell
from bench.validity import Flag, flags_of

FEW_PROBLEMS = 30


def validity(sources: Sequence[Source]) -> Section:
    """What speaks against a number: the flags of every cell, and the limits of each run."""
    parts: list[Part] = [
        "A flag that spoils a number marks it with a letter wherever it is shown, and it is "
        "not compared. A flag that spoils nothing is a statement. Words: `docs/telemetry.md`."
    ]
    for source in sources:
        found: dict[Flag, list[Cell]] = {}
        flags = flags_of(source.record)
        for cell, mine in flags.items():
            for flag in mine:
                found.setdefault(flag, []).append(cell)
        body = [
            (
                flag.name,
                flag.reason,
                ", ".join(flag.spoils) or "nothing",
                "all cells"
                if len(cells) == len(flags)
                else ", ".join(f"{decoder} on {task}" for decoder, task in cells),
            )
            for flag, cells in found.items()
        ]
        made = table(("flag", "says", "spoils", "where"), body) if body else "No flag."
        limits = "\n".join(f"- {line}" for line in _limits(source))
        parts.append(f"### {source.record.name}\n\n{made}\n\n{limits}")
    return Section(id="validity", title="Validity", parts=parts)


def _limits(source: Source) -> list[str]:
    """What the flags do not say and a reader must know."""
    header, rows = source.record.header, source.record.measurements
    cut = sum(row.finish == "length" for row in rows)
    lines = [
        f"few problems: {len(ids)} of {task}"
        for task, ids in header.problems.items()
        if len(ids) < FEW_PROBLEMS
    ]
    if header.dirty:
        lines.append("the code had local changes")
    if cut:
        lines.append(f"{cut} of {len(rows)} outputs were cut by the length limit")
    if header.profile["repeats"] == 1:
        lines.append("one repeat: intervals cover the choice of problems, not the machine's noise")
    return lines


def environment(sources: Sequence[Source]) -> Section:
    """Where it ran: what all records share, then what is each one's own; data with checksums."""
    facts: dict[str, dict[str, str]] = {}
    for source in sources:
        header = source.record.header
        env, weights = header.environment, header.weights
        pairs = [(name, env[name]) for name in env if name != "versions"]
        pairs += [(f"version of {name}", value) for name, value in env["versions"].items()]
        pairs += [
            (f"weights {n}", weights.get(n)) for n in ("name", "tier", "origin", "sha256", "dtype")
        ]
        pairs.append(("adapters", "; ".join(weights.get("adapters") or ()) or None))
        pairs += [
            ("commit", f"{header.commit}{' with local changes' if header.dirty else ''}"),
            ("recorded", header.created),
            ("definitions version", header.definitions),
            ("seed", header.seed),
        ]
        for task, data in header.data.items():
            pairs.append(
                (f"data of {task}", f"{data['kind']}: {data['path']}, sha256 {data['sha256']}")
            )
        facts[source.record.name] = {
            name: "none, or not known" if value is None else str(value) for name, value in pairs
        }
    first, *others = facts.values()
    shared = {
        name: value
        for name, value in first.items()
        if others and all(other.get(name) == value for other in others)
    }
    groups = {"The same in all records": shared} if shared else {}
    groups |= {
        record: {name: value for name, value in found.items() if name not in shared}
        for record, found in facts.items()
    }
    return Section(
        id="environment",
        title="Environment",
        parts=[
            f"### {title}\n\n{table(('what', 'value'), list(found.items()))}"
            for title, found in groups.items()
        ],
    )


def reproduce(sources: Sequence[Source], curves: Sequence[Path]) -> Section:
    """For each record the commands that made it, for each kind of number where it comes from."""
    parts = [
        "Counts and texts should repeat exactly on the same machine in float32; seconds do not, "
        "so compare ratios. What each number means stands in `docs/metrics.md`."
    ]
    for source in sources:
        header, name = source.record.header, source.record.name
        commands = [
            f"git checkout {header.commit or '(commit not recorded)'}",
            "make setup",
            f"python -m bench {shlex.join(header.argv)}",
            f"python -m bench tables {name}    # the same tables again, from the record",
            f"python -m bench report {name}    # this page again",
        ]
        text = f"### {name}\n\n```\n" + "\n".join(commands) + "\n```"
        if header.dirty:
            text += "\n\n**The code had local changes: the commit alone does not repeat this run.**"
        if any(data["kind"] == "data-dir" for data in header.data.values()):
            text += (
                "\n\nThe data came from a folder: name yours with `--data-dir` or "
                "`TIDAR_BENCH_DATA`; its checksums must be those under Environment."
            )
        words = " ".join(header.argv)
        if "reproduce" in header.argv and "--profile" not in words:
            text += (
                f"\n\n`reproduce` chose the profile `{header.profile['name']}` for this machine; "
                f"elsewhere add `--profile {header.profile['name']}`."
            )
        parts.append(text)
    for folder in curves:
        parts.append(_width_record(folder))
    body = [
        ("score", SCORES, "mean over problems, graded by the harness named in the row"),
        ("T/NFE, acceptance", f"{MEASUREMENTS}, {STEPS}", "counts of the step ledger"),
        ("tokens/s, ms/step, speedup", MEASUREMENTS, "decode seconds; ratios of sums"),
        ("equal outputs", MEASUREMENTS, "hash of the kept token ids, and the text"),
        ("latency by width, step ratios", "visits.jsonl", "medians over rounds (`bench slots`)"),
        ("step player", f"{STEPS}, vocabulary.json", "the ledger, token by token"),
        ("claims", "results/paper/*.csv", "python -m bench claims"),
    ]
    parts.append("### Where each number comes from")
    parts.append(table(("number", "file of the record", "how"), body))
    return Section(id="reproduce", title="How to reproduce each number", parts=parts)


def _width_record(folder: Path) -> str:
    """The command of a width record."""
    header, name = read_header(folder), folder.resolve().name
    commands = [
        f"git checkout {header.commit or '(commit not recorded)'}",
        "make setup",
        f"python -m bench {shlex.join(header.argv)}",
        f"python -m bench slots --tables {name}    # its tables and figures again",
    ]
    text = f"### {name}\n\n```\n" + "\n".join(commands) + "\n```"
    if header.dirty:
        text += "\n\n**The code had local changes: the commit alone does not repeat this.**"
    return text
