"""Static steps against the eager decoders: tokens, ledger, cache, ends; graphs only on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from baselines import autoregressive
from bench.profiles import DecoderSpec
from bench.registry import check_decoder
from tidar_ref import graphed, tidar
from tidar_ref.decoding import GenerationTrace, generate
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

NEW = 24


@pytest.fixture(autouse=True)
def small_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that grow by 8 slots, so that a short generation walks through several."""
    torch.set_num_threads(1)
    monkeypatch.setattr(graphed, "GRANULE", 8)


def build(model: tiny.Tiny, name: str, **params: Any) -> Any:
    if name == "ar":
        return autoregressive.build(model.model, mask_token_id=tiny.MASK, **params)
    return tidar.build(model.model, mask_token_id=tiny.MASK, **params)


def facts(trace: GenerationTrace) -> tuple[Any, ...]:
    """All of a trace but its seconds."""
    return (trace.token_ids, trace.tokens_generated, trace.prefill, trace.steps, trace.finish)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ar", {}),
    *(("tidar", {"block_len": k}) for k in (2, 4, 8, 16)),
    ("tidar", {"block_len": 4, "beta": 0.5}),
    ("tidar", {"block_len": 4, "beta": 0.0}),
    ("tidar", {"block_len": 8, "outcomes": "1-4"}),
]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_same_text_and_ledger_as_eager(name: str, params: dict[str, Any]) -> None:
    committed: set[int] = set()
    for index, model in enumerate((tiny.trained_tiny(), tiny.random_tiny("llama"))):
        prompts = tiny.prompts(4, seed=index)
        eager, static = build(model, name, **params), build(model, name, static=5, **params)
        batches = [[prompt] for prompt in prompts] + [prompts]
        for batch in batches:
            expected = generate(eager, batch, max_new_tokens=NEW)
            found = generate(static, batch, max_new_tokens=NEW)
            assert [facts(trace) for trace in found] == [facts(trace) for trace in expected]
            committed |= {len(s.committed[0]) for trace in found for s in trace.steps}
    assert len(committed) > 1 or name == "ar", "hollow proof: all steps committed alike"


@pytest.mark.parametrize(("name", "params"), CASES[:5])
def test_same_cache_as_eager_after_every_step(name: str, params: dict[str, Any]) -> None:
    """K/V of the committed tokens, to float32 rounding, at every read."""
    model, prompts = tiny.trained_tiny(), tiny.prompts(3, seed=5)
    eager, static = build(model, name, **params), build(model, name, static=1, **params)
    with torch.inference_mode():
        options: dict[str, Any] = {"max_new_tokens": 100, "sampling": Sampling()}
        one, _ = eager.prefill(prompts, **options)
        two, _ = static.prefill(prompts, **options)
        for _ in range(6):
            assert eager.step(one) == static.step(two)
            assert one.cache.lengths == two.cache.lengths == two.cache.kv_len.tolist()
            for row, length in enumerate(one.cache.lengths):
                for a, b in ((one.cache.k, two.cache.k), (one.cache.v, two.cache.v)):
                    torch.testing.assert_close(
                        a[:, row, :, :length], b[:, row, :, :length], atol=1e-5, rtol=1e-5
                    )


@pytest.mark.parametrize("steps", [1, 3, 64])
def test_ends_and_limits_fall_where_eager_puts_them(steps: int) -> None:
    """End-of-sequence and stop rules inside a burst; limits of 1 and up; rows that end apart."""
    model = tiny.trained_tiny()
    prompts = tiny.prompts(5, seed=2)

    def third(tokens: list[int], new: int) -> int | None:
        return 3 if len(tokens) >= 3 else None

    for name, params in (("ar", {}), ("tidar", {"block_len": 4})):
        eager, static = build(model, name, **params), build(model, name, static=steps, **params)
        text = generate(eager, prompts, max_new_tokens=NEW)
        eos = frozenset({text[0].token_ids[4], text[3].token_ids[-1]})
        for options in (
            {"eos_ids": eos},
            {"stop": lambda: third},
            *({"max_new_tokens": limit} for limit in (1, 2, 7)),
        ):
            both = [
                generate(decoder, prompts, **{"max_new_tokens": NEW, **options})
                for decoder in (eager, static)
            ]
            assert [facts(t) for t in both[1]] == [facts(t) for t in both[0]], (name, options)


