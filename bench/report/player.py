"""What the step player shows: chosen generations step by step, and the same as a table for paper.

The ledger (`steps.jsonl`) is the only source. Records from before the drafted ids were kept show
counts where the ids would stand; records without `vocabulary.json` show ids instead of text.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench.records import Measurement, StepRecord
from bench.report.markup import Raw, inline, table
from bench.store import Key, RunRecord, read_steps, read_vocabulary
from tidar_ref.outcomes import layout, next_draft, parse_outcomes

PROBLEMS_PER_TASK = 4  # each problem adds every decoder's steps to the page
STORY_STEPS = 8
HALF = "\ufffd"

HOW_TO_READ = """TiDAR's network does two jobs in one forward. It **checks** the tokens it guessed a
step ago: each guess must be the very token the network would now write itself. And it **guesses**
the next tokens, once for every way the check can end, so that the right guesses are ready whatever
is kept. Several tokens can become final in one forward; ordinary decoding (`ar`) makes one final
per forward."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One generation with its ledger, prefill first."""

    record: RunRecord
    measurement: Measurement
    steps: tuple[StepRecord, ...]
    pieces: dict[int, str]

    @property
    def drafts(self) -> bool:
        """Whether any step verified a draft."""
        return any(step.drafted for step in self.steps)


def examples(folder: Path, record: RunRecord) -> list[Example]:
    """The generations shown: of each task the first problems and the one that accepted most."""
    chosen = _chosen(record)
    ledgers: dict[Key, list[StepRecord]] = defaultdict(list)
    for step in read_steps(folder):
        if (step.task, step.problem, step.repeat) in chosen:
            ledgers[step.key].append(step)
    pieces = read_vocabulary(folder)
    found = [
        Example(record=record, measurement=row, steps=tuple(ledgers[row.key]), pieces=pieces)
        for row in record.measurements
        if row.key in ledgers
    ]
    order = list(record.header.decoders)
    tasks = list(record.header.problems)
    return sorted(
        found,
        key=lambda e: (
            tasks.index(e.measurement.task),
            record.header.problems[e.measurement.task].index(e.measurement.problem),
            order.index(e.measurement.decoder),
        ),
    )


def _chosen(record: RunRecord) -> set[tuple[str, str, int]]:
    chosen = set()
    for task, problems in record.header.problems.items():
        rows = [r for r in record.measurements if r.task == task and r.repeat == 0 and r.drafted]
        best = max(rows, key=lambda r: r.accepted / r.drafted, default=None)
        names = list(problems[:PROBLEMS_PER_TASK])
        if best is not None and best.problem not in names:
            names[-1:] = [best.problem]
        chosen |= {(task, name, 0) for name in names}
    return chosen


def first_shown(shown: list[Example]) -> Example | None:
    """The generation to open with: the best acceptance of a `tidar`, else of any that drafts; the
    longest of equals."""

    def rank(example: Example) -> tuple[bool, float, int]:
        row = example.measurement
        name = example.record.header.decoders[row.decoder]["name"]
        return name == "tidar", row.accepted / max(1, row.drafted), len(example.steps)

    return max((e for e in shown if e.drafts), key=rank, default=shown[0] if shown else None)


def spell(pieces: dict[int, str], token: int) -> str:
    """A token's text with its blanks made visible, or #id where its text is not known."""
    piece = pieces.get(token, "")
    if not piece or HALF in piece:
        return f"#{token}"
    return piece.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def story(example: Example) -> str:
    """The first steps of a generation as a Markdown table."""
    body = []
    for step in example.steps[: STORY_STEPS + 1]:
        own = step.committed[-1:]
        kept = step.committed[: step.accepted]
        if step.draft_tokens is not None:
            dropped = _spelled(example, step.draft_tokens[step.accepted :])
        elif step.drafted > step.accepted:
            dropped = f"{step.drafted - step.accepted} (ids not recorded)"
        else:
            dropped = ""
        body.append(
            (
                "prefill" if step.index == 0 else str(step.index),
                _spelled(example, kept),
                _spelled(example, own),
                dropped,
                str(len(step.committed)),
            )
        )
    row = example.measurement
    head = ("step", "drafts accepted", "the network's own token", "drafts thrown away", "committed")
    return (
        f"{row.decoder} on {row.task} {row.problem}, {example.record.name} "
        f"(first {min(STORY_STEPS, len(example.steps) - 1)} of {len(example.steps) - 1} steps):"
        f"\n\n{table(head, body)}"
    )


