"""HumanEval (164 problems, no shots), and HumanEval+ as evalplus grades the same texts.

One text has several verdicts, each under its own name: lm-eval on the text as cut at the stop
strings ("raw"); the same after evalplus' sanitiser ("sanitised"); evalplus base and plus tests on
the sanitised program, as released ("sanitised", HumanEval/32 fails for everybody) and with that
one problem graded by us ("repaired").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.tasks import _lm_eval, chat, data, plus
from bench.tasks.library_task import LibraryTask
from bench.tasks.task import Progress, Score


class HumanEval(LibraryTask):
    """lm-eval's humaneval, with the sanitised and the evalplus verdicts beside it."""

    name = "humaneval"
    shots = 0
    max_new_tokens = 512
    headline = "pass@1,create_test"

    def row_id(self, position: int, row: Mapping[str, Any]) -> str:
        return row["task_id"]

    def instruction(self, row: Mapping[str, Any]) -> str:
        return chat.COMPLETE.format(prompt=row["prompt"])

    def completion(self, id: str, text: str) -> str:
        # lm-eval puts the prompt in front: a whole function after it simply replaces the empty one.
        return chat.first_block(text) if self.style == "chat" else super().completion(id, text)

    def score(
        self, texts: Mapping[str, str], *, progress: Progress | None = None
    ) -> list[Score]:
        """As for every task, then sanitised, then evalplus when the HumanEval+ file is there."""
        scores = super().score(texts, progress=progress)
        rows = self._rows_of(texts)
        if progress is not None:
            progress(f"humaneval: sanitise and grade {len(rows)} texts")
        programs = {id: self._program(id, row, texts[id]) for id, row in rows.items()}
        passed = {
            id: float(
                _lm_eval.CODE_EVAL.passes(
                    programs[id], f"{row['test']}\ncheck({row['entry_point']})"
                )
            )
            for id, row in rows.items()
        }
        harness = f"{_lm_eval.version()} + {plus.version()} sanitiser"
        scores.append(self.scored(self.headline, passed, variant="sanitised", harness=harness))
        file = data.evalplus_file("humaneval", self.data_dir)
        if file is None:
            plus.say_missing("humaneval", progress)
            return scores
        verdicts = plus.verdicts("humaneval", programs, file, progress)
        for variant, repaired in (("sanitised", False), ("repaired", True)):
            for metric, values in plus.columns("evalplus", verdicts, repaired=repaired).items():
                scores.append(
                    self.scored(metric, values, variant=variant, harness=plus.version())
                )
        return scores

    def _program(self, id: str, row: Mapping[str, Any], text: str) -> str:
        """The whole program, sanitised."""
        code, define = self.completion(id, text), f"def {row['entry_point']}"
        prompt = row["prompt"]
        if self.style == "chat" and define in code:
            # The sanitiser keeps the first of two equal names, which would be the empty one.
            prompt = prompt[: prompt.index(define)]
        return plus.sanitised(prompt, code, row["entry_point"])
