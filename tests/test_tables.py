"""Tables from hand-made records: every cell against a number done by hand, and what stays empty."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from made_records import header, row

from bench import tables
from bench.records import Measurement, RunHeader, ScoreRecord
from bench.store import RunRecord, RunStore

TIDAR = "tidar:block_len=4,beta=1"


def score(decoder: str, values: dict[str, float], **changes: Any) -> ScoreRecord:
    """A headline score of the made-up task."""
    facts: dict[str, Any] = {
        "decoder": decoder,
        "task": "t",
        "repeat": 0,
        "metric": "pass@1",
        "variant": "raw",
        "harness": "x 1",
        "headline": True,
        "per_problem": values,
    }
    return ScoreRecord(**{**facts, **changes})


def measurements() -> tuple[Measurement, ...]:
    """AR: 20 tokens in 20 forwards, 4 s; TiDAR: 20 tokens in 10 forwards, 2 s; one text differs."""
    half = {"decode_forwards": 5, "decode_s": 1.0, "acceptance_histogram": (0, 0, 5)}
    drafts = {"drafted": 15, "accepted": 5, "drafted_at": (5, 5, 5), "accepted_at": (5, 0, 0)}
    return (
        row(problem="1"),
        row(problem="1", decoder=TIDAR, **half, **drafts),
        row(problem="2", finish="eos"),
        row(problem="2", decoder=TIDAR, finish="eos", token_ids_sha="b", **half, **drafts),
    )


def record(made: RunHeader | None = None, rows: int = 4) -> RunRecord:
    """A finished record, or its first `rows` measurements."""
    return RunRecord(
        name="2026-01-01_cpu2_p_abcdef0",
        header=made or header(),
        measurements=measurements()[:rows],
        scores=(score("ar", {"1": 1.0, "2": 0.0}), score(TIDAR, {"1": 1.0, "2": 1.0})),
    )


def test_cells() -> None:
    ar, tidar = tables.table_rows(record())
    assert (ar.decoder, ar.n, ar.planned, ar.stopped_by_length) == ("ar", 2, 2, 1)
    assert (ar.t_per_nfe, ar.tokens_per_s, ar.step_ms) == (1.0, 5.0, 200.0)
    assert (ar.score, ar.speedup, ar.equal_to_ar, ar.score_minus_ar) == (0.5, None, None, None)
    assert (tidar.t_per_nfe, tidar.tokens_per_s, tidar.step_ms) == (2.0, 10.0, 200.0)
    assert (tidar.speedup, tidar.speedup_low, tidar.speedup_high) == (2.0, 2.0, 2.0)
    assert (tidar.acceptance_length, tidar.acceptance_rate) == (2.0, pytest.approx(1 / 3))
    assert (tidar.score, tidar.score_minus_ar) == (1.0, 0.5)
    assert (tidar.equal_to_ar, tidar.compared_to_ar) == (1, 2)
    assert tidar.paper_system is None  # the paper has no task "t"


def test_csv_has_the_same_rows() -> None:
    rows = tables.table_rows(record())
    back = list(csv.DictReader(io.StringIO(tables.to_csv(rows))))
    assert len(back) == 2
    assert back[0]["speedup"] == "" and float(back[1]["speedup"]) == 2.0


def test_markdown_says_what_matters() -> None:
    page = tables.to_markdown(record())
    assert "embedded tier" in page and "our own problems, not a benchmark" in page
    assert "| 2.00x [2.00, 2.00] |" in page
    assert "1 of 2 outputs equal those of ar exactly" in page
    assert "float32: this is a defect" in page
    assert "unfinished" not in page


def test_bfloat16_divergence_is_not_called_a_defect() -> None:
    page = "\n".join(tables.divergence_lines(record(header(dtype="bfloat16"))))
    assert "near-ties" in page and "defect" not in page


def test_random_weights_show_times_only() -> None:
    made = header(weights={**header().weights, "tier": "random"})
    for line in tables.table_rows(record(made)):
        assert line.step_ms == 200.0
        assert (line.score, line.t_per_nfe, line.speedup, line.tokens_per_s) == (None,) * 4
        assert (line.paper_score, line.acceptance_length) == (None, None)
    page = tables.to_markdown(record(made))
    assert "mean nothing" in page and "Every score" not in page


def test_unfinished_record_says_so() -> None:
    page = tables.to_markdown(record(rows=3))
    assert "unfinished: 3 of 4" in page and "1 of 2" in page


def test_empty_record_has_empty_cells() -> None:
    for line in tables.table_rows(record(rows=0)):
        assert (line.n, line.step_ms, line.t_per_nfe, line.speedup) == (0, None, None, None)
    assert tables.to_markdown(record(rows=0))


def test_paper_values_stand_beside() -> None:
    made = header(
        problems={"humaneval": ("1", "2")},
        data={"humaneval": {**header().data["t"], "ours": False}},
    )
    ar, tidar = tables.table_rows(record(made, rows=0))
    assert ar.paper_system == "Qwen2.5 1.5B" and ar.paper_score is not None
    assert tidar.paper_system == "TiDAR 1.5B K=16"
    assert tidar.paper_t_per_nfe is not None and tidar.paper_t_per_nfe > 4


def test_written_into_the_record(tmp_path: Path) -> None:
    run = RunStore.create(tmp_path / "r", header())
    for measurement in measurements():
        run.append(measurement, [])
    run.write_scores(record().scores)
    run.close()
    page = tables.write_tables(tmp_path / "r")
    assert (tmp_path / "r" / "tables.md").read_text() == page
    assert (tmp_path / "r" / "tables.csv").read_text().count("\n") == 3
