"""GPM counters (GPU performance monitoring, Hopper and later): what utilisation cannot tell.

Two samples are taken and the driver gives the means between them, so a reading covers the time
since the one before. Fractions are 0 to 1. Older boards answer "not supported", which is normal.
"""

from __future__ import annotations

import math
from typing import Any

from bench.telemetry.nvml import FINAL_FOR_COUNTER, FINAL_FOR_DEVICE, code_of, describe_error

# Name in the record to the id of nvmlGpmMetricId_t; all are percentages.
METRICS = {
    "sm_active": 2,  # share of time in which an SM has at least one warp
    "sm_occupancy": 3,  # warps resident over the most an SM holds
    "tensor_active": 5,  # any tensor pipe
    "tensor_half_active": 7,  # the 16-bit tensor pipe
    "dram_active": 10,  # DRAM bandwidth used over its peak
}


class Gpm:
    """The GPM counters of one device. `absent` maps "gpm" or one metric to the first reason."""

    def __init__(self, api: Any, handle: Any) -> None:
        self.api, self._handle = api, handle
        self.absent: dict[str, str] = {}
        self._samples: list[Any] = []
        self._filled = False
        self._ended = True  # until support and memory for two samples are certain
        try:
            if not api.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                self.absent["gpm"] = "this GPU has no GPM; Hopper and later have it"
                return
            self._samples = [api.nvmlGpmSampleAlloc() for _ in range(2)]
            self._ended = False
        except Exception as error:  # every refusal is a normal answer
            self.absent["gpm"] = describe_error(api, error)

    def read(self) -> dict[str, float]:
        """Means since the last call; empty on the first call and where GPM does not answer."""
        if self._ended:
            return {}
        before, after = self._samples
        try:
            self.api.nvmlGpmSampleGet(self._handle, after)
            self._samples = [after, before]
            if not self._filled:
                self._filled = True
                return {}
            return self._between(before, after)
        except Exception as error:
            # Either sample may now be old, and a mean over an unknown time is worse than none.
            self._filled = False
            self._ended = code_of(self.api, error) in (*FINAL_FOR_COUNTER, *FINAL_FOR_DEVICE)
            self.absent.setdefault("gpm", describe_error(self.api, error))
            return {}

    def _between(self, before: Any, after: Any) -> dict[str, float]:
        request = self.api.c_nvmlGpmMetricsGet_t()
        request.version = self.api.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(METRICS)
        request.sample1, request.sample2 = before, after
        for slot, metric in enumerate(METRICS.values()):
            request.metrics[slot].metricId = metric
        self.api.nvmlGpmMetricsGet(request)
        found = {}
        for slot, name in enumerate(METRICS):
            metric = request.metrics[slot]
            if metric.nvmlReturn:
                self.absent.setdefault(
                    name, describe_error(self.api, self.api.NVMLError(metric.nvmlReturn))
                )
            elif math.isfinite(metric.value):
                found[name] = metric.value / 100
        return found

    def close(self) -> None:
        """Free the two samples."""
        for sample in self._samples:
            try:
                self.api.nvmlGpmSampleFree(sample)
            except Exception:  # the device may be gone; its samples are then gone too
                continue
        self._samples = []
