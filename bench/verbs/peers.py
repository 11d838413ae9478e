"""`bench peers`: time our AR against transformers' generate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tidar_ref.errors import UserError


def add(verbs: Any) -> None:
    """The verb and its options."""
    peers = verbs.add_parser("peers", help="time our AR against transformers' generate")
    peers.add_argument("--weights", default="embedded")
    peers.add_argument("--device", default="cpu")
    peers.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    peers.add_argument("--threads", type=int)
    peers.add_argument("--max-new-tokens", type=int, default=64)
    peers.add_argument("--rounds", type=int, default=5)
    peers.add_argument("--out", type=Path)
    peers.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Measure and print; UserError for counts below 1."""
    from bench import peers

    for name in ("rounds", "max_new_tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is below 1; give at least 1")
    peers.main(
        weights=args.weights,
        device=args.device,
        dtypes=tuple(args.dtypes.split(",")),
        threads=args.threads,
        max_new_tokens=args.max_new_tokens,
        rounds=args.rounds,
        out=args.out,
    )
    return 0
