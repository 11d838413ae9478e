"""`bench figures`: the paper's figures with ours beside them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    figures = verbs.add_parser("figures", help="the paper's figures with ours beside them")
    figures.add_argument("records", type=Path, nargs="*", metavar="RECORD")
    figures.add_argument("--out", type=Path, required=True, help="folder for SVG, PDF and PNG")
    figures.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Write every figure the records allow."""
    from bench.figures import draw_all

    for path in draw_all(args.records, args.out):
        print(f"written: {path}")
    return 0
