"""The records builders of training text make: a prompt with its response, or a plain document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
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


@dataclass(frozen=True, kw_only=True)
class Document:
    """One plain text; the loss sees all of it. licence: an SPDX identifier or expression."""

    source: str
    id: str
    text: str
    licence: str


def pairs_sha256(pairs: Iterable[Pair]) -> str:
    """Digest of ids, prompts and responses in their order: which data a model was trained on."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.id, pair.prompt, pair.response]).encode() + b"\n")
    return digest.hexdigest()
