"""What this machine is, for a record's header and for `doctor`: read, never changed.

No path of the machine leaves this file: `portable` reduces paths before they reach a record.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "transformers",
    "tokenizers",
    "lm-eval",
    "evalplus",
    "gguf",
)


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    for key in ("model name", "Hardware", "cpu model"):
        value = _cpuinfo(key)
        if value:
            return value
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags (Linux); empty where the system does not list them."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def _cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None


def usable_cores() -> int:
    """Cores this process may run on: affinity and the container's quota, at least 1 (count)."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2: the affinity stands
    return cores


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; elsewhere float32 is the faster one."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout that holds `folder`; (None, None) outside one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None, None
    status = git("status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def describe(device: str = "cpu") -> dict[str, Any]:
    """The environment part of a header for a run on `device` ("cpu" or "cuda")."""
    import torch

    values: dict[str, Any] = {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "cpu_bfloat16": cpu_has_bfloat16(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "gpu": None,
        "gpu_driver": None,
        "cuda": None,
    }
    if device.startswith("cuda"):
        values["gpu"] = torch.cuda.get_device_name()
        values["gpu_driver"] = gpu_driver()
        values["cuda"] = torch.version.cuda
    return values


def gpu_driver() -> str | None:
    """The NVIDIA driver's version through NVML, or None where NVML is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML reports absence with many types; the driver is then unknown
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def device_slug(device: str) -> str:
    """A short name of the device for folder names: `cpu2`, `h100`."""
    if not device.startswith("cuda"):
        return f"cpu{usable_cores()}"
    import torch

    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return next((word for word in words if any(c.isdigit() for c in word)), "cuda")


def portable(text: str) -> str:
    """`text` with an absolute path in it (whole, or after "=") reduced to its last part."""
    head, equals, tail = text.partition("=")
    if equals and os.path.isabs(tail):
        return f"{head}={portable(tail)}"
    return f".../{Path(text).name}" if os.path.isabs(text) else text
