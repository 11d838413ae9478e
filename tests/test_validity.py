"""Each flag from made records: what raises it, what just does not, and what it spoils."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_records import header, row

from bench import tables, validity
from bench.records import Measurement, ScoreRecord
from bench.store import TELEMETRY, RunRecord, RunStore, read_record
from bench.telemetry.summary import DESCRIBED
from bench.validity import COUNTS, ENERGY, FLAGS, SCORE, SPEED, Flag, Marks, flags_of

ROOT = Path(__file__).resolve().parents[1]
AR, TIDAR = "ar", "tidar:block_len=4,beta=1"
CELLS = {"ar": (0.0, 19.9), "tidar": (20.0, 39.9)}  # one window each, of two generations


def measurements(length_s: float = 9.9, **changes: Any) -> tuple[Measurement, ...]:
    """AR from 0 and 10, TiDAR from 20 and 30, ended by the model; the pauses are no borders."""
    facts = {"finish": "eos", **changes}
    return tuple(
        row(decoder=decoder, problem=str(i % 2 + 1), began_at=10.0 * i,
            ended_at=10.0 * i + length_s, **facts)
        for i, decoder in enumerate((AR, AR, TIDAR, TIDAR))
    )  # fmt: skip


def lines(cell: str | None = None, **changes: Any) -> tuple[dict[str, Any], ...]:
    """Telemetry of a calm H100, 2 Hz; `changes` hold in one cell's windows."""
    begin, end = CELLS.get(cell or "", (1.0, 0.0))
    start = {"kind": "start", "t": -5.0, "interval_s": 0.5, "counters": [], "absent": {}}
    calm = {"clock_reasons": 0, "sm_clock_mhz": 1980, "foreign_processes": 0, "power_w": 300.0}
    samples = []
    for i in range(-10, 90):
        t = i / 2
        odd = changes if begin <= t <= end else {}
        values = {**calm, "energy_j": 1000 + 150 * i, **odd}
        samples.append({"kind": "sample", "t": t} | {k: v for k, v in values.items() if v != -1})
    return (start, *samples)


def record(**changes: Any) -> RunRecord:
    """A finished, calm record of two decoders on one task."""
    score = {"task": "t", "repeat": 0, "metric": "m", "variant": "raw", "harness": "x",
             "headline": True}  # fmt: skip
    values: dict[str, Any] = {
        "name": "r",
        "header": dataclasses.replace(header(), device="cuda"),
        "measurements": measurements(),
        "scores": tuple(
            ScoreRecord(decoder=d, per_problem={"1": 1.0, "2": 0.0}, **score) for d in (AR, TIDAR)
        ),
        "sessions": ({"already_done": 0},),
        "telemetry": lines(),
    }
    return RunRecord(**{**values, **changes})


def named(made: RunRecord, decoder: str) -> dict[str, Flag]:
    """The cell's flags by name, without the one that four samples always raise."""
    found = {flag.name: flag for flag in flags_of(made)[decoder, "t"]}
    assert set(found) <= set(FLAGS) and "too_few_samples" in found
    return {name: flag for name, flag in found.items() if name != "too_few_samples"}


def test_a_calm_record_has_no_flag() -> None:
    assert named(record(), AR) == named(record(), TIDAR) == {}


@pytest.mark.parametrize("bits", [0x8, 0x20, 0x40, 0x80])
def test_throttled(bits: int) -> None:
    made = record(telemetry=lines("tidar", clock_reasons=bits | 0x4))
    flag = named(made, TIDAR)["throttled"]
    assert "slowdown in 100% of samples" in flag.reason and flag.spoils == (SPEED, ENERGY)
    assert "throttled" not in named(made, AR)


def test_a_power_cap_or_an_idle_moment_is_not_throttling() -> None:
    assert named(record(telemetry=lines("tidar", clock_reasons=0x1 | 0x4 | 0x2)), TIDAR) == {}


def test_clock_drift_between_cells() -> None:
    made = record(telemetry=lines("ar", sm_clock_mhz=1700))
    assert "clock_drift" in named(made, AR)
    assert named(record(telemetry=lines("ar", sm_clock_mhz=1950)), AR) == {}


def test_clock_drift_within_a_cell() -> None:
    wobbling = [
        {**line, "sm_clock_mhz": 1980 - 100 * (i % 3)} if line["kind"] == "sample" else line
        for i, line in enumerate(lines())
    ]
    flag = named(record(telemetry=tuple(wobbling)), TIDAR)["clock_drift"]
    assert "1780 to 1980 MHz" in flag.reason and flag.spoils == (SPEED, ENERGY)


def test_foreign_process() -> None:
    made = record(telemetry=lines("ar", foreign_processes=2))
    assert named(made, AR)["foreign_process"].reason.startswith("2 other")
    assert named(made, TIDAR) == {}


