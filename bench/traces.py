"""Acceptance traces: what a decoder committed step by step, to predict its speed elsewhere.

A trace comes from a record's ledger or from a distribution (`simulate`). Replayed on another
machine's step times it predicts tokens/s and speedup there: acceptance does not depend on the
machine, seconds do. `SimulatedAcceptance` makes a real engine commit drawn counts, to time the
engine without a trained drafter. No torch.
"""

from __future__ import annotations

import dataclasses
import json
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import from_dict
from bench.slots.curves import Point
from bench.slots.record import OK
from bench.store import read_record, read_steps, write_whole
from tidar_ref.errors import UserError

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class ProblemTrace:
    """One output: tokens committed and KV length read by each decode step (not the prefill's).

    decode_tokens: the kept tokens that the prefill did not commit (docs/metrics.md).
    """

    problem: str
    prompt_tokens: int
    output_tokens: int
    decode_tokens: int
    committed: tuple[int, ...]
    kv_lens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AcceptanceTrace:
    """A decoder's outputs. query_width, forwards_per_step: of every step, they never change.

    source: the record's name, or how the trace was simulated.
    """

    schema: int
    source: str
    weights: str
    decoder: str
    query_width: int
    forwards_per_step: int
    problems: tuple[ProblemTrace, ...]

    @property
    def steps(self) -> int:
        """Decode steps of all outputs (count)."""
        return sum(len(problem.committed) for problem in self.problems)

    @property
    def decode_tokens(self) -> int:
        """Kept tokens that no prefill committed, as docs/metrics.md counts them."""
        return sum(problem.decode_tokens for problem in self.problems)


def from_record(folder: Path, decoder: str) -> AcceptanceTrace:
    """The trace of one decoder of a record; UserError if it is not there or changes its width."""
    record = read_record(folder)
    if decoder not in record.header.decoders:
        raise UserError(
            f"{folder} has no decoder {decoder!r}; it has {', '.join(record.header.decoders)}"
        )
    steps: dict[tuple[str, str, str, int], list[Any]] = {}
    for step in read_steps(folder):
        if step.decoder == decoder and step.index > 0:
            steps.setdefault(step.key, []).append(step)
    rows = [row for row in record.measurements if row.decoder == decoder]
    kinds = {(s.query_width, s.target_forwards) for mine in steps.values() for s in mine}
    if len(kinds) != 1:
        raise UserError(f"{decoder} in {folder} has steps of widths {sorted(kinds)}; one is needed")
    [(width, forwards)] = kinds
    return AcceptanceTrace(
        schema=SCHEMA,
        source=record.name,
        weights=record.header.weights["name"],
        decoder=decoder,
        query_width=width,
        forwards_per_step=forwards,
        problems=tuple(
            ProblemTrace(
                problem=f"{row.task}/{row.problem}/{row.repeat}",
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
                decode_tokens=row.decode_tokens,
                committed=tuple(len(step.committed) for step in steps.get(row.key, ())),
                kv_lens=tuple(step.kv_len for step in steps.get(row.key, ())),
            )
            for row in rows
        ),
    )


def simulate(
    histogram: Mapping[int, float],
    *,
    decoder: str,
    query_width: int,
    prompt_tokens: int,
    output_tokens: int,
    outputs: int = 1,
    forwards_per_step: int = 1,
    seed: int = 0,
) -> AcceptanceTrace:
    """Steps that commit r tokens with weight histogram[r], independently, until output_tokens."""
    _check_histogram(histogram)
    rng = random.Random(seed)
    problems = []
    for index in range(outputs):
        committed: list[int] = []
        kv_lens: list[int] = []
        made = 1  # the prefill's
        while made < output_tokens:
            kv_lens.append(prompt_tokens + made - 1)
            committed.append(rng.choices(list(histogram), list(histogram.values()))[0])
            made += committed[-1]
        problems.append(
            ProblemTrace(
                problem=f"simulated/{index}",
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                decode_tokens=output_tokens - 1,
                committed=tuple(committed),
                kv_lens=tuple(kv_lens),
            )
        )
    return AcceptanceTrace(
        schema=SCHEMA,
        source=f"simulated, seed {seed}, {dict(histogram)}",
        weights="none",
        decoder=decoder,
        query_width=query_width,
        forwards_per_step=forwards_per_step,
        problems=tuple(problems),
    )


def _check_histogram(histogram: Mapping[int, float]) -> None:
    if not histogram or min(histogram) < 1 or sum(histogram.values()) <= 0:
        raise UserError(f"histogram {dict(histogram)}: give counts from 1 with weights above 0")


def save(trace: AcceptanceTrace, path: Path) -> None:
    """The trace as one JSON file."""
    write_whole(path, json.dumps(dataclasses.asdict(trace), ensure_ascii=False) + "\n")


