"""Predictions against simulation with a synthetic drafter that runs the real decoders."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from itertools import combinations
from json import dumps, loads
from pathlib import Path

import made_records
import oracles
import pytest
import test_house
import torch
from torch import Tensor

from baselines import tidar_two_forward
from bench import autotune, cli, validity
from bench.prediction import (
    WidthCurve,
    best_outcomes,
    hazards,
    predict,
    search,
    step_distribution,
    tokens_per_step,
)
from bench.records import to_line
from bench.slots.plan import Job, Plan
from bench.slots.record import OK, SlotsHeader, SlotsStore, Visit
from bench.store import read_record
from tidar_ref import tidar
from tidar_ref.cache import KVCache
from tidar_ref.decoding import Decoder, generate
from tidar_ref.errors import UserError

MASK = 15
FALLING = (0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
UNEVEN = (0.3, 0.95, 0.5, 0.9, 0.2, 0.99, 0.7)
CURVE = WidthCurve({1: 0.010, 16: 0.011, 72: 0.014, 272: 0.040}, "made")


class SyntheticBackbone:
    """A network whose causal rows are always right and whose slot m is right with chance c_m."""

    def __init__(self, c: tuple[float, ...], block_len: int) -> None:
        self.config = replace(
            oracles.tiny_config("llama", vocab=16, layers=1), max_position=100_000
        )
        self.c, self.block_len = c, block_len
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.chance = random.Random(0)

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, mask: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        row = ids[0].tolist()
        first_block = len(row) % self.block_len if cache.lengths[0] == 0 else 0
        for at, (token, position) in enumerate(zip(row, positions[0].tolist(), strict=True)):
            slot = (at - first_block) % self.block_len
            if token != MASK:
                said = (position + 1) % 7
            else:  # the token at `position` itself, and a wrong one with chance 1 - c_m
                right = slot == 0 or self.chance.random() < self.c[slot - 1]
                said = position % 7 if right else 8
            logits[0, at, said] = 1.0
        return logits

    def lm_head(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def simulated(decoder: Decoder, count: int = 3000) -> tuple[float, tuple[int, ...]]:
    """(tokens per step, histogram) of a real decoder on the synthetic network."""
    [trace] = generate(decoder, [[0, 1, 2]], max_new_tokens=count)
    assert all(token == (3 + i) % 7 for i, token in enumerate(trace.token_ids))
    runs = [len(step.committed[0]) for step in trace.steps]
    return sum(runs) / len(runs), tuple(runs.count(r) for r in range(max(runs) + 1))


def tidar_on(c: tuple[float, ...], block_len: int, outcomes: str | None) -> Decoder:
    backbone = SyntheticBackbone(c, block_len)
    return tidar.build(backbone, mask_token_id=MASK, block_len=block_len, outcomes=outcomes)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# --- the model of acceptance -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "outcomes"),
    [
        *((FALLING, chosen) for chosen in (None, "1", "1-4-8", "2-5")),
        *((UNEVEN, chosen) for chosen in (None, "8", "3-6")),
    ],
)
def test_tokens_per_step_equal_a_simulation(c: tuple[float, ...], outcomes: str | None) -> None:
    """Within 4 % for some thousand steps of the decoder itself, short drafts included."""
    got, _ = simulated(tidar_on(c, 8, outcomes))
    expected = predict("tidar", {"block_len": 8, "outcomes": outcomes}, c, CURVE).tokens_per_step
    assert got == pytest.approx(expected, rel=0.04)


def test_two_forwards_commit_what_dense_commits() -> None:
    backbone = SyntheticBackbone(FALLING, 8)
    got, _ = simulated(tidar_two_forward.build(backbone, mask_token_id=MASK, block_len=8))
    p = predict("tidar_two_forward", {"block_len": 8}, FALLING, CURVE)
    assert got == pytest.approx(p.tokens_per_step, rel=0.04)
    assert (p.query_width, p.forwards_per_step, p.step_s) == (16, 2, 2 * CURVE.at(8))


def test_hazards_are_read_back_from_a_dense_run() -> None:
    _, histogram = simulated(tidar_on(FALLING, 8, None), 8000)
    assert hazards(histogram, 8) == pytest.approx(FALLING, abs=0.05)


def test_hazards_by_hand() -> None:
    """10 steps: 4 of one token, 3 of two, 3 of three; none of four was ever tried beyond."""
    assert hazards((0, 4, 3, 3), 4) == pytest.approx((0.6, 0.5, 0.0))
    assert hazards((0, 5), 3) == (0.0, 0.0)
    for wrong in ((), (0, 0), (1, 5), (0, 1, 1, 1, 1)):
        with pytest.raises(UserError, match="histogram"):
            hazards(wrong, 3)


def test_distribution_and_means_by_hand() -> None:
    c = (0.5, 0.25)
    assert step_distribution(c, 3, 3) == pytest.approx((0.5, 0.375, 0.125))
    assert step_distribution(c, 3, 2) == pytest.approx((0.75, 0.25))
    assert step_distribution(c, 3, 1) == (1.0,)
    assert tokens_per_step(c, 3, (1, 2, 3)) == pytest.approx(0.5 + 0.75 + 0.375)
    # K = 2, only outcome 2: whole with c, else a step of one token that drafts anew.
    assert tokens_per_step((0.5,), 2, (2,)) == pytest.approx((2 / 3) * 1.5 + (1 / 3) * 1)
    assert tokens_per_step((0.0, 0.0), 3, (3,)) == pytest.approx(1.0)
    assert tokens_per_step((1.0, 1.0), 3, (1,)) == pytest.approx(2.0)  # 3 tokens, then 1


@pytest.mark.parametrize("c", [FALLING, UNEVEN])
def test_the_search_is_exact(c: tuple[float, ...]) -> None:
    """More outcomes help when slots get worse and worse; not always when a bad one is skipped."""
    before = 0.0
    for outcomes, tokens in best_outcomes(c[:5], 6):
        every = [tokens_per_step(c[:5], 6, s) for s in combinations(range(1, 7), len(outcomes))]
        assert tokens == max(every)
        assert tokens >= before or c is UNEVEN
        before = tokens


def test_growing_and_exchange_find_what_trying_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for c in (FALLING, UNEVEN):
        exact = dict(best_outcomes(c, 8)).values()
        monkeypatch.setattr("bench.prediction.EXHAUSTIVE_UP_TO", 1)
        assert list(dict(best_outcomes(c, 8)).values()) == pytest.approx(list(exact), rel=0.005)
        monkeypatch.undo()


# --- cost and choice ---------------------------------------------------------------------------


def test_the_curve_is_linear_between_and_ends_at_its_ends() -> None:
    assert CURVE.at(16) == 0.011 and CURVE.at(44) == pytest.approx(0.0125)
    for width in (0, 273):
        with pytest.raises(UserError, match=str(width)):
            CURVE.at(width)
    for wrong in ({}, {0: 1.0}, {1: 0.0}):
        with pytest.raises(UserError, match="width curve"):
            WidthCurve(wrong, "made")


def test_free_slots_favour_dense_and_dear_slots_favour_few() -> None:
    """A flat curve makes the dense layout best; a proportional one makes `ar` best."""
    flat = search(FALLING, WidthCurve({1: 1.0, 72: 1.0}, "flat"))
    assert flat[0].decoder == "tidar:block_len=8,beta=1"
    assert search(FALLING, WidthCurve({1: 1.0, 72: 72.0}, "dear"))[0].decoder == "ar"
    between = search(FALLING, WidthCurve({1: 1.0, 32: 1.05, 72: 4.0}, "knee"))
    assert "outcomes=" in between[0].decoder and between[0].query_width <= 32
    launch_bound = search(FALLING, WidthCurve({1: 1.0, 8: 1.0, 9: 5.0, 72: 5.0}, "cliff"))
    assert launch_bound[0].query_width <= 8 or launch_bound[0].forwards_per_step == 2


def test_search_stays_inside_curve_and_record() -> None:
    found = search(FALLING[:3], WidthCurve({1: 1.0, 12: 1.1}, "short"))
    assert max(p.query_width // p.forwards_per_step for p in found) <= 12
    assert {p.decoder for p in search(FALLING, CURVE, beta=0.5)} == {
        "ar",
        *(f"tidar:block_len={k},beta=0.5" for k in range(2, 9)),
    }
    with pytest.raises(UserError, match="extrapolated"):
        predict("tidar", {"block_len": 9, "beta": 1.0}, FALLING, CURVE)


def test_the_settings_named_can_be_run() -> None:
    from bench.profiles import parse_decoders
    from bench.registry import build_decoder

    backbone = SyntheticBackbone(FALLING, 8)
    for p in search(FALLING, CURVE):
        [spec] = parse_decoders([p.decoder])
        assert spec.label == p.decoder
        build_decoder(spec, backbone, mask_token_id=MASK)


# --- the verb ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record of `ar` and dense K = 4 on two problems, seconds as the curve says."""
    label = "tidar:block_len=4,beta=1"
    params = {"block_len": 4, "beta": 1.0}
    header = made_records.header(
        dtype="bfloat16",
        decoders={
            "ar": {"name": "ar", "params": {}, "lossless": True},
            label: {"name": "tidar", "params": params, "lossless": True},
        },
    )
    rows, steps = [], []
    for problem in ("1", "2"):
        rows.append(made_records.row(problem=problem, finish="eos"))
        rows.append(
            made_records.row(
                decoder=label,
                problem=problem,
                finish="eos",
                decode_forwards=4,
                decode_s=1.2,
                drafted=12,
                accepted=6,
                acceptance_histogram=(0, 1, 1, 1, 1),
            )
        )
    for measured, width in zip(rows, (1, 20, 1, 20), strict=True):
        steps += [replace(s, query_width=width) for s in made_records.steps_of(measured)]
    record = tmp_path / "rec"
    record.mkdir()
    (record / "header.json").write_text(dumps(asdict(header)))
    (record / "measurements.jsonl").write_text("".join(map(to_line, rows)))
    (record / "steps.jsonl").write_text("".join(map(to_line, steps)))
    return record


