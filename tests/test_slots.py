"""Width curves: record, kill, shuffled rounds, refusals, split, free slots, ratios by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import cli
from bench.metrics import Interval
from bench.slots import curves, engine, page, timing
from bench.slots.plan import Job, Plan, slots_plan
from bench.slots.predict import predicted_speedups, step_ratios
from bench.slots.record import OK, VISITS, WINDOWS, SlotsStore, Visit, read_slots
from bench.slots.split import median_split, split_run
from bench.slots.timing import Clock
from bench.store import TELEMETRY
from tidar_ref.cache import KVCache
from tidar_ref.checkpoint import load
from tidar_ref.errors import UserError
from tidar_ref.linear import kernel_route
from tidar_ref.masks import causal_mask
from tidar_ref.model import FEW_ROWS


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache to flush and no settling: these tests are about books, not about seconds."""
    monkeypatch.setattr(engine, "cache_bytes", lambda _: None)
    monkeypatch.setattr(Clock, "warm_up", lambda self, run: int(run() > 0))


def plan_of(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "weights": "random:tiny", "widths": (1, 6), "kv_lens": (4, 9), "batches": (2,),
        "decoders": ("ar", "tidar:block_len=2"), "dtype": "float32", "device": "cpu", "rounds": 2,
        "samples": 2, "seed": 0, "ceilings": False, "split": True,
    }  # fmt: skip
    return slots_plan(**{**values, **changes})


def run(plan: Plan, folder: Path, **settings: Any) -> bool:
    store = SlotsStore.open(folder, engine.make_header(plan, ("slots",)))
    try:
        return engine.run(plan, store, **settings)
    finally:
        store.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slots") / "record"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "cache_bytes", lambda _: None)
        assert run(plan_of(), folder)
    return folder


def test_a_record_holds_every_visit_once(finished: Path) -> None:
    record = read_slots(finished)
    keys = [(*visit.key, visit.round) for visit in record.visits]
    assert len(keys) == len(set(keys)) == record.plan.visits == 2 * 8
    for visit in record.visits:
        assert visit.status == OK and len(visit.total_s) == len(visit.host_s) == 2
        assert all(s > 0 for s in (*visit.total_s, *visit.host_s))
    by_what = {visit.what: visit for visit in record.visits}
    assert by_what["forward:6"].mask == "tidar K=2" and by_what["forward:1"].mask == "causal"
    assert by_what["tidar:block_len=2"].width == 6 and by_what["ar"].width == 1
    assert {s.width for s in record.splits} == {1, 6} and len(record.splits) == 4
    for split in record.splits:
        parts = split.attention_s + split.mlp_s + split.head_s + split.rest_s
        assert parts == pytest.approx(split.total_s)


