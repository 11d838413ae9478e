"""How many tokens a step commits, and which places of the draft are right.

The paper has no such figure; its project page's four traces (TiDAR 8B, K = 16) give a histogram,
and the share of steps in which a place was right follows from it (derived).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import metrics
from bench.claims import PAPER_DIR, load_file
from bench.figures.ours import Ours
from bench.figures.style import BLUE, GREEN, finish, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(ours: Ours) -> Figure:
    """First row: the site's traces. Then one row per record and drafting decoder."""
    drafting = []
    for record in ours.records:
        for label in record.header.decoders:
            rows = [row for row in record.measurements if row.decoder == label]
            if metrics.acceptance_rate(rows) is not None:
                drafting.append((record, label, rows))
    figure, axes = panels(1 + len(drafting), 2, width=10, height=2.7 * (1 + len(drafting)) + 0.6)
    counts = {
        int(claim.settings["committed"]): claim.value
        for claim in load_file(PAPER_DIR / "site_traces.csv")
        if claim.metric == "count"
    }
    site = "project page: TiDAR 8B, K = 16, four traces"
    histogram = [int(counts.get(length, 0)) for length in range(17)]
    _histogram(axes[0, 0], histogram, site, 16, GREEN)
    # A place is right exactly when the step commits more tokens than the place's number.
    _places(axes[0, 1], [sum(histogram[m + 1 :]) / sum(histogram) for m in range(1, 16)], GREEN)
    for row, (record, label, rows) in zip(axes[1:], drafting, strict=True):
        weights = record.header.weights
        rates = metrics.acceptance_rate_at(rows)
        longest = int(record.header.decoders[label]["params"].get("block_len", len(rates) + 1))
        name = f"ours: {label}, {weights['name']} ({weights['tier']})"
        _histogram(row[0], list(metrics.acceptance_histogram(rows)), name, longest, BLUE)
        _places(row[1], [rate or 0.0 for rate in rates], BLUE)
    notes = ["a place behind a rejected one counts as drafted and not accepted; the traces' right "
             "panel is derived from their histogram"]  # fmt: skip
    notes.append(
        "records: " + ", ".join(record.name for record in ours.records)
        if drafting
        else "Project page only: no record given holds a decoder that drafts."
    )
    finish(figure, "Acceptance: tokens committed by a step", notes, [], 1)
    return figure


def _histogram(axis: Axes, counts: list[int], title: str, longest: int, color: str) -> None:
    steps = sum(counts)
    lengths = range(1, max(longest, len(counts) - 1) + 1)
    shares = [100 * count / steps for count in counts] if steps else []
    axis.bar(lengths, [shares[n] if n < len(shares) else 0 for n in lengths], color=color,
             edgecolor="black", linewidth=0.6)  # fmt: skip
    axis.set(xlabel="tokens committed by a step", ylabel="share of steps %", ylim=(0, 105))
    axis.set_title(f"{title}\n{steps} decode steps", loc="left")
    axis.set_xticks(list(lengths))


def _places(axis: Axes, rates: list[float], color: str) -> None:
    places = range(1, len(rates) + 1)
    axis.plot(places, [100 * rate for rate in rates], color=color, marker="o",
              markeredgecolor="black", clip_on=False)  # fmt: skip
    axis.set(xlabel="place in the draft", ylabel="accepted of drafted %", ylim=(0, 105))
    axis.set_xticks(list(places))
