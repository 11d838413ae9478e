"""Peak memory of one generation: what CUDA allocated, or on Linux the process's resident set.

On a CPU the weights of every decoder of the run are in the process, so only differences between
decoders say something of a method.
"""

from __future__ import annotations

from pathlib import Path

OWN = Path("/proc/self")
RESET_PEAK = "5"  # what clear_refs takes to set the high-water mark back to the present (proc(5))


class Peak:
    """Watches from its making on; `bytes` tells the most so far."""

    def __init__(self, device: str) -> None:
        self.on_cuda = device.startswith("cuda")
        self.known = True
        if self.on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        try:
            (OWN / "clear_refs").write_text(RESET_PEAK)
        except OSError:  # not Linux, or not allowed: the mark would be that of the whole run
            self.known = False

    def bytes(self) -> int | None:
        """The peak (bytes); None where the system does not tell."""
        if not self.known:
            return None
        if self.on_cuda:
            import torch

            return int(torch.cuda.max_memory_allocated())
        lines = (OWN / "status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
