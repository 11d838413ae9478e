"""What pytest-benchmark's files say about this machine: GPU, driver and clocks beside its own."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Extend `machine_info`: comparing two files then shows an unlike GPU, driver or clock."""
    import torch

    from bench import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["tidar_bench"] = environment.describe(device)
    machine_info["cpu_clock_mhz"] = cpu_clock()
    machine_info["gpu"] = gpu() if device == "cuda" else None


def cpu_clock() -> dict[str, float] | None:
    """Current and highest processor clock (MHz), or None where the system does not say."""
    import psutil

    found = psutil.cpu_freq()
    return {"current": found.current, "max": found.max} if found else None


def gpu() -> dict[str, Any]:
    """Name, driver, clocks (MHz) and power limit (W) of the first visible GPU, through NVML.

    The GPU is found by its UUID: NVML counts from another zero than CUDA_VISIBLE_DEVICES. What
    this GPU does not report is None.
    """
    import pynvml
    import torch

    found = torch.cuda.get_device_properties(0)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{found.uuid}")

        def ask(call: Any, *words: Any) -> Any:
            try:
                return call(handle, *words)
            except pynvml.NVMLError:
                return None

        limit = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
        return {
            "name": found.name,
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_mhz": ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "sm_max_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
            "memory_mhz": ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            "memory_max_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": None if limit is None else limit / 1000,
        }
    finally:
        pynvml.nvmlShutdown()
