"""`bench claims`: every published number, ours beside it, a verdict."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    claims = verbs.add_parser("claims", help="every published number, ours beside it, a verdict")
    claims.add_argument("records", type=Path, nargs="*", metavar="RECORD", help="besides results/")
    claims.add_argument("--format", choices=("table", "csv", "json"), default="table")
    claims.add_argument("--source", help='only this source, e.g. "Table 2" or "Figure 4"')
    claims.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Print the page."""
    from bench.claims_verdict import page

    print(page(args.records, form=args.format, source=args.source), end="")
    return 0
