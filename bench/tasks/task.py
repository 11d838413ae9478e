"""What a task is to the harness: problems to generate for, and scores for the texts that came out.

The harness asks `problems()`, generates, and hands the texts back to `score()`. How prompts are
built and texts are graded is the business of the task's own file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

Progress = Callable[[str], None]
"""Receives one short line per stage of a long scoring run."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One prompt. `id` is unique in its task; `stop` excludes end-of-sequence tokens."""

    task: str
    id: str
    prompt: str
    stop: tuple[str, ...]
    max_new_tokens: int
    prompt_sha: str


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the problems came from; `path` is relative to its kind, never a machine's own path."""

    kind: str  # "data-dir" | "hub" | "package" | "own"
    path: str
    sha256: str
    checked: bool  # True when sha256 was compared with a value pinned in data.py


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric over the texts it was given; `metric` is the name the library prints."""

    task: str
    metric: str
    variant: str  # "raw" | "sanitised" | "repaired"
    harness: str
    per_problem: Mapping[str, float]
    headline: bool

    @property
    def value(self) -> float:
        """Mean over the problems, a fraction from 0 to 1."""
        return sum(self.per_problem.values()) / len(self.per_problem)


class Task(Protocol):
    """A named set of problems with its graders."""

    name: str
    shots: int
    source: DataSource
    ours: bool

    def problems(self, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems in the data set's order (all when None)."""
        ...

    def score(
        self, texts: Mapping[str, str], *, progress: Progress | None = None
    ) -> list[Score]:
        """Grade generated texts, keyed by problem id; a subset of the problems will do."""
        ...


def prompt_sha(prompt: str) -> str:
    """First 16 hex digits of the sha256 of a prompt's UTF-8 bytes."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def all_prompts_sha(problems: list[Problem]) -> str:
    """First 16 hex digits of the sha256 of all prompts joined by NUL."""
    return prompt_sha("\0".join(problem.prompt for problem in problems))
