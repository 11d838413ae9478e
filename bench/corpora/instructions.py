"""Code instructions as pairs: the clean rows of MBPP, and the Python rows of GPTeacher.

GPTeacher's repository is MIT, but its answers were written by GPT-4 and OpenAI's terms of use may
bind whoever trains on them: a recipe takes it by name, never by default.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.corpora.hygiene import MBPP_FILE, mbpp_clean_ids
from bench.corpora.pairs import Pair
from bench.tasks import data
from bench.tasks.chat import FENCE, tests_of
from tidar_ref.errors import UserError

MBPP_SOURCE, GPTEACHER_SOURCE = "mbpp-clean", "gpteacher-python"
GPTEACHER_FILE = "gpteacher_codegen/codegen-instruct.json.gz"
GPTEACHER_SHA256 = "7857d0abecf8a8b799c7de453be1f7885fd36364aef043274debab0783cbfa60"

# The item of MBPP's three-shot prompt, as lm-eval's task writes it for the question itself.
MBPP_ITEM = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
)
MBPP_END = "\n[DONE]"

# What makes a parsed answer a program: plain words parse as names, numbers as expressions.
PROGRAM = (
    ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.For, ast.While, ast.Assign,
)  # fmt: skip


def mbpp_pairs(data_dir: Path | None = None) -> list[Pair]:
    """The 317 MBPP rows of train and validation outside MBPP+, by id.

    Prompt: one item of the three-shot prompt, without the shots; response: the code and [DONE],
    which ends an item there. Not filtered: near-copies of test problems are among them.
    UserError: files missing or not the official ones.
    """
    ids = set(mbpp_clean_ids(data_dir))
    folder = data.data_folder(data_dir)
    assert folder is not None  # mbpp_clean_ids has read it
    rows = [row for row in data.read_jsonl(folder / MBPP_FILE) if row["task_id"] in ids]
    return [
        Pair(
            source=MBPP_SOURCE,
            id=f"{MBPP_SOURCE}/{row['task_id']}",
            prompt=MBPP_ITEM.format(text=row["text"], tests=tests_of(row)),
            response=_clean(row["code"]) + MBPP_END,
        )
        for row in sorted(rows, key=lambda row: row["task_id"])
    ]


def gpteacher_pairs(data_dir: Path | None = None) -> list[Pair]:
    """GPTeacher's rows whose answer is a Python program; id: the place in the file, from 0.

    Prompt: instruction, input when there is one, newline; response: the code without its fence.
    Not filtered. UserError: the file is missing or not the one that was examined.
    """
    folder = data.data_folder(data_dir)
    if folder is None or not (folder / GPTEACHER_FILE).is_file():
        raise UserError(
            f"{GPTEACHER_FILE} is not in a data folder: name one with --data-dir or "
            f"TIDAR_BENCH_DATA, or leave {GPTEACHER_SOURCE} out of the recipe"
        )
    packed = (folder / GPTEACHER_FILE).read_bytes()
    got = hashlib.sha256(packed).hexdigest()
    if got != GPTEACHER_SHA256:
        raise UserError(
            f"{GPTEACHER_FILE} has sha256 {got}, not {GPTEACHER_SHA256}: fetch it again"
        )
    rows = json.loads(gzip.decompress(packed))
    return [pair for place, row in enumerate(rows) if (pair := _gpteacher(place, row)) is not None]


def is_program(text: str) -> bool:
    """Whether a text parses as Python and does something: defines, imports, assigns or loops."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about the text, such as a stray "\d"
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # ValueError: NUL bytes
        return False
    return any(isinstance(node, PROGRAM) for node in tree.body)


def _gpteacher(place: int, row: Mapping[str, Any]) -> Pair | None:
    fenced = FENCE.search(row["response"])
    code = _clean(fenced.group(1) if fenced else row["response"])
    if not is_program(code):
        return None
    asked = [part for part in (_clean(row["instruction"]), _clean(row["input"])) if part]
    return Pair(
        source=GPTEACHER_SOURCE,
        id=f"{GPTEACHER_SOURCE}/{place}",
        prompt="\n".join(asked) + "\n",
        response=code,
    )


def _clean(text: str) -> str:
    """Line ends as \\n, no blanks at the ends of lines or of the text; indentation kept."""
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(lines).strip("\n")
