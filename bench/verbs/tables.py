"""`bench tables`: make the tables of a record folder again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    tables = verbs.add_parser("tables", help="make the tables of a record folder again")
    tables.add_argument("record", type=Path, metavar="RECORD")
    tables.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Print the tables, and write them into the record."""
    from bench.tables import write_tables

    print(write_tables(args.record), end="")
    return 0
