"""Small drawings as SVG text: bars and points with axes, no plotting library.

Colours come from the page's style sheet (classes s0..s5), so that a figure follows light and dark;
a series also has its own marker and dash, so that nothing depends on colour. After six series both
start anew, hollow and then pale, so that eighteen can be told apart. Numbers stand beside every
figure as a table (see `markup.Figure`); the drawing itself is one image with one label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 42
SERIES_STYLES = 6
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 3", "12 4")


@dataclass(frozen=True, kw_only=True)
class Point:
    """x, y and, where known, the interval of each; `label` is written beside the point."""

    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one name; `joined` draws a line through them."""

    name: str
    points: Sequence[Point]
    joined: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover low..high, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]


def bars(labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, x: str, y: str,
         alt: str) -> str:  # fmt: skip
    """Grouped bars: for every label one bar per series, from zero."""
    top = max((value for _, values in series for value in values), default=0.0) or 1.0
    marks = ticks(0.0, top)
    frame = _Frame(0.0, float(len(labels)), marks[0], marks[-1])
    parts = [frame.y_axis(marks, y), frame.x_title(x)]
    room = 0.8 / max(1, len(series))
    for place, label in enumerate(labels):
        parts.append(frame.x_label(place + 0.5, label))
        for index, (_, values) in enumerate(series):
            value = values[place] if place < len(values) else 0.0
            x0, x1 = (frame.px(place + 0.1 + room * (index + side)) for side in (0, 1))
            height = frame.py(0.0) - frame.py(value)
            parts.append(
                f'<rect class="{style(index)} bar" x="{x0:.1f}" y="{frame.py(value):.1f}"'
                f' width="{max(0.5, x1 - x0 - 1):.1f}" height="{height:.1f}"/>'
            )
    return _svg(parts, [name for name, _ in series], alt, square=True)


def points(series: Sequence[Series], *, x: str, y: str, alt: str, x_log2: bool = False,
           places: int = 0) -> str:  # fmt: skip
    """Points, with error bars where given and lines where joined. Axes start at zero.

    x_log2: doubling is one step to the right. places: x is a place 1..places and not a quantity.
    """

    def at(value: float) -> float:
        return math.log2(value) if x_log2 else value

    every = [point for one in series for point in one.points]
    xs = [at(v) for p in every for v in (p.x, *(p.x_range or ()))] + [0.0]
    ys = [v for p in every for v in (p.y, *(p.y_range or ()))] + [0.0]
    x_marks = ticks(min(xs), max(xs))
    if x_log2:
        x_marks = [float(i) for i in range(math.ceil(max(xs)) + 1)]
    if places:
        x_marks = [float(place) for place in range(1, places + 1)]
    y_marks = ticks(min(ys), max(ys))
    edge = 0.5 if places else 0.0
    frame = _Frame(x_marks[0] - edge, x_marks[-1] + edge, y_marks[0], y_marks[-1])
    parts = [frame.y_axis(y_marks, y), frame.x_title(x)]
    parts += [frame.x_label(m, _plain(2**m if x_log2 else m), tick=True) for m in x_marks]
    for index, one in enumerate(series):
        parts.append(f'<g class="{style(index)}">')
        spots = [(frame.px(at(p.x)), frame.py(p.y), p) for p in one.points]
        if one.joined and len(spots) > 1:
            path = " ".join(f"{left:.1f},{top:.1f}" for left, top, _ in spots)
            dash = DASHES[index % SERIES_STYLES]
            parts.append(f'<polyline class="line" points="{path}" stroke-dasharray="{dash}"/>')
        for left, top, point in spots:
            for bounds, flat in ((point.x_range, True), (point.y_range, False)):
                if bounds:
                    low, high = (frame.px(at(v)) if flat else frame.py(v) for v in bounds)
                    ends = (low, top, high, top) if flat else (left, low, left, high)
                    x1, y1, x2, y2 = (f"{v:.1f}" for v in ends)
                    parts.append(f'<line class="bounds" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
            parts.append(marker(index, left, top))
            if point.label:
                away = left > WIDTH - 130
                anchor = ' text-anchor="end"' if away else ""
                shift = -8 if away else 8
                parts.append(
                    f'<text class="note" x="{left + shift:.1f}" y="{top - 6:.1f}"{anchor}>'
                    f"{escape(point.label)}</text>"
                )
        parts.append("</g>")
    return _svg(parts, [one.name for one in series], alt)


def style(index: int) -> str:
    """CSS classes of a series: its colour, and its round: filled, hollow, pale."""
    return f"s{index % SERIES_STYLES} round{index // SERIES_STYLES % 3}"


def marker(index: int, x: float, y: float, size: float = 4.5) -> str:
    """Circle, square, triangle, diamond, cross or bar: one for each series."""
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        3: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        4: ((-1.2, 0.9), (1.2, -0.9), (1.2, 0.9), (-1.2, -0.9)),
        5: ((-1.4, -0.6), (1.4, -0.6), (1.4, 0.6), (-1.4, 0.6)),
    }.get(index % SERIES_STYLES)
    if corners is None:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    path = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark" points="{path}"/>'


class _Frame:
    """The plotting area: data to pixels, and the axes."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float) -> None:
        self.x0, self.x1, self.y0, self.y1 = x0, x1, y0, y1

    def px(self, value: float) -> float:
        share = (value - self.x0) / ((self.x1 - self.x0) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        share = (value - self.y0) / ((self.y1 - self.y0) or 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def y_axis(self, marks: Sequence[float], title: str) -> str:
        lines = []
        for mark in marks:
            at = self.py(mark)
            lines.append(
                f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>'
                f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_plain(mark)}</text>'
            )
        middle = (TOP + HEIGHT - BOTTOM) / 2
        lines.append(
            f'<text class="title" transform="translate(14 {middle:.0f}) rotate(-90)"'
            f' text-anchor="middle">{escape(title)}</text>'
        )
        return "".join(lines)

    def x_label(self, value: float, label: str, *, tick: bool = False) -> str:
        at, base = self.px(value), HEIGHT - BOTTOM
        line = f'<line class="grid" x1="{at:.1f}" y1="{base}" x2="{at:.1f}" y2="{base + 4}"/>'
        text = f'<text x="{at:.1f}" y="{base + 17}" text-anchor="middle">{escape(label)}</text>'
        return (line if tick else "") + text

    def x_title(self, title: str) -> str:
        middle = (LEFT + WIDTH - RIGHT) / 2
        return (
            f'<text class="title" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{escape(title)}</text>"
        )


def _plain(value: float) -> str:
    return f"{value:.10g}"


def _svg(parts: Sequence[str], names: Sequence[str], alt: str, *, square: bool = False) -> str:
    """The drawing and, above it, the key of its series as text."""
    keys = []
    for index, name in enumerate(names):
        spot = marker(1 if square else index, 8, 8)
        keys.append(
            f'<span class="key"><svg width="16" height="16" aria-hidden="true">'
            f'<g class="{style(index)}">{spot}</g></svg> {escape(name)}</span>'
        )
    return (
        f'<div class="keys" aria-hidden="true">{"".join(keys)}</div>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(alt)}">{"".join(parts)}</svg>'
    )
