"""The gate's statistics and answers: estimator, refusals, counters, writers, and proof by noise."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import noisy_machine
import pytest
from made_records import header, row, steps_of

from bench import cli
from bench.compare import commands, estimate, interleaved, regress_record, sides, verdict, writers
from bench.compare.estimate import PASS, REGRESSION, UNDECIDED, Change
from bench.compare.regress_record import RegressRecord, Turn, make_turn
from bench.records import Measurement
from bench.store import RunRecord, RunStore
from tidar_ref.errors import UserError

COUNTS = {
    "output_tokens": 16, "decode_tokens": 15, "decode_forwards": 10,
    "acceptance_histogram": [0, 5, 5],
}  # fmt: skip
SLOW_TIDAR = 1.10


def turns(seed: int, *, factor: float = 1.0, count: int = 20) -> tuple[Turn, ...]:
    """AR near 10 ms, tidar near 8 ms times `factor`, 1 % noise."""
    rng = random.Random(seed)
    return tuple(
        make_turn(
            "tidar",
            0,
            index,
            [0.010 * math.exp(rng.gauss(0, 0.01)) for _ in range(3)],
            [0.008 * factor * math.exp(rng.gauss(0, 0.01)) for _ in range(3)],
        )
        for index in range(count)
    )


def regress(**changes: Any) -> RegressRecord:
    """A made-up regress record of ar and tidar."""
    values: dict[str, Any] = {
        "kind": "regress",
        "schema": regress_record.SCHEMA,
        "definitions": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "commit": "abcdef0123",
        "dirty": False,
        "session": None,
        "environment": {"cpu": "c", "gpu": None, "threads": 1, "versions": {"torch": "2.13"}},
        "settings": {"seed": 0, "timed_tokens": 16, "timed_prompt": "p"},
        "decoders": {"ar": {}, "tidar": {}},
        "not_measured": {},
        "counters": {"ar": {"p": COUNTS}, "tidar": {"p": COUNTS}},
        "turns": turns(1),
    }
    return RegressRecord(**{**values, **changes})


def compared(base: RegressRecord, head: RegressRecord, **options: Any) -> verdict.Comparison:
    return verdict.compare(
        sides.from_regress(base, "base"), sides.from_regress(head, "head"), **options
    )


# --- the estimator


@pytest.mark.parametrize(
    ("n", "critical"), [(5, None), (6, 0), (8, 3), (10, 8), (15, 25), (20, 52), (25, 89), (50, 434)]
)
def test_signed_rank_cuts_are_the_published_ones(n: int, critical: int | None) -> None:
    assert estimate.rank_cut(n) == critical


def test_the_normal_cut_continues_the_exact_one() -> None:
    exact = estimate.rank_cut(50)
    assert exact is not None
    estimate_of_51 = estimate.rank_cut(51)
    assert estimate_of_51 is not None and 0 < estimate_of_51 - exact < 30


def test_change_by_hand() -> None:
    found = estimate.change([math.log(x) for x in (0.9, 0.9, 0.9, 0.9, 0.9, 0.9)])
    assert found == Change(value=pytest.approx(0.9), low=pytest.approx(0.9),
                           high=pytest.approx(0.9), n=6)  # fmt: skip
    # Pairwise means of -1, 0, 1: -1, -0.5, 0, 0, 0.5, 1; their median is 0.
    three = estimate.change([-1.0, 0.0, 1.0])
    assert three is not None
    assert (three.value, three.low, three.n) == (1.0, None, 3)
    assert estimate.change([]) is None
    with pytest.raises(ValueError, match="not finite"):
        estimate.change([float("inf")])


def test_wild_pairs_move_the_estimate_little() -> None:
    rng = random.Random(0)
    calm = [rng.gauss(0, 0.01) for _ in range(36)]
    wild = [*calm, math.log(20), math.log(15), math.log(0.05), math.log(8)]
    found = estimate.change(wild)
    assert found is not None and found.low is not None and found.high is not None
    assert 0.985 < found.low < 1 < found.high < 1.02


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(3)
    inside = 0
    for _ in range(400):
        found = estimate.change([0.05 + 0.1 * noisy_machine.student(rng) for _ in range(20)])
        assert found is not None and found.low is not None and found.high is not None
        inside += found.low <= math.exp(0.05) <= found.high
    assert 370 <= inside <= 392  # 95 % of 400 is 380


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.96, 1.02, PASS),
        (0.95, 0.96, PASS),
        (0.90, 0.949, REGRESSION),
        (0.94, 0.96, UNDECIDED),
        (0.90, 0.95, UNDECIDED),
        (1.2, 1.3, PASS),
        (None, None, UNDECIDED),
    ],
)
def test_verdicts(low: float | None, high: float | None, expected: str) -> None:
    assert estimate.verdict(Change(value=1.0, low=low, high=high, n=9), 0.05) == expected
    assert estimate.verdict(None, 0.05) == UNDECIDED


# --- proof by noise: the shipped driver, stopping rule and verdict on simulated machines


# Two of the simulated machines always, the others with the slow tests.
SOME_MACHINES = [
    machine if number < 2 else pytest.param(machine, marks=pytest.mark.slow)
    for number, machine in enumerate(noisy_machine.MACHINES)
]


@pytest.mark.parametrize("machine", SOME_MACHINES)
def test_a_planted_slowdown_is_caught_in_19_of_20(machine: str) -> None:
    found = noisy_machine.tally(
        noisy_machine.MACHINES[machine], noisy_machine.ONE_DECODER, trials=20, seed=1
    )
    assert found.caught >= 19 and found.wolf <= 1


@pytest.mark.parametrize("machine", SOME_MACHINES)
def test_no_change_alarms_in_1_of_20_at_most(machine: str) -> None:
    found = noisy_machine.tally(
        noisy_machine.MACHINES[machine], noisy_machine.NO_CHANGE, trials=20, seed=2
    )
    assert found.wolf <= 1 and found.undecided <= 1


def test_a_slower_network_is_caught_through_ar_itself() -> None:
    """All decoders 10 % slower, ar too: every speedup over ar stays as it was."""
    found = noisy_machine.tally(
        noisy_machine.MACHINES["neighbours"], noisy_machine.EVERYTHING, trials=20, seed=3
    )
    assert found.caught >= 19 and found.wolf <= 1


def test_noise_too_large_is_called_undecided_not_judged() -> None:
    found = noisy_machine.tally(noisy_machine.HOPELESS, noisy_machine.NO_CHANGE, trials=6, seed=4)
    assert found.wolf == 0 and found.undecided > 0 and found.processes > interleaved.FEWEST


@pytest.mark.slow
@pytest.mark.parametrize("machine", noisy_machine.MACHINES)
def test_the_rates_hold_over_many_trials(machine: str) -> None:
    noise = noisy_machine.MACHINES[machine]
    for planted in (noisy_machine.ONE_DECODER, noisy_machine.EVERYTHING):
        found = noisy_machine.tally(noise, planted, trials=100, seed=5)
        assert found.caught >= 95 and found.wolf <= 5
    assert noisy_machine.tally(noise, noisy_machine.NO_CHANGE, trials=100, seed=6).wolf <= 5


# --- comparing records


def test_equal_records_pass_and_slower_ones_do_not() -> None:
    base = regress()
    assert not compared(base, regress(turns=turns(2))).regressed
    slow = compared(base, regress(turns=turns(2, factor=SLOW_TIDAR)))
    [timing] = slow.timings
    assert (timing.decoder, timing.verdict) == ("tidar", REGRESSION)
    assert timing.change is not None and timing.change.value == pytest.approx(1 / 1.1, rel=0.01)
    assert slow.exit_code() == 1
    assert not compared(base, regress(turns=turns(2, factor=SLOW_TIDAR)), tolerance=0.15).regressed


def test_ar_is_compared_directly_in_one_session_only() -> None:
    def slower(turn: Turn) -> Turn:
        ar_s, own_s = ([1.1 * s for s in values] for values in (turn.ar_s, turn.own_s))
        return make_turn(turn.decoder, turn.process, turn.index, ar_s, own_s)

    slow = tuple(map(slower, turns(2)))
    apart = compared(regress(), regress(turns=slow))
    assert [t.decoder for t in apart.timings] == ["tidar"] and not apart.regressed
    assert any("ar itself is not compared" in note for note in apart.notes)
    together = compared(regress(session="s"), regress(session="s", turns=slow))
    verdicts = {t.decoder: t.verdict for t in together.timings}
    assert verdicts == {"ar": REGRESSION, "tidar": PASS}
    assert not compared(regress(session="s"), regress(session="t", turns=slow)).regressed


def test_few_turns_are_undecided_and_fail_only_when_strict() -> None:
    found = compared(regress(turns=turns(1, count=5)), regress(turns=turns(2, count=5)))
    assert [row.verdict for row in found.timings] == [UNDECIDED]
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"decode_forwards": 11}, "decode_forwards 10 -> 11"),
        ({"acceptance_histogram": [0, 4, 6]}, "[0, 5, 5] -> [0, 4, 6]"),
        ({"new_counter": 1}, "new_counter None -> 1"),
    ],
)
def test_one_differing_counter_is_a_regression(changed: dict[str, Any], words: str) -> None:
    head = regress(counters={"ar": {"p": COUNTS}, "tidar": {"p": {**COUNTS, **changed}}})
    found = compared(regress(), head)
    assert [row.differing for row in found.counters] == [0, 1]
    assert words in found.counters[1].examples[0] and found.exit_code() == 1
    assert words in writers.to_text(found)


def test_a_decoder_that_cannot_be_built_any_more_is_a_regression() -> None:
    head = regress(
        decoders={"ar": {}}, counters={"ar": {"p": COUNTS}}, not_measured={"tidar": "broken"}
    )
    found = compared(regress(), head)
    assert found.lost == {"tidar": "broken"} and found.regressed
    assert "LOST  broken" in writers.to_text(found)
    assert not compared(head, regress()).regressed  # a new one is no regression


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"definitions": 2}, "definitions is 1"),
        ({"settings": {"seed": 1, "timed_tokens": 16, "timed_prompt": "p"}}, "settings.seed is 0"),
        ({"environment": {"cpu": "d", "gpu": None, "threads": 1, "versions": {"torch": "2.13"}}},
         "environment.cpu is 'c'"),
        ({"environment": {"cpu": "c", "gpu": None, "threads": 2, "versions": {"torch": "2.13"}}},
         "environment.threads is 1"),
        ({"environment": {"cpu": "c", "gpu": None, "threads": 1, "versions": {"torch": "2.12"}}},
         "environment.versions.torch is '2.13'"),
    ],
)  # fmt: skip
def test_unlike_records_are_refused_by_field(
    changes: dict[str, Any], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="not comparable") as error:
        compared(regress(), regress(**changes))
    assert field in str(error.value)
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    regress_record.write(Path(files[0]), regress())
    regress_record.write(Path(files[1]), regress(**changes))
    assert cli.main(["compare", *files]) == 2
    assert field in capsys.readouterr().err


def test_a_package_one_side_does_not_list_is_no_difference() -> None:
    environment = regress().environment
    more = {**environment, "versions": {**environment["versions"], "peft": None}}
    assert not compared(regress(), regress(environment=more)).regressed


def test_tokens_of_a_prefill_are_in_no_decode_sum() -> None:
    """A denoiser whose prefill commits nothing decodes 16 tokens where AR decodes 15."""
    counters = {"ar": {"p": COUNTS}, "tidar": {"p": {**COUNTS, "decode_tokens": 16}}}
    side = sides.from_regress(regress(counters=counters), "x")
    assert side.t_per_nfe == {"ar": 1.5, "tidar": 1.6}
    assert side.ms_per_token["ar"] == pytest.approx(10 / 15, rel=0.02)
    assert side.ms_per_token["tidar"] == pytest.approx(8 / 16, rel=0.02)


def test_nothing_in_common_and_odd_tolerances_are_refused() -> None:
    with pytest.raises(UserError, match="share no decoder"):
        compared(regress(), regress(counters={"ar": {"q": COUNTS}}))
    for tolerance in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="tolerance"):
            compared(regress(), regress(), tolerance=tolerance)


def test_the_gate_says_what_is_undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After every pair of processes, through the command, on made-up turns: five, then forty."""
    records = [
        (
            regress(session="s", turns=turns(1, count=n)),
            regress(session="s", turns=turns(2, count=n)),
        )
        for n in (5, 40)
    ]
    answers = []

    def measured(start: Any, *, enough: Any, **_: Any) -> tuple[RegressRecord, RegressRecord]:
        answers.extend(enough(*pair) for pair in records)
        return records[-1]

    monkeypatch.setattr(interleaved, "checkout", lambda ref: nullcontext(tmp_path))
    monkeypatch.setattr(interleaved, "check_measurable", lambda folder, ref: None)
    monkeypatch.setattr(interleaved, "workers", lambda *words: nullcontext(None))
    monkeypatch.setattr(interleaved, "measure_pair", measured)
    said: list[str] = []
    how = commands.Measuring()
    found, files = commands.regress_against(
        "x", how, out=tmp_path / "out", tolerance=0.05, say=said.append
    )
    assert said == ["  undecided: ar, tidar", "  every timing is decided"]
    assert answers == [False, True] and not found.regressed and all(f.exists() for f in files)


