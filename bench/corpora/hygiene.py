"""Keeps the test sets out of training text, and says what was compared with what.

A text goes when it shares a run of RUN words with a problem of a reference: words in lower case,
numbers included, punctuation and layout ignored. Against code references it also goes when it
shares a run of RUN code tokens (names, numbers, single signs), which finds a solution whose prose
was taken off. Ten is strict: idioms of Python go too. Losing good text is cheaper than a leak; who
wants another trade gives `code_run`, and the report says so.

What is not on this machine cannot be compared: the report names it as not checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.corpora.pairs import Document, Pair
from bench.tasks import data
from bench.tasks.own_problems import FOLDER
from tidar_ref.errors import UserError

LOG = logging.getLogger(__name__)

RUN = 10

WORD = re.compile(r"[a-z0-9]+")
TOKEN = re.compile(r"[A-Za-z_]\w*|[0-9]+|[^\w\s]")

HUMANEVAL, GSM8K = "humaneval", "gsm8k-test"
MBPP, MBPP_PLUS = "mbpp 1-510", "mbpp_plus"
MBPP_FILE, SANITIZED_FILE = "mbpp/mbpp.jsonl", "mbpp/sanitized-mbpp.json"
PLUS_FILE = "mbpp_plus/MbppPlus-v0.2.0.jsonl.gz"
MBPP_FILES: dict[str, tuple[str, ...]] = {
    MBPP: (MBPP_FILE,),
    MBPP_PLUS: (PLUS_FILE, SANITIZED_FILE, MBPP_FILE),
}
LAST_TEST_ID = 510


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A test set: texts per problem, all of which training text must not repeat."""

    name: str
    sha256: str
    problems: Mapping[str, tuple[str, ...]]
    code: bool


