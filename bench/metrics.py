"""Every reported number, from finished measurements: pure arithmetic, no clock and no torch.

`docs/metrics.md` defines each number in words; `DEFINITIONS_VERSION` changes whenever one of them
changes its meaning, and records of different versions are never compared. Ratios are ratios of
sums (all tokens over all seconds), never means of per-problem ratios. A number that cannot be
computed is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.records import Measurement

DEFINITIONS_VERSION = 1

BOOTSTRAP_DRAWS = 2000
BOOTSTRAP_SEED = 20251108
Z_95 = 1.959963984540054  # two-sided 95 % point of the standard normal


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A point estimate with its 95 % interval; `n` counts problems. Bounds are None if n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int


def decode_tokens(rows: Sequence[Measurement]) -> int:
    """Kept output tokens that the prefill did not commit (count)."""
    return sum(row.decode_tokens for row in rows)


def tokens_per_nfe(rows: Sequence[Measurement]) -> float | None:
    """Kept decode tokens per decode forward of the target; plain AR gives exactly 1."""
    forwards = sum(row.decode_forwards for row in rows)
    return decode_tokens(rows) / forwards if forwards else None


def tokens_per_s(rows: Sequence[Measurement]) -> float | None:
    """Kept decode tokens per decode second; prefill is in neither sum."""
    seconds = sum(row.decode_s for row in rows)
    return decode_tokens(rows) / seconds if seconds > 0 else None


def draft_forwards_per_token(rows: Sequence[Measurement]) -> float | None:
    """Forwards of a separate drafter, prefill's included, per kept decode token."""
    tokens = decode_tokens(rows)
    return sum(row.draft_forwards for row in rows) / tokens if tokens else None


def tokens_processed_per_token(rows: Sequence[Measurement]) -> float | None:
    """Query tokens through the target per kept decode token: the compute of a token in AR steps.

    Masks, rejected drafts and stored blocks are in it, a separate drafter's work is not.
    """
    tokens, processed = decode_tokens(rows), [row.tokens_processed for row in rows]
    if not tokens or None in processed:
        return None
    return sum(count for count in processed if count is not None) / tokens


def peak_memory_bytes(rows: Sequence[Measurement]) -> int | None:
    """The largest peak of any output; None unless every row has one."""
    peaks = [row.peak_memory_bytes for row in rows]
    return None if not peaks or None in peaks else max(p for p in peaks if p is not None)


def prefill_s(rows: Sequence[Measurement]) -> float | None:
    """Mean seconds from the call to the first token."""
    return sum(row.prefill_s for row in rows) / len(rows) if rows else None


def acceptance_histogram(rows: Sequence[Measurement]) -> tuple[int, ...]:
    """Entry r: number of decode steps that committed r tokens (before output truncation)."""
    width = max((len(row.acceptance_histogram) for row in rows), default=0)
    total = [0] * width
    for row in rows:
        for length, count in enumerate(row.acceptance_histogram):
            total[length] += count
    return tuple(total)


def acceptance_length(rows: Sequence[Measurement]) -> float | None:
    """Mean tokens committed per decode step, bonus token included; AR is exactly 1."""
    histogram = acceptance_histogram(rows)
    steps = sum(histogram)
    committed = sum(length * count for length, count in enumerate(histogram))
    return committed / steps if steps else None


def acceptance_rate(rows: Sequence[Measurement]) -> float | None:
    """Accepted over drafted tokens, a fraction; None for a decoder that drafts nothing."""
    drafted = sum(row.drafted for row in rows)
    return sum(row.accepted for row in rows) / drafted if drafted else None


def acceptance_rate_at(rows: Sequence[Measurement]) -> tuple[float | None, ...]:
    """Acceptance rate by draft position (0-based): accepted there over drafted there."""
    width = max((len(row.drafted_at) for row in rows), default=0)
    rates: list[float | None] = []
    for position in range(width):
        drafted = sum(row.drafted_at[position] for row in rows if position < len(row.drafted_at))
        taken = sum(row.accepted_at[position] for row in rows if position < len(row.accepted_at))
        rates.append(taken / drafted if drafted else None)
    return tuple(rates)


def host_share(rows: Sequence[Measurement]) -> float | None:
    """Share of decode time spent outside the forward; None unless every row has its clocks."""
    if not rows or any(row.host_s is None or row.forward_s is None for row in rows):
        return None
    host = sum(row.host_s for row in rows if row.host_s is not None)
    forward = sum(row.forward_s for row in rows if row.forward_s is not None)
    return host / (host + forward) if host + forward > 0 else None


