"""The command line: bad input, dry run, a whole smoke run, kill -9 and resume, start-up time."""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import cli, doctor
from bench.store import planned_keys, read_record, read_steps

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ["run", "--profile", "smoke"]
BENCH = [sys.executable, "-m", "bench"]
# One thread: two small runs at once on two cores would otherwise fight over both.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in its own process, from another folder than the checkout."""
    return subprocess.run([*BENCH, *words], cwd=cwd, env=ENV, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record folder of one unbroken smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    done = bench(*SMOKE, "--out", "record", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "device: cpu" in done.stdout and "to do: 14 generations" in done.stdout
    assert "random weights" in done.stdout and "own_code" in done.stdout
    assert "it/s" not in done.stderr  # no progress bar when nobody watches
    return folder / "record"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--profile", "huge"], "unknown profile 'huge'"),
        ([*SMOKE, "--decoders", "beam"], "unknown decoder 'beam'"),
        ([*SMOKE, "--decoders", "tidar:block_len=1"], "block_len is 1"),
        ([*SMOKE, "--decoders", "tidar:block_len=17"], "block_len is 17"),
        ([*SMOKE, "--decoders", "tidar:beta=1.01"], "beta is 1.01"),
        ([*SMOKE, "--decoders", "tidar:width=3"], "no parameter"),
        ([*SMOKE, "--tasks", "chess"], "unknown task 'chess'"),
        ([*SMOKE, "--limit", "0"], "limit 0"),
        ([*SMOKE, "--max-new-tokens", "0"], "max_new_tokens 0"),
        ([*SMOKE, "--repeats", "-1"], "repeats -1"),
        ([*SMOKE, "--dtype", "int4"], "unknown dtype 'int4'"),
        ([*SMOKE, "--device", "cuda"], "no CUDA"),
        ([*SMOKE, "--weights", "random:nosuch"], "nosuch"),
        ([*SMOKE, "--weights", "no/such/folder"], "no/such/folder"),
        ([*SMOKE, "--limit", "many"], "invalid int value: 'many'"),
        ([*SMOKE, "--resume", "nowhere"], "nowhere is not a record folder"),
        ([*SMOKE, "--out", "file"], "not an empty folder"),
        ([*SMOKE, "--out", "file/below"], "cannot write"),
        (["tables", "nowhere"], "nowhere is not a record folder"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required: verb"),
        (["run"], "--profile"),
        (["peers", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SMOKE, "--dry-run", "--limit", "1"]) == 0
    assert "to do: 4 generations" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_smoke_record_is_whole(smoke: Path) -> None:
    record = read_record(smoke)
    assert record.complete and record.scores
    assert {path.name for path in smoke.iterdir()} == {
        "header.json",
        "measurements.jsonl",
        "steps.jsonl",
        "scores.jsonl",
        "sessions.jsonl",
        "tables.md",
        "tables.csv",
        "cells.json",
        "vocabulary.json",
    }
    texts = {(m.pair, m.decoder): m.text for m in record.measurements}
    for (pair, decoder), text in texts.items():
        assert text == texts[pair, "ar"], f"{decoder} differs from ar on {pair}"


def test_no_machine_path_in_a_record(smoke: Path) -> None:
    for path in smoke.iterdir():
        assert str(ROOT) not in path.read_text() and str(smoke.parent) not in path.read_text()


def test_tables_verb_makes_the_same_page(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (smoke / "tables.md").read_text()
    assert cli.main(["tables", str(smoke)]) == 0
    assert capsys.readouterr().out == before == (smoke / "tables.md").read_text()


def test_tables_refuse_another_schema(
    smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(smoke, tmp_path / "old")
    header = json.loads((old / "header.json").read_text())
    (old / "header.json").write_text(json.dumps({**header, "schema": 0}))
    assert cli.main(["tables", str(old)]) == 2
    assert "schema 0" in capsys.readouterr().err


def test_resume_with_other_settings_names_the_field(
    smoke: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (smoke / "measurements.jsonl").read_bytes()
    assert cli.main([*SMOKE, "--max-new-tokens", "31", "--resume", str(smoke)]) == 2
    assert "profile.max_new_tokens was 32, is now 31" in capsys.readouterr().err
    assert (smoke / "measurements.jsonl").read_bytes() == before


# The command line, held in its fourth generation: decoded, not yet written, and waiting.
HELD = """
import pathlib, signal, sys, time
from bench import cli, harness
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's child ignores it
measure, calls = harness.measure, []
def held(*arguments):
    found = measure(*arguments)
    calls.append(0)
    if len(calls) == 4:
        pathlib.Path("held").touch()
        time.sleep(120)
    return found
harness.measure = held
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("sign", "verb"), [(signal.SIGKILL, "reproduce"), (signal.SIGINT, "run")])
def test_killed_and_resumed_equals_unbroken(
    smoke: Path, tmp_path: Path, sign: signal.Signals, verb: str
) -> None:
    """kill -9 (found again by `reproduce`) and Ctrl-C (--resume): no key lost, none twice."""
    words = [verb, *SMOKE[1:]]
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, *words],
        cwd=tmp_path,
        env=ENV,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and not (tmp_path / "held").exists():
            time.sleep(0.01)
        process.send_signal(sign)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    [folder] = (tmp_path / "runs").iterdir()
    path = folder / "measurements.jsonl"
    assert len(read_record(folder).measurements) == 3
    if sign == signal.SIGINT:
        assert process.returncode == 130 and b"--resume" in errors
        words += ["--resume", str(folder)]
    else:
        assert process.returncode == -signal.SIGKILL
        with open(path, "ab") as file:  # what a kill in the middle of a write leaves
            file.write(b'{"decoder": "ar", "task"')
    done = bench(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resuming {folder.relative_to(tmp_path)}" in done.stdout or str(folder) in done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    again, unbroken = read_record(folder), read_record(smoke)
    keys = [row.key for row in again.measurements]
    assert sorted(keys) == sorted(planned_keys(again.header)) and len(set(keys)) == len(keys)
    assert {r.key: (r.text, r.token_ids_sha) for r in again.measurements} == {
        r.key: (r.text, r.token_ids_sha) for r in unbroken.measurements
    }
    steps = collections.Counter(step.key for step in read_steps(folder))
    assert steps == collections.Counter(step.key for step in read_steps(smoke))
    assert [s.per_problem for s in again.scores] == [s.per_problem for s in unbroken.scores]


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "hub_reachable", lambda: False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "cpu", "weights embedded", "data gsm8k_cot", "would run"):
        assert word in out


@pytest.mark.parametrize(
    ("memory", "hub", "smollm", "chosen"),
    [
        (80 * 2**30, True, True, "paper"),
        (4 * 2**30, True, True, "small"),
        (80 * 2**30, False, True, "embedded"),
        (None, True, True, "embedded"),
        (None, False, False, "smoke"),
    ],
)
def test_the_profile_follows_the_machine(
    monkeypatch: pytest.MonkeyPatch, memory: int | None, hub: bool, smollm: bool, chosen: str
) -> None:
    monkeypatch.setattr(doctor, "cuda_bytes", lambda: memory)
    monkeypatch.setattr(doctor, "hub_reachable", lambda: hub)
    monkeypatch.setattr(doctor, "installed", lambda module: smollm)
    choice = doctor.choose_profile()
    assert choice.profile == chosen and choice.reasons


def test_start_up_is_quick() -> None:
    """Limits are 0.3 s and 0.5 s on a quiet machine; here only gross mistakes may fail."""
    for words, limit in ((["-c", "import bench"], 0.3), (["-m", "bench", "--help"], 0.5)):
        best = min(_seconds([sys.executable, *words]) for _ in range(3))
        assert best < 4 * limit, f"{words} took {best:.2f} s"
    heavy = "torch", "numpy", "pandas", "transformers", "lm_eval", "tqdm"
    code = f"import sys, bench.cli; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - started