def _spelled(example: Example, tokens: tuple[int, ...]) -> str:
    return " ".join(f"`{spell(example.pieces, token).replace('`', 'ˋ')}`" for token in tokens)


def _outcomes(params: dict[str, Any], step: StepRecord) -> list[Any] | None:
    """[outcomes drafted in this step, index of the block that serves] of a chosen subset."""
    if params.get("outcomes") is None or step.index == 0 or not step.committed:
        return None
    k = params["block_len"]
    drafted = layout(parse_outcomes(params["outcomes"], k), step.drafted + 1)
    index, length = next_draft(drafted, len(step.committed), k)
    return [list(drafted), index if length > 1 else -1]


def player_data(shown: list[Example]) -> dict[str, Any]:
    """All the player needs, as plain data; token texts are stored once for each record."""
    records: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    runs = []
    for example in shown:
        header, row = example.record.header, example.measurement
        if example.record.name not in places:
            places[example.record.name] = len(records)
            records.append(
                {
                    "name": example.record.name,
                    "tier": header.weights["tier"],
                    "weights": header.weights["name"],
                    "decoders": header.decoders,
                    "pieces": {},
                }
            )
        pieces = records[places[example.record.name]]["pieces"]
        for step in example.steps:
            for token in (*step.committed, *(step.draft_tokens or ())):
                pieces[token] = example.pieces.get(token, "")
        params = header.decoders[row.decoder]["params"]
        runs.append(
            {
                "record": places[example.record.name],
                "decoder": row.decoder,
                "task": row.task,
                "problem": row.problem,
                "prompt": row.prompt_tokens,
                "kept": row.output_tokens,
                "finish": row.finish,
                "steps": [
                    {
                        "c": step.committed,
                        "d": step.draft_tokens,
                        "n": step.drafted,
                        "a": step.accepted,
                        "w": step.query_width,
                        "f": step.target_forwards,
                        "o": _outcomes(params, step),
                    }
                    for step in example.steps
                ],
            }
        )
    first = first_shown(shown)
    return {
        "records": records,
        "runs": runs,
        "first": next((i for i, e in enumerate(shown) if e is first), 0),
    }


def embedded(data: dict[str, Any]) -> str:
    """JSON that may stand inside a script element, whatever text it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def player(shown: list[Example], *, total: int) -> Raw:
    """The player of the page; its twin is the opening generation's first steps as a table."""
    first = first_shown(shown)
    if first is None:
        nothing = "No step ledger is in these records, so there is nothing to play."
        return Raw(html=f"<p>{nothing}</p>", markdown=nothing)
    page = files("bench.report").joinpath("player.html").read_text(encoding="utf-8")
    note = (
        f"{len(shown)} of {total} generations are in the player (the first problems of each task "
        "and the one with the most accepted drafts); all steps are in each record's `steps.jsonl`. "
        "The prompts are not part of a record. Forwards are not seconds: a wider forward can cost "
        "more, see the measured step times."
    )
    if first.record.header.weights["tier"] == "random":
        note = f"**Random weights: the text is noise and shows the mechanics only.** {note}"
    html = page.replace("{{data}}", embedded(player_data(shown))).replace("{{note}}", inline(note))
    return Raw(html=html.replace("{{story}}", escape(story(first))), markdown=story(first))
