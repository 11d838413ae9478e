"""`bench reproduce --profile h100-steps`: what ten minutes on an H100 should measure, best first.

Random weights, no network. A budget cuts off the end of the list and the same command continues.
`rehearsal` is the same list on a CPU at a tiny shape, so that a GPU run is never the first run.
Expected seconds are estimates from counted bytes, not measurements. No torch.
"""

from __future__ import annotations

import dataclasses

from bench.slots.plan import Job, Plan

# The published figure's widths, and TiDAR's.
FIGURE1_WIDTHS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
CURVE_WIDTHS = (1, 2, 4, 8, 16, 20, 32, 64, 72, 128, 256, 272, 512)
DENSE = tuple(f"tidar:block_len={k}" for k in (4, 8, 16))
GRAPHED = ("ar:graphs=8", *(f"{label},graphs=8" for label in DENSE))
AT_BETA_0 = "tidar:block_len=16,beta=0"  # the paper's 8B rows trust the diffusion logits
VARIANTS = (
    "tidar:block_len=16,outcomes=1-4-8-16",
    "tidar:block_len=8,outcomes=1-8",
    "tidar_two_forward:block_len=8",
    "tidar_two_forward:block_len=16",
)
SMALL, LARGE, FIGURE1 = "random:qwen2.5-1.5b", "random:qwen3-8b", "random:qwen3-32b"


def _job(name: str, weights: str, expected_s: float, **settings: object) -> Job:
    return Job(name=name, weights=weights, expected_s=expected_s, **settings)  # type: ignore[arg-type]


JOBS = (
    _job("steps-8b", LARGE, 60, kv_lens=(1024,),
         decoders=("ar", *GRAPHED, *DENSE, AT_BETA_0, *VARIANTS), rounds=8, samples=10),
    _job("steps-1.5b", SMALL, 50, kv_lens=(1024,), decoders=("ar", *GRAPHED, *DENSE, *VARIANTS),
         rounds=8, samples=10),
    _job("figure1-32b", FIGURE1, 90, kv_lens=(1024, 2048, 4096), widths=FIGURE1_WIDTHS,
         rounds=5, samples=4, split=True),
    _job("two-part-8b", LARGE, 30, kv_lens=(1024, 4096), attention="two_part",
         decoders=("ar", GRAPHED[0], DENSE[2], GRAPHED[3]), widths=(1, 20, 72, 272), rounds=5,
         samples=5),
    _job("compiled-8b", LARGE, 40, kv_lens=(1024,), compiled=True,
         decoders=("ar", GRAPHED[0], *DENSE[1:], *GRAPHED[2:]), rounds=5, samples=5),
    _job("flex-8b", LARGE, 25, kv_lens=(1024, 4096), attention="flex",
         decoders=("ar", GRAPHED[0], DENSE[2], GRAPHED[3]), widths=(1, 20, 72, 272), rounds=4,
         samples=4),
    _job("curve-8b", LARGE, 60, kv_lens=(1024, 2048, 4096), decoders=("ar", *DENSE),
        widths=CURVE_WIDTHS, rounds=5,
         samples=5, split=True),
    _job("batch16-8b", LARGE, 40, kv_lens=(1024,), decoders=("ar", *DENSE, VARIANTS[2]), batch=16,
         rounds=5, samples=5),
    _job("context-8b", LARGE, 70, kv_lens=(4096, 16384, 32768), decoders=("ar", *DENSE,
         VARIANTS[3]), rounds=5, samples=5),
    _job("curve-1.5b", SMALL, 50, kv_lens=(1024, 2048, 4096), decoders=("ar", *DENSE),
        widths=CURVE_WIDTHS, rounds=5,
         samples=5, split=True),
    _job("batch64-8b", LARGE, 45, kv_lens=(1024,), decoders=("ar", *DENSE), batch=64, rounds=3,
         samples=4),
    _job("batch4-8b", LARGE, 25, kv_lens=(1024,), decoders=("ar", *DENSE), batch=4, rounds=4,
         samples=5),
    _job("batch16-1.5b", SMALL, 30, kv_lens=(1024,), decoders=("ar", *DENSE), batch=16, rounds=5,
         samples=5),
    _job("batch64-1.5b", SMALL, 30, kv_lens=(1024,), decoders=("ar", *DENSE), batch=64, rounds=3,
         samples=4),
    _job("context-1.5b", SMALL, 25, kv_lens=(4096, 16384, 32768), decoders=("ar", *DENSE),
         rounds=3, samples=5),
    _job("batch16-context-8b", LARGE, 45, kv_lens=(4096,), decoders=("ar", *DENSE[1:]), batch=16,
         rounds=3, samples=4),
)  # fmt: skip


def h100_steps(device: str = "cuda") -> Plan:
    """The run book: 16 jobs, under 12 minutes by its own estimate."""
    return Plan(name="h100-steps", jobs=JOBS, device=device, ceilings=True, figure1="figure1-32b")


def rehearsal() -> Plan:
    """The same jobs at shape `tiny` on a CPU, with fewer lengths: proves the list, not speed.

    Graphed steps become static ones: the same code, not captured, under a label that says so.
    Nothing is compiled: a compiler would take longer than all the rest.
    """
    jobs = tuple(
        dataclasses.replace(
            job,
            weights="random:tiny",
            dtype="float32",
            kv_lens=tuple(kv // 64 for kv in job.kv_lens)[:2] if job.widths else (16,),
            widths=tuple(w for w in job.widths if w in (1, 8, 20, 64)),
            decoders=_quick(job),
            batch=min(job.batch, 2),
            rounds=2,
            samples=1,
            compiled=False,
        )
        for job in JOBS
    )
    return dataclasses.replace(h100_steps("cpu"), name="h100-steps-rehearsal", jobs=jobs)


def _quick(job: Job) -> tuple[str, ...]:
    """All decoders in the two jobs of steps; elsewhere the wide ones would only cost time."""
    if job.name.startswith("steps"):
        return tuple(label.replace("graphs=", "static=") for label in job.decoders)
    return tuple(label for label in job.decoders if label in ("ar", DENSE[0]))


def expected_s(plan: Plan) -> float:
    """Seconds the jobs expect on the machine the plan was written for."""
    return sum(job.expected_s or 0.0 for job in plan.jobs)
