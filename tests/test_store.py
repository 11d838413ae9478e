"""The record folder: what a kill, a full disk or an unlike run does to it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_records import header, row, steps_of

from bench import store
from bench.records import ScoreRecord
from bench.store import RunStore, read_record, read_steps
from tidar_ref.errors import UserError


def filled(folder: Path, problems: tuple[str, ...] = ("1", "2")) -> None:
    """A record with AR's measurements of the given problems."""
    run = RunStore.create(folder, header())
    for problem in problems:
        measurement = row(problem=problem)
        run.append(measurement, steps_of(measurement))
    run.close()


def test_round_trip(tmp_path: Path) -> None:
    filled(tmp_path / "r")
    record = read_record(tmp_path / "r")
    assert record.header == header()
    assert [m.problem for m in record.measurements] == ["1", "2"]
    assert len(list(read_steps(tmp_path / "r"))) == 4
    assert not record.complete  # tidar is missing


def test_planned_keys_alternate_decoders() -> None:
    keys = store.planned_keys(header())
    assert [(key[0].partition(":")[0], key[2]) for key in keys] == [
        ("ar", "1"), ("tidar", "1"), ("ar", "2"), ("tidar", "2"),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    folder = tmp_path / "r"
    filled(folder)
    path = folder / store.MEASUREMENTS
    os.truncate(path, path.stat().st_size - cut)
    assert [m.problem for m in read_record(folder).measurements] == ["1"]  # reading changes nothing
    run = RunStore.resume(folder, header())
    assert run.done == {("ar", "t", "1", 0)}
    assert {step.problem for step in read_steps(folder)} == {"1"}  # orphan steps are gone
    measurement = row(problem="2")
    run.append(measurement, steps_of(measurement))
    run.close()
    assert [m.problem for m in read_record(folder).measurements] == ["1", "2"]
    assert len(list(read_steps(folder))) == 4


def test_torn_steps_and_zero_block(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    filled(folder, ("1",))
    with open(folder / store.STEPS, "ab") as file:
        file.write(b'{"decoder": "ar", "ta')
    with open(folder / store.MEASUREMENTS, "ab") as file:
        file.write(b"\0" * 64)
    run = RunStore.resume(folder, header())
    run.close()
    assert run.done == {("ar", "t", "1", 0)}
    assert (folder / store.MEASUREMENTS).read_bytes().count(b"\0") == 0


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    filled(folder)
    path = folder / store.MEASUREMENTS
    path.write_bytes(b"{broken\n" + path.read_bytes())
    with pytest.raises(UserError, match="line 1"):
        read_record(folder)


def test_a_key_is_stored_once(tmp_path: Path) -> None:
    run = RunStore.create(tmp_path / "r", header())
    run.append(row(), [])
    with pytest.raises(ValueError):
        run.append(row(), [])
    run.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"weights": {**header().weights, "sha256": "other"}}, "weights.sha256"),
        ({"profile": {**header().profile, "max_new_tokens": 64}}, "profile.max_new_tokens"),
        ({"problems": {"t": ("1", "3")}}, "problems.t"),
        ({"commit": "9999"}, "commit"),
        ({"definitions": 2}, "definitions"),
        (
            {"environment": {**header().environment, "versions": {"torch": "2.11"}}},
            "environment.versions.torch",
        ),
        ({"decoders": dict(reversed(header().decoders.items()))}, "decoders"),
    ],
)
def test_resume_refuses_unlike_runs(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    filled(tmp_path / "r", ("1",))
    before = (tmp_path / "r" / store.MEASUREMENTS).read_bytes()
    with pytest.raises(UserError, match=f"{named} (was|has)"):
        RunStore.resume(tmp_path / "r", header(**changes))
    assert (tmp_path / "r" / store.MEASUREMENTS).read_bytes() == before
    assert store.find_unfinished(tmp_path, header(**changes)) is None
    assert store.find_unfinished(tmp_path, header()) == tmp_path / "r"


def test_created_and_argv_may_differ(tmp_path: Path) -> None:
    filled(tmp_path / "r", ("1",))
    run = RunStore.resume(tmp_path / "r", header(created="later", argv=("other",)))
    run.close()
    assert run.header.created == header().created


def test_scores_mark_a_finished_run(tmp_path: Path) -> None:
    filled(tmp_path / "r")
    run = RunStore.resume(tmp_path / "r", header())
    run.write_scores(
        [
            ScoreRecord(
                decoder="ar",
                task="t",
                repeat=0,
                metric="m",
                variant="raw",
                harness="h",
                headline=True,
                per_problem={"1": 1.0, "2": 0.0},
            )
        ]
    )
    run.close()
    assert read_record(tmp_path / "r").scores[0].per_problem == {"1": 1.0, "2": 0.0}
    assert store.find_unfinished(tmp_path, header()) is None


def test_another_schema_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "r")
    path = tmp_path / "r" / store.HEADER
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        read_record(tmp_path / "r")
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_record(tmp_path / "r")
    path.write_text(json.dumps({"schema": 1}))
    with pytest.raises(UserError, match="lacks a field"):
        read_record(tmp_path / "r")
    with pytest.raises(UserError, match="not a record folder"):
        read_record(tmp_path / "none")


def test_create_needs_an_empty_place(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "plain").touch()
    for name in ("full", "plain", "plain/below"):
        with pytest.raises(UserError):
            RunStore.create(tmp_path / name, header())
    assert (tmp_path / "plain").is_file()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_header_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store.os, "fsync", refuse)
    with pytest.raises(UserError, match=os.strerror(number)):
        RunStore.create(tmp_path / "r", header())
    assert not (tmp_path / "r").exists()


def test_full_disk_mid_run_keeps_whole_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    run = RunStore.create(folder, header())
    run.append(row(problem="1"), steps_of(row(problem="1")))
    real = os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2])

    monkeypatch.setattr(store.os, "write", half)
    with pytest.raises(UserError, match="No space left"):
        run.append(row(problem="2"), steps_of(row(problem="2")))
    monkeypatch.undo()
    run.close()
    assert (folder / store.STEPS).read_bytes().endswith(b"\n")
    assert [m.problem for m in read_record(folder).measurements] == ["1"]
    again = RunStore.resume(folder, header())
    again.append(row(problem="2"), steps_of(row(problem="2")))
    again.close()
    assert len(list(read_steps(folder))) == 4


FILL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from made_records import header, row, steps_of
from bench.store import RunStore
from tidar_ref.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
run = RunStore.create(Path(sys.argv[1]), header())
try:
    for n in range(1000):
        run.append(row(problem=str(n)), steps_of(row(problem=str(n))))
except UserError as error:
    print(n, error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limit here")
def test_a_real_limit_from_the_system(tmp_path: Path) -> None:
    """The kernel refuses the write part-way through; every earlier line is whole."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path / "r"), str(root / "tests")],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    count, _, message = done.stdout.partition(" ")
    assert "cannot write" in message
    record = read_record(tmp_path / "r")
    assert len(record.measurements) == int(count) > 5


def test_header_equality_ignores_tuple_and_list(tmp_path: Path) -> None:
    filled(tmp_path / "r")
    stored = store.read_header(tmp_path / "r")
    wanted = dataclasses.replace(header(), profile={**header().profile})
    assert store.header_difference(stored, wanted) is None