def test_killed_and_continued_repeats_nothing(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    plan = plan_of()
    assert not run(plan, folder, budget_s=1e-9)  # a spent budget measures nothing
    assert read_slots(folder).visits == ()
    whole = (finished / VISITS).read_bytes().splitlines(keepends=True)
    (folder / VISITS).write_bytes(b"".join(whole[:5]) + whole[5][:30])  # as a kill leaves it
    assert run(plan, folder)
    lines = (folder / VISITS).read_bytes().splitlines(keepends=True)
    assert lines[:5] == whole[:5] and len(lines) == len(whole)
    keys = [(*visit.key, visit.round) for visit in read_slots(folder).visits]
    assert len(set(keys)) == len(keys) == plan.visits
    with pytest.raises(UserError, match="plan.seed was 0, is now 1"):
        run(plan_of(seed=1), folder)


def test_rounds_are_shuffled_and_repeatable() -> None:
    plan = plan_of(widths=(1, 2, 3, 4, 5, 6, 7, 8))
    job = plan.jobs[0]
    assert plan.order(job, 0) != plan.order(job, 1) and plan.order(job, 0) == plan.order(job, 0)
    assert sorted(c.key for c in plan.order(job, 1)) == sorted(c.key for c in job.cells)


def test_what_cannot_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.free_bytes(torch.device("cpu"))
    tight = engine.cell_bytes(load("random:tiny").model, 64, 1, 1) / engine.KEPT_FREE
    assert real > tight
    monkeypatch.setattr(engine, "free_bytes", lambda _: int(tight) + 1)
    plan = plan_of(
        widths=(1, 512), kv_lens=(64, 4096), batches=(1,), decoders=("ar", "tidar_nowhere"),
        rounds=2, samples=1, split=False,
    )  # fmt: skip
    assert run(plan, tmp_path / "r")
    found = {(p.what, p.kv_len): p for p in curves.points(read_slots(tmp_path / "r"))}
    assert found["forward:1", 64].status == OK
    assert found["forward:512", 64].status == "no memory"
    assert "estimated" in (found["forward:512", 64].detail or "")
    assert found["forward:1", 4096].status == "no positions"
    assert found["tidar_nowhere", 64].status == "no decoder"
    text = page.write_page(tmp_path / "r")
    assert "no memory" in text and "unknown decoder 'tidar_nowhere'" in text


def test_a_decoder_without_a_kv_cache_is_not_applicable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run book goes on behind it, and the row says why."""
    fake = SimpleNamespace(prefill=lambda *_, **__: (SimpleNamespace(cache=None), None))
    real = engine.build_decoder
    monkeypatch.setattr(
        engine,
        "build_decoder",
        lambda spec, *a, **k: fake if spec.name == "ar" else real(spec, *a, **k),
    )
    assert run(plan_of(split=False), tmp_path / "r")
    record = read_slots(tmp_path / "r")
    status = {visit.what: visit.status for visit in record.visits}
    assert status["ar"] == "not applicable" and status["tidar:block_len=2"] == OK
    assert "not applicable | ar keeps no KVCache" in page.write_page(tmp_path / "r")


def test_static_steps_and_routes_reach_the_record(tmp_path: Path) -> None:
    """Their own `ar` is the reference; windows of the jobs are kept for telemetry."""
    labels = ("ar", "ar:static=3", "tidar:block_len=2", "tidar:block_len=2,static=3", "ar:graphs=2")
    plan = plan_of(decoders=labels, split=False, attention="two_part")
    assert run(plan, tmp_path / "r")
    found = {(p.what, p.kv_len): p for p in curves.points(read_slots(tmp_path / "r"))}
    assert {p.attention for p in found.values()} == {"two_part"}
    static, own = found["tidar:block_len=2,static=3", 9], found["ar:static=3", 9]
    assert static.ratio and static.latency and own.latency and not static.captured
    assert static.ratio.value == pytest.approx(static.latency.value / own.latency.value)
    refused = found["ar:graphs=2", 9]
    assert refused.status == "no decoder" and "--device cuda" in (refused.detail or "")
    visits = read_slots(tmp_path / "r").visits
    assert {v.steps for v in visits if "static" in v.what} == {3}
    [window] = map(json.loads, (tmp_path / "r" / WINDOWS).read_text().splitlines())
    assert window["job"] == "batch2" and window["began"] < window["ended"]
    with pytest.raises(UserError, match="attention"):
        plan_of(attention="flash")
    with pytest.raises(UserError, match="flex has no speed on a CPU"):
        plan_of(attention="flex", device="cpu")
    with pytest.raises(UserError, match="no split"):
        plan_of(compiled=True, split=True)


def test_routes_of_the_same_cell_stand_side_by_side(finished: Path) -> None:
    record = read_slots(finished)
    found = curves.points(record)
    assert "Routes of the same cell" not in page.to_markdown(record, found)
    [ar] = [p for p in found if p.what == "ar" and p.kv_len == 9]
    assert ar.latency
    half = dataclasses.replace(ar.latency, value=ar.latency.value / 2)
    more = [dataclasses.replace(ar, job="f", attention="flex", compiled=True, latency=half)]
    text = page.to_markdown(record, [*found, *more]).partition("Routes of the same cell")[2]
    rows = [line for line in text.partition("##")[0].splitlines() if "| ar |" in line]
    assert [row.split("|")[6].strip() for row in rows] == ["sdpa", "flex compiled"]
    assert [row.split("|")[8].strip() for row in rows] == ["2.00", "1.00"]


def test_telemetry_is_cut_by_the_jobs_windows(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(finished, folder)
    assert "The device while each job ran" not in page.write_page(folder)  # nobody watched
    [window] = map(json.loads, (folder / WINDOWS).read_text().splitlines())
    sample = {"kind": "sample", "sm_clock_mhz": 1500, "power_w": 300.0, "sm_active": 0.5}
    strange = {**sample, "sm_clock_mhz": 200}  # before and behind the job
    lines = [{"kind": "start", "t": window["began"] - 9, "interval_s": 0.2, "absent": {}}]
    lines += [{**strange, "t": window["began"] - 1}, {**strange, "t": window["ended"] + 1}]
    lines += [{**sample, "t": (window["began"] + window["ended"]) / 2}]
    (folder / TELEMETRY).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| 1 | 1500 [1500, 1500] | 300 | 50.0% |" in page.write_page(folder)


def test_a_split_is_that_of_one_run_so_its_rest_is_not_negative() -> None:
    def made(attention: float, mlp: float, head: float, rest: float) -> dict[str, float]:
        parts = {"attention": attention, "mlp": mlp, "head": head, "rest": rest}
        return {**parts, "total": sum(parts.values())}

    # Each part's median is 2, of the totals 5: what is left of them would be -1.
    runs = [made(2, 2, 0, 1), made(2, 0, 2, 1), made(0, 2, 2, 1)]
    found = median_split(runs)
    assert found in runs and found["rest"] == 1
    totals = [made(1, 1, 1, 1), made(9, 1, 1, 1), made(2, 1, 1, 1), made(3, 1, 1, 1)]
    assert median_split(totals)["attention"] == 2  # the lower of the two in the middle


def test_the_split_marks_compiled_layers_and_changes_no_number() -> None:
    loaded = load("random:tiny", device="cpu", dtype="float32")
    model, config = loaded.model, loaded.model.config
    if model.few_rows is None:
        pytest.skip(kernel_route(model))
    outputs, called = [], []
    layer = model.layers[0]
    for rows in (1, 6, FEW_ROWS + 1):
        mask = None if rows == 1 else causal_mask(rows)

        def forward(rows: int = rows, mask: torch.Tensor | None = mask) -> torch.Tensor:
            cache = KVCache(config, batch=1, max_len=200, scratch=0, dtype=torch.float32,
                            device="cpu")  # fmt: skip
            ids = torch.arange(rows)[None] % 50
            with torch.inference_mode():
                outputs.append(model(ids, torch.arange(rows)[None], cache, mask))
            return outputs[-1]

        whole = forward()
        handle = layer.register_forward_hook(lambda *_: called.append(1))
        parts = split_run(model, forward, lambda: None)
        handle.remove()
        assert len(called) == (rows > FEW_ROWS)
        assert torch.equal(outputs[-1], whole) and min(parts[p] for p in ("attention", "mlp")) > 0
        assert model.few_rows.mark is None


def test_the_split_refuses_layers_it_did_not_see() -> None:
    model = load("random:tiny").model
    with pytest.raises(ValueError, match="no split"):
        split_run(model, lambda: None, lambda: None)


def point(width: int, ratio: float, low: float | None, **changes: Any) -> curves.Point:
    values: dict[str, Any] = {
        "job": "j", "weights": "w", "dtype": "float32", "what": f"forward:{width}", "kv_len": 8,
        "batch": 1, "status": OK, "detail": None, "width": width,
        "ratio": Interval(value=ratio, low=low, high=ratio + 1, n=3),
    }  # fmt: skip
    return curves.Point(**{**values, **changes})


def test_free_slots_by_hand() -> None:
    curve = [point(1, 1, 1.0), point(4, 1.2, 1.06), point(8, 1.07, 1.04), point(16, 1.4, 1.3)]
    five, quarter = (curves.free_slots(curve, t) for t in (0.05, 0.25))
    assert five is not None and (five.width, five.first_slower, five.largest) == (8, 4, 16)
    assert quarter is not None and (quarter.width, quarter.first_slower) == (8, 16)
    assert curves.free_slots(curve[1:], 0.05) is None  # nothing to compare with
    assert curves.free_slots([point(1, 1, None)], 0.05) is None  # no interval, no claim


def test_ratio_of_medians_pairs_rounds() -> None:
    slow = {0: np.array([2.0, 2.0]), 1: np.array([20.0, 20.0]), 2: np.array([4.0, 4.0])}
    fast = {r: v / 2 for r, v in slow.items()}
    ratio = curves.ratio_interval(slow, fast)
    assert ratio is not None and (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    alone = curves.ratio_interval({0: np.array([3.0])}, fast)
    assert alone is not None and alone.low is None and alone.n == 1
    assert curves.ratio_interval({7: np.array([1.0])}, fast) is None
    spread = curves.median_interval([np.array([1.0]), np.array([3.0]), np.array([2.0])])
    assert spread.value == 2.0 and (spread.low, spread.high) == (1.0, 3.0)


def test_head_is_subtracted() -> None:
    visit = Visit(
        job="j", what="forward:2", kv_len=1, batch=1, round=0, status=OK,
        total_s=(3.0, 5.0), head_s=(1.0, 2.0),
    )  # fmt: skip
    assert curves._rounds([visit], head=False)[0].tolist() == [2.0, 3.0]


def step_point(what: str, ratio: float, weights: str) -> curves.Point:
    return point(272, ratio, ratio - 0.1, what=what, weights=weights, kv_len=1024)


def test_predictions_use_the_papers_t_per_nfe() -> None:
    found = [
        step_point("tidar:block_len=16", 1.25, "random:qwen3-8b"),
        step_point("tidar:block_len=4", 1.5, "random:qwen2.5-1.5b"),
        step_point("tidar:block_len=8,outcomes=1-8", 1.1, "random:qwen2.5-1.5b"),
    ]
    rows = predicted_speedups(found)
    [row] = [r for r in rows if r.system == "TiDAR 8B Trust Diff" and r.task == "humaneval"]
    assert (row.t_per_nfe, row.published) == (7.30, 5.16)
    assert row.predicted == pytest.approx(7.30 / 1.25)
    assert row.high == pytest.approx(7.30 / 1.15) and row.low == pytest.approx(7.30 / 2.25)
    assert any(r.source == "Site bar chart" for r in rows)
    assert not [r for r in rows if r.decoder.startswith("tidar:block_len=8")]
    ratios = {r.system: (r.derived, r.measured) for r in step_ratios(found)}
    assert ratios == {
        "TiDAR 1.5B K=4 (Figure 4)": (1.66, 1.5), "TiDAR 8B Trust Diff": (1.41, 1.25),
    }  # fmt: skip
    exact = [*found, step_point("tidar:block_len=16,beta=0", 1.3, "random:qwen3-8b")]
    assert {r.measured for r in step_ratios(exact) if "8B" in r.system} == {1.3}


def test_tables_and_figure_come_from_the_record(finished: Path) -> None:
    text = page.write_page(finished)
    assert "## Decoders' steps" in text and "| 1 x 6 |" in text and "batch 2, KV 9" in text
    [(weights, model)] = read_slots(finished).models.items()
    assert f"Products of few rows: {weights} by {model['kernels']}." in text
    lines = [json.loads(line) for line in (finished / "slots.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"total", "attention", "mlp", "head", "rest"}
    assert {line["width"] for line in lines} == {1, 6}
    again = page.write_page(finished)
    assert again == text


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["slots", "--weights", "random:tiny", "--dtype", "float32", "--device", "cpu"]
    for words, message in (
        (["--widths", "2,4"], "lacks 1"),
        (["--widths", "1,x"], "no list of whole numbers"),
        (["--kv", "0"], "whole numbers from 1"),
        (["--rounds", "0"], "rounds 0"),
        (["--dtype", "int4"], "unknown dtype"),
        (["--budget-seconds", "-1"], "leaves no time"),
        (["--tables", "nowhere"], "no readable"),
    ):
        assert cli.main([*small, *words]) == 2, words
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    words = [*small, "--widths", "1,2", "--kv", "4", "--decoders", "ar", "--rounds", "2",
             "--samples", "1", "--out", "r"]  # fmt: skip
    assert cli.main(words) == 0
    assert "Free slots" in capsys.readouterr().out
    assert {"slots.md", "slots.csv", "slots.svg", "slots.png"} <= {
        path.name for path in (tmp_path / "r").iterdir()
    }
    before = (tmp_path / "r" / VISITS).read_bytes()
    assert cli.main(words) == 0  # the same command again measures nothing twice
    assert (tmp_path / "r" / VISITS).read_bytes() == before
    for path in (tmp_path / "r").iterdir():
        assert str(tmp_path) not in path.read_text(errors="replace")


def test_a_job_needs_cells() -> None:
    with pytest.raises(UserError, match="no cells"):
        Job(name="x", weights="w", kv_lens=(4,))
    assert dataclasses.replace(plan_of(), ceilings=True).ceilings


@pytest.mark.parametrize("native", [False, True])
def test_an_emulated_formats_matrix_ceiling_is_float32s(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or utilisation would be counted against a rate that no product of ours is bound by."""
    monkeypatch.setattr(timing, "emulated", lambda dtype: not native)
    made = timing.ceilings(torch.device("cpu"), torch.bfloat16, small=True)
    assert made["matrix_dtype"] == ("bfloat16" if native else "float32")
    assert made["dtype"] == "bfloat16" and made["matrix_flops_per_s"] > 0
