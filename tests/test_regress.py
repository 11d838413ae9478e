"""Measuring for the gate: repeatable counters, off-by-one, workers, worktree, real slowdown."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gate_trials
import pytest
import torch
from torch import Tensor

import tidar_ref.tidar
from bench import cli
from bench import regress as measuring
from bench.compare import interleaved, regress_record, sides, verdict, writers
from bench.compare.estimate import REGRESSION
from bench.compare.regress_record import RegressRecord
from bench.registry import decoder_names
from bench.regress import Measurer
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.sampling import leading_matches

ROOT = Path(__file__).resolve().parents[1]
PERF = ROOT / "tests" / "perf"
SETTINGS = {"device": "cpu", "threads": 1, "words": ["tidar:block_len=4"]}
K8 = ["tidar:block_len=8"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A measurer sets torch's thread count; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def judged(base: RegressRecord, head: RegressRecord) -> verdict.Comparison:
    return verdict.compare(sides.from_regress(base, "base"), sides.from_regress(head, "head"))


def test_every_registered_decoder_is_measured_or_named() -> None:
    measurer = Measurer()
    named = {label.partition(":")[0] for label in (*measurer.decoders, *measurer.not_measured)}
    assert named == set(decoder_names())
    assert not measurer.not_measured.keys() & {"ar", "tidar", *measuring.VARIANTS}
    assert set(measurer.counters()) == set(measurer.decoders)


def test_counters_repeat_exactly_and_are_varied() -> None:
    first, second = Measurer(words=K8).counters(), Measurer(words=K8).counters()
    assert first == second
    counts = first["tidar:block_len=8"]
    lengths = {
        length
        for found in counts.values()
        for length, steps in enumerate(found["acceptance_histogram"])
        if steps
    }
    assert {1, 2, 3, 8} <= lengths and len(lengths) >= 5  # wrong, partly right and right drafts
    for name, found in counts.items():
        histogram = found["acceptance_histogram"]
        committed = sum(length * steps for length, steps in enumerate(histogram))
        assert committed + 1 == found["tokens_generated"]
        assert found["query_widths"] == {"72": sum(histogram)}
        assert found["prefill_width"] == len(measuring.PROMPTS[name]) + 8
        assert found["drafted"] == 7 * sum(histogram)
        assert found["token_ids_sha"] == first["ar"][name]["token_ids_sha"]
        assert found["decode_tokens"] == 47
        assert found["t_per_nfe"] == 47 / found["decode_forwards"]
    assert all(found["t_per_nfe"] == 1 for found in first["ar"].values())


@pytest.mark.parametrize("off", [-1, 1])
def test_an_off_by_one_in_acceptance_is_caught(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token too few is still right text and one too many is not: counters see both."""
    base = interleaved.measure_alone(Measurer(words=K8), rounds=1)

    def wrong(draft: Tensor, verified: Tensor) -> Tensor:
        return (leading_matches(draft, verified) + off).clamp(1, draft.shape[1])

    monkeypatch.setattr(tidar_ref.tidar, "leading_matches", wrong)
    head = interleaved.measure_alone(Measurer(words=K8), rounds=1)
    found = judged(base, head)
    assert {row.decoder: row.differing for row in found.counters} == {"ar": 0, K8[0]: 3}
    assert found.exit_code() == 1


