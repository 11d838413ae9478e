"""The evalplus adapter: verdicts on subsets, HumanEval/32, the sanitiser, and its limits."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.sandbox import isolation
from bench.tasks import _evalplus, data
from bench.tasks._evalplus import EvalplusVerdict, evalplus_scores, sanitise, sanitise_many
from tidar_ref.errors import UserError

PASSES = EvalplusVerdict(base=True, plus=True, base_repaired=True, plus_repaired=True)
FAILS = EvalplusVerdict(base=False, plus=False, base_repaired=False, plus_repaired=False)


def rows(shared_data: Path, dataset: str) -> dict[str, dict]:
    found = data.read_jsonl(shared_data / data.EVALPLUS_FILES[dataset])
    return {row["task_id"]: row for row in found}


def reference(row: dict) -> str:
    return row["prompt"] + row["canonical_solution"]


@pytest.fixture
def humaneval(shared_data: Path) -> dict[str, dict]:
    return rows(shared_data, "humaneval")


def score(
    shared_data: Path, dataset: str, programs: dict[str, str], work_dir: Path
) -> dict[str, EvalplusVerdict]:
    file = shared_data / data.EVALPLUS_FILES[dataset]
    return evalplus_scores(dataset, programs, data_file=file, work_dir=work_dir, timeout_s=300)


def test_humaneval_references_pass_and_wrong_answers_fail(
    shared_data: Path,
    humaneval: dict[str, dict],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EVALPLUS_TIMEOUT_PER_TASK", "1")  # breaks evalplus 0.3.1 when it is seen
    monkeypatch.setenv("TIDAR_SECRET", "secret")
    programs = {f"HumanEval/{i}": reference(humaneval[f"HumanEval/{i}"]) for i in (0, 1, 3, 4, 32)}
    programs["HumanEval/0"] = (
        "import os\nassert 'TIDAR_SECRET' not in os.environ\n" + programs["HumanEval/0"]
    )
    # The example of its docstring only; base tests it fails.
    programs["HumanEval/2"] = "def truncate_number(number):\n    return 0.5\n"
    # A syntax error and an early exit are failures, not accidents.
    programs["HumanEval/5"] = "def intersperse(:\n"
    programs["HumanEval/23"] = "import sys\nsys.exit(0)\n"
    started = time.perf_counter()
    found = score(shared_data, "humaneval", programs, tmp_path)
    assert time.perf_counter() - started < 60
    assert found == {
        **{f"HumanEval/{i}": PASSES for i in (0, 1, 3, 4)},
        "HumanEval/32": EvalplusVerdict(
            base=False, plus=False, base_repaired=True, plus_repaired=True
        ),
        **{f"HumanEval/{i}": FAILS for i in (2, 5, 23)},
    }


def test_base_and_plus_differ_for_an_answer_that_only_base_tests_accept(
    shared_data: Path, tmp_path: Path
) -> None:
    """And MBPP references pass; a stale results file is not believed."""
    mbpp = rows(shared_data, "mbpp")
    ids = ("Mbpp/2", "Mbpp/3", "Mbpp/7")
    programs = {id: reference(mbpp[id]) for id in ids}
    # Right on the base inputs, which it knows by heart, and nowhere else.
    row = mbpp["Mbpp/3"]
    known = [tuple(inputs) for inputs in row["base_input"]]
    programs["Mbpp/3"] += (
        f"\nright, {row['entry_point']} = {row['entry_point']}, "
        f"lambda n: right(n) if (n,) in {known!r} else 'wrong'\n"
    )
    stale = {"eval": {id: [{"base_status": "fail", "plus_status": "fail"}] for id in ids}}
    (tmp_path / "mbpp_samples_eval_results.json").write_text(json.dumps(stale))
    assert score(shared_data, "mbpp", programs, tmp_path) == {
        "Mbpp/2": PASSES,
        "Mbpp/3": EvalplusVerdict(base=True, plus=False, base_repaired=True, plus_repaired=False),
        "Mbpp/7": PASSES,
    }


def test_find_zero_is_repaired_for_right_answers_only(humaneval: dict[str, dict]) -> None:
    row = humaneval["HumanEval/32"]
    cases = {
        "reference": (reference(row), True, True),
        "constant": ("def find_zero(xs):\n    return 0.0\n", False, False),
        "nan": ("def find_zero(xs):\n    return float('nan')\n", False, False),
        "nothing": ("def find_zero(xs):\n    return None\n", False, False),
        "no such function": ("def f(xs):\n    return 0\n", False, False),
        "leaves": ("import os\nos._exit(0)\n", False, False),
        # Empties its argument, so that a check on the same list would sum nothing.
        "cheat": ("def find_zero(xs):\n    xs.clear()\n    return 0.0\n", False, False),
    }
    failed = [{"base_status": "fail", "plus_status": "fail"}]
    for name, (program, base, plus) in cases.items():
        verdict = _evalplus._verdict(failed, program, row)
        assert not verdict.base and not verdict.plus
        assert (verdict.base_repaired, verdict.plus_repaired) == (base, plus), name


@pytest.mark.skipif(sys.platform != "linux", reason="needs namespaces")
def test_generated_programs_have_no_network(
    shared_data: Path, humaneval: dict[str, dict], tmp_path: Path
) -> None:
    if not isolation().startswith("namespaces"):
        pytest.skip("this kernel gives no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = reference(humaneval["HumanEval/0"]) + (
            "\nimport socket\ntry:\n"
            f"    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)\n"
            "except OSError: pass\nelse: raise ValueError('connected')\n"
        )
        found = score(shared_data, "humaneval", {"HumanEval/0": program}, tmp_path)
        assert found == {"HumanEval/0": PASSES}
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_run_out_of_time_leaves_no_process(
    shared_data: Path, humaneval: dict[str, dict], tmp_path: Path
) -> None:
    file = shared_data / data.EVALPLUS_FILES["humaneval"]
    programs = {"HumanEval/0": "while True: pass\n"}  # two minutes, if nobody stopped it
    with pytest.raises(TimeoutError, match="not done after 3 s"):
        evalplus_scores(
            "humaneval", programs, data_file=file, work_dir=tmp_path, timeout_s=3
        )
    if Path("/proc/self/cmdline").exists():
        time.sleep(0.2)
        assert not [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path) in command_line(p)]


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def test_a_broken_run_ends_with_its_last_words(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_evalplus, "LAUNCHER", "raise SystemExit('no such luck')")
    file = shared_data / data.EVALPLUS_FILES["humaneval"]
    with pytest.raises(RuntimeError, match="no such luck"):
        evalplus_scores("humaneval", {"HumanEval/0": ""}, data_file=file, work_dir=tmp_path)


def test_bad_input_is_named(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shared_data / data.EVALPLUS_FILES["humaneval"]
    with pytest.raises(UserError, match="'apps'"):
        evalplus_scores("apps", {"a": ""}, data_file=file, work_dir=tmp_path)
    with pytest.raises(UserError, match="'HumanEval/999'"):
        evalplus_scores("humaneval", {"HumanEval/999": ""}, data_file=file, work_dir=tmp_path)
    assert evalplus_scores("humaneval", {}, data_file=file, work_dir=tmp_path) == {}
    monkeypatch.setattr(_evalplus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install evalplus==0\.3\.1"):
        evalplus_scores("humaneval", {"HumanEval/0": ""}, data_file=file, work_dir=tmp_path)


def test_sanitiser_equals_the_library_and_keeps_order(humaneval: dict[str, dict]) -> None:
    chosen = [humaneval[f"HumanEval/{i}"] for i in (0, 10, 32)]
    items = [
        (row["prompt"], row["canonical_solution"] + "\nprint('run on')\n", row["entry_point"])
        for row in chosen
    ]
    found = sanitise_many(items)
    code = (
        "import json, sys\nfrom evalplus.sanitize import sanitize\n"
        "print(json.dumps([sanitize(p + c, e) for p, c, e in json.load(sys.stdin)]))"
    )
    library = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(items), capture_output=True, text=True
    )
    assert [one.program for one in found] == json.loads(library.stdout)
    assert not any(one.fault or "run on" in one.program for one in found)
    assert sanitise(*items[1]) == found[1].program


def test_what_the_sanitiser_cannot_do_is_flagged(caplog: pytest.LogCaptureFixture) -> None:
    start = "def f():\n    return 1\n"
    with caplog.at_level(logging.WARNING):
        found = sanitise_many(
            [
                (start, "x = 1\n" * 700, "f"),  # cubic: minutes
                (start, "y = 2\n", "f"),  # the next one has a fresh worker and its own answer
                (start, "z = '\ud800'\n", "f"),  # half a character, as a cut byte-level token gives
                (start, "", "f"),
            ],
            timeout_s=2.0,
        )
    assert [bool(one.fault) for one in found] == [True, False, True, False]
    assert found[0].program == start + "x = 1\n" * 700 and "within 2 s" in found[0].fault
    assert found[1].program == start.strip()
    assert found[2].program == start + "z = '\ud800'\n"
    assert sum("left unsanitised" in line for line in caplog.messages) == 2


def test_a_dead_worker_is_replaced() -> None:
    assert sanitise("def f():\n    return 1\n", "", "f") == "def f():\n    return 1"
    process = _evalplus._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    (one,) = sanitise_many([("def f():\n    return 2\n", "", "f")])
    assert one.fault == "the sanitiser process died"
    assert sanitise("def f():\n    return 3\n", "", "f") == "def f():\n    return 3"


@pytest.mark.slow
def test_verdicts_equal_those_of_the_command_line(
    shared_data: Path, humaneval: dict[str, dict], tmp_path: Path
) -> None:
    programs = {id: reference(row) for id, row in list(humaneval.items())[30:36]}
    programs["HumanEval/31"] = "def is_prime(n):\n    return n in (2, 3, 5, 7, 11, 13)\n"
    programs["HumanEval/33"] = "def sort_third(l):\n    return 1 / 0\n"
    # Outside a function this loop would meet no limit per input and cost evalplus two minutes.
    programs["HumanEval/34"] = "def unique(l):\n    while True: pass\n"
    ours = score(shared_data, "humaneval", programs, tmp_path / "ours")

    file, samples = tmp_path / "six.jsonl", tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(humaneval[id]) + "\n" for id in programs))
    samples.write_text(
        "".join(json.dumps({"task_id": i, "solution": p}) + "\n" for i, p in programs.items())
    )
    subprocess.run(
        [sys.executable, "-m", "evalplus.evaluate", "--dataset", "humaneval",
         "--samples", str(samples), "--parallel", "2", "--min_time_limit", "4"],
        env=os.environ | {"HUMANEVAL_OVERRIDE_PATH": str(file), "XDG_CACHE_HOME": str(tmp_path),
                          "EVALPLUS_MAX_MEMORY_BYTES": str(8 * 1024**3)},
        stdin=subprocess.DEVNULL, capture_output=True, check=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    theirs = json.loads((tmp_path / "samples_eval_results.json").read_text())["eval"]
    for id, (sample,) in theirs.items():
        base = sample["base_status"] == "pass"
        assert ours[id].base == base, id
        assert ours[id].plus == (base and sample["plus_status"] == "pass"), id
    assert {id for id in ours if ours[id].plus} == {"HumanEval/30", "HumanEval/35"}
