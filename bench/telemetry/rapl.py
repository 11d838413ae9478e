"""RAPL: the processor's own energy counters, from /sys/class/powercap, where they may be read.

Package domains and the DRAM domains below them; the counters are in microjoules, wrap at a limit
that the system tells, and count the whole package, whoever uses it. Intel's name stands for AMD's
counters too. Many systems let only root read them: that is an answer, not an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(kw_only=True)
class _Domain:
    path: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def advance(self, raw_uj: int) -> None:
        """Add what passed since the last reading; a smaller value means one wrap."""
        step = raw_uj - self.last_uj
        self.total_uj += step if step >= 0 else step + self.range_uj
        self.last_uj = raw_uj


class Rapl:
    """The readable domains below `root`; `absent` holds one reason per domain or for all."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self.absent: dict[str, str] = {}
        self._domains: dict[str, _Domain] = {}
        folders = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        for folder in folders:
            try:
                name = (folder / "name").read_text().strip()
            except OSError:
                continue
            if not name.startswith("package") and name != "dram":
                continue  # core, uncore and psys overlap with the package
            number = folder.name.partition(":")[2].partition(":")[0]
            label = f"rapl_{name}" if name != "dram" else f"rapl_dram-{number}"
            try:
                self._domains[label] = _Domain(
                    path=folder / "energy_uj",
                    range_uj=int((folder / "max_energy_range_uj").read_text()),
                    last_uj=int((folder / "energy_uj").read_text()),
                )
            except (OSError, ValueError) as error:
                self.absent[label] = _reason(error)
        if not self._domains and not self.absent:
            self.absent["rapl"] = "no RAPL domain under powercap (container, or no such counter)"

    def read(self) -> dict[str, float]:
        """Joules since the start, by domain, and `rapl_energy_j`, the sum over all of them.

        The sum is left out as soon as one domain did not answer: half a sum is a wrong number.
        """
        found: dict[str, float] = {}
        for label, domain in self._domains.items():
            try:
                domain.advance(int(domain.path.read_text()))
            except (OSError, ValueError) as error:
                self.absent.setdefault(label, _reason(error))
                continue
            found[f"{label}_j"] = domain.total_uj / 1e6
        if found and not self.absent:
            found["rapl_energy_j"] = sum(found.values())
        return found


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return "not a number"
