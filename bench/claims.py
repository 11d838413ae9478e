"""What was claimed, as rows: every number of the paper, of its project page, of published rivals.

The files in results/paper/ hold what others print or draw; nothing is measured here. `certainty`
tells how a cell was read: "text" is exact to the digit, "vector figure" was measured off a drawing
(about 0.1 of a score point, 0.01 of a ratio), "bars" off a bar chart (about 1 %), "derived" is
arithmetic or logic on such cells. `note` names every inference. No torch, no pandas.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from tidar_ref.errors import UserError

PAPER_DIR = Path(__file__).resolve().parents[1] / "results" / "paper"
FILES = (
    "table2.csv", "table3.csv", "table4.csv", "table5.csv", "table6.csv", "figure1.csv",
    "figure4.csv", "figure5.csv", "figure6.csv", "text.csv", "site_bars.csv", "site_traces.csv",
    "published_eagle3.csv", "published_diffusion.csv",
)  # fmt: skip
FINDINGS, PROPERTIES = "findings.csv", "properties.csv"

KINDS = ("paper", "site", "published")
CERTAINTIES = ("text", "vector figure", "bars", "derived")
UNITS = {
    "score": "%",
    "t_per_nfe": "tokens/forward",
    "acceptance_length": "tokens/forward",
    "speedup": "x",
    "tokens_per_s": "tokens/s",
    "latency": "ms",
    "time": "ms",
    "step_ratio": "AR steps",
    "share": "%",
    "slots": "tokens",
    "steps": "steps",
    "count": "steps",
    "shots": "examples",
    "length_limit": "tokens",
}
# The paper's sizes, under the names their shapes have here.
SHAPES = {"1.5B": "qwen2.5-1.5b", "8B": "qwen3-8b", "32B": "qwen3-32b"}
NUMBERS = {"value": float, "tolerance": float, "beta": float, "alpha": float, "threshold": float,
           "block_len": int, "width": int, "kv_len": int}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number somebody published, with the setting it belongs to.

    `value` and `tolerance` are in `unit` (UNITS[metric]); tolerance is how far a measurement on
    the same weights and setting may lie and still count as a reproduction (our choice, see
    docs/metrics.md). `weights` is a hub id, or two joined by " + ", and empty where the weights
    are not published. `decoder` is our name for the method, empty where we have none. `setting`
    holds what has no column, as key=value joined by ";". Empty text or None: not stated or does
    not apply. `mark` is the provenance mark of the reading.
    """

    id: str
    kind: str
    source: str
    page: str
    system: str
    weights: str
    size: str
    decoder: str
    block_len: int | None
    beta: float | None
    alpha: float | None
    threshold: float | None
    task: str
    width: int | None
    kv_len: int | None
    setting: str
    metric: str
    unit: str
    value: float
    tolerance: float
    certainty: str
    mark: str
    note: str

    @property
    def settings(self) -> dict[str, str]:
        """`setting` taken apart; a word without "=" stands for itself."""
        parts = [part.partition("=") for part in self.setting.split(";") if part]
        return {key: value or key for key, _, value in parts}


    @property
    def setting_words(self) -> str:
        """Everything that places the number beside its task, for a reader: "K 16 beta 0 ..."."""
        words = [
            f"{word} {getattr(self, name):g}"
            for name, word in (
                ("block_len", "K"), ("beta", "beta"), ("alpha", "alpha"),
                ("threshold", "threshold"), ("width", "width"), ("kv_len", "KV"),
            )
            if getattr(self, name) is not None
        ]  # fmt: skip
        shown = ("alpha", "beta")
        words += [p for p in self.setting.split(";") if p and p.split("=")[0] not in shown]
        return " ".join(words)


COLUMNS = tuple(field.name for field in fields(Claim))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A place where the paper disagrees with itself, or says less than it seems to."""

    id: str
    where: str
    what: str
    mark: str


@dataclass(frozen=True, kw_only=True)
class Property:
    """A qualitative claim that holds for any weights; `test` is the pytest id that proves it."""

    id: str
    claim: str
    source: str
    test: str


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[dict[str, str], str]]:
    if not path.is_file():
        raise UserError(
            f"the paper's numbers are not at {path}: results/ lies beside the packages in a clone, "
            "so install with `pip install -e .` from a clone or run from one"
        )
    with path.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if tuple(reader.fieldnames or ()) != columns:
            raise UserError(f"{path.name} has columns {reader.fieldnames}; restore it with git")
        for row in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: expected {len(columns)} columns; restore the file with git"
                )
            yield row, where


def load_file(path: Path) -> list[Claim]:
    """All claims of one CSV file, in order. UserError names a missing file or the bad line."""
    claims = []
    for row, where in _rows(path, COLUMNS):
        try:
            numbers = {
                name: kind(row[name]) if row[name] or name in ("value", "tolerance") else None
                for name, kind in NUMBERS.items()
            }
        except ValueError as error:
            raise UserError(f"{where}: {error}; restore the file with git") from error
        claims.append(Claim(**{**row, **numbers}))
    return claims


@cache
def load_claims(folder: Path = PAPER_DIR) -> tuple[Claim, ...]:
    """Every claim of every file in `FILES`, the paper's tables first."""
    return tuple(claim for name in FILES for claim in load_file(folder / name))


def load_findings(folder: Path = PAPER_DIR) -> tuple[Finding, ...]:
    """The inconsistencies inside the paper."""
    names = tuple(field.name for field in fields(Finding))
    return tuple(Finding(**row) for row, _ in _rows(folder / FINDINGS, names))


def load_properties(folder: Path = PAPER_DIR) -> tuple[Property, ...]:
    """The qualitative claims with their tests."""
    names = tuple(field.name for field in fields(Property))
    return tuple(Property(**row) for row, _ in _rows(folder / PROPERTIES, names))
