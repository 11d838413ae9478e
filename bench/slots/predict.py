"""The paper's speedups predicted from measured step costs: speedup = T/NFE / (t_TiDAR / t_AR).

T/NFE is the paper's (or its project page's), both times are ours, at the paper's model shape and
batch 1. Such a number is always labelled "predicted". No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.claims import SHAPES, Claim, load_claims
from bench.profiles import parse_decoders
from bench.slots.curves import Point, step_mode
from bench.slots.record import OK

SOURCES = ("Figure 4", "Site bar chart")


@dataclass(frozen=True, kw_only=True)
class PredictedSpeedup:
    """A published speedup beside the one our step costs predict from the same T/NFE."""

    source: str
    system: str
    task: str
    kv_len: int
    decoder: str
    t_per_nfe: float
    published: float
    step_ratio: float
    predicted: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class StepRatio:
    """A step cost in AR steps derived from the paper's figure, and the measured one."""

    system: str
    decoder: str
    kv_len: int
    derived: float
    measured: float
    low: float | None
    high: float | None


def measured_for(claim: Claim, found: Sequence[Point]) -> list[Point]:
    """Steps of the claim's decoder at its size, batch 1; its own beta if measured.

    One point a KV length, eager and graphed apart.
    """
    shape = SHAPES.get(claim.size)
    mine = [
        (dict(parse_decoders([point.what])[0].params), point)
        for point in found
        if shape and point.status == OK and point.ratio is not None and point.batch == 1
        and point.what.startswith("tidar:") and shape in point.weights.lower()
    ]  # fmt: skip
    dense = [(p, point) for p, point in mine
             if p.get("block_len") == claim.block_len and "outcomes" not in p]  # fmt: skip
    exact = [point for p, point in dense if p.get("beta", 1) == claim.beta]
    chosen = exact or [point for p, point in dense if p.get("beta", 1) == 1]
    return list({(point.kv_len, step_mode(point.what)): point for point in chosen}.values())


def predicted_speedups(found: Sequence[Point]) -> list[PredictedSpeedup]:
    """One row per published TiDAR speedup with a T/NFE beside it, and measured KV length."""
    claims = [c for c in load_claims() if c.source in SOURCES and c.decoder == "tidar"]
    per_forward = {(c.source, c.system, c.task): c.value for c in claims if c.metric == "t_per_nfe"}
    rows = []
    for claim in claims:
        t_per_nfe = per_forward.get((claim.source, claim.system, claim.task))
        if claim.metric != "speedup" or t_per_nfe is None:
            continue
        for point in measured_for(claim, found):
            assert point.ratio is not None
            low, high = point.ratio.high, point.ratio.low  # a dear step is a small speedup
            rows.append(
                PredictedSpeedup(
                    source=claim.source,
                    system=claim.system,
                    task=claim.task,
                    kv_len=point.kv_len,
                    decoder=point.what,
                    t_per_nfe=t_per_nfe,
                    published=claim.value,
                    step_ratio=point.ratio.value,
                    predicted=t_per_nfe / point.ratio.value,
                    low=None if low is None else t_per_nfe / low,
                    high=None if high is None else t_per_nfe / high,
                )
            )
    return rows


def step_ratios(found: Sequence[Point]) -> list[StepRatio]:
    """The ratios derived from Figure 4 (1.66, 1.68, 1.56; 1.41 at 8B) beside ours."""
    return [
        StepRatio(
            system=claim.system,
            decoder=point.what,
            kv_len=point.kv_len,
            derived=claim.value,
            measured=point.ratio.value,
            low=point.ratio.low,
            high=point.ratio.high,
        )
        for claim in load_claims()
        if claim.metric == "step_ratio"
        for point in measured_for(claim, found)
        if point.ratio is not None
    ]
