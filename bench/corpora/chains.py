"""GSM8K's training answers reduced to their equations: `<<48/2=24>><<48+24=72>>#### 72`.

The data set marks each calculation with <<expression=result>> inside prose. Without the prose an
answer is some 30 tokens, and what is left can be checked by machine.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from bench.corpora.pairs import Pair
from bench.tasks.data import read_jsonl
from tidar_ref.errors import UserError

SOURCE = "gsm8k-train"
SPLITS = ("train", "dev")
DEV_ROWS = 200  # the last usable ones: never trained on

NUMBER = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
MARK = re.compile(rf"<<([-+*/().0-9]+=({NUMBER}))>>")
FINAL = re.compile(r"^#### *(-?[0-9][0-9,]*(?:\.[0-9]+)?) *$", re.MULTILINE)
ANSWER = re.compile(r"####[ \t]*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*")


def chain_of(answer: str) -> str | None:
    """The equation marks of a GSM8K answer and its final number, without commas; no prose.

    None when there is no mark, any mark is malformed, or there is not one final number. The last
    mark need not give the final number: 377 training answers do their last step in prose.
    """
    marks = MARK.findall(answer)
    finals = FINAL.findall(answer)
    if not marks or answer.count("<<") != len(marks) or answer.count(">>") != len(marks):
        return None
    if len(finals) != 1:
        return None
    return "".join(f"<<{mark}>>" for mark, _ in marks) + f"#### {finals[0].replace(',', '')}"


def chain_answer(text: str) -> Decimal | None:
    """The number after the one #### of a text that ends there; None for every other text.

    What stands in front is not judged. A text that runs on after its number has not answered.
    """
    found = ANSWER.fullmatch(text, text.find("####")) if text.count("####") == 1 else None
    return Decimal(found.group(1).replace(",", "")) if found else None


def gsm8k_chains(path: Path, *, split: str = "train") -> list[Pair]:
    """Questions of GSM8K's train.jsonl with their chains; prompt is the question and a newline.

    An id ends in the place in the file, from 0. Rows without a chain are left out. split "dev": the
    last 200 of the others; "train": all before. UserError: unknown split, no file, malformed row.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {SOURCE}: use {' or '.join(SPLITS)}")
    if not path.is_file():
        raise UserError(f"{path.name} is missing: put GSM8K's train.jsonl into the data folder")
    pairs = []
    for place, row in enumerate(read_jsonl(path)):
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            raise UserError(f"{path.name} row {place} lacks question or answer; fetch it again")
        if (chain := chain_of(row["answer"])) is not None:
            pairs.append(
                Pair(
                    source=SOURCE,
                    id=f"{SOURCE}/{place}",
                    prompt=row["question"] + "\n",
                    response=chain,
                )
            )
    if len(pairs) <= DEV_ROWS:
        raise UserError(f"{path.name} has {len(pairs)} usable rows: use GSM8K's whole train.jsonl")
    return pairs[-DEV_ROWS:] if split == "dev" else pairs[:-DEV_ROWS]
