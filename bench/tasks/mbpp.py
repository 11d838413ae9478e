"""MBPP (500 test problems) and lm-eval's mbpp_plus (378), three shots each.

lm-eval's `mbpp_plus` runs only the three asserts that its prompt shows: it is a base-test score on
other problems. The real MBPP+ verdicts of evalplus on the same texts are separate scores,
`evalplus_mbpp_base` and `evalplus_mbpp_plus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.tasks import chat, data, plus
from bench.tasks.library_task import LibraryTask
from bench.tasks.task import Progress, Score


class Mbpp(LibraryTask):
    """lm-eval's mbpp. Nobody can pass Mbpp/367: lm-eval ignores the set-up code it needs."""

    name = "mbpp"
    shots = 3
    max_new_tokens = 512
    headline = "pass_at_1,none"

    def row_id(self, position: int, row: Mapping[str, Any]) -> str:
        return f"Mbpp/{row['task_id']}"

    def instruction(self, row: Mapping[str, Any]) -> str:
        text = row["prompt"] if "prompt" in row else row["text"]
        return chat.WRITE.format(text=text, tests=chat.tests_of(row))

    def completion(self, id: str, text: str) -> str:
        return chat.first_block(text) if self.style == "chat" else super().completion(id, text)


class MbppPlus(Mbpp):
    """lm-eval's mbpp_plus, and MBPP / MBPP+ as evalplus grades them when its file is there."""

    name = "mbpp_plus"

    def score(
        self, texts: Mapping[str, str], *, progress: Progress | None = None
    ) -> list[Score]:
        """As for every task, then evalplus on the sanitised programs."""
        scores = super().score(texts, progress=progress)
        file = data.evalplus_file("mbpp", self.data_dir)
        if file is None:
            plus.say_missing("mbpp", progress)
            return scores
        entry_points = plus.entry_points(file)
        programs = {
            id: plus.sanitised("", self.completion(id, texts[id]), entry_points[id])
            for id in self._rows_of(texts)
        }
        verdicts = plus.verdicts("mbpp", programs, file, progress)
        for metric, values in plus.columns("evalplus_mbpp", verdicts, repaired=False).items():
            scores.append(
                self.scored(metric, values, variant="sanitised", harness=plus.version())
            )
        return scores
