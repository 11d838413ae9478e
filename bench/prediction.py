"""Tokens per step and tokens/s that a decoder setting would reach, and the best setting.

The model, all of it:

- Step cost. A step of w query tokens costs T(w) seconds, read off the curve (linear between the
  measured widths, nothing beyond them). A two-forward step costs 2 T(K), an `ar` step T(1). Where
  the curve holds the LM head apart, its seconds for the rows a step sends through it are added.
- Acceptance. Slot m of a drafted block is right with probability c_m, given that the tokens before
  it were; independent of everything else, and the same for every K, whether or not a shorter
  outcome's block serves as the draft. c_m comes from the acceptance histogram of a dense run:
  of the steps that committed at least m tokens, the share that committed more.
- Steps form a Markov chain over the length of the draft. Its transitions are the rules of
  `tidar_ref.outcomes`; tokens per step is the mean under its stationary distribution.

Nothing is extrapolated: K never exceeds the recorded one, and a slot that was never reached counts
as never right. No torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from tidar_ref.errors import UserError
from tidar_ref.outcomes import layout, next_draft, parse_outcomes

# All subsets are tried up to this K; above it the best of n is grown and improved by exchange.
EXHAUSTIVE_UP_TO = 10


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A decoder setting (label as --decoders takes it) with its predicted tokens and cost."""

    decoder: str
    query_width: int
    forwards_per_step: int
    tokens_per_step: float
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s


class WidthCurve:
    """Seconds of one forward by query width (tokens); `source` says where they come from.

    head: seconds of the LM head by rows, which `seconds` then do not include.
    """

    def __init__(
        self, seconds: Mapping[int, float], source: str, *, head: Mapping[int, float] | None = None
    ) -> None:
        if not seconds or min(seconds) < 1 or min(seconds.values()) <= 0:
            raise UserError(
                f"width curve {source} holds no widths from 1 with seconds above 0: measure one"
            )
        self.widths = sorted(seconds)
        self.seconds = [seconds[width] for width in self.widths]
        self.source = source
        self.head = dict(sorted(head.items())) if head else None

    def covers(self, width: int) -> bool:
        """True if `width` lies between the measured ones."""
        return self.widths[0] <= width <= self.widths[-1]

    def at(self, width: int) -> float:
        """Seconds at `width`, linear between measured widths; UserError outside them."""
        if not self.covers(width):
            raise UserError(
                f"width {width} is outside the curve's {self.widths[0]} to {self.widths[-1]}"
                f" ({self.source}): measure a longer curve"
            )
        right = bisect_left(self.widths, width)
        if self.widths[right] == width:
            return self.seconds[right]
        return float(np.interp(width, self.widths, self.seconds))

    def step(self, widths: Sequence[int], head_rows: Sequence[int]) -> float:
        """Seconds of forwards of these widths, with the head on these rows, one call each."""
        seconds = sum(map(self.at, widths))
        if self.head is None:
            return seconds
        known, values = list(self.head), list(self.head.values())
        return seconds + sum(float(np.interp(rows, known, values)) for rows in head_rows)


# --- acceptance --------------------------------------------------------------------------------


def hazards(histogram: Sequence[int], block_len: int) -> tuple[float, ...]:
    """c_1 .. c_{K-1} from a dense run's histogram (entry r: steps that committed r tokens)."""
    reached = [sum(histogram[r:]) for r in range(block_len + 1)]
    if not histogram or not reached[1] or len(histogram) > block_len + 1 or histogram[0]:
        raise UserError(
            f"histogram {list(histogram)} is not that of a run with block_len {block_len}:"
            " every step must have committed 1 to block_len tokens"
        )
    return tuple(reached[m + 1] / reached[m] if reached[m] else 0.0 for m in range(1, block_len))


@cache
def step_distribution(c: tuple[float, ...], block_len: int, length: int) -> tuple[float, ...]:
    """P(r = 1), ..., P(r = length) for a draft of `length` tokens: its tested slots are the
    last length - 1 of the block's."""
    shift, alive, found = block_len - length, 1.0, []
    for m in range(shift + 1, block_len):
        found.append(alive * (1 - c[m - 1]))
        alive *= c[m - 1]
    return (*found, alive)