def test_a_record_of_one_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    words = ["regress", "--decoders", *K8, "--rounds", "2", "--out", str(out)]
    assert cli.main(words) == 0
    assert str(out) in capsys.readouterr().out
    record = regress_record.read(out)
    assert [turn.place for turn in record.turns] == [(0, 0), (0, 1)]
    assert all(len(turn.ar_s) == len(turn.own_s) == measuring.REPEATS for turn in record.turns)
    assert all(turn.speedup == min(turn.ar_s) / min(turn.own_s) for turn in record.turns)
    assert record.session is None and record.environment["threads"] == 1
    assert str(ROOT) not in out.read_text()
    assert cli.main(["compare", str(out), str(out)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decoders", "beam"], "unknown decoder 'beam'"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "cuda"], "no CUDA"),
        (["--junit", "x.xml"], "add --base"),
        (["--base", "no-such-ref"], "no commit 'no-such-ref'"),
        (["--base", "HEAD", "--blocks", "0"], "--blocks 0"),
        (["--base", "HEAD", "--processes", "0"], "--processes 0"),
        (["--base", "HEAD", "--tolerance", "2"], "tolerance 2"),
        (["--base", "HEAD", "--out", "x.json"], "name a folder"),
    ],
)
def test_bad_input(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["regress", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_worker_answers_as_a_measurer_does() -> None:
    worker = interleaved.Worker(ROOT, SETTINGS)
    try:
        here = Measurer(**SETTINGS)
        assert list(worker.labels) == here.labels == ["tidar:block_len=4"]
        assert worker.counters() == here.counters()
        seconds = worker.turn("tidar:block_len=4", ar_first=True)
        assert min(*seconds["ar_s"], *seconds["own_s"]) > 0
        worker.process.kill()
        with pytest.raises(UserError, match="ended with code -9"):
            worker.counters()
    finally:
        worker.close()


def test_a_worker_says_what_is_wrong_and_ends(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown decoder 'beam'"):
        interleaved.Worker(ROOT, {**SETTINGS, "words": ["beam"]})
    # A folder without the packages: whatever Python finds instead must not be measured.
    said = "ended with code|imported the packages of|No module named 'bench'"
    with pytest.raises(UserError, match=said):
        interleaved.Worker(tmp_path, SETTINGS)


def git(folder: Path, *words: str) -> str:
    """Run git there with an identity of its own; gives what it prints."""
    names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
    env = {**os.environ, **dict.fromkeys(names, "test")}
    done = subprocess.run(
        ["git", "-C", str(folder), *words], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_checkout_is_the_ref_and_leaves_nothing_behind(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("old")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "old")
    (tmp_path / "file").write_text("new")
    with interleaved.checkout("HEAD", tmp_path) as folder:
        assert (folder / "file").read_text() == "old"
    assert not folder.exists() and git(tmp_path, "worktree", "list").count("\n") == 1
    assert (tmp_path / "file").read_text() == "new"
    with (
        pytest.raises(UserError, match="no commit 'nothing'"),
        interleaved.checkout("nothing", tmp_path),
    ):
        pass


def test_a_base_older_than_the_gate_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A commit without the gate, and one whose packages lack something the gate imports."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "tidar_ref", repository / "tidar_ref")
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "before the gate")
    (repository / "bench").mkdir()
    for name in ("__init__.py", "regress.py"):
        shutil.copy(ROOT / "bench" / name, repository / "bench")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "without bench.profiles")
    real = interleaved.checkout
    monkeypatch.setattr(interleaved, "checkout", lambda ref: real(ref, repository))
    for ref, words in (
        ("HEAD~1", "HEAD~1 has no bench/regress.py, so it is older than the gate"),
        ("HEAD", "base: this checkout cannot be measured by the gate as it is now (No module"),
    ):
        command = ["regress", "--base", ref, "--decoders", *K8, "--out", str(tmp_path / "out")]
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert f"error: {words}" in said and "Traceback" not in said
        assert said.strip().endswith("name a later commit as base")
    assert not (tmp_path / "out").exists()


class Slower:
    """A decoder whose every step takes `share` longer, by burning the processor."""

    def __init__(self, decoder: Any, share: float) -> None:
        self._decoder, self._share = decoder, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, state: State) -> StepTrace:
        started = time.perf_counter()
        trace = self._decoder.step(state)
        until = time.perf_counter() + self._share * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return trace


def test_counters_that_waver_between_processes_are_refused() -> None:
    class Wavering(Measurer):
        made = 0

        def counters(self) -> dict[str, dict[str, dict[str, Any]]]:
            Wavering.made += 1
            return {"ar": {"p": {"decode_forwards": Wavering.made}}}

    side = Wavering(words=K8)
    with pytest.raises(UserError, match="counters of base differ"):
        interleaved.measure_pair(lambda: (side, side), enough=lambda *_: False, blocks=1, most=2)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.10])
def test_a_real_slowdown_on_this_machine(share: float) -> None:
    """The tiny model, timed for real: 10 % more per tidar step is called; nothing is not."""
    base, head = Measurer(words=K8), Measurer(words=K8)
    if share:
        head.decoders[K8[0]] = Slower(head.decoders[K8[0]], share)
    records = interleaved.measure_pair(
        lambda: (base, head), enough=lambda *pair: verdict.all_decided(judged(*pair)), most=24
    )
    found = {row.decoder: row for row in judged(*records).timings}
    assert found["ar"].verdict != REGRESSION
    assert (found[K8[0]].verdict == REGRESSION) == bool(share), found