def test_steps_behind_the_end_are_discarded_and_counted() -> None:
    model, [prompt] = tiny.random_tiny("qwen2"), tiny.prompts(1)
    eager, static = build(model, "ar"), build(model, "ar", static=8)
    [whole] = generate(eager, [prompt], max_new_tokens=20)
    for stop_at in (3, 9):  # tokens; the first comes from the prefill
        rule = lambda tokens, new, n=stop_at: n if len(tokens) >= n else None  # noqa: E731
        [trace] = generate(static, [prompt], max_new_tokens=20, stop=lambda rule=rule: rule)
        assert trace.token_ids == whole.token_ids[:stop_at]
        assert len(trace.steps) == stop_at - 1
        assert static.owner.discarded == -(stop_at - 1) % 8
    generate(static, [prompt], max_new_tokens=20)
    assert static.owner.discarded == 0  # a limit is no surprise: 19 = 8 + 8 + 3


def test_one_decoder_many_prompts_reuses_its_buffers() -> None:
    model = tiny.random_tiny("qwen3")
    static, eager = build(model, "tidar", block_len=2, static=4), build(model, "tidar", block_len=2)
    long, short = [1, 2, 3] * 3, [4]
    places = set()
    for prompt in (long, short, long):
        [found] = generate(static, [prompt], max_new_tokens=12)
        [expected] = generate(eager, [prompt], max_new_tokens=12)
        assert facts(found) == facts(expected)
        places.add(static.buffers[1].cache.k.data_ptr())
    assert len(places) == 1  # no graph would have to be captured again
    with torch.inference_mode():
        options: dict[str, Any] = {"max_new_tokens": 4, "sampling": Sampling()}
        old, _ = static.prefill([short], **options)
        static.prefill([short], **options)
        with pytest.raises(ValueError, match="later prefill"):
            static.step(old)


def test_rewind_repeats_the_step() -> None:
    """What the timing of steps needs: any KV length, as often as wanted."""
    model = tiny.random_tiny("llama")
    static = build(model, "tidar", block_len=4, static=3)
    with torch.inference_mode():
        state, _ = static.prefill([[1, 2]], max_new_tokens=40, sampling=Sampling())
        for length in (30, 9, 30):
            static.rewind(state, length)
            assert static.step(state).kv_len == (length,)
            assert len(state.queue) == 2


def test_refusals_say_what_to_do() -> None:
    model = tiny.random_tiny("llama")
    for name, params in (("ar", {}), ("tidar", {"block_len": 4})):
        for wrong, message in (
            ({"graphs": 8}, "--device cuda, or static=8"),
            ({"static": -1}, "1 to 64"),
            ({"static": 2.5}, "1 to 64"),
            ({"static": 2, "graphs": 2}, "exclude each other"),
        ):
            with pytest.raises(UserError, match=message):
                build(model, name, **params, **wrong)
        static = build(model, name, static=2, **params)
        with pytest.raises(UserError, match="greedy"):
            generate(
                static, [[1]], max_new_tokens=4, sampling=Sampling(temperature=1, mode="match")
            )
        with pytest.raises(UserError, match="clock total"):
            generate(static, [[1]], max_new_tokens=4, clock="per_step")
        # Parameters are checked on a CPU before the weights of a CUDA run are loaded.
        spec = DecoderSpec(name=name, params=tuple({**params, "graphs": 8}.items()))
        check_decoder(spec, model.model, mask_token_id=tiny.MASK)
        assert build(model, name, graphs=0, **params).name == name


def test_buckets_hold_what_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "GRANULE", 512)
    assert [graphed.bucket(n) for n in (1, 512, 513, 1025, 4097)] == [512, 512, 1024, 1536, 5120]
    for slots in (1, 77, 1500, 4096, 30000, 33000):
        assert slots <= graphed.bucket(slots) < max(slots * 1.25 + 1, slots + 512)
    assert len({graphed.bucket(n) for n in range(1, 32769)}) < 40  # one graph each


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "params"), CASES)
def test_captured_steps_equal_eager_ones(name: str, params: dict[str, Any]) -> None:
    import copy

    model, prompts = tiny.trained_tiny(), tiny.prompts(4, seed=1)
    on_gpu = copy.deepcopy(model.model).to("cuda")
    builder = autoregressive.build if name == "ar" else tidar.build
    eager = builder(on_gpu, mask_token_id=tiny.MASK, **params)
    captured = builder(on_gpu, mask_token_id=tiny.MASK, graphs=5, **params)
    for batch in ([prompts[0]], prompts):
        expected = generate(eager, batch, max_new_tokens=NEW)
        found = generate(captured, batch, max_new_tokens=NEW)
        assert [facts(trace) for trace in found] == [facts(trace) for trace in expected]
