"""A recipe's documents: pairs from its sources, tokenised, filtered by length, in a fixed order."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.corpora.chains import gsm8k_chains
from bench.corpora.instructions import gpteacher_pairs, mbpp_pairs
from bench.corpora.pairs import Pair
from bench.corpora.python_sources import python_documents
from bench.corpora.templates import template_pairs
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.recipes import Recipe
    from tidar_ref.tokenizer import Tokenizer
    from tidar_ref.training.rows import Example

TEMPLATE_SEED = 1
PYTHON, PYTHON_BYTES = "python-sources", 60_000_000
FEW = 100  # a rehearsal asks for fewer and does not wait for thousands
SOURCES = ("gsm8k-chains", "templates", "mbpp-clean", "gpteacher", "python")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Pairs, their examples, the mixture's name for each one's source, and what was left out and
    why (JSON-able, for the card)."""

    pairs: tuple[Pair, ...]
    examples: tuple[Example, ...]
    sources: tuple[str, ...]
    report: dict[str, Any]


def pairs_of(source: str, count: int | None, data_dir: Path | None) -> list[Pair]:
    """The training pairs a source can give here; UserError names what is missing.

    count matters to sources without an end: some more are made, for those that are filtered out.
    """
    if source == "gsm8k-chains":
        if data_dir is None:
            raise UserError(
                "source gsm8k-chains needs GSM8K's train.jsonl: give --data-dir a folder that holds"
                " gsm8k/train.jsonl, or set TIDAR_BENCH_DATA"
            )
        return gsm8k_chains(data_dir / "gsm8k" / "train.jsonl")
    if source == "templates":
        few = count is not None and count < FEW
        made = 10 * count if few else max(20_000, (count or 0) * 11 // 10)
        return template_pairs(made, seed=TEMPLATE_SEED)
    if source == "mbpp-clean":
        return mbpp_pairs(data_dir)
    if source == "gpteacher":
        return gpteacher_pairs(data_dir)
    if source == "python":
        documents = python_documents(byte_budget=PYTHON_BYTES)
        return [Pair(source=PYTHON, id=d.id, prompt="", response=d.text) for d in documents]
    raise UserError(f"unknown source {source!r}: use one of {', '.join(SOURCES)}")


def build(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    eos_id: int,
    data_dir: Path | None,
    clean: Callable[[Sequence[Pair]], tuple[list[Pair], dict[str, Any]]],
    seed: int = 0,
) -> Corpus:
    """The recipe's documents. Each source is shuffled by the seed, filtered, then cut to its count.

    clean: the hygiene filter (bench.corpora.hygiene); its report is kept.
    """
    from tidar_ref.training.rows import Example

    chosen: list[tuple[Pair, Example, str]] = []
    report: dict[str, Any] = {"sources": {}, "max_tokens": recipe.max_tokens}
    for source in recipe.mixture:
        pairs = pairs_of(source.name, source.count, data_dir)
        random.Random(f"{source.name}/{seed + source.seed}").shuffle(pairs)
        kept, hygiene = clean(pairs)
        fitting: list[tuple[Pair, Example]] = []
        too_long = 0
        for pair in kept:
            if source.count is not None and len(fitting) == source.count:
                break
            prompt = tuple(tokenizer.encode(pair.prompt)) if pair.prompt else ()
            response = (*tokenizer.encode(pair.response), eos_id)
            if not prompt:  # plain text: cut into documents, none is too long
                fitting += _cut(pair, response, recipe.max_tokens)
                continue
            if len(prompt) + len(response) > recipe.max_tokens:
                too_long += 1
                continue
            fitting.append((pair, Example(prompt=prompt, response=response)))
        fitting = fitting[: source.count]
        if source.count is not None and len(fitting) < source.count:
            raise UserError(
                f"source {source.name} gives {len(fitting)} documents of up to {recipe.max_tokens}"
                f" tokens, recipe {recipe.name} wants {source.count}: lower the count"
            )
        report["sources"][source.name] = {
            "documents": len(fitting),
            "tokens": sum(len(example.tokens) for _, example in fitting),
            "too_long": too_long,
            "hygiene": hygiene,
        }
        chosen += [(pair, example, source.name) for pair, example in fitting]
    random.Random(f"mixture/{seed}").shuffle(chosen)
    report["documents"] = len(chosen)
    report["by_source"] = dict(Counter(pair.source for pair, *_ in chosen))
    return Corpus(
        pairs=tuple(pair for pair, _, _ in chosen),
        examples=tuple(example for _, example, _ in chosen),
        sources=tuple(source for _, _, source in chosen),
        report=report,
    )


def _cut(pair: Pair, tokens: Sequence[int], longest: int) -> list[tuple[Pair, Example]]:
    """Pieces of at most `longest` tokens; only the last ends with end-of-sequence."""
    from tidar_ref.training.rows import Example

    starts = range(0, len(tokens) - 1, longest)  # a piece of one token has nothing to predict
    return [
        (
            dataclasses.replace(pair, id=f"{pair.id}#{start}"),
            Example(prompt=(), response=tuple(tokens[start : start + longest])),
        )
        for start in starts
    ]
