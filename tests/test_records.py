"""Records survive the way to JSON and back, and refuse what they do not know."""

from __future__ import annotations

import json

import pytest
from made_records import row

from bench.records import Measurement, ScoreRecord, StepRecord, from_dict, ids_sha, to_line


def test_measurement_round_trip() -> None:
    before = row(text="línea\u2028\n\r\x00\ud7ff", finish="eos", drafted_at=(1, 2), host_s=None)
    line = to_line(before)
    assert line.count("\n") == 1 and line.endswith("\n")
    assert from_dict(Measurement, json.loads(line)) == before


def test_score_and_step_round_trip() -> None:
    score = ScoreRecord(
        decoder="ar",
        task="t",
        repeat=0,
        metric="pass@1,create_test",
        variant="raw",
        harness="x 1",
        headline=True,
        per_problem={"a": 1.0},
    )
    step = StepRecord(
        decoder="ar",
        task="t",
        problem="a",
        repeat=0,
        index=1,
        committed=(4, 5),
        target_forwards=1,
        draft_forwards=0,
        query_width=20,
        kv_len=7,
        drafted=3,
        accepted=1,
        step_s=None,
        forward_s=None,
    )
    for record in (score, step):
        assert from_dict(type(record), json.loads(to_line(record))) == record
    assert step.key == ("ar", "t", "a", 0)


def test_unknown_and_missing_fields_are_refused() -> None:
    values = json.loads(to_line(row()))
    with pytest.raises(TypeError):
        from_dict(Measurement, {**values, "surprise": 1})
    del values["text"]
    with pytest.raises(TypeError):
        from_dict(Measurement, values)


def test_not_a_number_is_not_json() -> None:
    with pytest.raises(ValueError):
        to_line(row(decode_s=float("nan")))


def test_ids_sha_tells_borders_apart() -> None:
    assert ids_sha([1, 23]) != ids_sha([12, 3])
    assert ids_sha([]) == "e3b0c44298fc1c14"