@pytest.mark.parametrize(("n", "missing"), [(63, "p90 needs 64, p99"), (64, "p99"), (662, None)])
def test_too_few_samples(n: int, missing: str | None) -> None:
    names = tuple(map(str, range(n)))
    made = record(
        header=header(problems={"t": names}, decoders={AR: header().decoders[AR]}),
        measurements=tuple(row(problem=name, prefill_s=float(name)) for name in names),
        telemetry=(),
    )
    found = {flag.name: flag for flag in flags_of(made)[AR, "t"]}
    [line] = tables.table_rows(made)
    assert (line.latency_p90_s is None) == (n < 64) and (line.latency_p99_s is None) == (n < 662)
    if missing is None:
        assert "too_few_samples" not in found
        assert line.latency_p99_s == 655 + 2.0  # rank 656 of 662, with 2 s of decoding
    else:
        assert missing in found["too_few_samples"].reason and not found["too_few_samples"].spoils


@pytest.mark.parametrize("counter", validity.WATCHED)
def test_counter_unavailable(counter: str) -> None:
    quiet = [{k: v for k, v in line.items() if k != counter} for line in lines()]
    quiet[0]["absent"] = {"x": "NVML says: Not Supported"}
    flag = named(record(telemetry=tuple(quiet)), AR)["counter_unavailable"]
    assert f"{counter}: no value" in flag.reason and "Not Supported" in flag.reason
    assert flag.spoils == ()


def test_nobody_watched() -> None:
    flag = named(record(telemetry=()), AR)["counter_unavailable"]
    assert flag.reason == "no telemetry was recorded"
    start = {"kind": "start", "t": 0.0, "interval_s": 0.2, "counters": []}
    made = record(telemetry=({**start, "absent": {"nvml": "Driver Not Loaded"}},))
    assert named(made, AR)["counter_unavailable"].reason == "nvml: Driver Not Loaded"
    far = tuple({**line, "t": line["t"] + 1e6} for line in lines())
    assert "no sample lies" in named(record(telemetry=far), AR)["counter_unavailable"].reason


def test_a_cpu_needs_no_gpu_counters() -> None:
    samples = [{"kind": "sample", "t": i / 2, "rapl_energy_j": 30.0 * i} for i in range(-2, 90)]
    made = record(
        header=header(), telemetry=(lines()[0], *samples), measurements=measurements(length_s=9.9)
    )
    assert named(made, AR) == {}
    assert tables.table_rows(made)[0].joules_per_token == pytest.approx(60 * 19.9 / 22)


def test_eos_never_reached() -> None:
    rows = measurements(finish="length")
    flag = named(record(measurements=rows), AR)["eos_never_reached"]
    assert flag.spoils == (SCORE, COUNTS) and "all 2 outputs" in flag.reason
    one_ended = (dataclasses.replace(rows[0], finish="stop"), *rows[1:])
    assert named(record(measurements=one_ended), AR) == {}
    fixed = header(profile={**header().profile, "stopping": "fixed"}, device="cuda")
    assert named(record(measurements=rows, header=fixed), AR) == {}


def test_window_too_short() -> None:
    """Windows that touch are one; with pauses between them each must be long enough."""
    made = record(measurements=measurements(length_s=4.0))
    flag = named(made, AR)["window_too_short"]
    assert "2 windows of 4.0 s" in flag.reason and flag.spoils == (ENERGY,)
    assert named(record(measurements=measurements(length_s=5.1)), AR) == {}


def test_interrupted_and_resumed() -> None:
    made = record(measurements=measurements()[:3])
    assert named(made, AR) == {}
    assert named(made, TIDAR)["interrupted"].reason == "1 of 2 generations"
    assert set(named(made, TIDAR)["interrupted"].spoils) == {SPEED, ENERGY, SCORE, COUNTS}
    made = record(sessions=({"already_done": 0}, {"already_done": 3}))
    assert named(made, AR) == {}  # both of its rows are the first process's
    assert named(made, TIDAR)["resumed"].spoils == (SPEED, ENERGY)
    assert "2 processes" in named(made, TIDAR)["resumed"].reason


def test_a_cell_without_rows_is_interrupted_and_nothing_else_fails() -> None:
    assert set(named(record(measurements=(), telemetry=()), AR)) == {
        "interrupted",
        "counter_unavailable",
    }


def test_spoilers_take_both_cells_and_the_kind() -> None:
    flags = {("a", "t"): (Flag(name="throttled", reason="r", spoils=(SPEED,)),), ("b", "t"): ()}
    a, b = ("a", "t"), ("b", "t")
    assert validity.spoilers((SPEED, COUNTS), (b, a), flags) == ("throttled",)
    assert validity.spoilers((SCORE,), (b, a), flags) == ()
    assert validity.spoilers((SPEED,), (b, ("none", "t")), flags) == ()


