"""In short: what ran, what it shows and does not, and one sentence for each decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench import metrics
from bench.report.markup import CAPTION, Section, table
from bench.report.source import Source, rows_of
from bench.store import planned_keys
from bench.tables import REFERENCE, weights_label
from bench.telemetry.summary import Cell
from bench.validity import COUNTS, SPEED, Flag, Marks, flags_of, lettered, spoilers

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
        # Other weights write other text: equality says nothing there.
        other = bool(record.header.decoders[decoder].get("weights"))
        equal, compared = (0, 0) if other else metrics.equal_outputs(rows, reference)
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
