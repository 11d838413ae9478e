"""Problems answered with a chain of equations, `<<48/2=24>><<48+24=72>>#### 72`, graded by us.

The form is the one of our own training examples (bench/corpora): the question and a newline, no
shots, no instruction, the end left to end-of-sequence. `gsm8k_chain` asks GSM8K's test questions
so. That is not lm-eval's GSM8K, and a score here is comparable with no published one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from bench.corpora.chains import chain_answer
from bench.tasks import chat, data
from bench.tasks.task import DataSource, Problem, Progress, Score, prompt_sha
from tidar_ref.errors import UserError

HARNESS = "tidar-bench"
METRIC = "exact_match,chain"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as it stands in the prompt, and the number that answers it."""

    prompt: str
    answer: Decimal


class ChainTask:
    """What the chain tasks share; a subclass says where its questions come from."""

    name: str
    source: DataSource
    shots = 0
    max_new_tokens = 96
    ours = True

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        style: str = "base",
        tokenizer: chat.ChatTokenizer | None = None,
    ) -> None:
        chat.check_style(style, tokenizer)
        if style != "base":
            raise UserError(
                f"task {self.name!r} has no prompt in style {style!r}: it asks in the form of our "
                "training examples; use style 'base'"
            )
        self._rows = self.ask(data_dir)

    def ask(self, data_dir: Path | None) -> dict[str, Asked]:
        """All questions by problem id, in order; also sets `source`."""
        raise NotImplementedError

    def problems(self, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems (all when None)."""
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit} of task {self.name!r} must be 1 or more")
        return [
            Problem(
                task=self.name,
                id=id,
                prompt=row.prompt,
                stop=(),
                max_new_tokens=self.max_new_tokens,
                prompt_sha=prompt_sha(row.prompt),
            )
            for id, row in list(self._rows.items())[:limit]
        ]

    def score(
        self, texts: Mapping[str, str], *, progress: Progress | None = None
    ) -> list[Score]:
        """1.0 where the text ends in #### and the right number; a subset of the texts will do."""
        unknown = [id for id in texts if id not in self._rows]
        if unknown or not texts:
            named = f"has no problem {unknown[0]!r}" if unknown else "was given no texts"
            raise UserError(f"task {self.name!r} {named}: score texts by the ids of problems()")
        if progress is not None:
            progress(f"{self.name}: grade {len(texts)} texts")
        values = {
            id: float(chain_answer(texts[id]) == row.answer)
            for id, row in self._rows.items()
            if id in texts
        }
        return [
            Score(
                task=self.name,
                metric=METRIC,
                variant="raw",
                harness=HARNESS,
                per_problem=values,
                headline=True,
            )
        ]


class Gsm8kChain(ChainTask):
    """The 1319 test questions of GSM8K, zero-shot, answered with a chain."""

    name = "gsm8k_chain"

    def ask(self, data_dir: Path | None) -> dict[str, Asked]:
        found = data.require(self.name, data_dir)
        self.source = found.source
        rows = {}
        for place, row in enumerate(found.read()):
            # What stands before the last #### of a reference answer is prose and marks.
            answer = chain_answer("####" + row["answer"].rpartition("####")[2])
            if answer is None:
                raise UserError(f"gsm8k/test.jsonl row {place} has no answer; fetch it again")
            rows[f"gsm8k/{place}"] = Asked(prompt=row["question"] + "\n", answer=answer)
        return rows