# --- run records


def run(seconds: float = 1.0, problems: int = 12, finish: str = "eos", **changes: Any) -> RunRecord:
    """A run record: tidar decodes each problem in about `seconds`, ar in 2 s."""
    rng = random.Random(round(1000 * seconds))
    rows: list[Measurement] = []
    for number in range(problems):
        scale = math.exp(rng.gauss(0, 0.005)) * (1 + number)  # problems differ in length
        rows.append(row(problem=str(number), decode_s=2.0 * (1 + number), finish=finish))
        tidar = {"decode_forwards": 5, "acceptance_histogram": (0, 0, 5), "finish": finish,
                 **changes}  # fmt: skip
        rows.append(row(problem=str(number), decoder="tidar", decode_s=seconds * scale, **tidar))
    made = header(
        problems={"t": tuple(str(n) for n in range(problems))},
        decoders={name: {"name": name, "params": {}, "lossless": True} for name in ("ar", "tidar")},
    )
    return RunRecord(name="r", header=made, measurements=tuple(rows), scores=())


def test_run_records_pair_by_problem() -> None:
    base = sides.from_run(run())
    assert base.t_per_nfe == {"ar": 1.0, "tidar": 2.0}
    assert base.levels["tidar"] == pytest.approx(2.0, rel=0.01)
    assert base.ms_per_token["ar"] == pytest.approx(200 * 78 / 12)
    same = verdict.compare(base, sides.from_run(run(1.001)))
    assert not same.regressed and same.timings[0].verdict == PASS
    assert same.counters[0].items == 12
    slow = verdict.compare(base, sides.from_run(run(1.1)))
    assert [t.verdict for t in slow.timings] == [REGRESSION]


