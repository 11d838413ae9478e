"""The h100-steps run book: what it lists, and its rehearsal on a CPU from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cli, steps
from bench.profiles import parse_decoders
from bench.registry import check_decoder
from bench.slots import engine
from bench.slots.record import OK, read_slots
from bench.slots.timing import Clock
from tidar_ref.checkpoint import load
from tidar_ref.shapes import shape

REHEARSE = ["reproduce", "--profile", "h100-steps", "--rehearse"]


def test_the_list_fits_its_twelve_minutes() -> None:
    plan = steps.h100_steps()
    assert steps.expected_s(plan) < 12 * 60
    assert all(job.expected_s for job in plan.jobs)
    names = [job.name for job in plan.jobs]
    assert len(set(names)) == len(names) and plan.figure1 in names
    assert names.index("steps-8b") < names.index("batch64-8b")  # the bars come before the sweeps
    for job in plan.jobs:
        config = shape(job.weights.removeprefix("random:")).config
        assert max(job.kv_lens) + 512 <= config.max_position, job.name
        assert "ar" in job.decoders or not job.decoders  # every step needs its reference


def test_every_decoder_of_the_list_exists_or_will_be_recorded_missing() -> None:
    tiny = load("random:tiny")
    for label in {label for job in steps.JOBS for label in job.decoders}:
        [spec] = parse_decoders([label])
        check_decoder(spec, tiny.model, mask_token_id=tiny.source.mask_token_id)


def test_fixed_list_takes_no_other_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([*REHEARSE, "--limit", "3"], "takes no --limit"),
        ([*REHEARSE, "--budget-seconds", "0"], "leaves no time"),
        (["run", "--profile", "h100-steps"], "reproduce --profile h100-steps"),
        (["reproduce", "--profile", "h100-steps"], "no CUDA"),
    ):
        import torch

        if message == "no CUDA" and torch.cuda.is_available():
            continue
        assert cli.main(words) == 2, words
        assert message in capsys.readouterr().err
    assert cli.main([*REHEARSE, "--dry-run"]) == 0
    assert "figure1-32b" in capsys.readouterr().out


@pytest.mark.slow
def test_rehearsal_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Budget first, then the rest; every job leaves its cells, tables and figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "cache_bytes", lambda _: None)
    monkeypatch.setattr(Clock, "warm_up", lambda self, run: int(run() > 0))
    assert cli.main([*REHEARSE, "--budget-seconds", "0.5"]) == 0
    assert "the same command with --out" in capsys.readouterr().out
    assert cli.main(REHEARSE) == 0  # finds the unfinished record by itself
    [folder] = (tmp_path / "runs").iterdir()
    record = read_slots(folder)
    assert {visit.job for visit in record.visits} == {job.name for job in steps.JOBS}
    assert all(visit.status == OK for visit in record.visits), "tiny has room for all"
    assert len(record.visits) == record.plan.visits
    assert {visit.steps for visit in record.visits if "static=8" in visit.what} == {8}
    assert not any(visit.captured or "graphs" in visit.what for visit in record.visits)
    assert record.ceilings is not None and record.ceilings["rehearsal"]
    files = {path.name for path in folder.iterdir()}
    assert {"slots.md", "slots.csv", "slots.svg", "slots-curve-8b.png"} <= files
    text = (folder / "slots.md").read_text()
    assert "means nothing" in text and "tidar_two_forward:block_len=8" in text
    assert "ar:static=8" in text
    assert "predicted" not in text  # tiny is nobody's published shape
