"""Scores from evalplus for the tasks that have them: HumanEval(+) and MBPP(+)."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.tasks import data
from bench.tasks.task import Progress

LOG = logging.getLogger(__name__)


def version() -> str:
    """As records name it: "evalplus 0.3.1"."""
    return f"evalplus {importlib.metadata.version('evalplus')}"


def say_missing(dataset: str, progress: Progress | None) -> None:
    """Tell that evalplus' columns stay empty, and which file would fill them."""
    line = f"no evalplus scores: {data.EVALPLUS_FILES[dataset]} is not in a data folder"
    LOG.warning(line)
    if progress is not None:
        progress(line)


def sanitised(prompt: str, completion: str, entry_point: str) -> str:
    """evalplus' sanitiser on prompt + completion: a whole program."""
    from bench.tasks._evalplus import sanitise

    return sanitise(prompt, completion, entry_point)


def entry_points(file: Path) -> dict[str, str]:
    """Function name per problem id of an evalplus data file."""
    return {row["task_id"]: row["entry_point"] for row in data.read_jsonl(file)}


def verdicts(
    dataset: str, programs: Mapping[str, str], file: Path, progress: Progress | None
) -> dict[str, Any]:
    """evalplus' verdict per problem id, from its own process in a folder that is removed."""
    from bench.tasks._evalplus import evalplus_scores

    if progress is not None:
        progress(f"{dataset}: evalplus grades {len(programs)} programs")
    with tempfile.TemporaryDirectory(prefix="tidar-bench-evalplus-") as folder:
        found = evalplus_scores(
            dataset, programs, data_file=file, work_dir=Path(folder), progress=progress
        )
    missing = [id for id in programs if id not in found]
    if missing:
        raise RuntimeError(f"evalplus gave no verdict for {missing[0]} ({len(missing)} in all)")
    return found


def columns(
    prefix: str, found: Mapping[str, Any], *, repaired: bool
) -> dict[str, dict[str, float]]:
    """{prefix_base, prefix_plus} per problem, with HumanEval/32 as released or as repaired."""
    tail = "_repaired" if repaired else ""
    return {
        f"{prefix}_{part}": {id: float(getattr(v, part + tail)) for id, v in found.items()}
        for part in ("base", "plus")
    }
