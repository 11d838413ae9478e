"""How much faster head is than base, from paired log speedups, with bounds noise cannot fake.

Each pair is one number: log(head's speedup / base's), both timed close together. The estimate is
the Hodges-Lehmann median of all pairwise means and its bounds invert Wilcoxon's signed-rank test:
symmetric pairs (swapping equal sides changes nothing) are all it assumes, and a spike of any height
counts as one rank. Among simulated bad neighbours it is level with a sign test or a bootstrapped
median and far ahead of a t interval; it is exact for few pairs and wastes less on a quiet machine
(docs/regress.md, tests/noisy_machine.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05  # two-sided: each bound errs in 2.5 % of cases
EXACT_UP_TO = 50  # pairs; beyond it the signed-rank sum is normal to three digits
PASS, REGRESSION, UNDECIDED = "pass", "regression", "undecided"


@dataclass(frozen=True, kw_only=True)
class Change:
    """Head's speedup over base's, as a ratio (1 is no change, 0.9 is 10 % slower).

    low and high bound the 95 % interval; None where too few pairs exist for one (n below 6).
    """

    value: float
    low: float | None
    high: float | None
    n: int


def change(log_ratios: Sequence[float]) -> Change | None:
    """The change that pairs of log(head speedup / base speedup) show; None without any pair."""
    values = np.asarray(log_ratios, dtype=float)
    if not len(values):
        return None
    if not np.isfinite(values).all():
        raise ValueError("a log ratio is not finite: a time of zero reached the comparison")
    rows, columns = np.triu_indices(len(values))
    means = np.sort((values[rows] + values[columns]) / 2)
    low = high = None
    skip = rank_cut(len(values))
    if skip is not None:
        low, high = math.exp(means[skip]), math.exp(means[-1 - skip])
    return Change(value=math.exp(float(np.median(means))), low=low, high=high, n=len(values))


def rank_cut(n: int) -> int | None:
    """How many of the ordered pairwise means lie outside the interval on each side.

    The largest k with P(W < k + 1) <= ALPHA / 2 for the signed-rank sum W of n values, exact up to
    EXACT_UP_TO; None if even k = 0 is too many.
    """
    if n > EXACT_UP_TO:
        mean, sd = n * (n + 1) / 4, math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return max(0, math.floor(mean - 1.959963984540054 * sd - 0.5))
    ways = [1] + [0] * (n * (n + 1) // 2)  # subsets of 1..n by their sum
    for rank in range(1, n + 1):
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    seen, allowed = 0, 2**n * ALPHA / 2
    for total, count in enumerate(ways):
        seen += count
        if seen > allowed:
            return total - 1 if total else None
    raise AssertionError("the probabilities of all rank sums add up to 1")


def verdict(found: Change | None, tolerance: float) -> str:
    """regression: all of the interval is below 1 - tolerance; pass: none of it; else undecided."""
    if found is None or found.low is None or found.high is None:
        return UNDECIDED
    if found.high < 1 - tolerance:
        return REGRESSION
    return PASS if found.low >= 1 - tolerance else UNDECIDED