@pytest.mark.slow
def test_make_regress_sees_a_change_in_a_checkout(tmp_path: Path) -> None:
    """A clone of this checkout with an off-by-one against its own last commit, through the CLI."""
    clone = tmp_path / "clone"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results", "notebooks")
    shutil.copytree(ROOT, clone, ignore=skip)
    git(clone, "init", "-q")
    git(clone, "add", "tidar_ref", "baselines", "bench")
    git(clone, "commit", "-qm", "base")
    env = {**os.environ, "PYTHONPATH": str(clone)}
    words = ["regress", "--base", "HEAD", "--blocks", "1", "--processes", "1", "--out", "out"]
    command = [sys.executable, "-m", "bench", *words, "--decoders", *K8]

    def gate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)

    same = gate()
    assert same.returncode == 0, same.stdout + same.stderr
    base, head = (regress_record.read(clone / "out" / f"{n}.json") for n in ("base", "head"))
    assert base.session == head.session and base.commit == head.commit
    assert (base.dirty, head.dirty) == (False, False)
    assert dataclasses.replace(base, turns=()).counters == head.counters

    source = clone / "tidar_ref" / "sampling.py"
    text = source.read_text()
    right = "return 1 + same.cumprod(dim=1).sum(dim=1)"
    assert text.count(right) == 1
    source.write_text(text.replace(right, right.replace("1 + ", "") + ".clamp_min(1)"))
    changed = gate()
    assert changed.returncode == 1, changed.stdout + changed.stderr
    assert "decode_forwards" in changed.stdout and "REGRESSION" in changed.stdout
    assert "local changes" in changed.stdout
    assert git(clone, "worktree", "list").count("\n") == 1


def test_the_ready_workflow_calls_what_exists() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / "docs" / "ci" / "regress.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    assert "${{" not in commands  # what an event brings reaches the shell as a variable only
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z]+)", commands)) == {"setup", "regress"} <= set(targets)
    [gate] = re.findall(r'make regress .*ARGS="([^"]*)"', commands)
    args = cli.parser().parse_args(["regress", "--base", "HEAD", *gate.split()])
    tools = {s["with"]["tool"]: s["with"]["output-file-path"] for s in steps if "benchmark" in
             s.get("uses", "")}  # fmt: skip
    assert tools == {
        "customBiggerIsBetter": str(args.gab),
        "customSmallerIsBetter": str(writers.smaller_path(args.gab)),
    }


# --- the pytest-benchmark suite in tests/perf/


def test_machine_info_names_gpu_driver_and_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a made-up NVML: the GPU is asked for by UUID, and a refused counter is None."""
    import pynvml

    spec = importlib.util.spec_from_file_location("perf_conftest", PERF / "conftest.py")
    assert spec and spec.loader
    perf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(perf)

    def refuse(handle: Any) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    fake = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-abc": "handle"}[uuid],
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1500, 2: 2600}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
        "nvmlDeviceGetEnforcedPowerLimit": refuse,
    }
    for name, call in fake.items():
        monkeypatch.setattr(pynvml, name, call)
    properties = SimpleNamespace(name="H100", uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert perf.gpu() == {
        "name": "H100", "driver": "580.1", "sm_mhz": 1500, "sm_max_mhz": 1980,
        "memory_mhz": 2600, "memory_max_mhz": 2619, "power_limit_w": None,
    }  # fmt: skip


@pytest.mark.slow
def test_the_perf_suite_runs_and_describes_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = ["-q", "-m", "perf", "--benchmark-max-time=0.01", f"--benchmark-json={file}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words, str(PERF)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(file.read_text())
    names = {entry["name"] for entry in values["benchmarks"]}
    assert {"test_step[ar]", "test_step[tidar]", "test_decode_mask[8]"} <= names
    info = values["machine_info"]
    assert info["tidar_bench"]["versions"]["torch"] and "cpu_clock_mhz" in info and "gpu" in info
    steps = {e["name"]: e["extra_info"] for e in values["benchmarks"] if "step" in e["name"]}
    assert steps["test_step[ar]"] == {"query_width": 1, "forwards": 1}


def test_the_documents_table_of_real_trials_is_the_records() -> None:
    """And its lines hold what a trial must: base against itself, or a planted slowdown."""
    [path] = sorted((ROOT / "results" / "gate").glob("*.jsonl"))
    text = (ROOT / "docs" / "regress.md").read_text(encoding="utf-8")
    rows = gate_trials.summary(path)
    assert [row[0] for row in rows] == ["nothing", "tidar:block_len=8 10%"]
    for row in rows:
        assert "| " + " | ".join(row) + " |" in text
