"""Loss curves of training runs: AR and draft loss, and how often a draft was right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.figures.style import BLACK, BLUE, GREEN, ORANGE, finish, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTH = 10  # steps in a running mean; single steps are drawn faint behind it
LOOKS = ((BLUE, "-"), (GREEN, "--"), (ORANGE, "-."), (BLACK, ":"))
PANELS = (
    ("ar_loss", "AR loss (nats per token)"),
    ("diffusion_loss", "draft loss (nats per token)"),
    ("draft_accuracy", "drafts guessed right (share)"),
)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run's or adapter's loss.jsonl; a line cut off by a kill is left out."""
    text = (folder / "loss.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def draw(runs: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """One line per run and panel, over clean tokens seen."""
    figure, axes = panels(1, 3, width=11, height=3.6)
    for axis, (name, title) in zip(axes[0], PANELS, strict=True):
        for (label, log), (color, line) in zip(runs.items(), LOOKS * len(runs), strict=False):
            points = [(row["tokens"], row[name]) for row in log if row[name] is not None]
            if not points:
                continue
            tokens, values = zip(*points, strict=True)
            axis.plot(tokens, values, color=color, alpha=0.25, linewidth=0.7)
            axis.plot(tokens, _running(values), color=color, linestyle=line, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("clean tokens seen")
        axis.set_ylim(bottom=0, top=1 if name == "draft_accuracy" else None)
        axis.locator_params(axis="x", nbins=5)  # more six-digit labels would touch
        axis.grid(alpha=0.3)
    notes = [f"running mean over {SMOOTH} steps, single steps faint behind it"]
    finish(figure, "Training", notes, list(axes[0]), 3)
    return figure


def _running(values: Sequence[float]) -> list[float]:
    means = []
    for index in range(len(values)):
        part = values[max(0, index + 1 - SMOOTH) : index + 1]
        means.append(sum(part) / len(part))
    return means
