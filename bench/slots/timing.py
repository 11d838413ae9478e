"""Timing of one thing at a time, and what this machine can do at most. Imports torch.

On CUDA a run is timed by events around its parts and by the host clock, device idle at both ends;
on a CPU by the host clock alone. Between runs the last-level cache is overwritten where the weights
are not far larger than it: a decode loop of the real model would find it full of other things.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peaks import find_peak
from tidar_ref.linear import Linear, emulated

FAR_LARGER = 4  # times the last-level cache
STABLE, WARM_UP_RUNS, WARM_UP_SECONDS = 0.10, 8, 3.0


def cache_bytes(device: torch.device) -> int | None:
    """Size of the last-level cache; None where neither table nor system tells."""
    if device.type == "cuda":
        peak = find_peak(torch.cuda.get_device_name(device))
        properties = torch.cuda.get_device_properties(device)
        return peak.cache_bytes if peak else getattr(properties, "L2_cache_size", None)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=None)


class Clock:
    """Times runs on a device; `flush_bytes` > 0 overwrites that much memory before each."""

    def __init__(self, device: torch.device, *, flush_bytes: int = 0) -> None:
        self.device = device
        self.waste = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    @property
    def flushes(self) -> bool:
        return self.waste.numel() > 0

    def run(self, parts: Sequence[Callable[[], Any]]) -> tuple[list[float], float]:
        """(seconds of each part, host seconds of all) of one run of the parts in order."""
        if self.flushes:
            self.waste.fill_(1)
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for part in parts:
                part()
                marks.append(time.perf_counter())
            spent = [b - a for a, b in zip(marks, marks[1:], strict=False)]
            return spent, marks[-1] - marks[0]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        torch.cuda.synchronize(self.device)
        host = time.perf_counter() - started
        pairs = zip(events, events[1:], strict=False)
        return [a.elapsed_time(b) / 1000 for a, b in pairs], host

    def warm_up(self, run: Callable[[], float]) -> int:
        """Run until two in a row agree within 10 %, at most 8 times or 3 s; how often it ran."""
        deadline, previous = time.perf_counter() + WARM_UP_SECONDS, 0.0
        for count in range(1, WARM_UP_RUNS + 1):
            seconds = run()
            if abs(seconds - previous) <= STABLE * seconds or time.perf_counter() > deadline:
                return count
            previous = seconds
        return WARM_UP_RUNS


def ceilings(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> dict[str, Any]:
    """Best rates seen here: copy and read bytes/s, one-row product bytes/s, matrix FLOP/s.

    Median of the faster half of the runs. small: sizes for a rehearsal, whose rates mean little.
    Where a CPU only emulates `dtype`, its products run in float32 (tidar_ref.linear), so the matrix
    rate is float32's; `matrix_dtype` says which it is. Of torch's product and the one decoding uses
    here (tidar_ref.linear) the faster counts.
    """
    on_gpu = device.type == "cuda"
    length = 2**20 if small else 2**31 if on_gpu else 2**27  # bytes
    side = 128 if small else 8192 if on_gpu else 1024
    item = torch.empty((), dtype=dtype).element_size()
    a = torch.ones(length // item, dtype=dtype, device=device)
    b = torch.empty_like(a)
    columns = 64 if small else 4096
    matrix, row = a.view(-1, columns), torch.ones(1, columns, dtype=dtype, device=device)
    clock = Clock(device)

    def best(run: Callable[[], Any]) -> float:
        seconds = sorted(clock.run([run])[0][0] for _ in range(5 if small else 12))
        return statistics.median(seconds[: len(seconds) // 2])

    def fastest(x: Tensor, weight: Tensor) -> float:
        """Seconds of x weight^T, by torch or as decoding multiplies here."""
        ours = Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype, device=device)
        ours.weight.copy_(weight)
        ours.prepare()
        return min(best(lambda: F.linear(x, weight)), best(lambda: ours(x)))

    with torch.inference_mode():
        copy, read = best(lambda: b.copy_(a)), best(lambda: a.view(torch.int64).sum())
        product = fastest(row, matrix)
        own = torch.float32 if not on_gpu and emulated(dtype) else dtype
        x = torch.randn(side, side, device=device).to(own)
        square = min(best(lambda: x @ x.t()), fastest(x.to(dtype), x.to(dtype)))
    return {
        "device": str(device.type),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_s": 2 * length / copy,
        "read_bytes_per_s": length / read,
        "one_row_product_bytes_per_s": length / product,
        "matrix_flops_per_s": 2 * side**3 / square,
        "array_bytes": length,
        "matrix_side": side,
        "matrix_dtype": str(own).removeprefix("torch."),
        "rehearsal": small,
    }
