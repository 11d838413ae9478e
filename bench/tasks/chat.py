"""Prompts and extraction for instruction-tuned models: our own wording, never mixed with base runs.

Every score of a chat run has ",chat" at the end of its metric name. The instruction stands in one
user turn that goes through the tokenizer's own template; there are no shots and no stop strings
(the turn ends with end-of-sequence). Code is what stands in the first fenced block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from tidar_ref.errors import UserError

STYLES = ("base", "chat")
METRIC_SUFFIX = ",chat"
HARNESS_SUFFIX = ", own chat prompt"

COMPLETE = (
    "Complete this Python function. Answer with the whole function, imports included, "
    "in one ```python block.\n\n```python\n{prompt}```"
)
WRITE = (
    "Write Python code for this task: {text}\nIt has to pass these tests:\n{tests}\n"
    "Answer with the code in one ```python block."
)
SOLVE = (
    "{question}\nThink step by step. End with a sentence of this form, where N is the number: "
    "The answer is N."
)

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class ChatTokenizer(Protocol):
    """The part of a tokenizer that chat prompts need."""

    has_chat_template: bool

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt for these turns, open for the assistant's answer."""
        ...


def check_style(style: str, tokenizer: ChatTokenizer | None) -> None:
    """UserError unless `style` exists and, for chat, the tokenizer has a template."""
    if style not in STYLES:
        raise UserError(f"unknown prompt style {style!r}: use one of {', '.join(STYLES)}")
    if style == "chat" and (tokenizer is None or not tokenizer.has_chat_template):
        raise UserError("style 'chat' needs a tokenizer with a chat template: use style 'base'")


def ask(tokenizer: ChatTokenizer, instruction: str) -> str:
    """One user turn through the tokenizer's template."""
    return tokenizer.chat([{"role": "user", "content": instruction}])


def tests_of(row: Mapping[str, Any]) -> str:
    """The three asserts that lm-eval's MBPP prompt shows, one a line."""
    return "\n".join(row["test_list"][:3])


def first_block(text: str) -> str:
    """Code of the first fenced block (to the end when not closed); without one, the text."""
    match = FENCE.search(text)
    return match.group(1) if match else text