def test_marks_and_notes() -> None:
    cold = Flag(name="clock_drift", reason="moved", spoils=(SPEED,))
    note = Flag(name="too_few_samples", reason="2 samples")
    marks = Marks({("a", "t"): (cold, note), ("b", "t"): (note,)})
    assert marks.mark("1.0", (SPEED,), ("a", "t")) == "1.0 (a)"
    assert marks.mark("1.0", (SCORE,), ("a", "t")) == "1.0"
    assert marks.mark("", (SPEED,), ("a", "t")) == ""
    assert marks.notes() == [
        "- (a) **clock_drift**, shown and not compared: t a: moved",
        "- noted, too_few_samples: 2 samples",
    ]


def test_the_tables_show_and_do_not_compare() -> None:
    made = record(telemetry=lines("ar", clock_reasons=0x40))
    ar, tidar = tables.table_rows(made)
    assert ar.flags.startswith("throttled ") and ar.speedup_compared is None
    assert tidar.speedup == 1.0 and tidar.speedup_compared is False  # its reference is spoiled
    assert tidar.score_compared is True
    page = tables.to_markdown(made)
    assert "| 1.00x [1.00, 1.00] (a) |" in page
    assert "(a) **throttled**, shown and not compared: t ar: hw_thermal_slowdown" in page
    back = list(csv.DictReader(io.StringIO(tables.to_csv([ar, tidar]))))
    assert back[1]["speedup_compared"] == "False" and back[0]["flags"].split()[0] == "throttled"
    clean = tables.table_rows(record())[1]
    assert clean.speedup_compared is True and "(a)" not in tables.to_markdown(record())


def test_the_device_table() -> None:
    """300 J a second, 22 kept tokens in 19.9 s, one right answer."""
    ar, _ = tables.table_rows(record())
    assert ar.joules_per_token == pytest.approx(5970 / 22)
    assert ar.joules_per_correct == pytest.approx(5970)
    page = tables.to_markdown(record())
    assert "| t | ar | 1 | 19.9 | 300 (300) | 271.364 | 5970.0 | 1980 |" in page
    assert "Energy: energy_counter; nothing is subtracted." in page
    random = record(header=header(weights={**header().weights, "tier": "random"}, device="cuda"))
    assert tables.table_rows(random)[0].joules_per_token is None
    assert "## Device" not in tables.to_markdown(record(telemetry=()))


def test_written_for_programs(tmp_path: Path) -> None:
    made = record(telemetry=lines("tidar", foreign_processes=1))
    run = RunStore.create(tmp_path / "r", made.header)
    for measurement in made.measurements:
        run.append(measurement, [])
    run.note_session({"already_done": 0, "telemetry": {"idle": [-4.0, -1.0]}})
    run.write_scores(made.scores)
    run.close()
    text = "".join(json.dumps(line) + "\n" for line in made.telemetry)
    (tmp_path / "r" / TELEMETRY).write_text(text)
    page = tables.write_tables(tmp_path / "r")
    assert "Idle before the run: 300 W" in page
    found = json.loads((tmp_path / "r" / "cells.json").read_text())
    by_decoder = {cell["decoder"]: cell for cell in found["cells"]}
    flag = next(f for f in by_decoder[TIDAR]["flags"] if f["name"] == "foreign_process")
    assert flag["spoils"] == ["speed", "energy"]
    assert by_decoder[TIDAR]["telemetry"]["stats"]["power_w"]["mean"] == 300.0
    assert read_record(tmp_path / "r").telemetry == made.telemetry


def test_committed_records_still_load() -> None:
    """Records from before telemetry: no times, no samples, and no number changes its mark."""
    folders = sorted(path.parent for path in (ROOT / "results" / "records").glob("*/header.json"))
    assert folders
    old = [read_record(folder) for folder in folders if not (folder / TELEMETRY).exists()]
    assert old
    for made in old:
        for cell, found in flags_of(made).items():
            reasons = {flag.name: flag.reason for flag in found}
            assert reasons["counter_unavailable"] == "no telemetry was recorded", cell
        assert made.sessions or not (ROOT / "results" / "records" / made.name / "sessions.jsonl"
                                     ).exists()  # fmt: skip


def test_reading_flags_needs_no_torch() -> None:
    code = "import sys, bench.validity\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_every_flag_and_counter_is_documented() -> None:
    page = (ROOT / "docs" / "telemetry.md").read_text(encoding="utf-8")
    assert not [name for name in (*FLAGS, *DESCRIBED, *validity.WATCHED) if f"`{name}`" not in page]
    kinds = {SPEED, ENERGY, SCORE, COUNTS}
    assert not [kind for kind in kinds if f"**{kind}**" not in page]
