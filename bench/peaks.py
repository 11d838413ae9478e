"""What devices can do at most, as their makers publish it: memory bandwidth, matrix rate, cache.

Matrix rates are dense 16-bit ones (bfloat16, float32 accumulation): makers print the double, for
sparse matrices. A device that is not listed has no peaks here, never guessed ones: measure its
ceilings instead (`python -m bench slots --ceilings`). Plain data, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Peak:
    """One device: bytes/s of its memory, dense bfloat16 FLOP/s, last-level cache in bytes.

    words: all of them stand in the name the driver gives, none of `without` does. checked: whether
    every number was compared with the maker's page (`source`), or one is from memory.
    """

    name: str
    words: tuple[str, ...]
    without: tuple[str, ...] = ()
    bytes_per_s: float
    flops_per_s: float
    cache_bytes: int
    source: str
    checked: bool = True


def _peak(
    name: str,
    words: str,
    tb_per_s: float,
    tflops: float,
    cache_mb: int,
    source: str,
    *,
    without: str = "",
    checked: bool = True,
) -> Peak:
    return Peak(
        name=name,
        words=tuple(words.split()),
        without=tuple(without.split()),
        bytes_per_s=tb_per_s * 1e12,
        flops_per_s=tflops * 1e12,
        cache_bytes=cache_mb * 2**20,
        source=source,
        checked=checked,
    )


# More telling names first: the first match wins.
PEAKS = (
    _peak("GB200", "gb200", 8.0, 2500, 126, "NVIDIA GB200 NVL72 page, per GPU", checked=False),
    _peak("B200", "b200", 8.0, 2250, 126, "NVIDIA DGX B200 data sheet", checked=False),
    _peak("H200", "h200", 4.8, 989, 50, "NVIDIA H200 data sheet", checked=False),
    _peak("H100 PCIe", "h100 pcie", 2.0, 756, 50, "NVIDIA H100 data sheet"),
    _peak("H100 NVL", "h100 nvl", 3.9, 835, 50, "NVIDIA H100 data sheet"),
    _peak("H100 SXM", "h100", 3.35, 989, 50, "NVIDIA H100 data sheet"),
    _peak("H20", "h20", 4.0, 148, 60, "reported, no data sheet seen", checked=False),
    _peak("A100 80GB", "a100 80gb", 2.04, 312, 40, "NVIDIA A100 data sheet (SXM)"),
    _peak("A100 40GB", "a100", 1.555, 312, 40, "NVIDIA A100 data sheet"),
    _peak("L40S", "l40s", 0.864, 362, 96, "NVIDIA L40S data sheet", checked=False),
    _peak("L4", "l4", 0.30, 121, 48, "NVIDIA L4 data sheet", without="l40 l40s", checked=False),
    _peak("RTX 4090", "rtx 4090", 1.008, 165.2, 72, "NVIDIA Ada white paper", checked=False),
)


def find_peak(device_name: str | None) -> Peak | None:
    """The entry for a device's name as the driver gives it; None for a CPU or an unlisted one."""
    if not device_name:
        return None
    words = device_name.lower().replace("-", " ").split()
    for peak in PEAKS:
        if all(word in words for word in peak.words) and not set(peak.without) & set(words):
            return peak
    return None
