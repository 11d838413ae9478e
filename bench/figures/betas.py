"""Figure 6: mean score of five tasks against beta, the weight of AR logits in verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.claims import PAPER_DIR, load_file
from bench.figures.ours import Ours, Spot
from bench.figures.style import BLUE, GREEN, ORANGE, finish, ours_look, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = ("beta (0: trust diffusion, 1: trust AR)", "mean score, %")
LACKS = "holds all five tasks"
LOOKS = {0.8: (ORANGE, "s", "--"), 1.0: (GREEN, "o", "-"), 1.2: (BLUE, "^", ":")}


def spots(ours: Ours) -> list[Spot]:
    """Our five-task means by beta; flagged ones under a name of their own."""
    found = []
    for item in ours.observed:
        if (item.task, item.metric, item.decoder) == ("average_5_tasks", "score", "tidar"):
            flags = f"; flagged {', '.join(item.spoiled)}" if item.spoiled else ""
            name = f"ours: K={item.params.get('block_len')}, {item.weights} ({item.record}{flags})"
            beta = float(item.params.get("beta", 1.0))
            found.append(Spot(panel="average_5_tasks", name=name, x=beta, y=item.value))
    return found


def draw(ours: Ours) -> Figure:
    """One panel for the paper, one for ours if a record holds the five-task mean for a beta."""
    mine: dict[str, list[tuple[float, float]]] = {}
    for spot in spots(ours):
        mine.setdefault(spot.name, []).append((spot.x, spot.y))
    figure, axes = panels(1, 2 if mine else 1, width=10 if mine else 6, height=4.6)
    claims = load_file(PAPER_DIR / "figure6.csv")
    for alpha, (color, marker, line) in LOOKS.items():
        points = sorted((c.beta, c.value) for c in claims if c.alpha == alpha)
        axes[0, 0].plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line,
                        label=f"paper: alpha {alpha:g}")  # fmt: skip
    axes[0, 0].set(title="paper: TiDAR 1.5B, K = 16, mean of five tasks", ylim=(45, 50))
    for index, (name, points) in enumerate(sorted(mine.items())):
        x, y = zip(*sorted(points), strict=True)
        axes[0, 1].plot(x, y, label=name, **{**ours_look(index), "linestyle": "-"})
        axes[0, 1].set(title="ours")
    for axis in axes.flat:
        axis.set(xlabel=AXES[0], ylabel=AXES[1])
    notes = ["paper: read off its vector figure; the axis does not start at 0"]
    if not mine:
        notes.append(f"Paper only: no record given {LACKS}.")
    finish(figure, "Figure 6: quality hardly depends on beta", notes, list(axes.flat), 3)
    return figure