def test_a_flagged_speedup_is_shown_and_not_compared() -> None:
    """All texts of head were cut: half as fast is no verdict, and a counter still is."""
    base, cut = sides.from_run(run()), run(2.0, finish="length")
    found = verdict.compare(base, sides.from_run(cut))
    [timing] = found.timings
    assert (timing.verdict, timing.change) == (verdict.FLAGGED, None)
    assert timing.base == pytest.approx(2, rel=0.01) and timing.head == pytest.approx(1, rel=0.01)
    note = "flagged, timing of tidar not compared: t in r (eos_never_reached)"
    assert note in found.notes
    text = writers.to_text(found)
    assert note in text and "0 undecided" not in text  # the finish counter differs: REGRESSION
    assert found.counters[1].differing == 12 and "finish eos -> length" in text
    both = verdict.compare(sides.from_run(run(finish="length")), sides.from_run(cut))
    assert (both.exit_code(), both.exit_code(strict=True)) == (0, 1)
    assert writers.to_text(both).endswith("0 of 1 undecided, 1 flagged\n")
    suite = ElementTree.fromstring(writers.to_junit(both).encode())[0]
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    bigger, _ = writers.to_gab(both)
    assert "T/NFE: tidar" in bigger and "speedup over ar" not in bigger


def test_run_records_compare_counters_of_the_same_problems() -> None:
    fewer = verdict.compare(sides.from_run(run()), sides.from_run(run(1.001, problems=7)))
    assert fewer.counters[1].items == 7 and not fewer.regressed
    assert any("5 items only in r" in note for note in fewer.notes)
    other = verdict.compare(sides.from_run(run()), sides.from_run(run(token_ids_sha="b")))
    assert other.counters[1].differing == 12
    assert "token_ids_sha a -> b" in other.counters[1].examples[0]


