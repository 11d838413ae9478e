"""`bench audit`: do a record's lossless decoders give ar's tokens?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    audit = verbs.add_parser("audit", help="do a record's lossless decoders give ar's tokens?")
    audit.add_argument("record", type=Path, metavar="RECORD")
    audit.add_argument("--weights", help="where the record's weights are, if not where it says")
    audit.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    audit.add_argument("--data-dir", type=Path, help="folder with the benchmark files")
    audit.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Print the verdicts; 1 if one is "bug"."""
    from bench.audit import audit, to_markdown

    made = audit(args.record, weights=args.weights, device=args.device, data_dir=args.data_dir)
    print(to_markdown(made), end="")
    return 1 if made.bugs else 0
