"""Measures whatever obeys the decoder protocol: tasks, harness, records, tables.

Importing this package loads nothing else; each part is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.frames import Frames


def load(paths: str | Path | Sequence[str | Path]) -> Frames:
    """Record folders as pandas frames: see bench/frames.py and docs/frames.md."""
    from bench.frames import load as read

    return read(paths)
