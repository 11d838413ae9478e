"""The generation loop: limits, stops, accounting, the step ledger and the clock."""

from __future__ import annotations

import pytest
import tiny
import torch

from baselines import autoregressive
from tidar_ref import tidar
from tidar_ref.decoding import Decoder, GenerationTrace, State, StepTrace, generate
from tidar_ref.errors import UserError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ar(model: tiny.Tiny) -> Decoder:
    return autoregressive.build(model.model)


def tidar_4(model: tiny.Tiny) -> Decoder:
    return tidar.build(model.model, mask_token_id=tiny.MASK, block_len=4, beta=1.0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ar_equals_dumb_greedy(family: str) -> None:
    for seed in range(2):
        model, prompts = tiny.random_tiny(family, seed), tiny.prompts(5, seed=seed)
        expected = [tuple(model.greedy(p, 20)) for p in prompts]
        assert [t.token_ids for t in generate(ar(model), prompts, max_new_tokens=20)] == expected
        alone = [generate(ar(model), [p], max_new_tokens=20)[0].token_ids for p in prompts]
        assert alone == expected


def test_ar_ledger() -> None:
    """AR commits one token a forward, prefill included: decode T/NFE is exactly 1."""
    model, calls = tiny.random_tiny("llama"), []
    handle = model.model.register_forward_hook(lambda _, args, __: calls.append(args[0].shape))
    try:
        trace = generate(ar(model), [[1, 2, 3]], max_new_tokens=10)[0]
    finally:
        handle.remove()
    assert [tuple(shape) for shape in calls] == [(1, 3)] + [(1, 1)] * 9
    ledger = [trace.prefill, *trace.steps]
    assert sum(step.target_forwards for step in ledger) == len(calls)
    assert [step.kv_len for step in trace.steps] == [(3 + n,) for n in range(9)]
    assert (len(trace.token_ids) - 1) / len(trace.steps) == 1.0
    assert sum((step.committed[0] for step in ledger), ()) == trace.token_ids


def test_end_token_is_kept_and_ends_the_sequence() -> None:
    model, prompt = tiny.random_tiny("qwen2"), [4, 2]
    text = model.greedy(prompt, 20)
    for eos in set(text):
        trace = generate(ar(model), [prompt], max_new_tokens=20, eos_ids=frozenset({eos}))[0]
        assert list(trace.token_ids) == text[: text.index(eos) + 1]
        assert trace.finish == "eos"
    at_prefill = generate(ar(model), [prompt], max_new_tokens=20, eos_ids=frozenset({text[0]}))[0]
    assert at_prefill.token_ids == (text[0],) and at_prefill.steps == ()


def keep_after(count: int):  # noqa: ANN201 - a factory of stop rules
    return lambda: lambda tokens, new: count if len(tokens) >= count else None


@pytest.mark.parametrize("decoder_of", [ar, tidar_4])
def test_earliest_condition_wins(decoder_of) -> None:  # noqa: ANN001
    """End token, stop rule and limit in every order; the earliest position decides."""
    model, prompt = tiny.trained_tiny(), [3, 9, 3, 9, 3, 9]
    text = model.greedy(prompt, 20)
    eos_at = next(i for i in range(1, 20) if text[i] not in text[:i])
    for stop_at in (eos_at - 1, eos_at, eos_at + 1, eos_at + 2):
        for limit in range(1, eos_at + 4):
            trace = generate(
                decoder_of(model),
                [prompt],
                max_new_tokens=limit,
                eos_ids=frozenset({text[eos_at]}),
                stop=keep_after(stop_at + 1),
            )[0]
            keep = min(eos_at + 1, stop_at + 1, limit)
            reason = "eos" if keep == eos_at + 1 else "stop" if keep == stop_at + 1 else "length"
            assert (list(trace.token_ids), trace.finish) == (text[:keep], reason)


def test_stop_rules_are_per_sequence_and_told_what_is_new() -> None:
    model, made = tiny.trained_tiny(), []

    class Recorder:
        def __init__(self) -> None:
            self.seen: list[int] = []
            made.append(self)

        def __call__(self, token_ids: list[int], new: int) -> int | None:
            assert token_ids[: len(self.seen)] == self.seen
            assert new == len(token_ids) - len(self.seen)
            self.seen = list(token_ids)
            return None

    prompts = tiny.prompts(4, seed=5)
    traces = generate(tidar_4(model), prompts, max_new_tokens=15, stop=Recorder)
    assert len(made) == 4
    for rule, trace in zip(made, traces, strict=True):
        assert tuple(rule.seen[:15]) == trace.token_ids
        assert len(rule.seen) == trace.tokens_generated


@pytest.mark.parametrize("decoder_of", [ar, tidar_4])
def test_finished_sequences_commit_nothing_more(decoder_of) -> None:  # noqa: ANN001
    """A batch whose members end at different times: each equals its own run, ledger included."""
    model, prompts = tiny.trained_tiny(), tiny.prompts(6, seed=6)
    eos = frozenset({model.greedy(prompts[0], 4)[-1], model.greedy(prompts[2], 6)[-1]})
    lengths: list[tuple[int, ...]] = []

    def record(state: State, step: StepTrace) -> None:
        lengths.append(tuple(state.cache.kv_len.tolist()))

    def essence(trace: GenerationTrace) -> tuple:
        runs = tuple(step.committed[0] for step in trace.steps)
        where = tuple(step.kv_len[0] for step in trace.steps)
        return trace.token_ids, trace.finish, trace.tokens_generated, runs, where

    batch = generate(decoder_of(model), prompts, max_new_tokens=20, eos_ids=eos, on_step=record)
    assert len({len(trace.steps) for trace in batch}) > 1
    for prompt, trace in zip(prompts, batch, strict=True):
        alone = generate(decoder_of(model), [prompt], max_new_tokens=20, eos_ids=eos)[0]
        assert essence(trace) == essence(alone)
    for index, trace in enumerate(batch):
        assert lengths[-1][index] == len(prompts[index]) + trace.tokens_generated - 1


@pytest.mark.parametrize("decoder_of", [ar, tidar_4])
def test_clock_modes(decoder_of) -> None:  # noqa: ANN001
    """Same tokens either way; per_step times each step, total none; the model stays as it was."""
    model = tiny.trained_tiny()
    total = generate(decoder_of(model), [[1, 2]], max_new_tokens=12)[0]
    timed = generate(decoder_of(model), [[1, 2]], max_new_tokens=12, clock="per_step")[0]
    assert total.token_ids == timed.token_ids
    assert total.prefill_s > 0 and total.decode_s > 0
    assert all(s.step_s is None and s.forward_s is None for s in (total.prefill, *total.steps))
    for step in (timed.prefill, *timed.steps):
        assert 0 < step.forward_s <= step.step_s
    assert sum(step.step_s for step in timed.steps) <= timed.decode_s
    assert "forward" not in vars(model.model) and "forward" not in vars(model.model.lm_head)


@pytest.mark.parametrize(
    ("prompts", "options", "word"),
    [
        ([], {}, "prompt"),
        ([[1], []], {}, "prompt 1"),
        ([[1, 99]], {}, "99"),
        ([[-1]], {}, "-1"),
        ([[1]], {"max_new_tokens": 0}, "0"),
        ([[1]], {"clock": "sundial"}, "sundial"),
    ],
)
def test_bad_requests_are_named(prompts: list, options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        generate(ar(tiny.random_tiny("llama")), prompts, **{"max_new_tokens": 4, **options})
