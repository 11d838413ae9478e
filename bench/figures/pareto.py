"""Figure 5: score against tokens per forward, everything trained with one recipe from one base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.claims import PAPER_DIR, Claim, load_file
from bench.figures.ours import Ours, Spot
from bench.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    TASK_TITLES,
    YELLOW,
    finish,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = ("tokens per forward (T/NFE)", "score, %")
LACKS = "holds both a score and T/NFE of these tasks"
SERIES = {
    "AR": (BLACK, "*", "none"),
    "AR, same recipe": (YELLOW, "P", "none"),
    "Block Diff, max and thresholds": (ORANGE, "s", "-"),
    "TiDAR, random masks (K=4, 8)": (PINK, "D", ":"),
    "TiDAR K=4": (SKY, "v", "none"),
    "TiDAR K=8": (BLUE, "^", "none"),
    "TiDAR K=16": (GREEN, "o", "none"),
}


def series_of(claim: Claim) -> str:
    """Which of the figure's series a claim of Figure 5 belongs to."""
    if claim.system == "Qwen2.5 1.5B":
        return "AR"
    if claim.decoder == "ar":
        return "AR, same recipe"
    if claim.decoder == "block_diffusion":
        return "Block Diff, max and thresholds"
    if claim.settings["masking"] == "random":
        return "TiDAR, random masks (K=4, 8)"
    return f"TiDAR K={claim.block_len}"


def spots(ours: Ours) -> list[Spot]:
    """Our points, task by task."""
    return [spot for task in TASK_TITLES for spot in ours.pairs(task, "t_per_nfe", "score")]


def draw(ours: Ours) -> Figure:
    """Six panels: five tasks and their mean."""
    figure, axes = panels(2, 3, width=12, height=8.4)
    claims = load_file(PAPER_DIR / "figure5.csv")
    tokens = {(c.system, c.task, c.setting): c.value for c in claims if c.metric == "t_per_nfe"}
    mine = spots(ours)
    for axis, task in zip(axes.flat, TASK_TITLES, strict=True):
        for name, (color, marker, line) in SERIES.items():
            points = [
                (tokens[claim.system, claim.task, claim.setting], claim.value)
                for claim in claims
                if (claim.task, claim.metric) == (task, "score") and series_of(claim) == name
            ]
            axis.plot(*zip(*points, strict=True), marker=marker, linestyle=line, color=color,
                      markeredgecolor=BLACK, markersize=11 if marker == "*" else 7,
                      label=name)  # fmt: skip
        for spot in mine:
            if spot.panel == task:
                axis.plot(spot.x, spot.y, label=spot.name, **spot.look)
        axis.set(title=TASK_TITLES[task], xlabel=AXES[0], ylabel=AXES[1])
        axis.margins(0.08)
    notes = ["paper: all from Qwen2.5 1.5B, read off its vector figure; three runs for each K "
             "(alpha 0.8, 1.0, 1.2: derived)"]  # fmt: skip
    notes.append(
        "ours are other weights."
        if mine
        else f"Paper only: no record given {LACKS}."
    )
    finish(figure, "Figure 5: score against tokens per forward", notes, list(axes.flat), 3)
    return figure