@dataclass(frozen=True, kw_only=True)
class References:
    """The test sets found here, and those that were not, with the reason."""

    found: tuple[Reference, ...]
    not_checked: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One text that went: the problem it repeats, and whether by "words" or "code"."""

    id: str
    source: str
    reference: str
    problem: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class HygieneReport:
    """What was compared and what went. kept: texts per source; code_run: code tokens in a run."""

    code_run: int
    checked: Mapping[str, Mapping[str, Any]]
    not_checked: Mapping[str, str]
    kept: Mapping[str, int]
    removed: tuple[Removal, ...]

    def as_json(self) -> dict[str, Any]:
        """For the model card: counts by source and reason, and the ids that went."""
        reasons: dict[str, Counter[str]] = {source: Counter() for source in self.kept}
        for removal in self.removed:
            reasons[removal.source][f"{removal.kind}: {removal.reference}"] += 1
        return {
            "run_words": RUN,
            "run_code_tokens": self.code_run,
            "checked": {name: dict(entry) for name, entry in self.checked.items()},
            "not_checked": dict(self.not_checked),
            "sources": {
                source: {
                    "kept": kept,
                    "removed": reasons[source].total(),
                    "reasons": dict(sorted(reasons[source].items())),
                }
                for source, kept in sorted(self.kept.items())
            },
            "removed": [
                {"id": r.id, "kind": r.kind, "reference": r.reference, "problem": r.problem}
                for r in self.removed
            ],
        }


class Filter:
    """Runs of all references, to hold any number of texts against."""

    def __init__(self, known: References, *, code_run: int = RUN) -> None:
        if code_run < 2:
            raise UserError(f"code_run {code_run} must be 2 or more: {RUN} is the strict filter")
        self.known, self.code_run = known, code_run
        self._words: dict[tuple[str, ...], tuple[str, str]] = {}
        self._code: dict[tuple[str, ...], tuple[str, str]] = {}
        for reference in known.found:
            for problem, texts in reference.problems.items():
                place = (reference.name, problem)
                for text in texts:
                    for run in word_runs(text):
                        self._words.setdefault(run, place)
                    for run in code_runs(text, code_run) if reference.code else ():
                        self._code.setdefault(run, place)

    def repeated(self, text: str) -> tuple[str, str, str] | None:
        """(kind, reference, problem) of the first run that `text` shares, or None."""
        for kind, runs, known in (
            ("words", word_runs(text), self._words),
            ("code", code_runs(text, self.code_run), self._code),
        ):
            for run in runs:
                if (place := known.get(run)) is not None:
                    return kind, *place
        return None

    def pairs(self, pairs: Sequence[Pair]) -> tuple[list[Pair], HygieneReport]:
        """The pairs that repeat nothing, in order, and the report."""
        return self._kept([(pair, f"{pair.prompt}\n{pair.response}") for pair in pairs])

    def documents(
        self, documents: Sequence[Document]
    ) -> tuple[list[Document], HygieneReport]:
        """As `pairs`, for plain texts; a document goes as a whole."""
        return self._kept([(document, document.text) for document in documents])

    def _kept(self, items: list[tuple[Any, str]]) -> tuple[list[Any], HygieneReport]:
        kept: list[Any] = []
        counts = dict.fromkeys((item.source for item, _ in items), 0)
        removed = []
        for item, text in items:
            if (found := self.repeated(text)) is None:
                kept.append(item)
                counts[item.source] += 1
                continue
            kind, reference, problem = found
            removed.append(
                Removal(
                    id=item.id, source=item.source, kind=kind, reference=reference, problem=problem
                )
            )
        report = HygieneReport(
            code_run=self.code_run,
            checked={
                reference.name: {"sha256": reference.sha256, "problems": len(reference.problems)}
                for reference in self.known.found
            },
            not_checked=self.known.not_checked,
            kept=counts,
            removed=tuple(removed),
        )
        return kept, report


def filter_pairs(
    pairs: Sequence[Pair], known: References
) -> tuple[list[Pair], HygieneReport]:
    """The pairs that repeat no reference, and what was compared and removed."""
    return Filter(known).pairs(pairs)


def word_runs(text: str) -> Iterator[tuple[str, ...]]:
    """All runs of RUN words of a text; none when it has fewer."""
    return _runs(WORD.findall(text.lower()), RUN)


def code_runs(text: str, length: int = RUN) -> Iterator[tuple[str, ...]]:
    """All runs of `length` code tokens of a text: names, numbers, single signs; case kept."""
    return _runs(TOKEN.findall(text), length)


def _runs(parts: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(parts[start:] for start in range(length)), strict=False)


def references(data_dir: Path | None = None) -> References:
    """Every expected test set that this machine has.

    HumanEval and GSM8K come from wherever the tasks would read them, MBPP and MBPP+ from the data
    folder only (the hub's test split lacks the prompt rows). A set that is not here gets an entry
    in not_checked. UserError: a file that is not the official one, no such data folder.
    """
    folder = data.data_folder(data_dir)
    found = [_own("code.jsonl"), _own("math.jsonl")]
    missing: dict[str, str] = {}
    for name, task, of_row in (
        (HUMANEVAL, "humaneval", _humaneval_row),
        (GSM8K, "gsm8k_cot", _gsm8k_row),
    ):
        there = data.locate(task, data_dir)
        if there is None:
            missing[name] = f"{data.FILES[task][0]} is neither in a data folder nor on the hub"
            continue
        problems = dict(of_row(place, row) for place, row in enumerate(there.read()))
        found.append(
            Reference(
                name=name, sha256=there.source.sha256, problems=problems, code=name == HUMANEVAL
            )
        )
    for name, read in ((MBPP, _mbpp), (MBPP_PLUS, _mbpp_plus)):
        lacking = [file for file in MBPP_FILES[name] if not _is_there(folder, file)]
        if folder is None or lacking:
            missing[name] = f"no data folder has {' and '.join(lacking)}"
            continue
        digests = [data.verify(folder, file) for file in MBPP_FILES[name]]
        digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        found.append(
            Reference(
                name=name,
                sha256=digests[0] if len(digests) == 1 else digest,
                problems=read(folder),
                code=True,
            )
        )
    for name, reason in missing.items():
        LOG.warning("hygiene: %s not checked: %s", name, reason)
    return References(found=tuple(found), not_checked=missing)


def mbpp_clean_ids(data_dir: Path | None = None) -> tuple[int, ...]:
    """The ids of MBPP's train and validation splits (511 to 974) that MBPP+ does not use: 317.

    UserError: MBPP or MBPP+ is not in the data folder, or is not the official file.
    """
    folder = data.data_folder(data_dir)
    files = (MBPP_FILE, PLUS_FILE)
    lacking = [file for file in files if not _is_there(folder, file)]
    if folder is None or lacking:
        raise UserError(
            f"the clean rows of MBPP cannot be told without {' and '.join(lacking)}: name a folder "
            "that has them with --data-dir or TIDAR_BENCH_DATA"
        )
    for file in files:
        data.verify(folder, file)
    plus = _plus_ids(data.read_jsonl(folder / PLUS_FILE))
    ids = {row["task_id"] for row in data.read_jsonl(folder / MBPP_FILE)}
    return tuple(sorted(id for id in ids - plus if id > LAST_TEST_ID))


def _is_there(folder: Path | None, file: str) -> bool:
    return folder is not None and (folder / file).is_file()


def _own(file: str) -> Reference:
    """Our own problems: they stand in for the public sets where those are missing."""
    code = file == "code.jsonl"
    problems = {}
    for row in data.read_jsonl(FOLDER / file):
        problems[row["id"]] = (
            (row["prompt"] + row["canonical_solution"],)
            if code
            else (row["question"], row["solution"])
        )
    digest = hashlib.sha256((FOLDER / file).read_bytes()).hexdigest()
    name = "own_code" if code else "own_math"
    return Reference(name=name, sha256=digest, problems=problems, code=code)


def _humaneval_row(place: int, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return row["task_id"], (row["prompt"] + row["canonical_solution"],)


def _gsm8k_row(place: int, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return f"gsm8k/{place}", (row["question"], row["answer"])


def _mbpp_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a row of MBPP or of its sanitized part, which calls the text "prompt"."""
    text = row["text"] if "text" in row else row["prompt"]
    return text, row["code"], *row["test_list"], *row.get("challenge_test_list", ())


def _mbpp(folder: Path) -> dict[str, tuple[str, ...]]:
    """The few-shot rows (1 to 10) and the test split (11 to 510)."""
    rows = data.read_jsonl(folder / MBPP_FILE)
    return {f"Mbpp/{r['task_id']}": _mbpp_texts(r) for r in rows if r["task_id"] <= LAST_TEST_ID}


def _mbpp_plus(folder: Path) -> dict[str, tuple[str, ...]]:
    """The 378 tasks in all three wordings: MBPP+'s own, sanitized MBPP's and MBPP's."""
    plus = data.read_jsonl(folder / PLUS_FILE)
    problems = {row["task_id"]: (row["prompt"] + row["canonical_solution"],) for row in plus}
    sanitized = json.loads((folder / SANITIZED_FILE).read_text("utf-8"))
    for row in (*data.read_jsonl(folder / MBPP_FILE), *sanitized):
        if (id := f"Mbpp/{row['task_id']}") in problems:
            problems[id] += _mbpp_texts(row)
    return problems


def _plus_ids(rows: list[dict[str, Any]]) -> set[int]:
    return {int(row["task_id"].removeprefix("Mbpp/")) for row in rows}
