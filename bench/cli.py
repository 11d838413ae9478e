"""The command line: assembles the parser from bench/verbs/ and runs one verb.

Bad input is one sentence and exit code 2, an interrupted run says how to go on and exits 130, an
audit that finds a bug and a gate that finds a regression exit 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from bench.verbs import (
    audit,
    autotune,
    claims,
    compare,
    doctor,
    export,
    figures,
    peers,
    regress,
    report,
    run,
    slots,
    tables,
    train,
)
from tidar_ref.errors import UserError

# In the order of `--help`.
VERBS = (
    run, tables, report, autotune, audit, doctor, compare, regress, claims, figures, export, train,
    slots, peers,
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    top = _Parser(prog="python -m bench", description="TiDAR benchmarks")
    verbs = top.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    for verb in VERBS:
        verb.add(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; exit code: 0, 1 for a finding, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(words)
        return args.action(args, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
