"""What the verbs `compare` and `regress` do; bench/verbs/ read the options and print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.compare import interleaved, regress_record, sides
from bench.compare.regress_record import RegressRecord
from bench.compare.verdict import Comparison, all_decided, compare
from tidar_ref.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How to measure; decoders None means all registered ones and some variants."""

    device: str = "cpu"
    threads: int = 1
    decoders: Sequence[str] | None = None

    def settings(self) -> dict[str, object]:
        """The arguments of a `Measurer`; UserError for what this machine cannot do."""
        from bench.harness import resolve_device

        _at_least_one("threads", self.threads)
        words = list(self.decoders) if self.decoders else None
        return {"device": resolve_device(self.device), "threads": self.threads, "words": words}


def compare_records(base: Path, head: Path, tolerance: float) -> Comparison:
    """Compare two finished records, each a file or a folder."""
    return compare(sides.read(base), sides.read(head), tolerance=tolerance)


def regress_alone(how: Measuring, *, rounds: int, out: Path) -> tuple[RegressRecord, Path]:
    """Measure this checkout; gives the record and where it was written."""
    from bench.regress import Measurer

    _at_least_one("rounds", rounds)
    record = interleaved.measure_alone(Measurer(**how.settings()), rounds)
    return record, regress_record.write(out, record)


def regress_against(
    ref: str,
    how: Measuring,
    *,
    out: Path,
    tolerance: float,
    blocks: int = interleaved.BLOCKS,
    most: int = interleaved.MOST,
    say: interleaved.Say = lambda _: None,
) -> tuple[Comparison, tuple[Path, Path]]:
    """Measure a git ref and this checkout interleaved, write both records, and compare them."""
    _at_least_one("blocks", blocks)
    _at_least_one("processes", most)
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance {tolerance:g} is not a share; give one between 0 and 1")
    if out.suffix == ".json":
        raise UserError(f"--out {out} is a file, but two records are written; name a folder")
    settings = how.settings()

    def judge(base: RegressRecord, head: RegressRecord) -> Comparison:
        return compare(
            sides.from_regress(base, "base"), sides.from_regress(head, "head"), tolerance=tolerance
        )

    def enough(base: RegressRecord, head: RegressRecord) -> bool:
        found = judge(base, head)
        names = ", ".join(row.decoder for row in found.undecided)
        say(f"  undecided: {names}" if names else "  every timing is decided")
        return all_decided(found)

    with interleaved.checkout(ref) as folder:
        interleaved.check_measurable(folder, ref)
        with interleaved.workers(folder, interleaved.HERE, settings) as start:
            base, head = interleaved.measure_pair(
                start,
                enough=enough,
                blocks=blocks,
                fewest=min(interleaved.FEWEST, most),
                most=most,
                say=say,
            )
    files = (
        regress_record.write(out / "base.json", base),
        regress_record.write(out / "head.json", head),
    )
    return judge(base, head), files


def default_out(runs: Path) -> Path:
    """A new folder name under `runs`."""
    return runs / f"{datetime.now(UTC).strftime('%Y-%m-%d_%H%M%S')}_regress"


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{name} {value} is below 1; give at least 1")
