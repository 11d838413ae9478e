"""Stop strings: when to end a generation, and which text it stands for.

lm-eval's rule: the answer ends before the earliest stop string, searched in the new text only.
Two traps are handled here. Decoding new tokens alone loses the first blank with SentencePiece-like
tokenizers, so text is always decoded behind the prompt's last tokens. A byte-level token can end
inside a character, so text that ends in U+FFFD waits for the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

HALF = "\ufffd"
# A UTF-8 character has at most four bytes: after that, U+FFFD is what the model really wrote.
LONGEST_WAIT = 4
# Tokens decoded before each new one: blanks at the border depend on what stands in front.
BORDER = 8


class Decodes(Protocol):
    """The part of a tokenizer that is used here."""

    eos_token_ids: Sequence[int]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        ...


class StopSearch:
    """Counts how many generated tokens to keep; state of one sequence, decodes each token once."""

    def __init__(
        self, tokenizer: Decodes, prompt_ids: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._keep_chars = max((len(stop) for stop in self._stops), default=1) - 1
        self._context = list(prompt_ids[-BORDER:])  # decoded before: its text is already searched
        self._pending: list[int] = []  # tokens that end inside a character
        self._tail = ""
        self._seen = 0

    def __call__(self, token_ids: Sequence[int], new: int) -> int | None:
        """Tokens to keep of `token_ids` (all generated so far, of which the last `new` are new).

        The token that completes the earliest stop string is kept. None: nothing found yet.
        """
        if not self._stops:
            return None
        while self._seen < len(token_ids):
            token = token_ids[self._seen]
            self._seen += 1
            text = self._take(token)
            if not text:
                continue
            window = self._tail + text
            if any(stop in window for stop in self._stops):
                return self._seen
            self._tail = window[-self._keep_chars:] if self._keep_chars else ""
        return None

    def _take(self, token: int) -> str:
        """Text that `token` adds, "" while a character is incomplete."""
        self._pending.append(token)
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._pending)
        if after.endswith(HALF) and len(self._pending) < LONGEST_WAIT:
            return ""
        text = _new_text(before, after)
        self._context = (self._context + self._pending)[-BORDER:]
        self._pending = []
        return text


def make_stop(
    tokenizer: Decodes, prompt_ids: Sequence[int], stops: Sequence[str]
) -> Callable[[], StopSearch]:
    """A factory of fresh stop rules for one prompt, as `tidar_ref.decoding.generate` wants it."""
    return lambda: StopSearch(tokenizer, prompt_ids, stops)


def final_text(
    tokenizer: Decodes, prompt_ids: Sequence[int], token_ids: Sequence[int], stops: Sequence[str]
) -> str:
    """The text to score: new tokens up to end-of-sequence, cut before the earliest stop string.

    A character that the last token left incomplete is dropped. Nothing else is trimmed: a lost
    final dot turns a right GSM8K answer into a wrong one.
    """
    kept = list(token_ids)
    ends = [kept.index(eos) for eos in set(tokenizer.eos_token_ids) if eos in kept]
    if ends:
        kept = kept[: min(ends)]
    prompt = list(prompt_ids)
    text = _new_text(tokenizer.decode(prompt), tokenizer.decode(prompt + kept))
    return cut(text, stops).rstrip(HALF)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the earliest occurrence of any stop string."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _new_text(before: str, after: str) -> str:
    """What `after` adds to `before`; a border inside a character belongs to the new text."""
    if not after.startswith(before):
        before = before.rstrip(HALF)
    if not after.startswith(before):
        # Some decoders rewrite the border itself; the longest common start is what both agree on.
        same = 0
        while same < min(len(before), len(after)) and before[same] == after[same]:
            same += 1
        before = before[:same]
    return after[len(before):]
