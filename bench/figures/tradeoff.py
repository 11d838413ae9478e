"""Figure 4: quality against decode speed relative to AR; numbers on points are T/NFE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.claims import PAPER_DIR, load_file
from bench.figures.ours import Ours, Spot
from bench.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    TASK_TITLES,
    finish,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {
    "Qwen2.5 1.5B": (BLACK, "*"),
    "Block Diff 1.5B": (ORANGE, "s"),
    "Block Diff 1.5B threshold 0.8": (PINK, "D"),
    "TiDAR 1.5B K=4 (Figure 4)": (SKY, "v"),
    "TiDAR 1.5B K=8 (Figure 4)": (BLUE, "^"),
    "TiDAR 1.5B K=16": (GREEN, "o"),
    "Qwen3 8B": (BLACK, "*"),
    "Qwen3 8B instruct": (ORANGE, "P"),
    "EAGLE-3 AngelSlim 8B": (PINK, "<"),
    "EAGLE-3 Tengyunw 8B": (RED, ">"),
    "TiDAR 8B Trust Diff": (GREEN, "o"),
}
AXES = ("tokens/s relative to AR", "score, %")
LACKS = "holds both a score and a speedup of these tasks"
LABEL_BELOW = {"Block Diff 1.5B threshold 0.8", "EAGLE-3 Tengyunw 8B", "TiDAR 1.5B K=8 (Figure 4)"}
# EAGLE-3 keeps the scores of the instruct model it runs on.
SCORE_OF = {
    "EAGLE-3 AngelSlim 8B": "Qwen3 8B instruct",
    "EAGLE-3 Tengyunw 8B": "Qwen3 8B instruct",
}


def spots(ours: Ours) -> list[Spot]:
    """Our points, task by task; every decoder stands beside the AR of its own record."""
    return [spot for task in TASK_TITLES for spot in ours.pairs(task, "speedup", "score")]


def draw(ours: Ours) -> Figure:
    """Two rows (1.5B and ours; 8B) of six panels: five tasks and their mean."""
    figure, axes = panels(2, 6, width=16, height=7.2)
    cells = {
        (claim.system, claim.task, claim.metric): claim.value
        for name in ("table2.csv", "figure4.csv")
        for claim in load_file(PAPER_DIR / name)
    }
    cells["Qwen2.5 1.5B", "average_5_tasks", "score"] = _mean_of_base(cells)
    mine = spots(ours)
    for column, task in enumerate(TASK_TITLES):
        for system, look in LOOKS.items():
            row = 1 if "8B" in system else 0
            _point(axes[row, column], cells, system, task, look)
        for spot in mine:
            if spot.panel == task:
                axes[0, column].plot(spot.x, spot.y, label=spot.name, **spot.look)
        for row, size in enumerate(("1.5B", "8B")):
            axis = axes[row, column]
            axis.set(title=f"{size}: {TASK_TITLES[task]}", xlabel=AXES[0])
            axis.margins(0.18)
            axis.set_xlim(left=0)
        axes[0, 0].set_ylabel(AXES[1])
        axes[1, 0].set_ylabel(AXES[1])
    notes = [
        "paper: one H100, batch 1; each point relative to the AR baseline of its own group "
        "(EAGLE-3: the instruct model); numbers on points: T/NFE; Qwen2.5 1.5B: Table 2"
    ]
    notes.append(
        "ours are other weights on another machine: compare shapes, not points."
        if mine
        else f"Paper only: no record given {LACKS}."
    )
    finish(figure, "Figure 4: quality against relative decode speed", notes, list(axes.flat), 4)
    return figure


def _mean_of_base(cells: dict[tuple[str, str, str], float]) -> float:
    tasks = [task for task in TASK_TITLES if task != "average_5_tasks"]
    return sum(cells["Qwen2.5 1.5B", task, "score"] for task in tasks) / len(tasks)


def _point(
    axis: Axes,
    cells: dict[tuple[str, str, str], float],
    system: str,
    task: str,
    look: tuple[str, str],
) -> None:
    score = cells[SCORE_OF.get(system, system), task, "score"]
    speed = cells.get((system, task, "speedup"), 1.0)  # a group's baseline is 1 by definition
    color, marker = look
    axis.plot(speed, score, marker=marker, color=color, markeredgecolor=BLACK, linestyle="none",
              markersize=11 if marker == "*" else 7, label=system)  # fmt: skip
    tokens = cells.get((system, task, "t_per_nfe"))
    if tokens is not None:
        offset = -13 if system in LABEL_BELOW else 7
        axis.annotate(f"{tokens:.2f}", (speed, score), textcoords="offset points",
                      xytext=(0, offset), ha="center", fontsize=7)  # fmt: skip
