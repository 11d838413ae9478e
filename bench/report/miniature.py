"""The paper's systems on this suite's own weights, and what its own weights would take.

Tables 2, 4 and 5 and Figures 5 and 6 of the paper compare systems that differ in their training.
A record has them when its decoders run on adapters of their own (`name:weights=<adapter>`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import metrics, validity
from bench.report.markup import CAPTION, Folded, Part, Section, table
from bench.report.source import Source, rows_of
from bench.tables import table_rows
from bench.validity import COUNTS, SCORE, lettered

ADAPTERS = Path(__file__).resolve().parents[2] / "results" / "adapters"
ASSUMED_MFU = 0.4
Notes = Mapping[str, Mapping[str, Any]]


def miniature(sources: Sequence[Source], adapters: Path = ADAPTERS) -> Section | None:
    """One table per record that compares trainings: whose `ar` has weights of its own too."""
    mine = [source for source in sources if source.scored and _compares_trainings(source)]
    if not mine:
        return None
    trained = _training_notes(adapters)
    parts: list[Part] = [
        "The paper compares systems that differ in how they were trained: the base, the base "
        "fine-tuned on the same text (Tables 2 and 4), block diffusion (Figure 4), TiDAR trusting "
        "its AR half or its drafts (Figure 5), full against random masks (Figure 6, Table 5). Here "
        "are ours, far smaller, on the same prompts. Brackets are 95 % intervals; one training "
        "seed each, so they hold the problems' chance and not the training's."
    ]
    for source in mine:
        parts += _systems(source, trained)
    parts.append(_missing(trained, mine))
    parts.append(_needed())
    return Section(id="miniature", title="The paper's systems in miniature", parts=parts)


def _compares_trainings(source: Source) -> bool:
    decoders = source.record.header.decoders.values()
    return any(decoder["name"] == "ar" and decoder.get("weights") for decoder in decoders)


def _training_notes(adapters: Path) -> Notes:
    """Name -> tidar.json of the adapters that came with this checkout."""
    found = {}
    for path in sorted(adapters.glob("*/tidar.json")):
        found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _systems(source: Source, trained: Notes) -> list[Part]:
    record = source.record
    header = record.header
    marks = validity.Marks(validity.flags_of(record))
    rows = {(row.task, row.decoder): row for row in table_rows(record)}
    tasks = list(header.problems)
    head = ["system", "trained on"]
    for task in tasks:
        head += [f"{task} score %", f"{task} T/NFE"]
    body = []
    for label, decoder in header.decoders.items():
        stack = _stack((decoder.get("weights") or header.weights).get("adapters") or ())
        cells = [system_name(label, decoder, stack, trained), _budget(stack, trained)]
        for task in tasks:
            row, cell = rows[task, label], [(label, task)]
            score = "" if row.score is None else _bracket(row.score, row.score_low, row.score_high)
            mine = [one for one in rows_of(record, label) if one.task == task]
            ratio = metrics.tokens_per_nfe_interval(mine)
            shown = "" if ratio is None else _bracket(ratio.value, ratio.low, ratio.high, ".2f", 1)
            cells.append(marks.mark(score, (SCORE,), *cell))
            cells.append(marks.mark(shown, (COUNTS,), *cell))
        body.append(cells)
    counts = ", ".join(f"{len(ids)} {task}" for task, ids in header.problems.items())
    text = (
        f"### {record.name}\n\nBase: {header.weights['name']}, {header.dtype}; {counts}.\n\n"
        f"{CAPTION}systems on {record.name}\n\n{table(head, body)}"
    )
    notes = "\n".join(lettered(marks))
    return [text, notes] if notes else [text]


def system_name(
    label: str, decoder: Mapping[str, Any], stack: Sequence[str], trained: Notes
) -> str:
    """A decoder in the paper's words: what decodes, how it was trained; others keep their label."""
    name, params = decoder["name"], decoder.get("params") or {}
    objective: dict[str, Any] = {}
    for adapter in stack:
        objective |= trained.get(adapter, {}).get("recipe", {}).get("objective", {})
    kind = objective.get("kind")
    if name == "ar":
        how = {None: "untrained", "ar": "fine-tuned"}.get(kind, "the AR half of TiDAR")
        return f"AR, {how}"
    said = [f"K={params['block_len']}"] if "block_len" in params else []
    if name == "tidar":
        beta = params.get("beta", 1.0)
        trust = {1: "trust AR", 0: "trust diffusion"}.get(beta, f"beta {beta:g}")
        masks = objective.get("masking", "full")
        gated = any(trained.get(adapter, {}).get("placement") == "mask" for adapter in stack)
        said += [trust, f"{masks} masks", *(["gated"] if gated else [])]
        said += ["aligned grid"] if objective.get("random_offset") is False else []
        said += [f"outcomes {params['outcomes']}"] if "outcomes" in params else []
        return f"TiDAR, {', '.join(said)}"
    if name == "block_diffusion":
        rule = params.get("rule", "threshold")
        said.append("one token" if rule == "one" else f"{rule} {params.get(rule, '')}".strip())
        return f"Block diffusion, {', '.join(said)}"
    return label


def _stack(adapters: Sequence[str]) -> list[str]:
    """The names in a header's "NAME sha256 HASH"."""
    return [text.partition(" sha256 ")[0] for text in adapters]


def _budget(stack: Sequence[str], trained: Notes) -> str:
    """Tokens, steps and seed behind a stack of adapters."""
    if not stack:
        return "nothing of ours"
    unknown = [name for name in stack if name not in trained]
    if unknown:
        return f"unknown: {', '.join(unknown)} is not in this checkout"
    notes = [trained[name] for name in stack]
    tokens = sum(note["clean_tokens"] for note in notes)
    steps = sum(note["steps"] for note in notes)
    seeds = sorted({note["recipe"]["train"].get("seed", 0) for note in notes})
    said = f"{tokens:,} tokens, {steps} steps, seed {', '.join(map(str, seeds))}"
    return f"{said} ({' + '.join(stack)})"


def _missing(trained: Notes, sources: Sequence[Source]) -> Folded:
    """The recipes nobody has run into this checkout, each with its command."""
    from bench.recipes import RECIPES

    used = {
        name
        for source in sources
        for decoder in source.record.header.decoders.values()
        for name in _stack((decoder.get("weights") or {}).get("adapters") or ())
    }
    body = [
        (
            recipe.name,
            recipe.purpose,
            "trained, not in these records" if recipe.name in trained else "not trained",
            f"`python -m bench train --recipe {recipe.name}`",
        )
        for recipe in RECIPES.values()
        if recipe.name not in used and recipe.head is None
    ]
    head = ("recipe", "what it is", "state", "command")
    return Folded(title="Systems that are missing here", markdown=table(head, body))


def _needed() -> Folded:
    """GPU hours of the paper's own rows, and how to start them."""
    from bench.training_cost import LAUNCH, estimate

    _, _, text = estimate(mfu=ASSUMED_MFU, gpu="h100").partition("\n\n")
    text += f"\nOn a node of 8 GPUs:\n\n```\n{LAUNCH}\n```\n"
    return Folded(title="What the 1.5B and 8B rows would take", markdown=text)


def _bracket(
    value: float, low: float | None, high: float | None, form: str = ".0f", scale: float = 100
) -> str:
    said = f"{scale * value:{form}}"
    if low is None or high is None:
        return said
    return f"{said} [{scale * low:{form}}, {scale * high:{form}}]"
