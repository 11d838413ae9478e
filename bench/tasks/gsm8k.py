"""GSM8K as lm-eval's gsm8k_cot: eight fixed shots, strict-match, then flexible-extract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.tasks import chat
from bench.tasks.library_task import LibraryTask


class Gsm8kCot(LibraryTask):
    """1319 school problems. strict-match wants "The answer is N." with its final dot."""

    name = "gsm8k_cot"
    shots = 8
    max_new_tokens = 256
    headline = "exact_match,strict-match"

    def row_id(self, position: int, row: Mapping[str, Any]) -> str:
        return f"gsm8k/{position}"  # the data set numbers nothing: place in the test file, from 0

    def instruction(self, row: Mapping[str, Any]) -> str:
        return chat.SOLVE.format(question=row["question"])
