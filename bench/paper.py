"""The paper's own numbers (arXiv 2511.08923), read from results/paper/*.csv: one row, one cell.

The files hold what the paper prints or draws; nothing is measured here. `reading` tells: "printed"
cells are exact to the digit; "figure" cells were measured off a vector figure (about 0.1 of a score
point, about 0.01 of a ratio). `note` names every inference made in reading a cell.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tidar_ref.errors import UserError

PAPER_DIR = Path(__file__).resolve().parents[1] / "results" / "paper"
# First file wins in paper_value: a printed cell before the same run's drawn one.
FILES = ("table2.csv", "table4.csv", "table5.csv", "figure4.csv")
COLUMNS = (
    "source", "page", "system", "size", "task", "metric", "value", "unit", "t_per_nfe", "reading",
    "note",
)  # fmt: skip
# The paper's two headline systems, under the names the files use.
TIDAR_1P5B = "TiDAR 1.5B K=16"
TIDAR_8B = "TiDAR 8B Trust Diff"


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """One number of the paper and where it stands.

    `value` is in `unit`: "%" for scores, "x" for speedups over the same-size AR baseline,
    "tokens/forward" for T/NFE. `t_per_nfe` is the tokens per forward given beside the value, if
    any. `page` is empty where it is not known. `metric` is "score", "speedup" or "t_per_nfe".
    """

    source: str
    page: str
    system: str
    size: str
    task: str
    metric: str
    value: float
    unit: str
    t_per_nfe: float | None
    reading: str
    note: str


def _cell(row: dict[str, str], where: str) -> PaperCell:
    if None in row or None in row.values():
        raise UserError(f"{where}: expected {len(COLUMNS)} columns; restore the file with git")
    try:
        value = float(row["value"])
        t_per_nfe = float(row["t_per_nfe"]) if row["t_per_nfe"] else None
    except ValueError as error:
        raise UserError(f"{where}: {error}; restore the file with git") from error
    return PaperCell(**{**row, "value": value, "t_per_nfe": t_per_nfe})


def load_file(path: Path) -> list[PaperCell]:
    """All cells of one CSV file, in order. UserError names a missing file or the bad line."""
    if not path.is_file():
        raise UserError(
            f"the paper's numbers are not at {path}: results/ lies beside the packages in a clone, "
            "so install with `pip install -e .` from a clone or run from one"
        )
    with path.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path.name} has columns {reader.fieldnames}; restore it with git")
        return [_cell(row, f"{path.name} line {reader.line_num}") for row in reader]


@cache
def load_cells(folder: Path = PAPER_DIR) -> tuple[PaperCell, ...]:
    """Every cell of every file in `FILES`, printed tables first."""
    return tuple(cell for name in FILES for cell in load_file(folder / name))


@cache
def _index(folder: Path) -> dict[tuple[str, str, str], PaperCell]:
    index: dict[tuple[str, str, str], PaperCell] = {}
    for cell in load_cells(folder):
        index.setdefault((cell.task, cell.metric, cell.system), cell)
        if cell.t_per_nfe is not None:
            beside = {**cell.__dict__, "metric": "t_per_nfe", "unit": "tokens/forward"}
            beside["value"] = cell.t_per_nfe
            index.setdefault((cell.task, "t_per_nfe", cell.system), PaperCell(**beside))
    return index


def systems() -> tuple[str, ...]:
    """Names `paper_value` knows, in file order."""
    return tuple(dict.fromkeys(cell.system for cell in load_cells()))


def paper_value(
    task: str, metric: str, system: str, *, folder: Path = PAPER_DIR
) -> PaperCell | None:
    """The paper's cell for a task ("humaneval", ...), metric ("score", "t_per_nfe", "speedup") and
    system (one of `systems()`); None where the paper has no such cell.

    Our "mbpp_plus" is lm-eval's task, as in the paper; evalplus' MBPP+ has no counterpart there.
    Figure 4's K=4 and K=8 points are other training runs than Tables 4 and 5, hence other systems.
    """
    return _index(folder).get((task, metric, system))