def wilson(successes: float, n: int) -> Interval | None:
    """Wilson score interval of a proportion; `successes` may be any sum of 0/1 scores."""
    if n == 0:
        return None
    share = successes / n
    z2 = Z_95 * Z_95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the formula gives 0 and 1 exactly; floats leave dust there.
    low = 0.0 if share == 0.0 else max(0.0, centre - half)
    high = 1.0 if share == 1.0 else min(1.0, centre + half)
    return Interval(value=share, low=low, high=high, n=n)


def _draws(n: int, seed: int) -> np.ndarray:
    """[draws, n] problem indices, drawn with replacement; the same for the same n and seed."""
    return np.random.default_rng(seed).integers(0, n, size=(BOOTSTRAP_DRAWS, n))


def _percentiles(samples: np.ndarray) -> tuple[float | None, float | None]:
    finite = samples[np.isfinite(samples)]
    if len(finite) < 0.95 * len(samples):  # too many resamples with an empty denominator
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def _per_problem(rows: Sequence[Measurement]) -> dict[tuple[str, str], tuple[int, float]]:
    """(task, problem) -> decode tokens and decode seconds, repeats summed."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for row in rows:
        tokens, seconds = sums.get((row.task, row.problem), (0, 0.0))
        sums[row.task, row.problem] = (
            tokens + row.decode_tokens,
            seconds + row.decode_s,
        )
    return sums


def speedup(
    rows: Sequence[Measurement], reference: Sequence[Measurement], *, seed: int = BOOTSTRAP_SEED
) -> Interval | None:
    """Tokens/s over the reference's tokens/s, on the (problem, repeat) pairs both completed.

    The interval is a paired bootstrap over problems: one draw picks the same problems for both.
    """
    shared = {row.pair for row in rows} & {row.pair for row in reference}
    ours = _per_problem([row for row in rows if row.pair in shared])
    theirs = _per_problem([row for row in reference if row.pair in shared])
    order = sorted(ours)
    if not order:
        return None
    table = np.array([[*ours[problem], *theirs[problem]] for problem in order], dtype=float)

    def ratio(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])

    value = float(ratio(table.sum(axis=0)))
    if not math.isfinite(value):
        return None
    low = high = None
    if len(order) > 1:
        low, high = _percentiles(ratio(table[_draws(len(order), seed)].sum(axis=1)))
    return Interval(value=value, low=low, high=high, n=len(order))


def tokens_per_nfe_interval(
    rows: Sequence[Measurement], *, seed: int = BOOTSTRAP_SEED
) -> Interval | None:
    """`tokens_per_nfe` with a bootstrap interval over problems, repeats summed."""
    value = tokens_per_nfe(rows)
    if value is None:
        return None
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        tokens, forwards = sums.get((row.task, row.problem), (0, 0))
        sums[row.task, row.problem] = (tokens + row.decode_tokens, forwards + row.decode_forwards)
    low = high = None
    if len(sums) > 1:
        table = np.array([sums[problem] for problem in sorted(sums)], dtype=float)
        drawn = table[_draws(len(sums), seed)].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = _percentiles(drawn[:, 0] / drawn[:, 1])
    return Interval(value=value, low=low, high=high, n=len(sums))


def score_interval(per_problem: Mapping[str, float]) -> Interval | None:
    """Mean of per-problem scores in 0..1 with Wilson's interval."""
    return wilson(sum(per_problem.values()), len(per_problem))


def score_difference(
    scores: Mapping[str, float], reference: Mapping[str, float], *, seed: int = BOOTSTRAP_SEED
) -> Interval | None:
    """Mean score minus the reference's, on the problems both have; paired bootstrap interval."""
    order = sorted(set(scores) & set(reference))
    if not order:
        return None
    gaps = np.array([scores[problem] - reference[problem] for problem in order])
    low = high = None
    if len(order) > 1:
        low, high = _percentiles(gaps[_draws(len(order), seed)].mean(axis=1))
    return Interval(value=float(gaps.mean()), low=low, high=high, n=len(order))


def equal_outputs(
    rows: Sequence[Measurement], reference: Sequence[Measurement]
) -> tuple[int, int]:
    """(equal, compared): pairs whose kept token ids and text are the reference's exactly."""
    expected = {row.pair: (row.token_ids_sha, row.text) for row in reference}
    compared = [row for row in rows if row.pair in expected]
    equal = sum((row.token_ids_sha, row.text) == expected[row.pair] for row in compared)
    return equal, len(compared)
