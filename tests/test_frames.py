"""bench.load: frames hold what the record holds, columns are documented, sums equal the tables."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from made_records import header, row, steps_of

import bench
from bench import frames, metrics
from bench.claims import load_claims
from bench.claims_ours import committed_records, run_folders
from bench.records import Measurement, ScoreRecord, StepRecord
from bench.store import RunStore, read_record, read_steps
from tidar_ref.errors import UserError

pd = pytest.importorskip("pandas")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "frames.md"
NAMES = tuple(field.name for field in dataclasses.fields(frames.Frames))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two of four planned generations, a score, a width curve of two points."""
    folder = tmp_path / "made"
    run = RunStore.create(folder, header())
    for measurement in (row(), row(problem="2", decode_forwards=0, output_tokens=1)):
        run.append(measurement, steps_of(measurement))
    run.write_scores(
        [ScoreRecord(decoder="ar", task="t", repeat=0, metric="m", variant="raw", harness="h",
                     headline=True, per_problem={"1": 1.0, "2": 0.0})]
    )  # fmt: skip
    run.close()
    (folder / frames.SLOTS).write_text('{"width": 1, "kv_len": 9, "extra": 2}\n{"width": 4}\n')
    return folder


def test_every_row_is_there(made: Path) -> None:
    loaded = bench.load(made)
    assert (len(loaded.measurements), len(loaded.steps), len(loaded.scores)) == (2, 4, 2)
    assert len(loaded.claims) == len(load_claims()) and len(loaded.header) == 1
    first, second = loaded.measurements.to_dict("records")
    assert (first["t_per_nfe"], first["tokens_per_s"], first["step_ms"]) == (1.0, 5.0, 200.0)
    assert first["decode_tokens"] == 10 and first["acceptance_histogram"] == (0, 10)
    assert second["decode_tokens"] == 0 and pd.isna(second["t_per_nfe"])
    assert loaded.header.loc[0, ["planned", "done"]].tolist() == [4, 2]
    assert loaded.scores["score"].tolist() == [1.0, 0.0]
    assert list(loaded.slots["width"]) == [1, 4] and loaded.slots["extra"][0] == 2
    assert loaded.steps["committed_tokens"].tolist() == [1, 1, 1, 1]


def test_frames_equal_the_records_they_come_from() -> None:
    folders = run_folders(committed_records())
    loaded = bench.load([str(folder) for folder in folders])
    records = [read_record(folder) for folder in folders]
    assert len(loaded.measurements) == sum(len(record.measurements) for record in records)
    assert len(loaded.steps) == sum(len(list(read_steps(folder))) for folder in folders)
    for record in records:
        part = loaded.measurements[loaded.measurements.record == record.name]
        for decoder, mine in part.groupby("decoder"):
            rows = [m for m in record.measurements if m.decoder == decoder]
            ratio = mine.decode_tokens.sum() / mine.decode_forwards.sum()
            assert ratio == pytest.approx(metrics.tokens_per_nfe(rows))
            assert mine.decode_tokens.sum() / mine.decode_s.sum() == pytest.approx(
                metrics.tokens_per_s(rows)
            )


def test_columns_are_the_documented_ones(made: Path) -> None:
    loaded = bench.load(made)
    assert set(NAMES) == set(frames.COLUMNS)
    for name in NAMES:
        columns = list(getattr(loaded, name).columns)
        expected = list(frames.COLUMNS[name])
        assert columns[: len(expected)] == expected, name
        assert name == "slots" or len(columns) == len(expected), name
    assert frames.describe() in DOCS.read_text(encoding="utf-8"), (
        "docs/frames.md is behind: paste what bench.frames.describe() gives"
    )


def test_units_are_named() -> None:
    for name, columns in frames.COLUMNS.items():
        for column, (unit, meaning) in columns.items():
            assert meaning, (name, column)
            for ending, expected in (("_s", "s"), ("_ms", "ms"), ("_bytes", "bytes")):
                if column.endswith(ending) and column != "tokens_per_s":
                    assert unit == expected, (name, column)


def test_every_field_of_a_record_is_documented() -> None:
    """A new field shows up in its frame by itself; its unit and meaning have to be written."""
    for name, kind in (("measurements", Measurement), ("steps", StepRecord)):
        missing = {field.name for field in dataclasses.fields(kind)} - set(frames.COLUMNS[name])
        assert not missing, f"say in bench.frames.COLUMNS[{name!r}] what these are: {missing}"


def test_empty_frames_keep_their_columns(tmp_path: Path) -> None:
    RunStore.create(tmp_path / "r", header()).close()
    loaded = bench.load(tmp_path / "r")
    assert loaded.measurements.empty and loaded.slots.empty
    assert "query_width" in loaded.steps and "median_s" in loaded.slots


def test_bad_input(tmp_path: Path, made: Path) -> None:
    with pytest.raises(UserError, match="no record folder"):
        bench.load([])
    with pytest.raises(UserError, match="nosuch"):
        bench.load(tmp_path / "nosuch")
    (made / frames.SLOTS).write_text("[1\n")
    with pytest.raises(UserError, match="line 1"):
        bench.load(made)


def test_import_bench_loads_nothing() -> None:
    code = "import sys, bench; print(sorted({'pandas', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
