"""NVML counters of one GPU, each of which may be missing on this board, driver or account.

`Nvml` takes the nvidia-ml-py module (or a fake) and reads what answers. A counter that says "not
supported", "no permission" or "function not found" is asked once and never again; its reason stays
in `absent`. A lost GPU ends all of them. Fractions are 0 to 1, units are in the names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Value = float | int | None

POWER_INSTANT_FIELD = 186  # NVML_FI_DEV_POWER_INSTANT; nvmlDeviceGetPowerUsage averages a second
NOT_AVAILABLE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE, as an unsigned long long

# Bits of nvmlDeviceGetCurrentClocksEventReasons; the older name is "throttle reasons".
CLOCK_REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
# After these answers a counter, or the whole device, is not asked again.
FINAL_FOR_COUNTER = ("NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND", "DEPRECATED")
FINAL_FOR_DEVICE = ("GPU_IS_LOST", "RESET_REQUIRED", "UNINITIALIZED", "DRIVER_NOT_LOADED")


def reason_names(bits: int) -> tuple[str, ...]:
    """The names of the clock event reasons in `bits`; unknown bits as hex."""
    known = [name for bit, name in CLOCK_REASONS.items() if bits & bit]
    rest = bits & ~sum(CLOCK_REASONS)
    return (*known, *([hex(rest)] if rest else []))


def code_of(api: Any, error: BaseException) -> str:
    """The part after NVML_ERROR_ of an NVML error's code, or the error's class."""
    value = getattr(error, "value", None)
    if isinstance(error, api.NVMLError):
        for name in dir(api):
            if name.startswith("NVML_ERROR_") and getattr(api, name) == value:
                return name.removeprefix("NVML_ERROR_")
    return type(error).__name__


def describe_error(api: Any, error: BaseException) -> str:
    """A reason for the record: NVML's own words, or that this binding lacks the call."""
    if isinstance(error, AttributeError):
        return "this nvidia-ml-py has no such call"
    if isinstance(error, api.NVMLError):
        return f"NVML says: {error}"
    return f"{type(error).__name__}: {error}"


class Nvml:
    """One GPU's counters. `absent` maps a counter, or "nvml" for all, to the first reason."""

    def __init__(self, api: Any, gpu: str, own_pid: int) -> None:
        self.api, self.own_pid = api, own_pid
        self.absent: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self._handle: Any = None
        self._asked_once: set[str] = set()  # final answers: these are not asked again
        self._event_reasons = True
        self._readers: dict[str, Callable[[], dict[str, Value]]] = {
            "utilisation": self._utilisation,
            "memory": self._memory,
            "power": lambda: {"power_w": api.nvmlDeviceGetPowerUsage(self._handle) / 1e3},
            "power_instant": self._power_instant,
            "energy": lambda: {
                "energy_j": api.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
            },
            "sm_clock": lambda: {"sm_clock_mhz": self._clock(api.NVML_CLOCK_SM)},
            "memory_clock": lambda: {"memory_clock_mhz": self._clock(api.NVML_CLOCK_MEM)},
            "temperature": lambda: {
                "temperature_c": api.nvmlDeviceGetTemperature(
                    self._handle, api.NVML_TEMPERATURE_GPU
                )
            },
            "clock_reasons": self._clock_reasons,
            "processes": self._processes,
        }
        try:
            api.nvmlInit()
        except Exception as error:  # NVML reports absence with many types; the run goes on
            self.absent["nvml"] = describe_error(api, error)
            return
        try:
            if not gpu:
                raise LookupError("torch does not tell the UUID of its device")
            self._handle = api.nvmlDeviceGetHandleByUUID(gpu)
        except Exception as error:
            self.absent["nvml"] = f"the run's device was not found: {describe_error(api, error)}"
            return
        self._describe()

    @property
    def handle(self) -> Any:
        """NVML's handle of the device, or None when there is nothing to read."""
        return None if "nvml" in self.absent else self._handle

    def _describe(self) -> None:
        calls = {
            "name": lambda: self.api.nvmlDeviceGetName(self._handle),
            "driver": lambda: self.api.nvmlSystemGetDriverVersion(),
            "power_limit_w": lambda: self.api.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3,
            "max_sm_clock_mhz": lambda: self.api.nvmlDeviceGetMaxClockInfo(
                self._handle, self.api.NVML_CLOCK_SM
            ),
        }
        for name, call in calls.items():
            try:
                value = call()
            except Exception:  # a fact that is not told is left out; counters give reasons
                continue
            self.facts[name] = value.decode() if isinstance(value, bytes) else value

    def read(self) -> dict[str, Value]:
        """All counters that answer now; a counter without an answer is not in the result."""
        found: dict[str, Value] = {}
        for name, reader in self._readers.items():
            if "nvml" in self.absent:
                break
            if name in self._asked_once:
                continue
            try:
                found.update(reader())
            except Exception as error:  # every refusal is a normal answer
                self._refuse(name, error)
        return found

    def _refuse(self, name: str, error: Exception) -> None:
        code = code_of(self.api, error)
        reason = describe_error(self.api, error)
        if code in FINAL_FOR_DEVICE:
            self.absent["nvml"] = reason
            return
        self.absent.setdefault(name, reason)
        if code in FINAL_FOR_COUNTER or isinstance(error, AttributeError):
            self._asked_once.add(name)

    def _utilisation(self) -> dict[str, Value]:
        rates = self.api.nvmlDeviceGetUtilizationRates(self._handle)
        return {"gpu_util": rates.gpu / 100, "memory_util": rates.memory / 100}

    def _memory(self) -> dict[str, Value]:
        return {"memory_used_bytes": self.api.nvmlDeviceGetMemoryInfo(self._handle).used}

    def _power_instant(self) -> dict[str, Value]:
        [value] = self.api.nvmlDeviceGetFieldValues(self._handle, [POWER_INSTANT_FIELD])
        if value.nvmlReturn:
            raise self.api.NVMLError(value.nvmlReturn)
        return {"power_instant_w": value.value.uiVal / 1e3}

    def _clock(self, kind: int) -> int:
        return self.api.nvmlDeviceGetClockInfo(self._handle, kind)

    def _clock_reasons(self) -> dict[str, Value]:
        if self._event_reasons:
            try:
                bits = self.api.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
                return {"clock_reasons": bits}
            except (AttributeError, self.api.NVMLError) as error:
                missing = isinstance(error, AttributeError)
                if not missing and code_of(self.api, error) != "FUNCTION_NOT_FOUND":
                    raise
                self._event_reasons = False  # an older driver knows the same bits by this name:
        return {"clock_reasons": self.api.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)}

    def _processes(self) -> dict[str, Value]:
        """Compute processes beside the run; process numbers and names are not recorded.

        In a container NVML may tell the host's process numbers. If ours is not among them, one
        process is taken to be ours, and `own_process_seen` is 0.
        """
        found = self.api.nvmlDeviceGetComputeRunningProcesses(self._handle)
        others = [process for process in found if process.pid != self.own_pid]
        seen = len(others) < len(found)
        foreign = len(others) if seen else max(0, len(others) - 1)
        values: dict[str, Value] = {"foreign_processes": foreign, "own_process_seen": int(seen)}
        memory = [process.usedGpuMemory for process in others]
        if seen and all(used is not None and used != NOT_AVAILABLE for used in memory):
            values["foreign_memory_bytes"] = sum(memory)
        return values

    def close(self) -> None:
        """Leave NVML; a library that is gone already needs no goodbye."""
        try:
            self.api.nvmlShutdown()
        except Exception:  # nothing is read after this, so there is nothing to report
            return
