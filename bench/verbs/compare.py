"""`bench compare`: two records: counters equal, speedups not lower?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.compare.verdict import Comparison


def add(verbs: Any) -> None:
    """The verb and its options."""
    compare = verbs.add_parser("compare", help="two records: counters equal, speedups not lower?")
    compare.add_argument("base", type=Path, metavar="BASE", help="regress record or run folder")
    compare.add_argument("head", type=Path, metavar="HEAD")
    gate_options(compare)
    compare.set_defaults(action=act)


def gate_options(verb: argparse.ArgumentParser) -> None:
    """What `compare` and `regress` both take."""
    verb.add_argument("--tolerance", type=float, default=0.05, help="share a speed may fall by")
    verb.add_argument("--strict", action="store_true", help="undecided or flagged ones fail too")
    verb.add_argument("--junit", type=Path, help="write JUnit XML here")
    verb.add_argument("--gab", type=Path, help="write github-action-benchmark JSON here")


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Print the comparison; 1 if the gate finds a regression."""
    from bench.compare import commands

    return tell(commands.compare_records(args.base, args.head, args.tolerance), args)


def tell(found: Comparison, args: argparse.Namespace) -> int:
    """Print a comparison, write the files asked for, and give the exit code."""
    from bench.compare import writers

    print(writers.to_text(found), end="")
    for path in writers.write(found, junit=args.junit, gab=args.gab):
        print(f"written: {path}")
    return found.exit_code(strict=args.strict)
