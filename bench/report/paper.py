"""The paper's figures with ours beside them: drawn by `bench.figures`, told as tables."""

from __future__ import annotations

import base64
import io
from html import escape

from bench import figures
from bench.claims import load_claims
from bench.report.markup import CAPTION, Figure, table

PIXELS_PER_INCH = 76  # a figure's letters about as large as the page's small ones
TITLES = {
    "figure1": "what a forward costs, by its token slots",
    "figure4": "quality against relative decode speed",
    "figure5": "score against tokens per forward",
    "figure6": "score by beta, the weight of AR logits in verification",
}


def paper_figure(name: str, ours: figures.Ours) -> Figure:
    """One of the paper's figures (`TITLES`) as `bench figures` draws it, and all its points.

    The caption says plainly where these records hold nothing to draw.
    """
    from bench.figures.style import save

    out, made = io.BytesIO(), figures.draw(name, ours)
    save(made, out, "svg")
    width = PIXELS_PER_INCH * made.get_figwidth()
    drawn = base64.b64encode(out.getvalue()).decode()
    source = f"Figure {name.removeprefix('figure')}"
    spots = figures.spots(name, ours)
    caption = f"The paper's {source}: {TITLES[name]}"
    if spots:
        said = f"Ours beside it: {len({s.name for s in spots})} series, {len(spots)} points."
    else:
        said = f"**Not measured here:** no record of this page {figures.lacks(name)}."
    numbers = _ours(name, spots) + _papers(source)
    return Figure(
        caption=f"{caption}. {said}",
        # An image and not inline: the identifiers of two drawings must not meet.
        svg=f'<div class="scroll" tabindex="0" role="region" aria-label="{source}">'
        f'<img class="paper" alt="{escape(caption)}" width="{width:.0f}"'
        f' src="data:image/svg+xml;base64,{drawn}"></div>',
        numbers=numbers,
    )


def _ours(name: str, spots: list[figures.Spot]) -> str:
    if not spots:
        return ""
    body = [(spot.name, spot.panel, f"{spot.x:.4g}", f"{spot.y:.4g}") for spot in spots]
    return f"{CAPTION}ours\n\n{table(('series', 'panel', *figures.axes(name)), body)}\n\n"


def _papers(source: str) -> str:
    """A row per point, a column per quantity the figure gives of it."""
    points: dict[tuple[str, str, str], dict[str, str]] = {}
    for claim in load_claims():
        if claim.source == source:
            place = (claim.system, claim.task, claim.setting_words)
            points.setdefault(place, {})[claim.metric] = f"{claim.value:g} {claim.unit}"
    metrics = list(dict.fromkeys(metric for values in points.values() for metric in values))
    body = [
        (*place, *(values.get(metric, "") for metric in metrics))
        for place, values in points.items()
    ]
    return f"{CAPTION}the paper's points\n\n" + table(("system", "task", "setting", *metrics), body)
