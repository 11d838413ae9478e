"""`bench slots`: what a forward costs by width, KV length and batch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.verbs import RUNS


def add(verbs: Any) -> None:
    """The verb and its options."""
    slots = verbs.add_parser("slots", help="what a forward costs by width, KV length and batch")
    slots.add_argument("--weights", default="embedded", help="as for run; random:SHAPE for speed")
    slots.add_argument("--widths", default="1,2,4,8,16,20,32,64,72,128,256,272,512")
    slots.add_argument("--kv", default="256,1024", help="cached tokens, comma-separated")
    slots.add_argument("--batch", default="1", help="sequences, comma-separated")
    slots.add_argument("--decoders", nargs="*", help="whose steps to time (default: ar, tidar)")
    slots.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16")
    slots.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    slots.add_argument("--out", type=Path, help="record folder; the same command continues it")
    slots.add_argument("--budget-seconds", type=float, help="stop cleanly after this long")
    slots.add_argument("--rounds", type=int, default=8, help="visits of each cell")
    slots.add_argument("--samples", type=int, default=4, help="timed runs a visit")
    slots.add_argument("--seed", type=int, default=0)
    slots.add_argument("--attention", default="sdpa", help="sdpa, two_part or flex")
    slots.add_argument("--compile", action="store_true", help="layers through torch.compile")
    slots.add_argument(
        "--telemetry",
        action=argparse.BooleanOptionalAction,
        help="watch power, clocks and counters (default: on a GPU)",
    )
    slots.add_argument("--no-split", action="store_true", help="skip attention, MLP, head, rest")
    slots.add_argument("--ceilings", action="store_true", help="measure copy, read, matrix rates")
    slots.add_argument("--tables", type=Path, metavar="RECORD", help="only make its tables again")
    slots.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Measure, or make a record's tables again."""
    from bench.slots.commands import slots

    slots(args, runs=RUNS, argv=words)
    return 0
