"""Acceptance traces: from records, simulated, saved; predictions done by hand; a forced engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
from made_records import header, row, steps_of

from bench import traces
from bench.metrics import Interval
from bench.slots.curves import Point
from bench.store import RunStore
from tidar_ref.decoding import generate
from tidar_ref.errors import UserError
from tidar_ref.tidar import TidarDecoder

TIDAR = "tidar:block_len=4,beta=1"


def by_hand() -> traces.AcceptanceTrace:
    """Two outputs: 5 tokens in 2 steps behind a prompt of 10, 3 tokens in 1 step behind 20."""
    problems = (
        traces.ProblemTrace(
            problem="a", prompt_tokens=10, output_tokens=5, decode_tokens=4, committed=(3, 2),
            kv_lens=(10, 13),
        ),
        traces.ProblemTrace(
            problem="b", prompt_tokens=20, output_tokens=3, decode_tokens=2, committed=(2,),
            kv_lens=(20,),
        ),
    )  # fmt: skip
    return traces.AcceptanceTrace(
        schema=traces.SCHEMA, source="hand", weights="w", decoder=TIDAR, query_width=20,
        forwards_per_step=1, problems=problems,
    )  # fmt: skip


def test_prediction_by_hand() -> None:
    trace = by_hand()
    times = traces.StepTimes({10: 0.2, 20: 0.4}, "steps")
    ar = traces.StepTimes({10: 0.1, 20: 0.2}, "ar")
    found = traces.predict(trace, times, ar)
    own = 0.2 + 0.26 + 0.4  # at 10, 13, 20
    ar_s = (0.10 + 0.11 + 0.12 + 0.13) + (0.2 + 0.2)  # 4 tokens from 10, 2 from 20 (21 is outside)
    assert found.tokens_per_s == pytest.approx(6 / own)
    assert found.ar_tokens_per_s == pytest.approx(6 / ar_s)
    assert found.speedup == pytest.approx(ar_s / own)
    assert found.t_per_nfe == 2.0 and found.outside == 0.0
    short = traces.predict(trace, traces.StepTimes({12: 0.2, 15: 0.2}, "s"), ar)
    assert short.outside == pytest.approx(2 / 3)


def test_a_denoisers_first_token_is_a_decode_token() -> None:
    """Its prefill commits nothing: 4 tokens in 2 steps, where AR takes 3 steps for 3 tokens."""
    problem = traces.ProblemTrace(
        problem="a", prompt_tokens=7, output_tokens=4, decode_tokens=4, committed=(2, 2),
        kv_lens=(7, 7),
    )  # fmt: skip
    trace = dataclasses.replace(by_hand(), decoder="block_diffusion", problems=(problem,))
    times, ar = traces.StepTimes({1: 0.2}, "s"), traces.StepTimes({1: 0.1}, "a")
    found = traces.predict(trace, times, ar)
    assert (found.t_per_nfe, found.tokens_per_s) == (2.0, pytest.approx(10))
    assert (found.ar_tokens_per_s, found.speedup) == (pytest.approx(10), pytest.approx(1))
    single = dataclasses.replace(problem, output_tokens=1, decode_tokens=1)
    with pytest.raises(UserError, match="AR takes no step"):
        traces.predict(dataclasses.replace(trace, problems=(single,)), times, ar)


def test_ar_predicts_speedup_one() -> None:
    problem = traces.ProblemTrace(
        problem="a", prompt_tokens=7, output_tokens=4, decode_tokens=3, committed=(1, 1, 1),
        kv_lens=(7, 8, 9),
    )  # fmt: skip
    trace = dataclasses.replace(by_hand(), decoder="ar", query_width=1, problems=(problem,))
    times = traces.StepTimes({1: 0.1, 100: 0.9}, "ar")
    assert traces.predict(trace, times, times).speedup == pytest.approx(1.0)


def test_from_a_record_and_back_from_json(tmp_path: Path) -> None:
    mine = row(decoder=TIDAR, output_tokens=4, prompt_tokens=5)
    ledger = [
        dataclasses.replace(step, query_width=width, committed=(1,) * count, kv_len=kv_len)
        for step, width, count, kv_len in zip(
            steps_of(mine, 3), (9, 20, 20), (1, 2, 1), (0, 5, 7), strict=True
        )
    ]
    store = RunStore.create(tmp_path / "r", header())
    store.append(mine, ledger)
    store.close()
    trace = traces.from_record(tmp_path / "r", TIDAR)
    assert trace.query_width == 20 and trace.steps == 2 and trace.decode_tokens == 3
    assert trace.problems[0].committed == (2, 1) and trace.problems[0].kv_lens == (5, 7)
    traces.save(trace, tmp_path / "t.json")
    assert traces.read(tmp_path / "t.json") == trace
    with pytest.raises(UserError, match="no decoder 'x'"):
        traces.from_record(tmp_path / "r", "x")
    (tmp_path / "bad.json").write_text('{"schema": 9}')
    with pytest.raises(UserError, match="schema 9"):
        traces.read(tmp_path / "bad.json")


def test_simulated_traces_keep_their_books() -> None:
    trace = traces.simulate(
        {1: 1, 4: 3}, decoder=TIDAR, query_width=20, prompt_tokens=8, output_tokens=4001, seed=3
    )
    [problem] = trace.problems
    assert sum(problem.committed) >= 4000 > sum(problem.committed[:-1])
    assert problem.kv_lens[0] == 8
    steps = zip(problem.kv_lens, problem.committed, problem.kv_lens[1:], strict=False)
    assert all(before + count == after for before, count, after in steps)
    assert sum(problem.committed) / trace.steps == pytest.approx(3.25, abs=0.15)
    with pytest.raises(UserError, match="counts from 1"):
        traces.simulate({0: 1}, decoder="ar", query_width=1, prompt_tokens=1, output_tokens=2)


def point(what: str, kv_len: int, host_s: float) -> Point:
    latency = Interval(value=host_s, low=None, high=None, n=1)
    return Point(
        job="j", weights="w", dtype="float32", what=what, kv_len=kv_len, batch=1, status="ok",
        detail=None, latency=latency, host_s=host_s,
    )  # fmt: skip


def test_step_times_prefer_the_decoders_own_steps() -> None:
    found = [point("forward:20", 8, 0.1), point(TIDAR, 8, 0.3), point("forward:4", 8, 0.05)]
    assert traces.step_times(found, decoder=TIDAR, width=20, weights="w").at(8) == 0.3
    bare = traces.step_times(found, decoder="two", width=4, forwards=2, weights="w")
    assert bare.at(8) == 0.1 and "bare forwards" in bare.name
    with pytest.raises(UserError, match="width 5"):
        traces.step_times(found, decoder="other", width=5, weights="w")


def test_forced_acceptance_drives_the_engine() -> None:
    model = tiny.random_tiny("qwen3").model
    inner = TidarDecoder(model, mask_token_id=tiny.MASK, block_len=4)
    forced = traces.SimulatedAcceptance(inner, {3: 1})
    lengths = []
    out = generate(
        forced, [[1, 2, 3], [4, 5]], max_new_tokens=13,
        on_step=lambda state, _: lengths.append(list(state.cache.lengths)),
    )  # fmt: skip
    for trace in out:
        assert [len(step.committed[0]) for step in trace.steps] == [3] * 4
        assert len(trace.token_ids) == 13
    assert lengths == [[3 + 3 * n, 2 + 3 * n] for n in range(1, 5)]
    with pytest.raises(UserError, match="lower it"):
        generate(traces.SimulatedAcceptance(inner, {21: 1}), [[1]], max_new_tokens=4)