def test_every_measurement_field_is_counted_or_named_as_not() -> None:
    counted = set(sides.from_run(run()).counters["ar"]["t/0/0"])
    fields = {field.name for field in dataclasses.fields(Measurement)}
    assert counted | sides.NOT_COUNTED == fields and not counted & sides.NOT_COUNTED
    assert {"decode_forwards", "token_ids_sha", "accepted_at", "prompt_sha"} <= counted


def test_unlike_runs_are_refused() -> None:
    base = sides.from_run(run())
    for field, changes in {
        "dtype": {"dtype": "bfloat16"},
        "weights.sha256": {"weights": {**header().weights, "sha256": "x"}},
        "profile.stopping": {"profile": {**header().profile, "stopping": "fixed"}},
        "data.t.sha256": {"data": {"t": {**header().data["t"], "sha256": "x"}}},
    }.items():
        made = run()
        head = dataclasses.replace(made, header=dataclasses.replace(made.header, **changes))
        with pytest.raises(UserError, match=field):
            verdict.compare(base, sides.from_run(head))
    with pytest.raises(UserError, match="kind is 'run'"):
        verdict.compare(base, sides.from_regress(regress(), "x"))


def test_run_folders_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, made in {"base": run(), "head": run(1.001)}.items():
        store = RunStore.create(tmp_path / name, made.header)
        for measurement in made.measurements:
            width = 20 if (name, measurement.decoder) == ("head", "tidar") else 1
            steps = [dataclasses.replace(s, query_width=width) for s in steps_of(measurement)]
            store.append(measurement, steps)
        store.close()
    assert cli.main(["compare", str(tmp_path / "base"), str(tmp_path / "base")]) == 0
    assert "no regression found" in capsys.readouterr().out
    assert cli.main(["compare", str(tmp_path / "base"), str(tmp_path / "head")]) == 1
    assert "query_widths {'1': 2} -> {'20': 2}" in capsys.readouterr().out


