"""The record every builder of training examples makes: a prompt and the response to learn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One example; the loss sees the response only. Ends of sequence are the trainer's business.

    source names the builder ("gsm8k-train"); id is unique in its source ("gsm8k-train/17").
    """

    source: str
    id: str
    prompt: str
    response: str
