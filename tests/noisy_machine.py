"""A simulated machine with bad neighbours, to try the regression gate on: seeded, no real clock.

`python tests/noisy_machine.py` prints the tables of docs/regress.md: how often the gate as it ships
(same driver, same stopping rule, same verdict) catches a planted slowdown or cries wolf.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a program

from bench.compare import interleaved, sides
from bench.compare.estimate import PASS, REGRESSION, Change, change, verdict
from bench.compare.verdict import Comparison, all_decided, compare

AR_S = 0.015  # one generation of AR on a quiet machine
DECODERS = {"tidar": 0.030, "tidar_two_forward": 0.037, "prompt_lookup": 0.014}
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What a machine does to a generation's seconds; spreads are of the logarithm.

    tail: Student t, 3 degrees of freedom, per generation; it only ever adds time, unless symmetric
    (faster than the code allows: no machine does that). drift: random walk per generation.
    spike: chance of 2x to 20x, one generation. burst: chance per generation that a neighbour comes
    (1.3x to 3x, uneven), who leaves with chance 0.05. process: persistent luck of one process.
    """

    tail: float = 0.03
    symmetric: bool = False
    drift: float = 0.0
    spike: float = 0.0
    burst: float = 0.0
    process: float = 0.01


MACHINES = {
    "quiet": Noise(),
    "heavy tails": Noise(tail=0.10),
    "drifting": Noise(drift=0.02),
    "spikes": Noise(spike=0.08),
    "neighbours": Noise(drift=0.01, spike=0.08, burst=0.01),
    "unlucky processes": Noise(drift=0.01, spike=0.02, burst=0.003, process=0.02),
}
HOPELESS = Noise(tail=0.10, symmetric=True)


class Machine:
    """The state both sides share: drift and whoever else is running."""

    def __init__(self, noise: Noise, rng: random.Random) -> None:
        self.noise, self.rng = noise, rng
        self.drift, self.neighbour = 0.0, 0.0

    def factor(self) -> float:
        """How much longer the next generation takes than on an undisturbed machine."""
        noise, rng = self.noise, self.rng
        self.drift += rng.gauss(0, noise.drift)
        if self.neighbour:
            if rng.random() < 0.05:
                self.neighbour = 0.0
        elif rng.random() < noise.burst:
            self.neighbour = rng.uniform(math.log(1.3), math.log(3))
        tail = noise.tail * student(rng)
        log = self.drift + (tail if noise.symmetric else abs(tail))
        if self.neighbour:
            log += self.neighbour + rng.gauss(0, 0.15)
        if rng.random() < noise.spike:
            log += rng.uniform(math.log(2), math.log(20))
        return math.exp(log)


def student(rng: random.Random) -> float:
    """A draw of Student's t with 3 degrees of freedom."""
    return rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.5, 2) / 3)


class FakeSide:
    """A checkout on a `Machine`: obeys `interleaved.Side`; `slower` multiplies seconds."""

    def __init__(self, machine: Machine, slower: dict[str, float]) -> None:
        self.machine = machine
        self.labels: Sequence[str] = list(DECODERS)
        luck = {name: machine.rng.gauss(0, machine.noise.process) for name in ("ar", *DECODERS)}
        self.seconds = {
            name: seconds * slower.get(name, 1.0) * math.exp(luck[name])
            for name, seconds in {"ar": AR_S, **DECODERS}.items()
        }

    def facts(self) -> dict[str, Any]:
        return {
            "root": "",
            "definitions": 1,
            "commit": None,
            "dirty": None,
            "environment": {"cpu": "simulated"},
            "settings": {"timed_tokens": 16, "timed_prompt": "p"},
            "decoders": {name: {} for name in ("ar", *DECODERS)},
            "not_measured": {},
        }

    def counters(self) -> dict[str, dict[str, dict[str, Any]]]:
        counts = {"decode_forwards": 15, "output_tokens": 16, "decode_tokens": 15}
        return {name: {"p": dict(counts)} for name in ("ar", *DECODERS)}

    def turn(self, label: str, *, ar_first: bool) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {"ar": [], label: []}
        for name in (("ar", label) if ar_first else (label, "ar")) * REPEATS:
            seconds[name].append(self.seconds[name] * self.machine.factor())
        return {"ar_s": seconds["ar"], "own_s": seconds[label]}