# --- files


def test_a_record_survives_the_disk_and_damage_is_named(tmp_path: Path) -> None:
    file = regress_record.write(tmp_path / "folder", regress())
    assert file == tmp_path / "folder" / regress_record.FILE
    assert regress_record.read(file) == regress()
    assert sides.read(tmp_path / "folder").counters == sides.read(file).counters
    values = json.loads(file.read_text())
    for damage, message in {
        "[1": "not JSON",
        "[1]": "not a record",
        json.dumps({**values, "schema": 99}): "schema 99",
        json.dumps({k: v for k, v in values.items() if k != "turns"}): "damaged",
        json.dumps({**values, "extra": 1}): "damaged",
    }.items():
        file.write_text(damage)
        with pytest.raises(UserError, match=message):
            sides.read(file)
    with pytest.raises(UserError, match="cannot read"):
        sides.read(tmp_path / "absent.json")
    with pytest.raises(UserError, match="holds neither"):
        sides.read(tmp_path)


def test_junit_says_what_failed() -> None:
    head = regress(
        turns=turns(2, factor=SLOW_TIDAR),
        counters={"ar": {"p": {**COUNTS, "decode_forwards": 11}}, "tidar": {"p": COUNTS}},
    )
    suite = ElementTree.fromstring(writers.to_junit(compared(regress(), head)).encode())[0]
    assert suite.tag == "testsuite"
    totals = {key: suite.get(key) for key in ("tests", "failures", "skipped", "errors")}
    assert totals == {"tests": "3", "failures": "2", "skipped": "0", "errors": "0"}
    failed = {(c.get("classname"), c.get("name")) for c in suite.iter("testcase") if len(c)}
    assert failed == {("bench.counters", "ar"), ("bench.timings", "tidar")}
    few = compared(regress(turns=turns(1, count=4)), regress(turns=turns(2, count=4)))
    suite = ElementTree.fromstring(writers.to_junit(few).encode())[0]
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


def test_benchmark_action_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(regress_record.write(tmp_path / name, regress())) for name in ("a.json", "b.json")]
    junit, gab = tmp_path / "out" / "junit.xml", tmp_path / "out" / "gab.json"
    assert cli.main(["compare", *files, "--junit", str(junit), "--gab", str(gab)]) == 0
    assert f"written: {gab}" in capsys.readouterr().out and junit.exists()
    bigger = json.loads(gab.read_text())
    smaller = json.loads((tmp_path / "out" / "gab.smaller.json").read_text())
    for entry in (*bigger, *smaller):
        assert isinstance(entry["value"], float) and math.isfinite(entry["value"])
        assert set(entry) == {"name", "unit", "value", "extra"}
        assert all(isinstance(entry[key], str) for key in ("name", "unit", "extra"))
    values = {entry["name"]: entry["value"] for entry in bigger}
    assert values["T/NFE: tidar"] == 1.5
    assert values["speedup over ar: tidar"] == pytest.approx(1.25, rel=0.02)
    times = {entry["name"]: entry["value"] for entry in smaller}
    assert times["decode: ar"] == pytest.approx(10 / 15, rel=0.02)
