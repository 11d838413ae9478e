"""One look for all figures: colours that survive colour blindness, marks that survive grey.

Colours are Okabe and Ito's; every series also has its own marker or line style, and ours are
hollow with a black edge. Saved files carry no date, no random ids and no software version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#777777"
OUR_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "tidar-bench",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
    "figure.dpi": 100,
}
TASK_TITLES = {
    "humaneval": "HumanEval",
    "humaneval_plus": "HumanEval+",
    "mbpp": "MBPP",
    "mbpp_plus": "MBPP+ (lm-eval)",
    "gsm8k_cot": "GSM8K",
    "average_5_tasks": "mean of the five",
}
# No date and no software version, so that the same record gives the same bytes.
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib's own defaults plus RC, whatever the user's configuration says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with its grid of axes, [rows, columns]; room below for legend and notes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(
    figure: Figure, title: str, notes: Sequence[str], axes: Sequence[Axes], columns: int
) -> None:
    """Title, the notes, and one shared legend below (each label once)."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    text = "\n".join(notes)
    if not handles:
        figure.supxlabel(text, fontsize=8, x=0.01, ha="left")
        return
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower left", ncols=columns,
        title=text, title_fontsize=8, alignment="left",
    )  # fmt: skip


def ours_look(index: int, *, flagged: bool = False) -> dict[str, Any]:
    """Hollow black-edged marker of our index-th series; a flagged point has a thin grey edge."""
    return {
        "marker": OUR_MARKS[index % len(OUR_MARKS)],
        "markerfacecolor": "none",
        "markeredgecolor": GREY if flagged else BLACK,
        "markeredgewidth": 0.7 if flagged else 1.4,
        "markersize": 7 + 2 * (index % 4),  # so that equal points stay visible
        "linestyle": "none",
        "zorder": 5,
    }


def save(figure: Figure, file: Path | IO[bytes], kind: str) -> None:
    """Write as svg, pdf or png, the same bytes for the same figure."""
    with styled():
        figure.savefig(file, format=kind, metadata=_METADATA[kind], facecolor="white")
