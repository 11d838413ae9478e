"""Our own small problems (folder own/), for machines that have neither data files nor a hub.

Written for this project, so a score on them is comparable with nothing published. own_code is
asked like HumanEval (signature and docstring, no shots) and graded in the same sandbox; own_math
like gsm8k_cot, with four shots of our own, a strict and a flexible reading.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from bench.tasks import chat, data
from bench.tasks.stopping import cut
from bench.tasks.task import DataSource, Problem, Progress, Score, prompt_sha
from tidar_ref.errors import UserError

FOLDER = Path(__file__).parent / "own"
HARNESS = "tidar-bench"
PROGRAM_TIMEOUT_S = 3.0

CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # lm-eval's for HumanEval
MATH_STOPS = ("Q:",)

SHOTS: tuple[tuple[str, str], ...] = (
    (
        "A tram has 14 passengers. At the market 5 get off and 9 get on. How many are on it now?",
        "There were 14 passengers. After 5 got off there were 14 - 5 = 9. After 9 got on there "
        "were 9 + 9 = 18. The answer is 18.",
    ),
    (
        "Ines bakes 6 trays of 12 rolls and burns 7 rolls. How many good rolls does she have?",
        "She bakes 6 * 12 = 72 rolls. Without the burnt ones there are 72 - 7 = 65. "
        "The answer is 65.",
    ),
    (
        "A rope of 45 metres is cut into pieces of 5 metres. Each piece sells for 3 euros. "
        "How much do all pieces bring?",
        "There are 45 / 5 = 9 pieces. They bring 9 * 3 = 27 euros. The answer is 27.",
    ),
    (
        "Omar reads 20 pages on Monday and twice as many on Tuesday. His book has 100 pages. "
        "How many pages are left?",
        "On Tuesday he reads 2 * 20 = 40 pages. Together that is 20 + 40 = 60. "
        "So 100 - 60 = 40 pages are left. The answer is 40.",
    ),
)

NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
# The final dot must be there, as lm-eval's strict-match wants a character after the number.
STRICT = re.compile(rf"The answer is ({NUMBER.pattern})\.(?![0-9])")


class _Own:
    """What both own tasks share: rows out of a file of the package."""

    name: str
    shots: int
    file: str
    max_new_tokens: int
    needed: frozenset[str]
    stops: tuple[str, ...]
    ours = True

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        style: str = "base",
        tokenizer: chat.ChatTokenizer | None = None,
        folder: Path = FOLDER,
    ) -> None:
        del data_dir  # these problems come with the package
        chat.check_style(style, tokenizer)
        self.style, self.tokenizer = style, tokenizer
        if style == "chat":
            self.shots = 0
        path = folder / self.file
        if not path.is_file():
            raise UserError(f"own/{self.file} is missing from the installed package: reinstall it")
        self.source = DataSource(
            kind="own",
            path=f"bench/tasks/own/{self.file}",
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            checked=False,
        )
        self._rows: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(data.read_jsonl(path), start=1):
            missing = sorted(self.needed - row.keys())
            if missing or row["id"] in self._rows:
                fault = f"lacks {missing[0]!r}" if missing else f"repeats id {row['id']!r}"
                raise UserError(f"own/{self.file} row {number} {fault}: correct the file")
            self._rows[row["id"]] = row

    def base_prompt(self, row: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def instruction(self, row: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def grade(self, row: Mapping[str, Any], text: str) -> dict[str, float]:
        """Metric name to 0.0 or 1.0; the first one is the headline."""
        raise NotImplementedError

    def problems(self, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems (all when None)."""
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit} of task {self.name!r} must be 1 or more")
        return [self._problem(row) for row in list(self._rows.values())[:limit]]

    def score(
        self, texts: Mapping[str, str], *, progress: Progress | None = None
    ) -> list[Score]:
        """Grade the texts given; a subset will do."""
        unknown = [id for id in texts if id not in self._rows]
        if unknown or not texts:
            named = f"has no problem {unknown[0]!r}" if unknown else "was given no texts"
            raise UserError(f"task {self.name!r} {named}: score texts by the ids of problems()")
        if progress is not None:
            progress(f"{self.name}: grade {len(texts)} texts")
        values: dict[str, dict[str, float]] = {}
        for id, row in self._rows.items():
            if id in texts:
                for metric, value in self.grade(row, self._completion(texts[id])).items():
                    values.setdefault(metric, {})[id] = value
        suffix = chat.METRIC_SUFFIX if self.style == "chat" else ""
        return [
            Score(
                task=self.name,
                metric=metric + suffix,
                variant="raw",
                harness=HARNESS,
                per_problem=per_problem,
                headline=place == 0,
            )
            for place, (metric, per_problem) in enumerate(values.items())
        ]

    def _completion(self, text: str) -> str:
        return text if self.style == "chat" else cut(text, self.stops)

    def _problem(self, row: Mapping[str, Any]) -> Problem:
        prompt, stops = self.base_prompt(row), self.stops
        if self.style == "chat":
            prompt, stops = chat.ask(self.tokenizer, self.instruction(row)), ()
        return Problem(
            task=self.name,
            id=row["id"],
            prompt=prompt,
            stop=stops,
            max_new_tokens=self.max_new_tokens,
            prompt_sha=prompt_sha(prompt),
        )


class OwnCode(_Own):
    """Complete a function; right when its check() passes."""

    name = "own_code"
    shots = 0
    file = "code.jsonl"
    max_new_tokens = 512
    needed = frozenset({"id", "prompt", "entry_point", "canonical_solution", "test"})
    stops = CODE_STOPS

    def base_prompt(self, row: Mapping[str, Any]) -> str:
        return row["prompt"]

    def instruction(self, row: Mapping[str, Any]) -> str:
        return chat.COMPLETE.format(prompt=row["prompt"])

    def grade(self, row: Mapping[str, Any], text: str) -> dict[str, float]:
        from bench.sandbox import run_program

        code = chat.first_block(text) if self.style == "chat" else text
        program = f"{row['prompt']}{code}\n{row['test']}\ncheck({row['entry_point']})"
        return {"own_pass@1": float(run_program(program, timeout_s=PROGRAM_TIMEOUT_S).passed)}


class OwnMath(_Own):
    """Solve a word problem; strict wants "The answer is N.", flexible the last number."""

    name = "own_math"
    shots = 4
    file = "math.jsonl"
    max_new_tokens = 256
    needed = frozenset({"id", "question", "answer", "solution"})
    stops = MATH_STOPS

    def base_prompt(self, row: Mapping[str, Any]) -> str:
        shots = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in SHOTS)
        return f"{shots}Q: {row['question']}\nA:"

    def instruction(self, row: Mapping[str, Any]) -> str:
        return chat.SOLVE.format(question=row["question"])

    def grade(self, row: Mapping[str, Any], text: str) -> dict[str, float]:
        said = STRICT.search(text)
        numbers = NUMBER.findall(text)
        return {
            "own_exact_match,strict": _equal(said.group(1) if said else None, row["answer"]),
            "own_exact_match,flexible": _equal(numbers[-1] if numbers else None, row["answer"]),
        }


def _equal(got: str | None, expected: str) -> float:
    """1.0 when both are the same number ("1,200" is 1200, "3.0" is 3)."""
    if got is None:
        return 0.0
    try:
        return float(Decimal(got.replace(",", "").rstrip(".")) == Decimal(expected))
    except InvalidOperation:
        return 0.0