def read(path: Path) -> AcceptanceTrace:
    """A trace from its JSON file; UserError if it is none, or of another schema."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA:
            raise UserError(f"{path} has trace schema {values['schema']!r}, not {SCHEMA}")
        problems = tuple(from_dict(ProblemTrace, problem) for problem in values["problems"])
        return AcceptanceTrace(**{**values, "problems": problems})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no acceptance trace ({error}); make it again") from error


class StepTimes:
    """Seconds of a step by KV length, linear between measured lengths and flat outside them.

    name: what was timed. Widths are never interpolated.
    """

    def __init__(self, seconds: Mapping[int, float], name: str) -> None:
        if not seconds:
            raise UserError(f"no step times of {name}: measure it with bench slots")
        self.kv_lens = sorted(seconds)
        self.seconds = [seconds[kv_len] for kv_len in self.kv_lens]
        self.name = name

    def at(self, kv_len: int) -> float:
        index = bisect_left(self.kv_lens, kv_len)
        if index == 0:
            return self.seconds[0]
        if index == len(self.kv_lens):
            return self.seconds[-1]
        left, right = self.kv_lens[index - 1], self.kv_lens[index]
        share = (kv_len - left) / (right - left)
        return self.seconds[index - 1] + share * (self.seconds[index] - self.seconds[index - 1])

    def outside(self, kv_len: int) -> bool:
        """Whether no two measured lengths enclose it."""
        return not self.kv_lens[0] <= kv_len <= self.kv_lens[-1]


def step_times(
    found: Sequence[Point], *, decoder: str, width: int, forwards: int = 1, weights: str
) -> StepTimes:
    """Of a width record's points at batch 1: the decoder's own steps by the host clock, else bare
    forwards of exactly that width (times the forwards of a step); UserError if neither is there."""
    mine = [p for p in found if p.status == OK and p.batch == 1 and p.weights == weights]
    steps = {p.kv_len: p.host_s for p in mine if p.what == decoder and p.host_s is not None}
    if steps:
        return StepTimes(steps, f"steps of {decoder}")
    bare = {p.kv_len: forwards * p.host_s for p in mine
            if p.what == f"forward:{width}" and p.host_s is not None}  # fmt: skip
    if not bare:
        raise UserError(
            f"the width record has neither steps of {decoder} nor width {width} for {weights}; "
            f"add --decoders {decoder} or {width} to --widths"
        )
    return StepTimes(bare, f"bare forwards of width {width}")


@dataclass(frozen=True, kw_only=True)
class PredictedSpeed:
    """Decode speed a trace would have with given step times; `speedup` is over `ar` there.

    outside: share of steps whose KV length no measured lengths enclose. Always "predicted".
    """

    tokens_per_s: float
    ar_tokens_per_s: float
    speedup: float
    t_per_nfe: float
    outside: float
    times: str


def predict(trace: AcceptanceTrace, times: StepTimes, ar: StepTimes) -> PredictedSpeed:
    """tokens/s = kept decode tokens over the summed step times; AR pays one step for each token of
    an output but the first, which its prefill makes."""
    tokens = trace.decode_tokens
    if not tokens or not trace.steps:
        raise UserError(f"the trace of {trace.source} has no decode tokens: nothing to predict")
    reads = [kv_len for problem in trace.problems for kv_len in problem.kv_lens]
    own = sum(times.at(kv_len) for kv_len in reads)
    ar_reads = [
        problem.prompt_tokens + index
        for problem in trace.problems
        for index in range(problem.output_tokens - 1)
    ]
    if not ar_reads:
        raise UserError(f"the trace of {trace.source} has outputs of one token: AR takes no step")
    ar_s = sum(map(ar.at, ar_reads))
    return PredictedSpeed(
        tokens_per_s=tokens / own,
        ar_tokens_per_s=len(ar_reads) / ar_s,
        speedup=(tokens / own) / (len(ar_reads) / ar_s),
        t_per_nfe=tokens / (trace.steps * trace.forwards_per_step),
        outside=sum(times.outside(kv_len) for kv_len in reads) / len(reads),
        times=f"{times.name}; ar: {ar.name}",
    )


class SimulatedAcceptance:
    """A decoder that does all its work and then commits a drawn number of tokens instead.

    Its token ids mean nothing; its seconds are the engine's at that acceptance. Wraps decoders
    whose state holds a KVCache and which write at least max(histogram) tokens a step.
    """

    lossless = False

    def __init__(self, decoder: Any, histogram: Mapping[int, float], *, seed: int = 0) -> None:
        _check_histogram(histogram)
        self.inner, self.model = decoder, decoder.model
        self.name = f"simulated_{decoder.name}"
        self.params, self.scratch = decoder.params, decoder.scratch
        self.counts, self.weights = list(histogram), list(histogram.values())
        self.rng = random.Random(seed)

    def prefill(self, prompts: list[list[int]], **settings: Any) -> tuple[Any, Any]:
        """The wrapped decoder's own."""
        return self.inner.prefill(prompts, **settings)

    def step(self, state: Any) -> Any:
        """The wrapped step, its committed counts replaced by drawn ones (same for the cache)."""
        trace = self.inner.step(state)
        if max(self.counts) > trace.query_width:
            raise UserError(
                f"simulated acceptance of {max(self.counts)} tokens, but a step of "
                f"{self.inner.name} sends {trace.query_width}: lower it"
            )
        drawn = [self.rng.choices(self.counts, self.weights)[0] if done else 0
                 for done in trace.committed]  # fmt: skip
        gap = [n - len(done) for n, done in zip(drawn, trace.committed, strict=True)]
        state.cache.advance(gap)
        committed = tuple(
            (*done, *(done[-1:] * n))[:n] for done, n in zip(trace.committed, drawn, strict=True)
        )
        accepted = tuple(max(0, min(n - 1, d)) for n, d in zip(drawn, trace.drafted, strict=True))
        return dataclasses.replace(trace, committed=committed, accepted=accepted)
