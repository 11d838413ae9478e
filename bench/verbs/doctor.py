"""`bench doctor`: what this machine can run, and how to get the rest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb and its options."""
    doctor = verbs.add_parser("doctor", help="what this machine can run, and how to get the rest")
    doctor.add_argument("--data-dir", type=Path)
    doctor.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Print what was found."""
    from bench.doctor import report

    print(report(args.data_dir))
    return 0
