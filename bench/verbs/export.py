"""`bench export`: a record in lm-eval's or evalplus' own files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    export = verbs.add_parser("export", help="a record in lm-eval's or evalplus' own files")
    export.add_argument("record", type=Path, metavar="RECORD")
    export.add_argument("--format", choices=("lm-eval", "evalplus"), required=True)
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--data-dir", type=Path, help="folder with the benchmark files")
    export.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Write the files."""
    from bench.export import export

    for path in export(args.record, args.format, args.out, data_dir=args.data_dir):
        print(f"written: {path}")
    return 0
