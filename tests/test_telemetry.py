"""Counters that answer and counters that refuse, windows, energy, and the sampler's life."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nvml
import pytest
from fake_nvml import OWN_PID, UUID, FakeNvml
from made_records import row

from bench import telemetry
from bench.records import Measurement, ScoreRecord
from bench.store import read_record
from bench.telemetry import cells, sampler, summary
from bench.telemetry.gpm import METRICS, Gpm
from bench.telemetry.nvml import Nvml, reason_names
from bench.telemetry.rapl import Rapl
from bench.telemetry.sampler import Sources

ROOT = Path(__file__).resolve().parents[1]
CALLS = {  # counter, the NVML call behind it, the value it gives
    "utilisation": ("nvmlDeviceGetUtilizationRates", "gpu_util"),
    "memory": ("nvmlDeviceGetMemoryInfo", "memory_used_bytes"),
    "power": ("nvmlDeviceGetPowerUsage", "power_w"),
    "power_instant": ("nvmlDeviceGetFieldValues", "power_instant_w"),
    "energy": ("nvmlDeviceGetTotalEnergyConsumption", "energy_j"),
    "sm_clock": ("nvmlDeviceGetClockInfo", "sm_clock_mhz"),
    "temperature": ("nvmlDeviceGetTemperature", "temperature_c"),
    "clock_reasons": ("nvmlDeviceGetCurrentClocksEventReasons", "clock_reasons"),
    "processes": ("nvmlDeviceGetComputeRunningProcesses", "foreign_processes"),
}


def test_every_counter_of_a_willing_board() -> None:
    device = Nvml(FakeNvml(), UUID, OWN_PID)
    found = device.read()
    assert device.absent == {}
    assert device.facts == {
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "580.65",
        "power_limit_w": 700.0,
        "max_sm_clock_mhz": 1980,
    }
    assert found == {
        "gpu_util": 1.0,
        "memory_util": 0.37,
        "memory_used_bytes": 17 * 2**30,
        "power_w": 250.0,
        "power_instant_w": 260.0,
        "energy_j": 1050.0,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "temperature_c": 45,
        "clock_reasons": 0,
        "foreign_processes": 0,
        "own_process_seen": 1,
        "foreign_memory_bytes": 0,
    }


@pytest.mark.parametrize("counter", CALLS)
@pytest.mark.parametrize("code", [fake_nvml.NOT_SUPPORTED, fake_nvml.NO_PERMISSION, None])
def test_a_final_refusal_is_asked_once(counter: str, code: int | None) -> None:
    call, value = CALLS[counter]
    refuse = {call: code}
    if counter == "clock_reasons":
        refuse["nvmlDeviceGetCurrentClocksThrottleReasons"] = code
    api = FakeNvml(refuse=refuse)
    device = Nvml(api, UUID, OWN_PID)
    first, asked = device.read(), api.calls.count(call)
    second = device.read()
    assert value not in first and value not in second and len(second) >= 8
    assert device.absent[counter] and api.calls.count(call) == asked
    words = {3: "Not Supported", 4: "Insufficient Permissions", None: "no such call"}
    assert words[code] in device.absent[counter]


def test_a_passing_failure_is_asked_again() -> None:
    api = FakeNvml(refuse={"nvmlDeviceGetPowerUsage": fake_nvml.TIMEOUT})
    device = Nvml(api, UUID, OWN_PID)
    assert "power_w" not in device.read() and "power" in device.absent
    api.refuse.clear()
    assert device.read()["power_w"] == 250.0
    assert "power" in device.absent  # that it once failed stays on record


def test_a_lost_gpu_ends_everything() -> None:
    api = FakeNvml()
    sources = Sources(UUID, OWN_PID, api=api)
    sources.read()
    assert not sources.lost
    api.refuse["nvmlDeviceGetUtilizationRates"] = fake_nvml.GPU_IS_LOST
    before = len(api.calls)
    sources.read()
    assert sources.lost and sources.absent["nvml"] == "NVML says: GPU is lost"
    nvml_calls = [name for name in api.calls[before:] if not name.startswith("nvmlGpm")]
    assert nvml_calls == ["nvmlDeviceGetUtilizationRates"]


@pytest.mark.parametrize(
    ("refuse", "uuid"),
    [
        ({"nvmlInit": fake_nvml.LIBRARY_NOT_FOUND}, UUID),
        ({"nvmlInit": fake_nvml.DRIVER_NOT_LOADED}, UUID),
        ({"nvmlDeviceGetHandleByUUID": fake_nvml.UNKNOWN}, UUID),
        ({}, "GPU-another"),
        ({}, ""),
    ],
)
def test_no_driver_or_no_such_device(refuse: dict[str, int | None], uuid: str) -> None:
    sources = Sources(uuid, OWN_PID, api=FakeNvml(refuse=refuse))
    assert sources.read() == {} and sources.lost
    assert list(sources.absent) == ["nvml"] and sources.absent["nvml"]


def test_an_older_driver_knows_throttle_reasons_by_their_old_name() -> None:
    refuse: dict[str, int | None] = {
        "nvmlDeviceGetCurrentClocksEventReasons": fake_nvml.FUNCTION_NOT_FOUND
    }
    device = Nvml(FakeNvml(refuse=refuse, reasons=0x44), UUID, OWN_PID)
    assert device.read()["clock_reasons"] == 0x44 and not device.absent
    assert reason_names(0x44) == ("sw_power_cap", "hw_thermal_slowdown")
    assert reason_names(0x1001) == ("gpu_idle", "0x1000") and reason_names(0) == ()


@pytest.mark.parametrize(
    ("pids", "foreign", "seen"),
    [((OWN_PID,), 0, 1), ((OWN_PID, 7), 1, 1), ((7,), 0, 0), ((7, 8), 1, 0), ((), 0, 0)],
)
def test_foreign_processes(pids: tuple[int, ...], foreign: int, seen: int) -> None:
    found = Nvml(FakeNvml(pids=pids), UUID, OWN_PID).read()
    assert (found["foreign_processes"], found["own_process_seen"]) == (foreign, seen)
    assert not {str(OWN_PID), "7"} & set(map(str, found.values()))  # no process number is kept


def test_the_names_and_codes_are_those_of_the_real_binding() -> None:
    real = pytest.importorskip("pynvml")
    for name in [name for name in dir(FakeNvml) if name.startswith(("nvml", "c_nvml"))]:
        assert hasattr(real, name), name
    for name in [name for name in vars(FakeNvml) if name.startswith("NVML_")]:
        assert getattr(real, name) == getattr(FakeNvml, name), name
    ids = {
        "sm_active": "SM_UTIL",
        "sm_occupancy": "SM_OCCUPANCY",
        "tensor_active": "ANY_TENSOR_UTIL",
        "tensor_half_active": "HMMA_TENSOR_UTIL",
        "dram_active": "DRAM_BW_UTIL",
    }
    assert METRICS == {k: getattr(real, f"NVML_GPM_METRIC_{v}") for k, v in ids.items()}
    request = real.c_nvmlGpmMetricsGet_t()
    request.metrics[len(METRICS) - 1].metricId = 10
    assert {name for name, _ in request._fields_} >= {"version", "numMetrics", "sample1", "sample2"}
    assert real.NVMLError(3).value == 3 and isinstance(real.NVMLError(15), real.NVMLError)
    assert {f"nvmlClocksEventReason{n}" for n in ("HwThermalSlowdown", "SwPowerCap")} <= set(
        dir(real)
    )


def test_gpm_gives_means_between_two_readings() -> None:
    api = FakeNvml()
    gpm = Gpm(api, "handle")
    assert gpm.read() == {}  # nothing to compare with yet
    expected = {"sm_active": 0.55, "sm_occupancy": 0.125, "tensor_active": 0.08,
                "tensor_half_active": 0.08, "dram_active": 0.71}  # fmt: skip
    assert gpm.read() == expected and gpm.read() == expected and not gpm.absent
    gpm.close()
    assert api.allocated == 0


def test_gpm_on_an_older_board_and_refusals() -> None:
    gpm = Gpm(FakeNvml(gpm=False), "handle")
    assert gpm.read() == {} and "Hopper" in gpm.absent["gpm"]
    for code in (fake_nvml.NOT_SUPPORTED, fake_nvml.FUNCTION_NOT_FOUND, None):
        gpm = Gpm(FakeNvml(refuse={"nvmlGpmQueryDeviceSupport": code}), "handle")
        assert gpm.read() == {} and gpm.absent["gpm"]
    api = FakeNvml(refuse={"nvmlGpmSampleGet": fake_nvml.NO_PERMISSION})
    gpm = Gpm(api, "handle")
    assert gpm.read() == gpm.read() == {} and api.calls.count("nvmlGpmSampleGet") == 1
    gpm = Gpm(FakeNvml(gpm_refuse={3: fake_nvml.NOT_SUPPORTED}), "handle")
    gpm.read()
    assert "sm_occupancy" not in gpm.read() and "Not Supported" in gpm.absent["sm_occupancy"]


def test_gpm_never_spans_a_failure() -> None:
    api = FakeNvml()
    gpm = Gpm(api, "handle")
    gpm.read()
    api.refuse["nvmlGpmSampleGet"] = fake_nvml.TIMEOUT
    assert gpm.read() == {}
    api.refuse.clear()
    assert gpm.read() == {}  # the first sample after the failure has nothing before it
    assert gpm.read()["sm_active"] == 0.55


def powercap(root: Path, raw: dict[str, str], limit: str = "1000000") -> Path:
    """A made powercap folder: folder name to domain name, all counters at 900000 uJ."""
    for folder, name in raw.items():
        (root / folder).mkdir(parents=True)
        (root / folder / "name").write_text(name + "\n")
        (root / folder / "max_energy_range_uj").write_text(limit)
        (root / folder / "energy_uj").write_text("900000")
    return root


def test_rapl_wraps_and_adds_up(tmp_path: Path) -> None:
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram"}
    rapl = Rapl(powercap(tmp_path, names))
    assert rapl.read()["rapl_energy_j"] == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000")  # wrapped once
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("950000")  # inside the package: no part
    (tmp_path / "intel-rapl:0:1" / "energy_uj").write_text("950000")
    found = rapl.read()
    assert found == {
        "rapl_package-0_j": pytest.approx(0.2),
        "rapl_dram-0_j": pytest.approx(0.05),
        "rapl_energy_j": pytest.approx(0.25),
    }
    (tmp_path / "intel-rapl:0:1" / "energy_uj").unlink()
    assert "rapl_energy_j" not in rapl.read()  # half a sum is not a sum
    assert rapl.absent["rapl_dram-0"] == "no such file or directory"


def test_rapl_absent(tmp_path: Path) -> None:
    rapl = Rapl(tmp_path / "none")
    assert rapl.read() == {} and "no RAPL domain" in rapl.absent["rapl"]
    made = powercap(tmp_path, {"intel-rapl:0": "package-0"}, limit="much")
    rapl = Rapl(made)
    assert rapl.read() == {} and rapl.absent == {"rapl_package-0": "not a number"}


def sample(t: float, **values: Any) -> dict[str, Any]:
    return {"kind": "sample", "t": t, **values}


def made_run(first: float, spans: list[tuple[str, float, float]]) -> list[Measurement]:
    """Measurements of (decoder, begin, end) relative to `first`."""
    return [
        row(decoder=decoder, problem=str(i), began_at=first + begin, ended_at=first + end)
        for i, (decoder, begin, end) in enumerate(spans)
    ]


def test_windows_merge_and_alternate() -> None:
    rows = made_run(
        0, [("ar", 0, 6), ("ar", 6.1, 9), ("td", 9, 15), ("ar", 15, 16), ("ar", 20, 21)]
    )
    assert summary.windows(reversed(rows)) == {
        ("ar", "t"): [(0, 9), (15, 16), (20, 21)],
        ("td", "t"): [(9, 15)],
    }
    assert summary.windows([row()]) == {}  # an older record has no times


def test_a_run_is_cut_into_its_cells() -> None:
    """300 W for ar in 10..20, 500 W for td in 20..30, 70 W before; samples every half second."""

    def watts(t: float) -> float:
        return 70.0 if t < 10 else 300.0 if t < 20 else 500.0

    lines: list[dict[str, Any]] = [
        {"kind": "start", "t": 0.0, "interval_s": 0.5, "counters": ["power_w"],
         "absent": {"gpm": "old"}},
    ]  # fmt: skip
    joules = 1000.0
    for i in range(64):
        t = i / 2
        lines.append(
            sample(
                t,
                energy_j=joules,
                power_w=watts(t),
                sm_clock_mhz=1980,
                gpu_util=1.0,
                clock_reasons=0x40 if i == 42 else 0,
                foreign_processes=int(i == 25),
            )
        )
        joules += watts(t) / 2  # fmt: skip
    sessions = [{"telemetry": {"idle": [1.0, 9.0]}}]
    run = summary.summarise_run(lines, made_run(0, [("ar", 10, 20), ("td", 20, 30)]), sessions)
    ar, td = run.cells["ar", "t"], run.cells["td", "t"]
    assert ar.energy == summary.Energy(joules=3000.0, source="energy_counter")
    assert td.energy.joules == 5000.0 and (td.windows, td.seconds, td.samples) == (1, 10, 21)
    assert run.idle is not None and run.idle.energy.joules == 560.0
    assert td.clock_reasons == {"hw_thermal_slowdown": 1 / 21} and ar.clock_reasons == {}
    assert (ar.foreign_processes, td.foreign_processes) == (1, 0)
    assert ar.stats["power_w"].median == 300 and td.stats["power_w"].mean == 500
    assert run.absent == {"gpm": "old"} and "energy_j" in run.counters


def test_energy_between_samples_is_interpolated() -> None:
    samples = [sample(float(i), energy_j=100.0 * i) for i in range(11)]
    found = summary.energy(samples, [(2.25, 4.75), (6.5, 7.5)], 1.0)
    assert found.joules == pytest.approx(350) and found.source == "energy_counter"


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([], "no energy counter answered, nor did power"),
        ([sample(float(i), energy_j=1.0 * i) for i in range(5)], "do not cover every window"),
        ([sample(t, energy_j=t) for t in (0.0, 3.0, 6.0, 9.0)], "3.0 s without a sample"),
        ([sample(t / 2, energy_j=float(t % 9)) for t in range(20)], "went back"),
        ([sample(t / 2, energy_j=7.0) for t in range(20)], "did not move"),
    ],
)
def test_energy_that_cannot_be_told(samples: list[dict[str, Any]], reason: str) -> None:
    assert summary.energy(samples, [], 0.5).reason == "no generation has its times"
    found = summary.energy(samples, [(1.0, 8.0)], 0.5)
    assert found.joules is None and found.source is None and reason in (found.reason or "")


def test_power_stands_in_for_the_energy_counter_and_says_so() -> None:
    """Also where the counter went back: a driver reload is not negative energy."""
    ramp = [sample(float(i), power_w=100.0 * i) for i in range(11)]
    found = summary.energy(ramp, [(2.0, 4.0), (5.5, 6.5)], 1.0)
    assert found.joules == pytest.approx(1200) and found.source == "power_integral"
    assert found.reason == "power_w integrated: no energy counter answered"
    back = [{**line, "energy_j": 50.0 if i < 6 else 1.0} for i, line in enumerate(ramp)]
    found = summary.energy(back, [(5.0, 7.0)], 1.0)
    assert found.joules == pytest.approx(1200) and "went back" in (found.reason or "")
    both = [{**line, "power_instant_w": 10.0} for line in ramp]
    assert summary.energy(both, [(2.0, 4.0)], 1.0).joules == pytest.approx(20)


def test_joules_per_token_and_per_correct_answer() -> None:
    rows = made_run(0, [("ar", 0, 6), ("ar", 6, 12)])  # 11 kept tokens each
    samples = [sample(float(i), energy_j=55.0 * i) for i in range(14)]
    seen = summary.summarise(samples, [(0.0, 12.0)], 1.0)

    def graded(values: dict[str, float]) -> list[ScoreRecord]:
        facts = {"decoder": "ar", "task": "t", "repeat": 0, "metric": "m", "variant": "raw",
                 "harness": "x"}  # fmt: skip
        plain = ScoreRecord(**facts, headline=False, per_problem={"0": 1.0, "1": 1.0})
        return [ScoreRecord(**facts, headline=True, per_problem=values), plain]

    assert cells.joules_per_token(rows, seen) == pytest.approx(30)
    assert cells.joules_per_correct(rows, graded({"0": 1.0, "1": 0.0}), seen) == pytest.approx(660)
    assert cells.joules_per_correct(rows, graded({"0": 0.0, "1": 0.0}), seen) is None
    assert cells.joules_per_correct(rows, graded({"0": 1.0}), seen) is None  # not all are graded
    assert cells.joules_per_token([*rows, row()], seen) is None  # a row without its times
    assert cells.joules_per_token(rows, None) is None


def lines_of(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines()))


def test_the_loop_writes_what_the_reader_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole session against the fake: start, samples, a counter that goes, end."""
    api, out, ends = FakeNvml(), io.StringIO(), iter([None, None, "stopped"])

    def ended(due: float, parent: int) -> str | None:
        if api.energy_mj > 1_100_000:
            api.refuse["nvmlDeviceGetTemperature"] = fake_nvml.NO_PERMISSION
        return next(ends)

    monkeypatch.setattr(sampler, "_run_ended", ended)
    sources = Sources(UUID, OWN_PID, api=api)
    sampler.sample_until_told(sources, out, interval_s=0.2, parent=1, offset_s=1e9)
    sources.close()
    path = tmp_path / "telemetry.jsonl"
    path.write_text(out.getvalue() + '{"kind": "sample", "t": 5')  # killed while writing
    lines = summary.read_lines(path)
    kinds = ["start", "sample", "sample", "absent", "sample", "end"]
    assert [line["kind"] for line in lines] == kinds
    assert lines[0]["name"].startswith("NVIDIA H100") and lines[0]["absent"] == {}
    assert set(METRICS) | {"energy_j"} <= set(lines[0]["counters"])
    assert lines[-1]["reason"] == "stopped" and lines[-1]["samples"] == 3
    assert all(line["t"] > 1e9 for line in lines)
    run = summary.summarise_run(lines, [])
    assert "dram_active" in run.counters and "Permissions" in run.absent["temperature"]
    assert UUID not in path.read_text()


