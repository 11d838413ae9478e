"""`bench report`: one page of one or more records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    report = verbs.add_parser("report", help="one page of one or more records: HTML and Markdown")
    report.add_argument("records", type=Path, nargs="+", metavar="RECORD")
    report.add_argument("--out", type=Path, help="folder for the page (default: a sole record's)")
    report.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Write the page."""
    from bench.report.build import write_report

    for path in write_report(args.records, args.out):
        print(f"report: {path}")
    return 0
