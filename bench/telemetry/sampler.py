"""The sampling process: `python -m bench.telemetry.sampler`, started by the run, ends with it.

Writes one JSON line per sample: `start` (what answers, what does not and why), `sample`, `absent`
(a counter that stopped answering) and `end` (why, and what the sampling itself cost). Input ending
or another parent means that the run is gone. Imports no torch and never writes to the run.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from bench.telemetry.gpm import Gpm
from bench.telemetry.nvml import Nvml
from bench.telemetry.rapl import Rapl

LONGEST_WAIT_S = 0.5  # how late the end of the parent may be noticed
FASTEST_S = 0.1  # below that the counters repeat themselves


class Sources:
    """Everything that can be read here, and why the rest cannot."""

    def __init__(self, gpu: str | None, own_pid: int, *, api: Any = None) -> None:
        self._missing: dict[str, str] = {}
        self._parts: list[Any] = []
        self.facts: dict[str, Any] = {}
        self._nvml: Nvml | None = None
        if gpu is None:
            self._parts.append(Rapl())
            return
        if api is None:
            try:
                import pynvml as api
            except ImportError:
                self._missing["nvml"] = "nvidia-ml-py is not installed"
                return
        self._nvml = Nvml(api, gpu, own_pid)
        self._parts.append(self._nvml)
        self.facts = self._nvml.facts
        if self._nvml.handle is not None:
            self._parts.append(Gpm(api, self._nvml.handle))

    @property
    def lost(self) -> bool:
        """The device answered before, or was never there: nothing more will come."""
        return not self._parts or (self._nvml is not None and self._nvml.handle is None)

    @property
    def absent(self) -> dict[str, str]:
        """Counter to the first reason for which it gave no value."""
        found = dict(self._missing)
        for part in self._parts:
            found.update(part.absent)
        return found

    def read(self) -> dict[str, Any]:
        """All values of this moment."""
        found: dict[str, Any] = {}
        for part in self._parts:
            found.update(part.read())
        return found

    def close(self) -> None:
        """Give samples and the library back, in that order."""
        for part in reversed(self._parts):
            if hasattr(part, "close"):
                part.close()


def sample_until_told(
    sources: Sources, out: TextIO, *, interval_s: float, parent: int, offset_s: float
) -> None:
    """Write lines until the input ends, the parent changes or the device is lost."""

    def write(kind: str, at: float, values: dict[str, Any]) -> None:
        line = {"kind": kind, "t": round(offset_s + at, 4), **values}
        out.write(json.dumps(line, allow_nan=False) + "\n")
        out.flush()

    sources.read()  # GPM gives means between two readings: this is the first
    time.sleep(FASTEST_S)
    first = sources.read()
    reasons = sources.absent
    started = time.monotonic()
    values: dict[str, Any] = {
        "interval_s": interval_s,
        **sources.facts,
        "counters": sorted(first),
        "absent": reasons,
    }
    write("start", started, values)
    due, count, spent = time.monotonic(), 0, 0.0
    why = "no counter answers" if not first else "device lost"
    while first and not sources.lost:
        end = _run_ended(due, parent)
        before = time.monotonic()
        found = sources.read()
        after = time.monotonic()
        spent += after - before
        write("sample", (before + after) / 2, {k: _short(v) for k, v in found.items()})
        count += 1
        if end:  # only now: the last window ends before this sample, and needs it for its energy
            why = end
            break
        new = {key: text for key, text in sources.absent.items() if key not in reasons}
        for name, reason in new.items():
            write("absent", after, {"counter": name, "reason": reason})
        reasons = {**reasons, **new}
        due = max(due + interval_s, after)  # a slow reading delays the next, never bunches them
    cost = {"samples": count, "read_s": round(spent, 4), "cpu_s": round(time.process_time(), 4)}
    write("end", time.monotonic(), {"reason": why, **cost})


def _run_ended(due: float, parent: int) -> str | None:
    """Wait until `due`; why sampling should end, or None to go on."""
    while True:
        if os.getppid() != parent:
            return "the run is gone"
        wait = min(due - time.monotonic(), LONGEST_WAIT_S)
        readable, _, _ = select.select([sys.stdin], [], [], max(0.0, wait))
        if readable and not os.read(sys.stdin.fileno(), 64):
            return "the run is gone" if os.getppid() != parent else "stopped"
        if time.monotonic() >= due:
            return None


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def open_lines(path: Path) -> TextIO:
    """The file for appending; a line that a killed sampler left torn is ended first."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = open(path, "a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Sample until the run ends; 1 when the file cannot be written."""
    words = argparse.ArgumentParser(prog="python -m bench.telemetry.sampler")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--parent", type=int, required=True, help="process number of the run")
    words.add_argument("--interval", type=float, required=True, help="seconds between samples")
    words.add_argument("--epoch-offset", type=float, required=True)
    words.add_argument("--gpu", help="UUID of the device; RAPL only without it")
    args = words.parse_args(argv)
    try:
        with open_lines(args.out) as out:
            sources = Sources(args.gpu, args.parent)
            try:
                sample_until_told(
                    sources,
                    out,
                    interval_s=max(args.interval, FASTEST_S),
                    parent=args.parent,
                    offset_s=args.epoch_offset,
                )
            finally:
                sources.close()
    except OSError:
        return 1  # the disk is full or the folder gone: the run will say so itself
    return 0


if __name__ == "__main__":
    sys.exit(main())
