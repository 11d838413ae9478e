"""Watching the device while a run goes: the run's side of it, free of torch and of NVML.

Another process samples (`bench.telemetry.sampler`), because a thread inside a launch-bound decode
loop would slow what it watches. The run starts it, marks an idle window, stamps its generations
with `now()` and stops it; what was read lies in the record as telemetry.jsonl. `summary` cuts the
windows out again. Nothing here can fail a run: what is missing is written down with its reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The run hands its offset to the sampler: both stamp with one clock that no time server can step.
EPOCH_OFFSET_S = time.time() - time.monotonic()
INTERVAL_S = 0.2  # 5 Hz: the counters themselves move only about every 0.1 s
IDLE_S = 5.0
READY_S = 10.0  # NVML may take seconds to start; the run waits no longer than this
STOP_S = 2.0


def now() -> float:
    """Unix seconds from the monotonic clock; shared by the run and its sampler."""
    return EPOCH_OFFSET_S + time.monotonic()


@dataclass(kw_only=True)
class Watch:
    """A running sampler, or none: `note` goes into the session's line, `lines` to the reader."""

    process: subprocess.Popen[bytes] | None = None
    note: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    counters: bool = False

    def idle(self, seconds: float = IDLE_S) -> None:
        """Wait, and note the wait as the idle window; no wait where nothing can be read."""
        if not self.counters:
            return
        began = now()
        time.sleep(seconds)
        self.note["idle"] = [round(began, 3), round(now(), 3)]

    def stop(self) -> None:
        """End the sampler; a driver call that hangs is killed and not waited for."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()  # end of input is the sign to stop
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)


def cuda_device(device: str) -> str | None:
    """NVML's name ("GPU-<uuid>") of a torch device, None for a CPU; CUDA's numbers are not NVML's.

    The empty string means a CUDA device whose UUID this torch does not tell.
    """
    if not device.startswith("cuda"):
        return None
    import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.device(device)), "uuid", None)
    return f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid is not None else ""


@contextlib.contextmanager
def watching(
    path: Path, *, device: str, wanted: bool | None, interval_s: float = INTERVAL_S
) -> Iterator[Watch]:
    """Sample into `path` while the block runs.

    `wanted` None means: only for a CUDA device. On a CPU the sampler reads RAPL, if it may.
    """
    if wanted is None:
        wanted = device.startswith("cuda")
    if not wanted:
        yield Watch(note={"on": False}, lines=["telemetry: off; --telemetry turns it on"])
        return
    watch = _start(path, cuda_device(device), interval_s)
    try:
        yield watch
    finally:
        watch.stop()


def _start(path: Path, gpu: str | None, interval_s: float) -> Watch:
    root = str(Path(__file__).resolve().parents[2])
    command = [
        *(sys.executable, "-m", "bench.telemetry.sampler"),
        *("--out", str(path), "--parent", str(os.getpid()), "--interval", str(interval_s)),
        *("--epoch-offset", repr(EPOCH_OFFSET_S)),
        *(("--gpu", gpu) if gpu is not None else ()),
    ]
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    begin = path.stat().st_size if path.exists() else 0
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the run; the sampler ends with its input
        )
    except OSError as error:
        reason = f"the sampler did not start: {error.strerror}"
        return Watch(note={"on": True, "absent": reason}, lines=[f"telemetry: absent ({reason})"])
    watch = Watch(process=process, note={"on": True})
    start = _wait_for_start(path, begin, process)
    if start is None:
        watch.note["absent"] = f"the sampler said nothing within {READY_S:.0f} s"
        watch.lines.append(f"telemetry: absent ({watch.note['absent']})")
        return watch
    watch.counters = bool(start["counters"])
    watch.lines.append(
        f"telemetry: {len(start['counters'])} counters every {interval_s:g} s"
        + (f" of {start['name']}" if start.get("name") else "")
    )
    watch.lines += [f"  no {counter}: {reason}" for counter, reason in start["absent"].items()]
    return watch


def _wait_for_start(
    path: Path, begin: int, process: subprocess.Popen[bytes]
) -> dict[str, Any] | None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_bytes()[begin:].splitlines(keepends=True):
                values = json.loads(line) if line.strip() and line.endswith(b"\n") else {}
                if values.get("kind") == "start":
                    return values
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    return None
