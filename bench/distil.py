"""Self-distillation: the weights write the answers that the drafts are then trained to predict.

Greedy answers of the very model that will verify: a draft is right when it says what that model
says, right or wrong. Answers are kept as they are, whatever a checker would say of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.recipes import Recipe
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.corpora.mixture import Corpus
    from tidar_ref.checkpoint import LoadedModel
    from tidar_ref.training.rows import Example

ANSWERS_FILE = "distilled.jsonl"
BATCH = 48  # prompts decoded together on a CPU: by then products cost more than reading weights
GPU_BATCH = 256


def distilled(corpus: Corpus, loaded: LoadedModel, recipe: Recipe, out: Path) -> Corpus:
    """The corpus with each response of the distilled sources replaced by the model's own answer.

    Answers are appended to out/distilled.jsonl as they come; those already there are used again.
    Prompts of like length are decoded together.
    """
    from tqdm import tqdm

    from baselines.autoregressive import build
    from tidar_ref.decoding import generate
    from tidar_ref.training.rows import Example

    out.mkdir(parents=True, exist_ok=True)
    path = out / ANSWERS_FILE
    answers = _read(path)
    decoder = build(loaded.model.prepare())
    eos = frozenset(loaded.source.eos_token_ids)
    chosen = [index for index, source in enumerate(corpus.sources) if source in recipe.distil]
    order = sorted(
        (index for index in chosen if corpus.pairs[index].id not in answers),
        key=lambda index: len(corpus.examples[index].prompt),
    )
    if any(not corpus.examples[index].prompt for index in chosen):
        raise UserError(f"recipe {recipe.name} distils plain text, which asks nothing: drop it")
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(
            total=len(chosen), initial=len(chosen) - len(order), unit="answer", disable=None
        ) as bar,
    ):
        batch = BATCH if loaded.model.device.type == "cpu" else GPU_BATCH
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            traces = generate(
                decoder,
                [corpus.examples[index].prompt for index in group],
                max_new_tokens=recipe.answer_tokens,
                eos_ids=eos,
            )
            for index, trace in zip(group, traces, strict=True):
                identity = corpus.pairs[index].id
                answers[identity] = trace.token_ids
                file.write(json.dumps({"id": identity, "ids": trace.token_ids}) + "\n")
            file.flush()
            bar.update(len(group))
    loaded.model.forget()  # training moves the weights
    examples = list(corpus.examples)
    for index in chosen:
        answer = answers[corpus.pairs[index].id]
        examples[index] = Example(prompt=examples[index].prompt, response=answer)
    ours = [examples[index] for index in chosen]
    report = {
        **corpus.report,
        "distilled_by": loaded.source.name,
        "distilled_sources": list(recipe.distil),
        "distilled_tokens": sum(len(example.response) for example in ours),
        "same_as_source": _same(ours, [corpus.examples[index] for index in chosen]),
        "cut_at_the_limit": sum(example.response[-1] not in eos for example in ours),
    }
    return dataclasses.replace(corpus, examples=tuple(examples), report=report)


def _read(path: Path) -> dict[str, tuple[int, ...]]:
    """Answers written so far; a line cut off by a kill is dropped and its answer made again."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    rows = (json.loads(line) for line in whole.splitlines())
    return {row["id"]: tuple(row["ids"]) for row in rows}


def _same(ours: Sequence[Example], theirs: Sequence[Example]) -> int:
    return sum(a.response == b.response for a, b in zip(ours, theirs, strict=True))
