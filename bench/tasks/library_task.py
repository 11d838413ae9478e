"""What HumanEval, MBPP and GSM8K share: rows from data.py, prompts and grades from lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.tasks import _lm_eval, chat, data
from bench.tasks.stopping import cut
from bench.tasks.task import Problem, Progress, Score, all_prompts_sha, prompt_sha
from tidar_ref.errors import UserError

# all_prompts_sha of every whole set as lm-eval 0.4.13 builds it from the official files. TiDAR's
# published prompts (gsm8k_cot 452, humaneval 105, mbpp 118) are byte-identical with these.
PROMPTS_SHA = {
    "humaneval": "6a712466e64fa7d2",
    "mbpp": "b09746904aefaa69",
    "mbpp_plus": "4c9a68217f43a591",
    "gsm8k_cot": "9a08edd9368fad0c",
}


class LibraryTask:
    """A task that lm-eval defines. Subclasses say how a row is named and asked, and what counts."""

    name: str
    shots: int
    max_new_tokens: int
    headline: str  # lm-eval's "metric,filter"
    ours = False

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        style: str = "base",
        tokenizer: chat.ChatTokenizer | None = None,
    ) -> None:
        chat.check_style(style, tokenizer)
        self.style, self.tokenizer, self.data_dir = style, tokenizer, data_dir
        if style == "chat":
            self.shots = 0
        self._found = data.require(self.name, data_dir)
        self.source = self._found.source
        self._rows: dict[str, dict[str, Any]] | None = None
        self._asked: dict[str, tuple[str, tuple[str, ...]]] = {}

    def row_id(self, position: int, row: Mapping[str, Any]) -> str:
        """Problem id of the row at this position of the whole data set."""
        raise NotImplementedError

    def instruction(self, row: Mapping[str, Any]) -> str:
        """What a chat model is asked."""
        raise NotImplementedError

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows by problem id, in the data set's order."""
        if self._rows is None:
            self._rows = {self.row_id(i, row): row for i, row in enumerate(self._found.read())}
        return self._rows

    def problems(self, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems (all when None), prompted in the style of this task."""
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit} of task {self.name!r} must be 1 or more")
        ids = list(self.rows())[:limit]
        self._collect(ids)
        problems = [self._problem(id) for id in ids]
        if self.style == "base" and len(ids) == len(self.rows()):
            self._check_prompts(problems)
        return problems

    def score(
        self, texts: Mapping[str, str], *, progress: Progress | None = None
    ) -> list[Score]:
        """lm-eval's metrics on the texts given (a subset will do), cut at the stop strings."""
        rows = self._rows_of(texts)
        if progress is not None:
            progress(f"{self.name}: lm-eval grades {len(rows)} texts")
        self._collect(list(rows))
        values = _lm_eval.score(
            self.name,
            list(rows.values()),
            [self._asked[id][0] for id in rows],
            [self.completion(id, texts[id]) for id in rows],
        )
        return [
            self.scored(metric, dict(zip(rows, of_rows, strict=True)))
            for metric, of_rows in values.items()
        ]

    def completion(self, id: str, text: str) -> str:
        """The part of a generated text that is graded."""
        return text if self.style == "chat" else cut(text, self._asked[id][1])

    def scored(
        self,
        metric: str,
        per_problem: dict[str, float],
        *,
        variant: str = "raw",
        harness: str | None = None,
    ) -> Score:
        """A Score that says whether the prompts were lm-eval's or our chat wording."""
        in_chat = self.style == "chat"
        return Score(
            task=self.name,
            metric=metric + (chat.METRIC_SUFFIX if in_chat else ""),
            variant=variant,
            harness=(harness or _lm_eval.version()) + (chat.HARNESS_SUFFIX if in_chat else ""),
            per_problem=per_problem,
            headline=metric == self.headline and variant == "raw",
        )

    def _rows_of(self, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        unknown = [id for id in texts if id not in self.rows()]
        if unknown or not texts:
            named = f"has no problem {unknown[0]!r}" if unknown else "was given no texts"
            raise UserError(f"task {self.name!r} {named}: score texts by the ids of problems()")
        return {id: row for id, row in self.rows().items() if id in texts}

    def _collect(self, ids: list[str]) -> None:
        """Ask lm-eval for the prompts of these ids, once each."""
        new = [id for id in ids if id not in self._asked]
        if new:
            asked = _lm_eval.collect(self.name, [self.rows()[id] for id in new])
            self._asked.update(zip(new, asked, strict=True))

    def _check_prompts(self, problems: list[Problem]) -> None:
        """Other prompts are another benchmark, whether the data or the library changed."""
        got = all_prompts_sha(problems)
        if got != PROMPTS_SHA[self.name]:
            raise UserError(
                f"the {len(problems)} prompts of task {self.name!r} are not the published ones "
                f"(expected sha256 {PROMPTS_SHA[self.name]}, got {got}, {_lm_eval.version()}, data "
                f"from {self.source.path}): use lm-eval 0.4.13 and the official data files"
            )

    def _problem(self, id: str) -> Problem:
        prompt, stop = self._asked[id]
        if self.style == "chat":
            prompt, stop = chat.ask(self.tokenizer, self.instruction(self.rows()[id])), ()
        return Problem(
            task=self.name,
            id=id,
            prompt=prompt,
            stop=stop,
            max_new_tokens=self.max_new_tokens,
            prompt_sha=prompt_sha(prompt),
        )
