"""What stands on the report, section by section, written once in Markdown.

One record is one experiment on one weights tier: every table has rows of a single record, and a
`random` record shows step times only, in a section of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import metrics
from bench.records import Measurement
from bench.report.markup import CAPTION, Folded, Part, Section, table
from bench.store import MEASUREMENTS, SCORES, STEPS, RunRecord, planned_keys
from bench.tables import REFERENCE, to_markdown, weights_label
from bench.telemetry.summary import Cell
from bench.validity import COUNTS, SPEED, Flag, Marks, flags_of, spoilers

if TYPE_CHECKING:
    from bench.claims_verdict import Judged

SHOWS = {
    "random": (
        "what a step costs on this machine, and that the chain works",
        "anything about quality, acceptance or speedup: random weights write noise",
    ),
    "embedded": (
        "exact counts, step costs and equality with plain decoding, on real weights of toy size",
        "the paper's scores or speedups: these are other, far smaller weights",
    ),
    "small": (
        "counts, speed and scores of a small model on this machine",
        "the paper's own rows: these are not its weights",
    ),
    "paper": (
        "the rows of the paper that these weights are named in",
        "rows of other weights, and the paper's seconds unless the hardware is the same",
    ),
    "local": (
        "what this folder of weights does on this machine",
        "which model it is: that is the caller's claim",
    ),
}


FEW_PROBLEMS = 30


@dataclass(frozen=True, kw_only=True)
class Source:
    """A record with the folder it was read from."""

    folder: Path
    record: RunRecord

    @property
    def tier(self) -> str:
        return self.record.header.weights["tier"]

    @property
    def scored(self) -> bool:
        """Whether T/NFE, acceptance and scores of these weights mean anything."""
        return self.tier != "random"


def rows_of(record: RunRecord, decoder: str) -> list[Measurement]:
    """The measurements of one decoder."""
    return [row for row in record.measurements if row.decoder == decoder]


def headline(sources: Sequence[Source]) -> Section:
    """What ran, on what, what it shows and what it does not; one table per record."""
    parts = [
        "**TiDAR** ([arXiv 2511.08923](https://arxiv.org/abs/2511.08923)) is a way to decode a "
        f"language model that checks and guesses several tokens in one forward. {_claimed()} "
        f"This page shows what {_count(len(sources), 'recorded run')} measured, and where that "
        "leaves the claim. A speedup is over `ar`, ordinary decoding one token at a time, with "
        "the same weights on the same machine."
    ]
    for source in sorted(sources, key=lambda s: not s.scored):
        marks = Marks(flags_of(source.record))
        parts.append(f"{_what_ran(source, marks)}\n\n{_headline_table(source, marks)}")
    return Section(id="headline", title="In short", parts=parts)


def _claimed() -> str:
    from bench.claims import load_claims

    speedups = [
        claim
        for claim in load_claims()
        if claim.source == "Abstract" and claim.metric == "speedup" and claim.decoder == "tidar"
    ]
    if not speedups:
        return ""
    words = " and ".join(f"{c.value:g}x ({c.size})" for c in speedups)
    return f"Its authors claim {words} the tokens per second of ordinary decoding, at its quality."


def _what_ran(source: Source, marks: Marks) -> str:
    header = source.record.header
    env, weights = header.environment, header.weights
    machine = env.get("gpu") or f"{env.get('cpu')}, {env.get('threads')} threads"
    problems = ", ".join(f"{len(ids)} {task}" for task, ids in header.problems.items())
    shows, hides = SHOWS[source.tier]
    done, planned = len(source.record.measurements), len(planned_keys(header))
    generations = _count(done, "generation") + ("" if done == planned else f" of {planned} planned")
    lines = [
        f"### {source.record.name}",
        "",
        f"- **What ran:** {generations}: {problems}; {machine}, {header.dtype}",
        f"- **Weights:** {weights['name']}; {weights_label(weights)}",
        f"- **It shows** {shows}",
        f"- **It does not show** {hides}",
        *[f"- {sentence}" for sentence in verdicts(source, marks.flags)],
    ]
    return "\n".join(lines)


def lettered(marks: Marks) -> list[str]:
    """The notes of the letters that were put on numbers."""
    return [line for line in marks.notes() if line.startswith("- (")]


def verdicts(source: Source, flags: Mapping[Cell, Sequence[Flag]]) -> list[str]:
    """One sentence for each decoder against `ar`: the interval decides, a flag forbids it."""
    record = source.record
    reference = rows_of(record, REFERENCE)
    if not source.scored or not reference:
        return []
    said = []
    for decoder in record.header.decoders:
        faster = metrics.speedup(rows_of(record, decoder), reference)
        if decoder == REFERENCE or faster is None:
            continue
        both = [(name, task) for name in (decoder, REFERENCE) for task in record.header.problems]
        spoiled = spoilers((SPEED, COUNTS), both, flags)
        if spoiled:
            word = f"not compared ({', '.join(spoiled)}, see Validity)"
        elif faster.low is None or faster.high is None:
            word = "no interval from one problem, so no verdict"
        elif faster.low > 1:
            word = "**faster than ar**"
        elif faster.high < 1:
            word = "**slower than ar**"
        else:
            word = "**not told apart from ar**"
        said.append(f"`{decoder}`: {_interval(faster)} the tokens per second of `ar`: {word}")
    return said


def _headline_table(source: Source, marks: Marks) -> str:
    record = source.record
    reference = rows_of(record, REFERENCE)
    caption = f"{CAPTION}{record.name}, all tasks together"
    body = []
    for decoder in record.header.decoders:
        rows = rows_of(record, decoder)
        mine = [(decoder, task) for task in record.header.problems]
        both = [*mine, *((REFERENCE, task) for task in record.header.problems)]
        forwards = sum(row.decode_forwards for row in rows)
        step = f"{1000 * sum(row.decode_s for row in rows) / forwards:.1f}" if forwards else ""
        step = marks.mark(step, (SPEED,), *mine)
        if not source.scored:
            body.append((decoder, str(len(rows)), step))
            continue
        faster = None if decoder == REFERENCE else metrics.speedup(rows, reference)
        equal, compared = metrics.equal_outputs(rows, reference)
        body.append(
            (
                decoder,
                str(len(rows)),
                marks.mark(_number(metrics.tokens_per_nfe(rows)), (COUNTS,), *mine),
                marks.mark(_share(metrics.acceptance_rate(rows)), (COUNTS,), *mine),
                step,
                marks.mark(_interval(faster) if faster else "", (SPEED, COUNTS), *both),
                "" if decoder == REFERENCE or not compared else f"{equal} of {compared}",
            )
        )
    if not source.scored:
        made = f"{caption}\n\n" + table(("decoder", "generations", "ms per step"), body)
    else:
        head = (
            "decoder",
            "generations",
            "tokens per forward (T/NFE)",
            "drafts accepted",
            "ms per step",
            "speedup over ar",
            "outputs equal to ar's",
        )
        made = f"{caption}; brackets are 95 % intervals\n\n{table(head, body)}"
    return "\n\n".join([made, "\n".join(lettered(marks))])


def results(sources: Sequence[Source]) -> Section:
    """The tables `bench tables` makes, record by record."""
    return Section(
        id="results",
        title="Results",
        parts=[_tables(source) for source in sources if source.scored]
        or ["No record here has weights whose scores and counts mean anything."],
    )


def _tables(source: Source) -> str:
    """The record's page of tables, less the device's, which has a section of its own."""
    chunks = to_markdown(source.record).split("\n## ")
    return "\n## ".join(chunk for chunk in chunks if not chunk.startswith("Device\n"))


def step_costs(sources: Sequence[Source]) -> Section | None:
    """Tables of the random-weight records, apart from every score; None without one."""
    random = [source for source in sources if not source.scored]
    if not random:
        return None
    say = (
        "These records have random weights. A step costs what it would cost with trained weights "
        "of this shape; everything else would be noise and is left out."
    )
    return Section(
        id="step-costs",
        title="Step costs on random weights",
        parts=[say, *map(_tables, random)],
    )


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
    """Where it ran: one table per record, and the data with checksums."""
    parts = []
    for source in sources:
        header = source.record.header
        env, weights = header.environment, header.weights
        pairs = [(name, env[name]) for name in env if name != "versions"]
        pairs += [(f"version of {name}", value) for name, value in env["versions"].items()]
        pairs += [
            (f"weights {n}", weights.get(n)) for n in ("name", "tier", "origin", "sha256", "dtype")
        ]
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
        body = [(name, "none, or not known" if v is None else str(v)) for name, v in pairs]
        parts.append(f"### {source.record.name}\n\n{table(('what', 'value'), body)}")
    return Section(id="environment", title="Environment", parts=parts)


def reproduce(sources: Sequence[Source]) -> Section:
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
    body = [
        ("score", SCORES, "mean over problems, graded by the harness named in the row"),
        ("T/NFE, acceptance", f"{MEASUREMENTS}, {STEPS}", "counts of the step ledger"),
        ("tokens/s, ms/step, speedup", MEASUREMENTS, "decode seconds; ratios of sums"),
        ("equal outputs", MEASUREMENTS, "hash of the kept token ids, and the text"),
        ("step player", f"{STEPS}, vocabulary.json", "the ledger, token by token"),
        ("claims", "results/paper/*.csv", "python -m bench claims"),
    ]
    parts.append("### Where each number comes from")
    parts.append(table(("number", "file of the record", "how"), body))
    return Section(id="reproduce", title="How to reproduce each number", parts=parts)


def claims(sources: Sequence[Source]) -> Section:
    """Every published number beside ours, with a verdict: the records of this report only."""
    from bench import claims_verdict as verdict
    from bench.claims import load_claims, load_findings, load_properties
    from bench.claims_ours import observe

    observed = [item for source in sources for item in observe(source.record)]
    judged = verdict.judge_all(load_claims(), observed)
    tally = verdict.counts(judged)
    verdicts = [(name, str(tally[name]), MEANINGS[name]) for name in verdict.VERDICTS]
    parts: list[Part] = [
        f"All {tally['cells']} numbers of the paper, of its project page and of published rivals, "
        f"judged against the records of this report: {tally['with ours beside']} have a number of "
        f"ours beside, {tally['with verdict']} could be judged, {tally['open']} are open.",
        f"{CAPTION}claims by verdict\n\n{table(('verdict', 'cells', 'meaning'), verdicts)}",
    ]
    settled = (verdict.REPRODUCED, verdict.OFF, verdict.PREDICTED)
    judged_rows = [_claim(item) for item in judged if item.verdict in settled]
    beside = [_claim(i) for i in judged if i.ours is not None and i.verdict not in settled]
    if judged_rows:
        parts.append(f"### Judged\n\n{table(CLAIM_HEAD, judged_rows)}")
    if beside:
        title = f"Not judged, with a number of ours beside ({len(beside)} claims)"
        parts.append(Folded(title=title, markdown=table(CLAIM_HEAD, beside)))
    whole = verdict.to_markdown(judged, load_findings(), load_properties())
    parts.append("### Every claim, by source")
    for chunk in whole.split("\n## ")[1:]:
        name, _, text = chunk.partition("\n")
        parts.append(Folded(title=name, markdown=text.strip()))
    return Section(id="claims", title="Claims against measurements", parts=parts)


def _claim(item: Judged) -> tuple[str, ...]:
    claim, ours = item.claim, "" if item.ours is None else f"{round(item.ours, 4):.4g}"
    if item.low is not None and item.high is not None:
        ours += f" [{round(item.low, 4):.3g}, {round(item.high, 4):.3g}]"
    return (
        f"{claim.source}: {claim.system}",
        claim.task,
        claim.metric,
        f"{claim.value:g} {claim.unit}",
        ours,
        f"{item.weights}, {item.label}, n={item.n}",
        item.verdict,
        item.reason,
    )


CLAIM_HEAD = ("claim", "task", "metric", "claimed", "ours", "ours is", "verdict", "why")
MEANINGS = {
    "reproduced": "same weights and setting, ours within the tolerance",
    "off": "same weights and setting, ours outside the tolerance",
    "predicted": "T/NFE as claimed, step times ours: not a measured speedup",
    "flagged": "same weights and setting, but a validity flag spoils ours: shown, not judged",
    "different weights": "the same method and quantity on other weights: shown beside, not judged",
    "different setting": "the same weights, but other problems, length or hardware: not judged",
    "not run": "nothing of ours; the table says what it would take",
}


def _interval(interval: metrics.Interval) -> str:
    text = f"{interval.value:.2f}x"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{interval.low:.2f}, {interval.high:.2f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
