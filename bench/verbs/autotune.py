"""`bench autotune`: which K and which outcomes would be fastest for a record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    tune = verbs.add_parser("autotune", help="which K and outcomes would be fastest for a record")
    tune.add_argument("record", type=Path, metavar="RECORD")
    tune.add_argument(
        "--widths",
        type=Path,
        help="record of `bench slots`, or CSV: width,seconds (default: the record's own)",
    )
    tune.add_argument("--kv", type=int, metavar="N", help="width record: cached tokens, or nearest")
    tune.add_argument("--job", help="width record: whose curve, where several fit")
    tune.add_argument("--decoder", help="dense tidar run to learn acceptance from: the largest K")
    tune.add_argument("--task", help="learn from and compare on this task only")
    tune.add_argument("--top", type=int, default=10, help="settings to print")
    tune.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Print predictions beside what the record measured."""
    from bench.autotune import report

    text = report(
        args.record,
        widths=args.widths,
        decoder=args.decoder,
        task=args.task,
        top=args.top,
        kv_len=args.kv,
        job=args.job,
    )
    print(text, end="")
    return 0
