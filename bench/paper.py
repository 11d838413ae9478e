"""One cell of the paper by task, metric and system: what the tables put beside our numbers.

The cells themselves are claims (bench/claims.py, results/paper/*.csv); this is only the look-up.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from bench.claims import PAPER_DIR, Claim, load_file

# First file wins: a printed cell before the same run's drawn one.
LOOKED_UP = ("table2.csv", "table3.csv", "table4.csv", "table5.csv", "figure4.csv")
# The paper's two headline systems, under the names the files use.
TIDAR_1P5B = "TiDAR 1.5B K=16"
TIDAR_8B = "TiDAR 8B Trust Diff"


@cache
def _index(folder: Path) -> dict[tuple[str, str, str], Claim]:
    index: dict[tuple[str, str, str], Claim] = {}
    for name in LOOKED_UP:
        for claim in load_file(folder / name):
            index.setdefault((claim.task, claim.metric, claim.system), claim)
    return index


def systems() -> tuple[str, ...]:
    """Names `paper_value` knows, in file order."""
    return tuple(dict.fromkeys(system for _, _, system in _index(PAPER_DIR)))


def paper_value(task: str, metric: str, system: str, *, folder: Path = PAPER_DIR) -> Claim | None:
    """The paper's cell for a task ("humaneval", ...), metric ("score", "t_per_nfe", "speedup") and
    system (one of `systems()`); None where the paper has no such cell.

    Our "mbpp_plus" is lm-eval's task, as in the paper; evalplus' MBPP+ has no counterpart there.
    Figure 4's K=4 and K=8 points are other training runs than Tables 4 and 5, hence other systems.
    """
    return _index(folder).get((task, metric, system))