def judge(noise: Noise, slower: dict[str, float], seed: int) -> tuple[Comparison, int]:
    """One whole `make regress` on a simulated machine; gives the answer and the processes used."""
    machine = Machine(noise, random.Random(seed))
    answers: list[Comparison] = []

    def enough(base: Any, head: Any) -> bool:
        pair = sides.from_regress(base, "base"), sides.from_regress(head, "head")
        answers.append(compare(*pair, tolerance=0.05))
        return all_decided(answers[-1])

    interleaved.measure_pair(
        lambda: (FakeSide(machine, {}), FakeSide(machine, slower)), enough=enough
    )
    return answers[-1], len(answers)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of `trials`: runs that called `planted` slower, runs that called anything else slower, runs
    that left something undecided, and the mean number of process pairs."""

    trials: int
    caught: int
    wolf: int
    undecided: int
    processes: float


def tally(noise: Noise, slower: dict[str, float], trials: int, seed: int = 0) -> Tally:
    """Many runs of the gate; `slower` names what is planted in head (see `planted`)."""
    caught = wolf = undecided = used = 0
    for trial in range(trials):
        found, processes = judge(noise, slower, seed * 100_000 + trial)
        called = {row.decoder for row in found.timings if row.verdict == REGRESSION}
        caught += bool(called & planted(slower))
        wolf += bool(called - planted(slower))
        undecided += bool(found.undecided)
        used += processes
    return Tally(
        trials=trials,
        caught=caught,
        wolf=wolf,
        undecided=undecided,
        processes=used / trials,
    )


def planted(slower: dict[str, float]) -> set[str]:
    """The rows that may alarm. Slower AR shows as AR alone: ratios over it only rise."""
    return {"ar"} if "ar" in slower else set(slower)


NO_CHANGE: dict[str, float] = {}
ONE_DECODER = {"tidar": 1.10}
EVERYTHING = {name: 1.10 for name in ("ar", *DECODERS)}


def pairs_of(
    noise: Noise, slower: dict[str, float], seed: int, best: Callable[[Sequence[float]], float]
) -> list[float]:
    """Log changes of tidar's speedup after FEWEST restarts, with `best` of the three in a turn."""
    machine = Machine(noise, random.Random(seed))
    base, head = interleaved.measure_pair(
        lambda: (FakeSide(machine, {}), FakeSide(machine, slower)),
        enough=lambda *_: True,
    )
    logs = [
        {
            t.place: math.log(best(t.ar_s) / best(t.own_s))
            for t in side.turns
            if t.decoder == "tidar"
        }
        for side in (base, head)
    ]
    return [logs[1][place] - logs[0][place] for place in logs[0]]


def t_interval(values: list[float]) -> Change:
    """Student's interval of the mean (40 pairs)."""
    centre, half = statistics.fmean(values), 2.023 * statistics.stdev(values) / len(values) ** 0.5
    return _change(centre, centre - half, centre + half, len(values))


def sign_interval(values: list[float]) -> Change:
    """The median with the sign test's interval (40 pairs: the 14th from either end)."""
    ordered = sorted(values)
    return _change(statistics.median(values), ordered[13], ordered[-14], len(values))


def bootstrap_interval(values: list[float]) -> Change:
    """The median with a percentile bootstrap, 500 draws."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(500))
    return _change(statistics.median(values), medians[12], medians[-13], len(values))


def blockwise(values: list[float]) -> Change:
    """What ships, on base-head-head-base averaged to one pair."""
    found = change([(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)])
    assert found
    return found


def _change(value: float, low: float, high: float, n: int) -> Change:
    return Change(value=math.exp(value), low=math.exp(low), high=math.exp(high), n=n)


METHODS: dict[str, tuple[Callable[[Sequence[float]], float], Callable[..., Change | None]]] = {
    "fastest of 3, signed-rank interval (ships)": (min, change),
    "median of 3, signed-rank interval": (statistics.median, change),
    "fastest of 3, two pairs averaged": (min, blockwise),
    "fastest of 3, t interval": (min, t_interval),
    "fastest of 3, sign-test interval": (min, sign_interval),
    "fastest of 3, bootstrapped median": (min, bootstrap_interval),
}


def methods(trials: int) -> None:
    """Print the table of estimators: tidar among neighbours, 40 pairs, no further turns."""
    print("| estimate from 40 pairs | tidar 10 %: caught | no change: alarms | passed |")
    print("| --- | --- | --- | --- |")
    noise = MACHINES["neighbours"]
    for name, (best, estimate) in METHODS.items():
        found = [
            [verdict(estimate(pairs_of(noise, slower, seed, best)), 0.05) for seed in range(trials)]
            for slower in (ONE_DECODER, NO_CHANGE)
        ]
        counts = (found[0].count(REGRESSION), found[1].count(REGRESSION), found[1].count(PASS))
        print("| " + " | ".join((name, *(f"{n} of {trials}" for n in counts))) + " |", flush=True)


def machines(trials: int) -> None:
    """Print the table of machines: the whole gate, as it ships."""
    print("| machine | planted | caught | false alarms | left undecided | process pairs, mean |")
    print("| --- | --- | --- | --- | --- | --- |")
    cases = (("nothing", NO_CHANGE), ("tidar 10 %", ONE_DECODER), ("everything 10 %", EVERYTHING))
    for name, noise in {**MACHINES, "symmetric 10 % tails": HOPELESS}.items():
        for what, slower in cases:
            t = tally(noise, slower, trials)
            caught = f"{t.caught} of {trials}" if slower else ""
            cells = (name, what, caught, f"{t.wolf} of {trials}", f"{t.undecided} of {trials}")
            print("| " + " | ".join((*cells, f"{t.processes:.1f}")) + " |", flush=True)


if __name__ == "__main__":
    machines(trials=100)
    print()
    methods(trials=100)
