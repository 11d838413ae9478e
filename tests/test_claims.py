"""Verdicts: each rule on made observations, the whole page on the committed records."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from made_records import header, row

from bench import claims_ours, claims_verdict, cli
from bench.claims import Claim, load_claims, load_findings, load_properties
from bench.claims_ours import Observed
from bench.claims_verdict import (
    FLAGGED,
    NOT_RUN,
    OFF,
    OTHER_SETTING,
    OTHER_WEIGHTS,
    PREDICTED,
    REPRODUCED,
    judge_all,
)
from bench.records import Measurement
from bench.store import RunRecord

H100 = "NVIDIA H100 80GB HBM3"


def claim(id: str) -> Claim:
    return next(claim for claim in load_claims() if claim.id == id)


def seen(**changes: Any) -> Observed:
    """HumanEval pass@1 of Qwen2.5-1.5B, all problems, on an H100."""
    values: dict[str, Any] = {
        "record": "r",
        "weights": "Qwen/Qwen2.5-1.5B",
        "adapters": (),
        "tier": "paper",
        "shape": "qwen2.5-1.5b",
        "device": H100,
        "decoder": "ar",
        "label": "ar",
        "params": {},
        "task": "humaneval",
        "metric": "score",
        "value": 36.6,
        "low": 30.0,
        "high": 43.0,
        "n": 164,
        "whole": True,
        "spoiled": (),
    }
    return Observed(**{**values, **changes})


TABLE2_AR = "table2/qwen2.5-1.5b/humaneval/score"
FIGURE4 = "figure4/tidar-8b-trust-diff/humaneval/speedup"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, REPRODUCED),
        ({"value": 35.98 + 1.4}, REPRODUCED),
        ({"value": 35.98 + 1.6}, OFF),
        ({"value": 35.98 - 1.6}, OFF),
        ({"device": "cpu"}, REPRODUCED),  # a score does not depend on the machine
        ({"whole": False, "n": 20}, OTHER_SETTING),
        ({"weights": "SmolLM2-135M-Instruct", "shape": "smollm2-135m-instruct",
          "tier": "embedded"}, OTHER_WEIGHTS),
        ({"adapters": ("x",)}, NOT_RUN),  # a converted model's AR is not the base
        ({"tier": "local"}, OTHER_WEIGHTS),
        ({"tier": "random"}, NOT_RUN),
        ({"task": "mbpp"}, NOT_RUN),
        ({"metric": "t_per_nfe"}, NOT_RUN),
        ({"decoder": "tidar", "params": {"block_len": 16, "beta": 1.0}}, NOT_RUN),
    ],
)  # fmt: skip
def test_verdict_of_a_score(changes: dict[str, Any], verdict: str) -> None:
    (judged,) = judge_all([claim(TABLE2_AR)], [seen(**changes)])
    assert judged.verdict == verdict
    assert (judged.ours is None) == (verdict == NOT_RUN)
    assert (judged.difference is None) == (verdict not in (REPRODUCED, OFF))
    assert bool(judged.needs) == (verdict not in (REPRODUCED, OFF))


def test_a_fine_tuned_baseline_is_not_the_base() -> None:
    tuned = [c for c in load_claims() if c.system == "Qwen2.5 1.5B fine-tuned"]
    assert tuned and {j.verdict for j in judge_all(tuned, [seen()])} == {NOT_RUN}
    twin = seen(adapters=("smollm2-ar 0123",), tier="embedded", shape="w")
    assert {j.verdict for j in judge_all(tuned, [twin])} == {NOT_RUN, OTHER_WEIGHTS}


def test_the_better_run_is_shown() -> None:
    few = seen(value=1.0, whole=False, n=3, record="z")
    (judged,) = judge_all([claim(TABLE2_AR)], [few, seen(), few])
    assert (judged.verdict, judged.ours, judged.n) == (REPRODUCED, 36.6, 164)


def test_a_flagged_number_is_shown_and_not_judged() -> None:
    spoiled = seen(spoiled=("throttled", "resumed"), record="z", n=999)
    (judged,) = judge_all([claim(TABLE2_AR)], [spoiled])
    assert (judged.verdict, judged.ours, judged.difference) == (FLAGGED, 36.6, None)
    assert judged.reason == "flags: throttled, resumed" and judged.needs
    (row,) = claims_verdict.to_rows([judged])
    assert row["ours_flags"] == "throttled resumed"
    tally = claims_verdict.counts([judged])
    assert (tally["flagged"], tally["open"], tally["with verdict"]) == (1, 1, 0)
    (clean,) = judge_all([claim(TABLE2_AR)], [spoiled, seen()])  # a clean one is preferred
    assert (clean.verdict, clean.flags) == (REPRODUCED, ())
    (other,) = judge_all([claim(TABLE2_AR)], [seen(spoiled=("resumed",), whole=False, n=20)])
    assert other.verdict == OTHER_SETTING and other.reason.endswith("limit; flags: resumed")


def test_nothing_is_predicted_from_a_flagged_step_time() -> None:
    every = judge_all(load_claims(), [cost(spoiled=("throttled",))])
    assert not [item for item in every if item.verdict == PREDICTED]
    ratio = claim("figure4/tidar-8b-trust-diff/step_ratio")
    assert judge_all([ratio], [cost(spoiled=("throttled",))])[0].verdict == FLAGGED


def cost(**changes: Any) -> Observed:
    """A TiDAR step of 1.3 AR steps at the 8B shape, K = 16, random weights."""
    values: dict[str, Any] = {
        "weights": "random:qwen3-8b", "tier": "random", "shape": "qwen3-8b", "task": "",
        "decoder": "tidar", "label": "tidar:block_len=16", "metric": "step_ratio",
        "params": {"block_len": 16, "beta": 0.0}, "value": 1.3, "low": None, "high": None, "n": 4,
    }  # fmt: skip
    return seen(**{**values, **changes})


def test_predicted_speedup_is_tokens_over_step_cost() -> None:
    (judged,) = judge_all(
        [c for c in load_claims() if c.id == FIGURE4],
        [cost()],
    )
    assert judged.verdict == NOT_RUN  # its T/NFE was not among the claims given
    every = judge_all(load_claims(), [cost()])
    judged = next(item for item in every if item.claim.id == FIGURE4)
    assert judged.verdict == PREDICTED and judged.ours == pytest.approx(7.30 / 1.3)
    assert judged.difference == pytest.approx(7.30 / 1.3 - 5.16)
    headline = next(item for item in every if item.claim.id.startswith("text/tidar-8b")
                    and item.claim.metric == "speedup")  # fmt: skip
    assert headline.verdict == PREDICTED and headline.ours == pytest.approx(8.36 / 1.3)
    assert not [j for j in every if j.verdict == PREDICTED and j.claim.size != "8B"]
    for wrong in ({"shape": "smollm2-135m"}, {"params": {"block_len": 8}}, {"decoder": "ar"}):
        others = judge_all(load_claims(), [cost(**wrong)])
        assert not [j for j in others if j.verdict == PREDICTED and j.claim.block_len == 16]


def test_step_cost_is_judged_on_an_h100_only() -> None:
    ratio = claim("figure4/tidar-8b-trust-diff/step_ratio")
    (judged,) = judge_all([ratio], [cost()])
    assert judged.verdict == OFF and judged.difference == pytest.approx(-0.11)
    assert judge_all([ratio], [cost(value=1.42)])[0].verdict == REPRODUCED
    assert judge_all([ratio], [cost(device="cpu")])[0].verdict == OTHER_SETTING
    assert judge_all([ratio], [cost(shape="qwen2.5-1.5b")])[0].verdict == NOT_RUN


def test_a_width_curve_meets_figure_1() -> None:
    total = claim("figure1/qwen3-32b/w64/k1024/part=total/latency")
    mlp = claim("figure1/qwen3-32b/w64/part=mlp/latency")
    place = {"width": 64, "kv_len": 1024, "part": "total"}
    ours = seen(weights="random:qwen3-32b", tier="random", shape="qwen3-32b", task="",
                metric="latency", value=33.0, params=place)  # fmt: skip
    judged = judge_all([total, mlp], [ours])
    assert [item.verdict for item in judged] == [REPRODUCED, NOT_RUN]
    part = dataclasses.replace(ours, params={**place, "part": "mlp"}, value=40.0)
    assert [i.verdict for i in judge_all([total, mlp], [part])] == [NOT_RUN, OFF]
    for changes, verdict in (
        ({"device": "cpu"}, OTHER_SETTING), ({"shape": "smollm2-135m"}, NOT_RUN),
        ({"params": {**place, "width": 32}}, NOT_RUN), ({"value": 40.0}, OFF),
        ({"params": {**place, "kv_len": 2048}}, NOT_RUN),
    ):  # fmt: skip
        assert judge_all([total], [dataclasses.replace(ours, **changes)])[0].verdict == verdict


def test_chosen_outcomes_are_not_the_papers_step() -> None:
    ratio = claim("figure4/tidar-8b-trust-diff/step_ratio")
    chosen = cost(params={"block_len": 16, "outcomes": "1-4"})
    assert judge_all([ratio], [chosen])[0].verdict == NOT_RUN
    assert judge_all([ratio], [cost(params={"block_len": 16, "beta": 1})])[0].verdict == OFF


def test_alpha_and_masking_need_weights_that_say_so() -> None:
    tidar = seen(decoder="tidar", label="t", params={"block_len": 4, "beta": 1.0}, tier="small",
                 shape="w", task="gsm8k_cot")  # fmt: skip
    random = claim("table5/tidar-1.5b-k=4-random-mask/gsm8k-cot/masking=random/score")
    full = claim("table5/tidar-1.5b-k=4-tables-4-5/gsm8k-cot/masking=full/score")
    assert [j.verdict for j in judge_all([random, full], [tidar])] == [NOT_RUN, OTHER_WEIGHTS]
    trained = dataclasses.replace(tidar, adapters=("smollm2-k4-random sha",))
    assert judge_all([random], [trained])[0].verdict == OTHER_WEIGHTS


def test_counts_add_up() -> None:
    judged = judge_all(load_claims(), [seen(), cost()])
    tally = claims_verdict.counts(judged)
    assert tally["cells"] == len(load_claims())
    assert sum(tally[verdict] for verdict in claims_verdict.VERDICTS) == tally["cells"]
    assert tally["with verdict"] + tally["open"] == tally["cells"]
    assert tally["reproduced"] >= 1 and tally["predicted"] >= 6


def five_tasks() -> RunRecord:
    names = ("humaneval", "mbpp", "mbpp_plus", "gsm8k_cot")
    made = header(
        problems={name: ("1",) for name in names},
        data={name: {**header().data["t"], "ours": False} for name in names},
        decoders={"tidar:block_len=4,beta=1": {
            "name": "tidar", "params": {"block_len": 4, "beta": 1.0}, "lossless": True},
            "ar": {"name": "ar", "params": {}, "lossless": True}},
    )  # fmt: skip
    rows: list[Measurement] = []
    for number, name in enumerate(names, start=1):
        rows.append(row(task=name))
        rows.append(row(task=name, decoder="tidar:block_len=4,beta=1",
                                decode_forwards=5 * number, decode_s=1.0))  # fmt: skip
    return RunRecord(name="r", header=made, measurements=tuple(rows), scores=())


def test_observed_by_hand() -> None:
    """10 decode tokens each: T/NFE 2, 1, 2/3, 1/2; AR 2 s and ours 1 s: speedup 2 everywhere."""
    found = {(o.decoder, o.task, o.metric): o for o in claims_ours.observe(five_tasks())}
    assert found["tidar", "humaneval", "t_per_nfe"].value == 2
    assert found["tidar", "mbpp_plus", "t_per_nfe"].value == pytest.approx(2 / 3)
    assert found["tidar", "gsm8k_cot", "speedup"].value == pytest.approx(2)
    assert found["tidar", "mbpp_average", "t_per_nfe"].value == pytest.approx((1 + 2 / 3) / 2)
    # Steps: 4 s over 5+10+15+20 forwards against AR's 8 s over 40.
    assert found["tidar", "", "step_ratio"].value == pytest.approx((4 / 50) / (8 / 40))
    assert ("tidar", "humaneval_plus", "t_per_nfe") not in found  # evalplus did not grade it
    assert ("tidar", "average_5_tasks", "t_per_nfe") not in found
    assert not found["tidar", "humaneval", "t_per_nfe"].whole


def test_observed_flags_follow_what_a_number_is_made_of() -> None:
    """Every text of AR on mbpp was cut: its counts are spoiled, and what is divided by them."""
    record = five_tasks()
    rows = [
        dataclasses.replace(row, finish="length" if (row.task, row.decoder) == ("mbpp", "ar")
                            else "eos") for row in record.measurements
    ]  # fmt: skip
    made = dataclasses.replace(record, measurements=tuple(rows))
    found = {(o.decoder, o.task, o.metric): o.spoiled for o in claims_ours.observe(made)}
    cut = ("eos_never_reached",)
    assert found["tidar", "mbpp", "t_per_nfe"] == found["tidar", "humaneval", "speedup"] == ()
    assert found["ar", "mbpp", "t_per_nfe"] == found["tidar", "mbpp", "speedup"] == cut
    assert found["tidar", "mbpp_average", "t_per_nfe"] == ()
    assert found["ar", "mbpp_average", "t_per_nfe"] == cut
    assert found["tidar", "", "step_ratio"] == ()  # a step costs the same whatever it writes

    again = dataclasses.replace(rows[0], problem="2")  # by a second process, as all after it
    resumed = dataclasses.replace(
        made, measurements=(rows[0], again, *rows[1:]),
        sessions=({"already_done": 0}, {"already_done": 1}),
    )  # fmt: skip
    found = {(o.decoder, o.task, o.metric): o.spoiled for o in claims_ours.observe(resumed)}
    assert found["tidar", "humaneval", "speedup"] == ("resumed",)
    assert found["tidar", "", "step_ratio"] == ("resumed",)
    assert found["ar", "humaneval", "t_per_nfe"] == found["tidar", "gsm8k_cot", "speedup"] == ()


def test_the_protocol_is_met_or_off_on_any_weights() -> None:
    shots, limit = claim("table6/mbpp/shots"), claim("table6/mbpp/length_limit")
    made = five_tasks()
    data = {**made.header.data, "mbpp": {**made.header.data["mbpp"], "shots": 3}}

    def judged(length: int, cap: int | None, data: dict[str, Any] = data) -> list[str]:
        profile = {**made.header.profile, "max_new_tokens": cap}
        head = dataclasses.replace(made.header, profile=profile, data=data)
        rows = [dataclasses.replace(row, output_tokens=length) for row in made.measurements]
        record = dataclasses.replace(made, header=head, measurements=tuple(rows))
        return [j.verdict for j in judge_all([shots, limit], claims_ours.observe(record))]

    assert judged(512, None) == [REPRODUCED, REPRODUCED]
    assert judged(256, None) == [REPRODUCED, OFF]
    assert judged(64, 64) == [REPRODUCED, OTHER_SETTING]
    assert judged(512, None, made.header.data) == [OFF, REPRODUCED]  # no worked example
    assert [j.verdict for j in judge_all([shots], [])] == [NOT_RUN]
    found = {(o.task, o.metric): o.value for o in claims_ours.observe(made)}
    assert found["humaneval_plus", "shots"] == 0


def test_random_weights_give_step_costs_only() -> None:
    record = five_tasks()
    random = dataclasses.replace(
        record, header=dataclasses.replace(
            record.header, weights={**record.header.weights, "tier": "random"})
    )  # fmt: skip
    protocol = {"shots", "length_limit"}
    assert {o.metric for o in claims_ours.observe(random)} == {"step_ratio"} | protocol


def test_runs_and_width_curves_are_found_the_same_way(tmp_path: Path) -> None:
    for name, file in (("b_run", "header.json"), ("a_curve", "slots_header.json"), ("c", "x.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    found = claims_ours.committed_records(tmp_path)
    assert [path.name for path in found] == ["a_curve", "b_run"]
    # What is neither is kept, so that reading it says what is wrong with it.
    runs = claims_ours.run_folders([*found, tmp_path / "c"])
    assert [path.name for path in runs] == ["b_run", "c"]


def test_the_page_of_the_committed_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert claims_ours.committed_records()
    assert cli.main(["claims"]) == 0
    table = capsys.readouterr().out
    assert f"{len(load_claims())} cells" in table.splitlines()[2]
    assert all(finding.what in table for finding in load_findings())
    assert all(item.test in table for item in load_properties())
    assert cli.main(["claims", "--format", "csv", "--source", "Table 2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 119 and {row["source"] for row in rows} == {"Table 2"}
    assert {row["verdict"] for row in rows} <= set(claims_verdict.VERDICTS)
    beside = [row for row in rows if row["ours"]]
    assert beside and all(row["ours_record"] and row["ours_weights"] for row in beside)
    assert cli.main(["claims", "--format", "json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["counts"]["cells"] == len(whole["claims"]) == len(load_claims())


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "--source", "Table 9"]) == 2
    assert "Table 9" in capsys.readouterr().err
    assert cli.main(["claims", "no/such/record"]) == 2
    assert "no/such/record" in capsys.readouterr().err
