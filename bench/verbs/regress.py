"""`bench regress`: measure for `compare`, or against a git ref."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.verbs import RUNS
from bench.verbs.compare import gate_options, tell
from tidar_ref.errors import UserError


def add(verbs: Any) -> None:
    """The verb and its options."""
    regress = verbs.add_parser("regress", help="measure for `compare`, or against a git ref")
    regress.add_argument("--base", metavar="REF", help="git ref to measure interleaved with this")
    regress.add_argument("--out", type=Path, help=f"file or folder (default: under {RUNS}/)")
    regress.add_argument("--rounds", type=int, default=40, help="turns per decoder, without --base")
    regress.add_argument("--blocks", type=int, default=5, help="A B B A blocks per process")
    regress.add_argument("--processes", type=int, default=16, help="most restarts of both sides")
    regress.add_argument("--decoders", nargs="+", help="default: all, and some variants")
    regress.add_argument("--device", default="cpu")
    regress.add_argument("--threads", type=int, default=1)
    gate_options(regress)
    regress.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Measure; with --base print the comparison, 1 if the gate finds a regression."""
    from bench.compare import commands

    def say(line: str) -> None:
        print(line, flush=True)

    how = commands.Measuring(device=args.device, threads=args.threads, decoders=args.decoders)
    out = args.out or commands.default_out(RUNS)
    if args.base is None:
        if args.junit or args.gab:
            raise UserError("--junit and --gab need something to compare; add --base REF")
        record, file = commands.regress_alone(how, rounds=args.rounds, out=out)
        for label, reason in record.not_measured.items():
            say(f"not measured: {label}: {reason}")
        say(f"record: {file} ({', '.join(record.decoders)})")
        return 0
    found, files = commands.regress_against(
        args.base,
        how,
        out=out,
        tolerance=args.tolerance,
        blocks=args.blocks,
        most=args.processes,
        say=say,
    )
    say("records: " + " ".join(map(str, files)))
    return tell(found, args)
