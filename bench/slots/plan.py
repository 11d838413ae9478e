"""What to measure, as plain data: jobs of cells on one set of weights. No torch.

A cell is a bare forward of w new tokens ("forward:w") or a decoder's own step (its label, as
--decoders takes it) behind kv_len cached tokens. Cells of a job are visited in rounds, shuffled
anew each round with the plan's seed, so that a slow minute falls on all of them alike.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tidar_ref.errors import UserError

FORWARD = "forward:"
WIDTHS = (1, 2, 4, 8, 16, 20, 32, 64, 72, 128, 256, 272, 512)
ATTENTION = ("sdpa", "two_part", "flex")
DECODERS = ("ar", "tidar:block_len=4", "tidar:block_len=8", "tidar:block_len=16")
# A decoder that may not exist in every checkout is asked for all the same: its absence is recorded.


@dataclass(frozen=True, kw_only=True)
class Job:
    """One set of cells: `widths` x `kv_lens` forwards and `decoders` x `kv_lens` steps.

    rounds visits a cell, `samples` timed runs a visit. split: time attention, MLP, head and rest
    apart in a pass of its own. attention: "sdpa", "two_part" (`tidar_ref.attention`) or "flex"
    (`tidar_ref.flex_decode`). compiled: layers through torch.compile, all but attention and cache.
    expected_s: on the machine the plan was written for (seconds).
    """

    name: str
    weights: str
    kv_lens: tuple[int, ...]
    widths: tuple[int, ...] = ()
    decoders: tuple[str, ...] = ()
    batch: int = 1
    dtype: str = "bfloat16"
    rounds: int = 5
    samples: int = 4
    split: bool = False
    attention: str = "sdpa"
    compiled: bool = False
    expected_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("kv_lens", "widths"):
            bad = [value for value in getattr(self, name) if value < 1]
            if bad:
                raise UserError(f"{name} of {self.name} holds {bad[0]}: give numbers from 1")
        for name in ("batch", "rounds", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; give at least 1")
        if self.attention not in ATTENTION:
            raise UserError(
                f"attention {self.attention!r} is unknown: use one of {', '.join(ATTENTION)}"
            )
        if self.compiled and self.split:
            raise UserError(f"job {self.name} is compiled, so its parts have no seams: no split")
        if not self.kv_lens or not (self.widths or self.decoders):
            raise UserError(
                f"job {self.name} has no cells: give KV lengths, and widths or decoders"
            )

    @property
    def cells(self) -> list[Cell]:
        """All cells, decoders' steps behind forwards."""
        names = [f"{FORWARD}{width}" for width in dict.fromkeys(self.widths)]
        return [
            Cell(job=self.name, what=what, kv_len=kv_len)
            for what in (*names, *dict.fromkeys(self.decoders))
            for kv_len in dict.fromkeys(self.kv_lens)
        ]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to time; `key` is unique in a plan."""

    job: str
    what: str
    kv_len: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.job, self.what, self.kv_len)

    @property
    def width(self) -> int | None:
        """Query width of a forward; None for a decoder, which knows its own."""
        return int(self.what.removeprefix(FORWARD)) if self.what.startswith(FORWARD) else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Jobs in the order of their value: a budget cuts off the end. figure1: the job drawn as such.

    ceilings: measure copy, read and matrix rates of the device first.
    """

    name: str
    jobs: tuple[Job, ...]
    device: str = "cpu"
    seed: int = 0
    ceilings: bool = False
    figure1: str | None = None

    def order(self, job: Job, round_: int) -> list[Cell]:
        """The job's cells as round `round_` visits them."""
        cells = job.cells
        random.Random(f"{self.seed}/{job.name}/{round_}").shuffle(cells)
        return cells

    @property
    def visits(self) -> int:
        """Visits of a finished run (count)."""
        return sum(len(job.cells) * job.rounds for job in self.jobs)


def slots_plan(
    *,
    weights: str,
    widths: tuple[int, ...],
    kv_lens: tuple[int, ...],
    batches: tuple[int, ...],
    decoders: tuple[str, ...],
    dtype: str,
    device: str,
    rounds: int,
    samples: int,
    seed: int,
    ceilings: bool,
    split: bool,
    attention: str = "sdpa",
    compiled: bool = False,
) -> Plan:
    """The plan of `bench slots`: one job per batch size."""
    if attention == "flex" and device == "cpu":
        raise UserError(
            "--attention flex has no speed on a CPU, only a proof; take sdpa or two_part there"
        )
    if 1 not in widths:
        raise UserError("--widths lacks 1, to which every width is compared; add it")
    jobs = tuple(
        Job(
            name=f"batch{batch}", weights=weights, kv_lens=kv_lens, widths=widths,
            decoders=decoders, batch=batch, dtype=dtype, rounds=rounds, samples=samples,
            split=split, attention=attention, compiled=compiled,
        )
        for batch in dict.fromkeys(batches)
    )  # fmt: skip
    return Plan(
        name="slots", jobs=jobs, device=device, seed=seed, ceilings=ceilings, figure1=jobs[0].name
    )
