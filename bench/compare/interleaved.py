"""Measure one checkout alone, or two checkouts turn by turn on the same machine at the same time.

Two long-lived processes, base and head, answer one turn at a time in the order A B B A, so that
whatever the machine does to one it does to the other. The pair of processes is started anew a few
times, because where code and memory happen to lie makes a process persistently fast or slow.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from bench.compare.regress_record import KIND, SCHEMA, RegressRecord, Turn, make_turn
from tidar_ref.errors import UserError

HERE = Path(__file__).resolve().parents[2]
WORKER = HERE / "bench" / "regress.py"
BLOCKS = 5  # A B B A blocks in one pair of processes
FEWEST, MOST = 4, 16  # pairs of processes: stop between them as soon as every decoder is decided

Say = Callable[[str], None]


class Side(Protocol):
    """Something that can be measured: a `Measurer` here, or one in another process."""

    labels: Sequence[str]

    def facts(self) -> dict[str, Any]: ...

    def counters(self) -> dict[str, dict[str, dict[str, Any]]]: ...

    def turn(self, label: str, *, ar_first: bool) -> dict[str, list[float]]: ...


class Worker:
    """A `Measurer` in a process of its own, on the packages of the checkout at `root`."""

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.root = root.resolve()
        env = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(settings["threads"])
        # -P: this file's own folder stays off the path, so only `root` can provide the packages.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=self.root,
        )
        try:
            self.labels: Sequence[str] = self._ask(dict(settings))
            found = Path(self.facts()["root"])
            if found != self.root:
                raise UserError(
                    f"the worker for {self.root.name} imported the packages of {found.name}; "
                    "uninstall the copy that hides it, or use another environment"
                )
        except BaseException:
            self.close()
            raise

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone: the missing answer says so
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"the measuring process of {self.root.name} ended with code "
                f"{self.process.wait()}; its own message is above"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(f"{self.root.name}: {reply['error']}")
        return reply["result"]

    def facts(self) -> dict[str, Any]:
        return self._ask({"do": "facts"})

    def counters(self) -> dict[str, dict[str, dict[str, Any]]]:
        return self._ask({"do": "counters"})

    def turn(self, label: str, *, ar_first: bool) -> dict[str, list[float]]:
        return self._ask({"do": "turn", "label": label, "ar_first": ar_first})

    def close(self) -> None:
        """End the process; it has nothing to save."""
        self.process.kill()
        self.process.communicate()


def measure_alone(side: Side, rounds: int) -> RegressRecord:
    """Counters and `rounds` turns of every decoder of one checkout, decoders alternating."""
    record = _record(side, None)
    for label in side.labels:  # warm-up, not measured
        side.turn(label, ar_first=True)
    turns = [_turn(side, label, 0, index) for index in range(rounds) for label in side.labels]
    return _with(record, turns)


def measure_pair(
    start: Callable[[], tuple[Side, Side]],
    *,
    enough: Callable[[RegressRecord, RegressRecord], bool],
    blocks: int = BLOCKS,
    fewest: int = FEWEST,
    most: int = MOST,
    say: Say = lambda _: None,
) -> tuple[RegressRecord, RegressRecord]:
    """Interleave base and head until `enough` of the records so far, or `most` pairs of processes.

    `start` gives a fresh (base, head); counters that change between processes of one checkout are a
    UserError, because then nothing could be compared exactly.
    """
    session = uuid.uuid4().hex
    records: list[RegressRecord] = []
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    for process in range(most):
        sides = start()
        fresh = [_record(side, session) for side in sides]
        for old, new, name in zip(records, fresh, ("base", "head"), strict=False):
            if old.counters != new.counters:
                raise UserError(
                    f"the counters of {name} differ between two processes of the same code; make "
                    "its decoders deterministic first"
                )
        records = records or fresh
        shared = [label for label in sides[0].labels if label in sides[1].labels]
        for label in shared:  # warm-up, not measured
            for side in sides:
                side.turn(label, ar_first=True)
        for block in range(blocks):
            for label in shared:
                for which, index in ((0, 0), (1, 0), (1, 1), (0, 1)):
                    turns[which].append(_turn(sides[which], label, process, 2 * block + index))
        base, head = (_with(record, own) for record, own in zip(records, turns, strict=True))
        say(f"processes {process + 1} of at most {most}: {len(turns[0])} turns a side")
        decided = enough(base, head)  # asked every time: it refuses unlike sides at once
        if decided and process + 1 >= fewest:
            break
    return base, head


def _turn(side: Side, label: str, process: int, index: int) -> Turn:
    return make_turn(label, process, index, **side.turn(label, ar_first=index % 2 == 0))


def _record(side: Side, session: str | None) -> RegressRecord:
    facts = side.facts()
    del facts["root"]  # a path of this machine
    return RegressRecord(
        kind=KIND,
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        session=session,
        counters=side.counters(),
        turns=(),
        **facts,
    )


def _with(record: RegressRecord, turns: Sequence[Turn]) -> RegressRecord:
    return dataclasses.replace(record, turns=tuple(turns))


@contextmanager
def checkout(ref: str, repository: Path = HERE) -> Iterator[Path]:
    """A temporary worktree of `ref`, removed afterwards; UserError for an unknown ref."""
    with tempfile.TemporaryDirectory(prefix="bench-base-") as parent:
        folder = Path(parent) / "base"
        commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        if not commit:
            raise UserError(f"git knows no commit {ref!r} here; give a branch, tag or commit")
        if _git(repository, "worktree", "add", "--detach", str(folder), commit) is None:
            raise UserError(f"git cannot make a worktree of {ref!r}; run `git worktree prune` once")
        try:
            yield folder
        finally:
            _git(repository, "worktree", "remove", "--force", str(folder))


def check_measurable(folder: Path, ref: str) -> None:
    """UserError unless the checkout has the gate itself: older ones lack what it measures with."""
    if not (folder / WORKER.relative_to(HERE)).is_file():
        raise UserError(
            f"{ref} has no {WORKER.relative_to(HERE)}, so it is older than the gate and cannot be "
            "measured; name a later commit as base"
        )


def _git(repository: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *words], capture_output=True, text=True
        )
    except OSError as error:
        raise UserError("git is not installed; install it to compare two checkouts") from error
    return done.stdout.strip() if done.returncode == 0 else None


@contextmanager
def workers(
    base: Path, head: Path, settings: Mapping[str, Any]
) -> Iterator[Callable[[], tuple[Side, Side]]]:
    """A `start` for `measure_pair`: each call ends the previous two processes and starts two."""
    with ExitStack() as running:

        def start() -> tuple[Side, Side]:
            running.close()
            sides = []
            for root in (base, head):
                sides.append(Worker(root, settings))
                running.callback(sides[-1].close)
            return sides[0], sides[1]

        yield start