def test_report_puts_measurement_beside_prediction(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: 2.5 tokens a step of 0.3 s, against 1 in 0.2 s."""
    assert cli.main(["autotune", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "| share of steps | 0.75 | 0.67 | 0.50 |" in text
    beside = text[text.index("beside measured") :]
    assert "| ar | 1.00 | 1.00 | 5.0 | 5.0 | 1.00x |  |" in beside
    assert "| tidar:block_len=4,beta=1 | 2.50 | 2.50 | 8.3 | 8.3 | 1.67x | 1.67x |" in beside


def test_flagged_measurements_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = validity.Flag(name="throttled", reason="hot", spoils=(validity.SPEED,))
    cell = ("tidar:block_len=4,beta=1", read_record(folder).measurements[0].task)
    monkeypatch.setattr(validity, "flags_of", lambda record: {cell: (flag,)})
    text = autotune.report(folder)
    assert "| 2.50 | 2.50 | 8.3 | 8.3 (a) | 1.67x | 1.67x (a) |" in text
    assert "- (a) **throttled**, shown and not compared: hot" in text


def test_only_runs_on_the_same_weights_stand_beside(folder: Path) -> None:
    """Acceptance belongs to weights: a run on an adapter of its own is neither row nor `ar`."""
    path = folder / "header.json"
    header = loads(path.read_text())
    header["decoders"]["ar"]["weights"] = {"name": "base + other"}
    path.write_text(dumps(header))
    beside = autotune.report(folder).partition("beside measured")[2]
    assert "| ar |" not in beside
    assert "| tidar:block_len=4,beta=1 | 2.50 | 2.50 | 8.3 | 8.3 | 1.67x |  |" in beside


def test_a_curve_from_a_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "widths.csv"
    path.write_text("width,seconds\n1,0.1\n4,0.1\n20,1.0\n")
    text = autotune.report(folder, widths=path)
    assert "| tidar_two_forward:block_len=4 | 8 | 2.50 | 1.25 | 200.0 | 12.5 | 1.25x |" in text
    assert "| tidar:block_len=4,beta=1 | 2.50 | 2.50 | 2.5 | 8.3 | 0.25x | 1.67x |" in text
    path.write_text("w,s\n1,2\n")
    with pytest.raises(UserError, match="columns width and seconds"):
        autotune.report(folder, widths=path)
    with pytest.raises(UserError, match="nowhere.csv"):
        autotune.report(folder, widths=tmp_path / "nowhere.csv")


@pytest.mark.parametrize(("options", "word"), [
    ({"decoder": "ar"}, "no tidar run"), ({"task": "poetry"}, "poetry"),
])  # fmt: skip
def test_records_without_a_dense_run_are_refused(folder: Path, options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        autotune.report(folder, **options)


@pytest.mark.parametrize("name", ["bench.autotune", "bench.prediction", "bench.slots.tuning"])
def test_no_torch(name: str) -> None:
    _, foreign = test_house.reached(name)
    assert not foreign & test_house.HEAVY


# --- a width record ----------------------------------------------------------------------------

TIDAR4 = "tidar:block_len=4"
BODY = {1: 0.10, 4: 0.11, 8: 0.12, 20: 0.20}  # seconds of forwards without the head; 0.01 a row


@pytest.fixture
def widths(tmp_path: Path) -> Path:
    """Two jobs of one sequence, in either number format, at two KV lengths; steps of `ar` and K = 4
    in the first. Behind 100 tokens everything takes twice as long, in float32 four times."""
    jobs = tuple(
        Job(
            name=dtype, weights="made", kv_lens=(8, 100), widths=tuple(BODY), rounds=2, samples=1,
            dtype=dtype, decoders=("ar", TIDAR4) if dtype == "bfloat16" else (),
        )
        for dtype in ("bfloat16", "float32")
    )  # fmt: skip
    header = SlotsHeader(
        schema=1, created="2026-01-01T00:00:00+00:00", argv=("slots",), device="cpu",
        plan=asdict(Plan(name="made", jobs=jobs)), commit="abcdef0123", dirty=False,
        environment={"cpu": "c", "threads": 1, "gpu": None, "versions": {}},
    )  # fmt: skip
    store = SlotsStore.open(tmp_path / "slots", header)
    store.note_model("made", {"source": {"parameters": 10}, "config": {}})
    for job in jobs:
        for cell in job.cells:
            times = (2 if cell.kv_len == 100 else 1) * (4 if job.dtype == "float32" else 1)
            head = 0.01 * cell.width if cell.width else 0.0
            seconds = (
                BODY[cell.width] + head if cell.width else {"ar": 0.12, TIDAR4: 0.25}[cell.what]
            )
            for number in range(2):
                visit = Visit(
                    job=job.name, what=cell.what, kv_len=cell.kv_len, batch=1, round=number,
                    status=OK, width=cell.width or 1, total_s=(times * seconds,),
                    head_s=(times * head,) if cell.width else (), host_s=(times * seconds,),
                )  # fmt: skip
                store.append(visit)
    store.close()
    return tmp_path / "slots"


def test_a_width_record_gives_the_curve_and_its_steps(
    folder: Path, widths: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand, behind 8 tokens: `ar` 0.10 + 0.01 s; K = 4 0.20 s and the head on 4 + 3 rows, so
    0.27 s for 2.5 tokens; two forwards 2 x 0.11 + 0.07 s."""
    assert cli.main(["autotune", str(folder), "--widths", str(widths), "--top", "99"]) == 0
    text = capsys.readouterr().out
    assert "Width curve: slots, bfloat16, 8 cached tokens, 1 to 20 tokens." in text
    assert "something else" not in text
    assert "| ar | 1 | 1.00 | 1.00 | 110.0 | 9.1 | 1.00x |" in text
    assert "| tidar_two_forward:block_len=4 | 8 | 2.50 | 1.25 | 290.0 | 8.6 | 0.95x |" in text
    # Beside the run's own measurement (0.3 s a step), and beside the width record's (0.25 s).
    assert "| tidar:block_len=4,beta=1 | 2.50 | 2.50 | 9.3 | 8.3 | 1.02x | 1.67x |" in text
    steps = text[text.index("measured in the width record") :]
    assert "| ar | 110.0 | 120.0 | 9.1 | 8.3 |" in steps
    assert f"| {TIDAR4} | 270.0 | 250.0 | 9.3 | 10.0 |" in steps


def test_cells_of_a_width_record_can_be_chosen(folder: Path, widths: Path) -> None:
    far = autotune.report(folder, widths=widths, kv_len=90)
    assert "slots, bfloat16, 100 cached tokens" in far and "| ar | 1 | 1.00 | 1.00 | 220.0 |" in far
    other = autotune.report(folder, widths=widths, job="float32")
    assert "| ar | 1 | 1.00 | 1.00 | 440.0 |" in other and "in the width record" not in other
    assert "number format: float32, not bfloat16" in other
    with pytest.raises(UserError, match="'batch1': its are bfloat16, float32"):
        autotune.report(folder, widths=widths, job="batch1")
    with pytest.raises(UserError, match="--widths FOLDER"):
        autotune.report(folder, kv_len=90)


def test_a_curve_of_other_weights_is_named_or_asked_for(folder: Path, widths: Path) -> None:
    models = widths / "slots_models.json"
    models.write_text(models.read_text().replace("10", "11"))
    with pytest.raises(UserError, match="--job: bfloat16, float32"):
        autotune.report(folder, widths=widths)
    header = widths / "slots_header.json"
    header.write_text(header.read_text().replace('"threads": 1', '"threads": 2'))
    text = autotune.report(folder, widths=widths, job="bfloat16")
    assert "seconds differ (weights: made, not w; threads: 2, not 1)" in text
    made = loads(models.read_text())
    made["made"]["kernels"] = "torch (why)"
    models.write_text(dumps(made))
    text = autotune.report(folder, widths=widths, job="bfloat16")
    assert "threads: 2, not 1; kernels: torch (why), not none noted)" in text


def test_a_width_record_without_a_curve_is_refused(folder: Path, widths: Path) -> None:
    (widths / "visits.jsonl").write_text("")
    with pytest.raises(UserError, match="no widths from 1"):
        autotune.report(folder, widths=widths)
    with pytest.raises(UserError, match=r"slots_header\.json"):
        autotune.report(folder, widths=folder)


def test_the_head_costs_by_rows_where_it_is_known() -> None:
    apart = WidthCurve({1: 1.0, 20: 2.0}, "made", head={1: 0.1, 20: 2.0})
    assert apart.step([20], [4, 3]) == pytest.approx(2.0 + 0.4 + 0.3)
    assert predict("tidar", {"block_len": 4, "beta": 1.0}, FALLING, apart).step_s == pytest.approx(
        2.7
    )
    mixed = predict("tidar", {"block_len": 4, "beta": 0.5}, FALLING, apart)
    assert mixed.step_s == pytest.approx(3.1)
    assert WidthCurve({1: 1.0, 20: 2.0}, "made").step([20], [4, 3]) == 2.0