def test_a_torn_line_is_ended_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"kind": "sam')
    with sampler.open_lines(path) as file:
        file.write('{"kind": "sample", "t": 2}\n')
    assert [line["t"] for line in summary.read_lines(path)] == [2]
    assert summary.read_lines(tmp_path / "none") == ()


def fake_rapl(tmp_path: Path) -> dict[str, str]:
    """An environment in which the sampler's process finds a made RAPL domain."""
    made = powercap(tmp_path / "powercap", {"intel-rapl:0": "package-0"})
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib\n"
        "from bench.telemetry import rapl\n"
        f"rapl.Rapl.__init__.__defaults__ = (pathlib.Path({str(made)!r}),)\n"
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def wait_for(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_the_sampler_lives_as_long_as_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", fake_rapl(tmp_path))
    path = tmp_path / "telemetry.jsonl"
    with telemetry.watching(path, device="cpu", wanted=True, interval_s=0.1) as watch:
        assert watch.process is not None and watch.process.poll() is None
        assert os.getsid(watch.process.pid) != os.getsid(0)  # Ctrl-C goes to the run alone
        watch.idle(0.35)
        end = telemetry.now()
    assert watch.process.returncode == 0
    lines = lines_of(path)
    samples = [line for line in lines if line["kind"] == "sample"]
    assert lines[0]["counters"] == ["rapl_energy_j", "rapl_package-0_j"]
    assert lines[-1]["kind"] == "end" and lines[-1]["reason"] == "stopped"
    assert len(samples) >= 2  # the last one is taken after the end
    begin, idle_end = watch.note["idle"]
    assert samples[0]["t"] < idle_end and samples[-1]["t"] >= end - 0.01  # one clock for both
    rising = [{**line, "rapl_energy_j": float(i)} for i, line in enumerate(samples)]
    assert summary.energy(rising, [(samples[0]["t"], end)], 0.1).source == "rapl"


def test_the_sampler_ends_within_two_seconds_of_a_killed_run(tmp_path: Path) -> None:
    """kill -9 of the parent, while a child of the parent still holds the pipe open."""
    path = tmp_path / "telemetry.jsonl"
    code = (
        "import os, sys, time, pathlib\n"
        "from bench import telemetry\n"
        f"w = telemetry._start(pathlib.Path({str(path)!r}), None, 0.1)\n"
        "assert w.counters, w.lines\n"
        "holder = os.fork()\n"
        "if holder == 0:\n    time.sleep(20)\n    os._exit(0)\n"
        "print(w.process.pid, holder, flush=True)\n"
        "time.sleep(60)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], env=fake_rapl(tmp_path), stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    _, holder = map(int, run.stdout.readline().split())
    try:
        run.send_signal(signal.SIGKILL)
        run.wait()
        killed = time.monotonic()
        assert wait_for(lambda: '"end"' in path.read_text(), 2.0), "the sampler outlived its run"
        assert time.monotonic() - killed < 2.0
        assert lines_of(path)[-1]["reason"] == "the run is gone"
    finally:
        os.kill(holder, signal.SIGKILL)
        run.stdout.close()


def test_without_counters_the_run_goes_on_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    began = time.monotonic()
    watch = telemetry._start(path, "GPU-none", 0.2)
    watch.idle(30)  # returns at once: nothing can be read
    watch.stop()
    assert time.monotonic() - began < 10
    assert watch.counters is False and any("no nvml: " in line for line in watch.lines)
    assert [line["kind"] for line in lines_of(path)] == ["start", "end"]


def test_an_unwritable_place_does_not_stop_the_run(tmp_path: Path) -> None:
    watch = telemetry._start(tmp_path / "no" / "folder" / "t.jsonl", None, 0.2)
    watch.stop()
    assert not watch.counters and "absent" in watch.note


def test_a_device_is_found_by_its_uuid_never_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES renumbers for CUDA and not for NVML."""
    torch = pytest.importorskip("torch")
    told: list[Any] = [SimpleNamespace(uuid=UUID.removeprefix("GPU-")), SimpleNamespace()]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told[device.index or 0])
    assert telemetry.cuda_device("cuda") == telemetry.cuda_device("cuda:0") == UUID
    assert telemetry.cuda_device("cuda:1") == ""
    assert telemetry.cuda_device("cpu") is None


def test_a_run_asked_to_watch_on_a_cpu_says_what_it_found(tmp_path: Path) -> None:
    words = ["run", "--profile", "smoke", "--tasks", "own_math", "--limit", "1", "--telemetry"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words, "--out", "r"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "counters every 0.2 s" in done.stdout
    start, *_, end = lines_of(tmp_path / "r" / "telemetry.jsonl")
    assert end["kind"] == "end"
    for counter, reason in start["absent"].items():
        assert f"no {counter}: {reason}" in done.stdout
    assert start["counters"] or "no RAPL" in done.stdout or "denied" in done.stdout
    session = json.loads((tmp_path / "r" / "sessions.jsonl").read_text())
    assert session["telemetry"]["on"] is True
    rows = read_record(tmp_path / "r").measurements
    assert all(m.ended_at > m.began_at >= start["t"] for m in rows) and len(rows) == 2


def test_off_is_said(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    for wanted in (None, False):
        with telemetry.watching(path, device="cpu", wanted=wanted) as watch:
            watch.idle(30)
        assert watch.note == {"on": False} and "off" in watch.lines[0]
    assert not path.exists()


def test_the_sampler_imports_nothing_heavy() -> None:
    code = (
        "import sys, bench.telemetry.sampler\n"
        "print(*sorted({'torch', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


@pytest.mark.gpu
def test_a_real_reading(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = tmp_path / "telemetry.jsonl"
    with telemetry.watching(path, device="cuda", wanted=None) as watch:
        assert watch.counters, watch.lines
        watch.idle(1.0)
        began = telemetry.now()
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        while telemetry.now() - began < 6:
            for _ in range(50):
                a = torch.tanh(a @ a)
            torch.cuda.synchronize()
        ended = telemetry.now()
    lines = summary.read_lines(path)
    rows = [row(began_at=began, ended_at=ended)]
    run = summary.summarise_run(lines, rows, [{"telemetry": watch.note}])
    cell = run.cells["ar", "t"]
    assert cell.samples >= 20 and cell.energy.source in ("energy_counter", "power_integral")
    assert cell.energy.joules is not None and 5 < cell.energy.joules / cell.seconds < 3000
    assert cell.stats["sm_clock_mhz"].median > 100
    if "gpm" not in run.absent:  # Hopper and later
        assert 0.3 < cell.stats["sm_active"].median <= 1.0
        assert cell.stats["tensor_active"].median > 0.05
