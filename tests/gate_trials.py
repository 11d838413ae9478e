"""The regression gate tried on this machine: real processes, a planted slowdown, many times over.

`python tests/gate_trials.py results/gate/<name>.jsonl --trials 20` alternates trials in which head
is base's own code with trials in which every dense `tidar` step of head burns 10 % more time. Base
and head are worktrees of the last commit; driver, restarts, stopping rule and verdict are those of
`make regress`. One line a trial; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a program

from bench.compare import interleaved, sides
from bench.compare.estimate import REGRESSION, UNDECIDED
from bench.compare.regress_record import RegressRecord
from bench.compare.verdict import TOLERANCE, Comparison, all_decided, compare

WORDS = ("tidar:block_len=8",)
PLANTED = 0.10
BURN = """

_step = TidarDecoder.step


def _slower(self, state):
    import time

    started = time.perf_counter()
    trace = _step(self, state)
    until = time.perf_counter() + {share} * (time.perf_counter() - started)
    while time.perf_counter() < until:
        pass
    return trace


TidarDecoder.step = _slower
"""


def judge(base: RegressRecord, head: RegressRecord) -> Comparison:
    return compare(sides.from_regress(base, "base"), sides.from_regress(head, "head"))


def trial(base: Path, head: Path) -> dict[str, Any]:
    """One run of the gate; verdicts and log changes by decoder."""
    began = time.perf_counter()
    settings = {"device": "cpu", "threads": 1, "words": list(WORDS)}
    with interleaved.workers(base, head, settings) as start:
        records = interleaved.measure_pair(start, enough=lambda *pair: all_decided(judge(*pair)))
    found = judge(*records)
    return {
        "pairs": len(records[0].turns) // len(found.timings),
        "seconds": round(time.perf_counter() - began, 1),
        "counters_differ": any(row.differing for row in found.counters),
        "verdicts": {row.decoder: row.verdict for row in found.timings},
        "ratios": {
            row.decoder: [row.change.value, row.change.low, row.change.high]
            for row in found.timings
            if row.change
        },
    }


def summary(path: Path) -> list[tuple[str, str, str, str, str]]:
    """Rows for docs/regress.md: planted, trials, called a regression, left undecided, pairs."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = []
    for planted in (0.0, PLANTED):
        mine = [line for line in lines if line.get("planted") == planted]
        if not mine:
            continue
        called = sum(REGRESSION in line["verdicts"].values() for line in mine)
        open_ = sum(
            UNDECIDED in line["verdicts"].values() and REGRESSION not in line["verdicts"].values()
            for line in mine
        )
        name = f"{WORDS[0]} {planted:.0%}" if planted else "nothing"
        pairs = sum(line["pairs"] for line in mine) / len(mine)
        rows.append((name, str(len(mine)), str(called), str(open_), f"{pairs:.0f}"))
    return rows


def main(words: Sequence[str]) -> int:
    from tqdm import tqdm

    from bench import environment

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=20, help="of each kind")
    args = parser.parse_args(words)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    commit, _ = environment.git_state(interleaved.HERE)
    header = {
        "header": {
            "commit": commit, "decoders": WORDS, "planted": PLANTED, "tolerance": TOLERANCE,
            "threads": 1, "environment": environment.describe("cpu"),
        }
    }  # fmt: skip
    if not args.out.exists():
        args.out.write_text(json.dumps(header) + "\n", encoding="utf-8")
    lines = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    if lines[0]["header"]["commit"] != commit:
        parser.error(f"{args.out} is of another commit: name a new file")
    done = {(line["trial"], line["planted"]) for line in lines[1:]}
    todo = [(i, p) for i in range(args.trials) for p in (PLANTED, 0.0) if (i, p) not in done]
    with ExitStack() as worktrees:
        base, same, slower = (
            worktrees.enter_context(interleaved.checkout("HEAD")) for _ in range(3)
        )
        with open(slower / "tidar_ref" / "tidar.py", "a", encoding="utf-8") as source:
            source.write(BURN.format(share=PLANTED))
        for index, planted in tqdm(todo, unit="trial", disable=None):
            row = trial(base, slower if planted else same)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps({"trial": index, "planted": planted, **row}) + "\n")
    for row in summary(args.out):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
