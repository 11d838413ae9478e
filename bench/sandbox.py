"""Runs one generated program far from everything it could harm, and says whether it passed.

Two layers. Portable: a fresh isolated interpreter in its own session, wall-clock, CPU, memory and
file-size limits, a scratch folder as working directory, an empty environment, no stdin, and an
audit hook that refuses sockets, processes, ctypes, signals and writes outside the scratch folder.
Strong, where the Linux kernel allows it: new user, network, PID and IPC namespaces, so that no
native code reaches the network either and every descendant dies with the program; and (Linux
5.12) a mount namespace in which every file outside the scratch folder is read-only.

What this is not: a boundary against a determined attacker. The audit hook stops Python code, not
native code in an installed extension module, and a few calls raise no audit event (mkfifo, shared
memory): only the strong layer stops those. Files readable by the user stay readable. A program
that searches the interpreter's frames for the token can claim to have passed; none does by
accident. Without the namespaces and without Linux, a descendant in a session of its own survives.
`isolation()` says which layer this machine gives.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
MEMORY_BYTES = 2 * 1024**3
ISOLATIONS = ("namespaces, read-only files", "namespaces", "audit hook")
STATUSES = ("passed", "failed", "timeout", "memory", "crashed")
GRACE_S = 10.0  # start-up of the interpreter and clean-up, on a loaded machine


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """status is one of STATUSES; detail is the exception or signal, at most 500 characters."""

    passed: bool
    status: str
    detail: str
    seconds: float
    isolation: str  # one of ISOLATIONS; "unknown" when the supervisor was killed


def run_program(
    source: str, *, timeout_s: float = 3.0, memory_bytes: int = MEMORY_BYTES
) -> Verdict:
    """Execute `source` as a module that is not __main__; it passes if its last line is reached.

    Leaving early (sys.exit(0), os._exit(0)) is no pass: only code behind the program's end can
    report one. timeout_s bounds wall-clock and CPU seconds, memory_bytes the address space.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as scratch:
        request = {
            "source": source,
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "scratch": str(Path(scratch).resolve()),
        }
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=scratch,
            env={"PATH": "", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(json.dumps(request).encode(), timeout_s + GRACE_S)
        except subprocess.TimeoutExpired:
            answer = b""
        except BaseException:
            _kill_session(process)
            raise
        finally:
            _kill_session(process)
    seconds = time.perf_counter() - started
    try:
        found = json.loads(answer)
    except ValueError:
        found = {"status": "crashed", "detail": "the supervisor was killed", "isolation": "unknown"}
    return Verdict(
        passed=found["status"] == "passed",
        status=found["status"],
        detail=found["detail"][:500],
        seconds=seconds,
        isolation=found["isolation"],
    )


def run_many(
    sources: Sequence[str],
    *,
    workers: int = 2,
    timeout_s: float = 3.0,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Verdict]:
    """`run_program` on each source, `workers` at a time; progress is told how many are done."""
    verdicts: list[Verdict] = []
    run = functools.partial(run_program, timeout_s=timeout_s, memory_bytes=memory_bytes)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for verdict in pool.map(run, sources):
            verdicts.append(verdict)
            progress(len(verdicts))
    return verdicts


@functools.cache
def isolation() -> str:
    """The layer this machine gives, one of ISOLATIONS (asks by running `pass`)."""
    return run_program("pass").isolation


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the supervisor's process group and collect it."""
    import os

    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # already gone; a zombie group on macOS answers with PermissionError
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
