"""The paper's figures with ours beside them, and acceptance: records in, SVG, PDF and PNG out.

Each module draws one figure from the claims (results/paper/) and an `Ours`; where no record holds
the quantity, the figure says so. Bytes depend on the records and matplotlib's version only. The
only package that imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures.ours import Ours, gather

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf", "png")
__all__ = ["FORMATS", "Ours", "draw", "draw_all", "figure_names", "gather", "png"]


def _drawers() -> dict[str, Callable[[Ours], Figure]]:
    from bench.figures import acceptance, betas, latency, pareto, tradeoff

    return {
        "figure1": latency.draw,
        "figure4": tradeoff.draw,
        "figure5": pareto.draw,
        "figure6": betas.draw,
        "acceptance": acceptance.draw,
    }


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
