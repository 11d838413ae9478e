"""A fake of the nvidia-ml-py module: a board that answers like an H100, or refuses on request.

`FakeNvml(refuse={"nvmlDeviceGetPowerUsage": 3})` raises that NVML error code from that call, `None`
means that the binding lacks the call. Codes and shapes are those of nvidia-ml-py 13.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, DRIVER_NOT_LOADED, TIMEOUT = 3, 4, 6, 9, 10
LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 12, 13, 15, 999
UUID = "GPU-11111111-2222-3333-4444-555555555555"
OWN_PID = 4242


class NVMLError(Exception):
    """As the real one: `value` is the code."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {3: "Not Supported", 4: "Insufficient Permissions", 15: "GPU is lost"}.get(
            self.value, f"code {self.value}"
        )


class FakeNvml:
    """The functions our code calls; each reading of the energy counter is 50 J later."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_GPM_METRICS_GET_VERSION = 1
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION = 3, 4
    NVML_ERROR_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_TIMEOUT = 6, 9, 10
    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = 12, 13
    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_UNKNOWN = 15, 999

    def __init__(
        self,
        *,
        refuse: dict[str, int | None] | None = None,
        gpm: bool = True,
        gpm_refuse: dict[int, int] | None = None,
        pids: tuple[int, ...] = (OWN_PID,),
        reasons: int = 0,
    ) -> None:
        self.refuse = dict(refuse or {})
        self.gpm, self.gpm_refuse = gpm, gpm_refuse or {}
        self.pids, self.reasons = pids, reasons
        self.energy_mj, self.calls = 1_000_000, []
        self.ticks, self.allocated = 0, 0

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return object.__getattribute__(self, name)
        refused = self.refuse
        if name in refused and refused[name] is None:
            raise AttributeError(name)
        real: Callable[..., Any] = object.__getattribute__(self, name)

        def call(*values: Any) -> Any:
            self.calls.append(name)
            if name in refused:
                raise NVMLError(refused[name])
            return real(*values)

        return call

    def nvmlInit(self) -> None:
        return None

    def nvmlShutdown(self) -> None:
        return None

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise NVMLError(NOT_FOUND)
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=100, memory=37)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=17 * 2**30, total=80 * 2**30, free=63 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 250_000

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[SimpleNamespace]:
        value = SimpleNamespace(uiVal=260_000)
        return [SimpleNamespace(fieldId=fields[0], nvmlReturn=0, value=value)]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.energy_mj += 50_000
        return self.energy_mj

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 45

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=2**30) for pid in self.pids]

    def nvmlGpmQueryDeviceSupport(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(isSupportedDevice=int(self.gpm))

    def nvmlGpmSampleAlloc(self) -> dict[str, int]:
        self.allocated += 1
        return {"tick": -1}

    def nvmlGpmSampleFree(self, sample: dict[str, int]) -> None:
        self.allocated -= 1

    def nvmlGpmSampleGet(self, handle: str, sample: dict[str, int]) -> dict[str, int]:
        self.ticks += 1
        sample["tick"] = self.ticks
        return sample

    def c_nvmlGpmMetricsGet_t(self) -> SimpleNamespace:
        slots = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(20)]
        return SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=slots)

    def nvmlGpmMetricsGet(self, request: SimpleNamespace) -> SimpleNamespace:
        """The older sample must come first, both filled, as the driver wants it."""
        if not 0 < request.sample1["tick"] < request.sample2["tick"] or request.version != 1:
            raise NVMLError(2)
        for slot in request.metrics[: request.numMetrics]:
            slot.nvmlReturn = self.gpm_refuse.get(slot.metricId, 0)
            slot.value = {2: 55.0, 3: 12.5, 5: 8.0, 7: 8.0, 10: 71.0}[slot.metricId]
        return request