def tokens_per_step(c: tuple[float, ...], block_len: int, outcomes: Sequence[int]) -> float:
    """Mean tokens a step commits in the long run, K = block_len, these outcomes drafted."""
    move = np.zeros((block_len, block_len))  # [draft length - 1, next draft length - 1]
    gain = np.zeros(block_len)
    for length in range(1, block_len + 1):
        drafted = layout(tuple(outcomes), length)
        for r, share in enumerate(step_distribution(c, block_len, length), start=1):
            move[length - 1, next_draft(drafted, r, block_len)[1] - 1] += share
            gain[length - 1] += share * r
    reachable = _reachable(move, block_len - 1)
    move = move[np.ix_(reachable, reachable)]
    # Stationary distribution: p (M - 1) = 0 and sum p = 1.
    system = np.vstack([move.T - np.eye(len(reachable)), np.ones(len(reachable))])
    right = np.append(np.zeros(len(reachable)), 1.0)
    stationary = np.linalg.lstsq(system, right, rcond=None)[0]
    return float(stationary @ gain[reachable])


def _reachable(move: np.ndarray, start: int) -> list[int]:
    seen, todo = {start}, [start]
    while todo:
        for state in map(int, np.flatnonzero(move[todo.pop()])):
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return sorted(seen)


def best_outcomes(c: tuple[float, ...], block_len: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """For n = 1..K the n outcomes with the most tokens per step, and those tokens."""

    def worth(outcomes: tuple[int, ...]) -> float:
        return tokens_per_step(c, block_len, outcomes)

    every = range(1, block_len + 1)
    best: tuple[int, ...] = ()
    for count in every:
        if block_len <= EXHAUSTIVE_UP_TO:
            best = max(combinations(every, count), key=worth)
        else:
            best = max((_with(best, j) for j in every if j not in best), key=worth)
            while True:
                swaps = [
                    _with(tuple(i for i in best if i != old), new)
                    for old in best
                    for new in every
                    if new not in best
                ]
                better = max(swaps, key=worth, default=best)
                if worth(better) <= worth(best) + 1e-12:
                    break
                best = better
        yield best, worth(best)


def _with(outcomes: tuple[int, ...], j: int) -> tuple[int, ...]:
    return tuple(sorted((*outcomes, j)))


# --- predictions -------------------------------------------------------------------------------


def predict(
    name: str, params: Mapping[str, Any], c: tuple[float, ...], curve: WidthCurve
) -> Prediction:
    """The prediction for one setting; `params` as a decoder holds them. UserError if the curve
    does not reach its width or K exceeds the recorded one."""
    if name == "ar":
        return Prediction(
            decoder="ar",
            query_width=1,
            forwards_per_step=1,
            tokens_per_step=1.0,
            step_s=curve.step([1], [1]),
        )
    k = params["block_len"]
    if k > len(c) + 1:
        raise UserError(f"block_len {k} exceeds the recorded {len(c) + 1}: nothing is extrapolated")
    text = ",".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                    for key, value in params.items())  # fmt: skip
    every = tuple(range(1, k + 1))
    if name == "tidar_two_forward":
        outcomes, width, forwards = every, 2 * k, 2
        step_s = curve.step([k, k], [k, k - 1])
    else:
        chosen = params.get("outcomes")
        outcomes = every if chosen is None else parse_outcomes(chosen, k)
        width, forwards = k * (1 + len(outcomes)), 1
        # Verify K rows, draft K - 1; below beta = 1 the blocks' first slots are mixed in.
        mixed = [k] if params.get("beta", 1.0) < 1.0 else []
        step_s = curve.step([width], [k, *mixed, k - 1])
    return Prediction(
        decoder=f"{name}:{text}",
        query_width=width,
        forwards_per_step=forwards,
        tokens_per_step=tokens_per_step(c[: k - 1], k, outcomes),
        step_s=step_s,
    )


def search(c: tuple[float, ...], curve: WidthCurve, *, beta: float = 1.0) -> list[Prediction]:
    """`ar`, `tidar_two_forward` and the best outcome set of every size for every K the curve
    reaches, fastest first. With beta < 1 only the dense layouts exist."""
    found = [predict("ar", {}, c, curve)]
    for k in range(2, len(c) + 2):
        dense = {"block_len": k, "beta": beta}
        if curve.covers(k * (k + 1)):
            found.append(predict("tidar", dense, c, curve))
        if beta < 1.0:
            continue
        if curve.covers(k):
            found.append(predict("tidar_two_forward", {"block_len": k}, c, curve))
        for outcomes, _ in best_outcomes(c[: k - 1], k):
            if len(outcomes) < k and curve.covers(k * (1 + len(outcomes))):
                chosen = "-".join(map(str, outcomes))
                found.append(predict("tidar", {**dense, "outcomes": chosen}, c, curve))
    return sorted(found, key=lambda p: -p.tokens_per_s)
