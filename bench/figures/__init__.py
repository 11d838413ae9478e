"""The paper's figures with ours beside them, and acceptance: records in, SVG, PDF and PNG out.

Each module draws one figure from the claims (results/paper/) and an `Ours`; where no record holds
the quantity, the figure says so. Bytes depend on the records and matplotlib's version only. The
only package that imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.figures.ours import Ours, Spot, gather

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf", "png")
__all__ = [
    "FORMATS", "Ours", "Spot", "axes", "draw", "draw_all", "figure_names", "gather", "lacks", "png",
    "spots",
]  # fmt: skip


def _papers() -> dict[str, Any]:
    """The paper's figures: modules with AXES, LACKS, spots and draw."""
    from bench.figures import betas, latency, pareto, tradeoff

    return {"figure1": latency, "figure4": tradeoff, "figure5": pareto, "figure6": betas}


def _drawers() -> dict[str, Callable[[Ours], Figure]]:
    from bench.figures import acceptance

    drawn = {name: module.draw for name, module in _papers().items()}
    return {**drawn, "acceptance": acceptance.draw}


def axes(name: str) -> tuple[str, str]:
    """What stands on the axes of one of the paper's figures."""
    return _papers()[name].AXES


def spots(name: str, ours: Ours) -> list[Spot]:
    """Our points on one of the paper's figures; empty where no record holds its quantities."""
    return _papers()[name].spots(ours)


def lacks(name: str) -> str:
    """What a record must hold to be on one of the paper's figures, as "holds ..."."""
    return _papers()[name].LACKS


def figure_names() -> tuple[str, ...]:
    """What `draw` takes."""
    return tuple(_drawers())


def draw(name: str, ours: Ours) -> Figure:
    """One figure by name (`figure_names()`); KeyError for another name."""
    from bench.figures.style import styled

    with styled():
        return _drawers()[name](ours)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, e.g. for a notebook's Image(data=...)."""
    import io

    from bench.figures.style import save

    out = io.BytesIO()
    save(figure, out, "png")
    return out.getvalue()


def draw_all(records: Sequence[Path], out: Path) -> list[Path]:
    """Every figure of these record folders into `out`, in every format; gives the files.

    UserError for a folder that is no record, or if `out` cannot be written.
    """
    from bench.figures.style import save
    from tidar_ref.errors import UserError

    ours = gather(records)
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in figure_names():
            figure = draw(name, ours)
            for kind in FORMATS:
                save(figure, out / f"{name}.{kind}", kind)
                written.append(out / f"{name}.{kind}")
    except OSError as error:
        raise UserError(
            f"cannot write figures to {out}: {error.strerror}; name another folder with --out"
        ) from error
    return written
