"""Figure 1: latency of one forward against its token slots, for three lengths of past KV.

Upper row: the paper (Qwen3-32B, one H100). Lower row, if a record holds width curves: ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.claims import PAPER_DIR, load_file
from bench.figures.ours import Ours, Spot
from bench.figures.style import BLACK, BLUE, GREEN, RED, finish, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("token slots in one forward", "ms")
LACKS = "holds a width curve"
LOOKS = {
    "total": {"color": BLACK, "marker": "o", "linestyle": "-"},
    "mlp": {"color": BLUE, "marker": "s", "linestyle": "--"},
    "attention": {"color": RED, "marker": "^", "linestyle": ":"},
    "head": {"color": GREEN, "marker": "D", "linestyle": "-."},
}


def spots(ours: Ours) -> list[Spot]:
    """Whole forwards of our width curves at batch 1; a panel is a length of past KV."""
    return [
        Spot(
            panel=f"past KV {point.get('kv_len') or 0}",
            name=f"ours: {point.get('weights', 'a forward')} ({name})",
            x=point["width"],
            y=1000 * point["median_s"],
        )
        for name, rows in ours.slots.items()
        for point in rows
        if point.get("part", "total") == "total"
        and point.get("batch", 1) == 1
        and point.get("median_s") is not None
    ]


def draw(ours: Ours) -> Figure:
    """Three panels, or three for the paper and three for each record with a width curve."""
    curves = [(name, rows) for name, rows in ours.slots.items() if rows]
    figure, axes = panels(1 + len(curves), 3, width=11, height=3.6 * (1 + len(curves)) + 0.8)
    claims = load_file(PAPER_DIR / "figure1.csv")
    for axis, kv_len in zip(axes[0], (1024, 2048, 4096), strict=True):
        axis.axvspan(1, 64, facecolor="#ececec", edgecolor="none", label="free slots (paper)")
        axis.axvspan(64, 256, facecolor="white", edgecolor="#c4c4c4", hatch="///", linewidth=0.5,
                     label="cheap slots (paper)")  # fmt: skip
        for part in ("total", "mlp", "attention"):
            points = sorted(
                (claim.width, claim.value)
                for claim in claims
                if claim.settings.get("part") == part and claim.kv_len in (kv_len, None)
            )
            axis.plot(*zip(*points, strict=True), label=part, **LOOKS[part])
        _axis(axis, f"paper: past KV {kv_len}")
        axis.set_ylim(0, 85)
    for row, (name, rows) in zip(axes[1:], curves, strict=True):
        _ours(row, name, rows)
    notes = ["paper: Qwen3-32B, one H100, batch 1, read off its vector figure (parts at fewer "
             "widths; MLP is the same in all panels)"]  # fmt: skip
    if not curves:
        notes.append(f"Paper only: no record given {LACKS}.")
    finish(figure, "Figure 1: what a forward costs, by its token slots", notes, list(axes.flat), 5)
    return figure


def _ours(row: Any, name: str, rows: list[dict[str, Any]]) -> None:
    first = [point for point in rows if point.get("batch", 1) == 1]
    lengths = sorted({point.get("kv_len") for point in first if point.get("kv_len") is not None})
    for axis, kv_len in zip(row, lengths[:3], strict=False):
        mine = [point for point in first if point.get("kv_len") == kv_len]
        for part, look in LOOKS.items():
            points = sorted(
                (point["width"], 1000 * point["median_s"])
                for point in mine
                if point.get("part", "total") == part and point.get("median_s") is not None
            )
            if points:
                axis.plot(*zip(*points, strict=True), label=part, **{**look, "mfc": "white"})
        weights = dict.fromkeys(point["weights"] for point in mine if point.get("weights"))
        _axis(axis, f"ours: {', '.join((*weights, name))}\npast KV {kv_len}")
    for axis in row[len(lengths) :]:
        axis.set_axis_off()


def _axis(axis: Axes, title: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel=AXES[0], ylabel=AXES[1])
    ticks = [1, 4, 16, 64, 256, 512]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
