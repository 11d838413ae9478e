"""TiDAR's decode loop against greedy AR and against a dense rewriting of the paper's step."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch

from baselines import autoregressive
from tidar_ref import tidar
from tidar_ref.cache import KVCache
from tidar_ref.decoding import State, StepTrace, generate
from tidar_ref.sampling import Sampling

BLOCKS = (2, 4, 8, 16)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(model: tiny.Tiny, block_len: int, beta: float = 1.0) -> tidar.TidarDecoder:
    return tidar.build(model.model, mask_token_id=tiny.MASK, block_len=block_len, beta=beta)


def models() -> list[tiny.Tiny]:
    return [tiny.trained_tiny(), *(tiny.random_tiny(family) for family in tiny.FAMILIES)]


# --- beta = 1 is greedy AR ---------------------------------------------------------------------


@pytest.mark.parametrize("block_len", BLOCKS)
def test_trust_ar_equals_dumb_greedy(block_len: int) -> None:
    """Token for token in float32, one by one and in a ragged batch; and the proof is not hollow."""
    seen: Counter[int] = Counter()
    for index, model in enumerate(models()):
        prompts = tiny.prompts(4, seed=index)
        expected = [tuple(model.greedy(prompt, 24)) for prompt in prompts]
        decoder = build(model, block_len)
        alone = [generate(decoder, [p], max_new_tokens=24)[0] for p in prompts]
        assert [t.token_ids for t in alone] == expected
        batch = generate(decoder, prompts, max_new_tokens=24)
        assert [t.token_ids for t in batch] == expected
        for trace in alone:
            seen.update(len(step.committed[0]) for step in trace.steps)
    assert seen[1] and seen[block_len], f"hollow proof, committed counts were {dict(seen)}"
    if block_len == 4:
        assert seen[2] + seen[3]


@pytest.mark.parametrize("seed", range(1, 4))
def test_trust_ar_equals_ar_on_many_weights(seed: int) -> None:
    for family in tiny.FAMILIES:
        model = tiny.random_tiny(family, seed)
        prompts = tiny.prompts(5, seed=100 + seed, longest=20)
        ar = generate(autoregressive.build(model.model), prompts, max_new_tokens=25)
        for block_len in BLOCKS:
            got = generate(build(model, block_len), prompts, max_new_tokens=25)
            assert [t.token_ids for t in got] == [t.token_ids for t in ar]


@pytest.mark.parametrize("block_len", BLOCKS)
def test_length_limits(block_len: int) -> None:
    model = tiny.trained_tiny()
    decoder, prompts = build(model, block_len), tiny.prompts(3, seed=40)
    full = [tuple(model.greedy(p, 20)) for p in prompts]
    for limit in range(1, 21):
        for trace, expected in zip(
            generate(decoder, prompts, max_new_tokens=limit), full, strict=True
        ):
            assert trace.token_ids == expected[:limit]
            assert trace.finish == "length"
            assert trace.tokens_generated >= limit
            assert (len(trace.steps) == 0) == (limit == 1)


@pytest.mark.parametrize("block_len", BLOCKS)
def test_end_of_sequence_anywhere(block_len: int) -> None:
    """Every token in turn is the end token; some of them fall inside a committed run."""
    model, cut_inside = tiny.trained_tiny(), 0
    prompts = tiny.prompts(6, seed=41)
    ar, decoder = autoregressive.build(model.model), build(model, block_len)
    for eos in range(8):
        options = {"max_new_tokens": 24, "eos_ids": frozenset({eos, eos + 8})}
        expected = generate(ar, prompts, **options)
        for got, want in zip(generate(decoder, prompts, **options), expected, strict=True):
            assert (got.token_ids, got.finish) == (want.token_ids, want.finish)
            cut_inside += got.finish == "eos" and got.tokens_generated > len(got.token_ids)
    assert cut_inside > 0


class EndsWithPair:
    """Stop rule: keep up to and including the first occurrence of the pair (a, b)."""

    def __init__(self, pair: tuple[int, int]) -> None:
        self.pair = pair

    def __call__(self, token_ids: list[int], new: int) -> int | None:
        start = max(1, len(token_ids) - new)
        for end in range(start, len(token_ids)):
            if (token_ids[end - 1], token_ids[end]) == self.pair:
                return end + 1
        return None


@pytest.mark.parametrize("block_len", BLOCKS)
def test_stop_rule_anywhere(block_len: int) -> None:
    model, stopped, cut_inside = tiny.trained_tiny(), 0, 0
    prompts = tiny.prompts(5, seed=42)
    ar, decoder = autoregressive.build(model.model), build(model, block_len)
    pairs = set()
    for prompt in prompts:
        tokens = model.greedy(prompt, 24)
        pairs |= set(zip(tokens, tokens[1:], strict=False))
    for pair in sorted(pairs)[::2]:
        for eos in (frozenset(), frozenset({pair[0]})):
            options = {"max_new_tokens": 24, "stop": lambda p=pair: EndsWithPair(p), "eos_ids": eos}
            expected = generate(ar, prompts, **options)
            for got, want in zip(generate(decoder, prompts, **options), expected, strict=True):
                assert (got.token_ids, got.finish) == (want.token_ids, want.finish)
                stopped += got.finish == "stop"
                cut_inside += got.finish == "stop" and got.tokens_generated > len(got.token_ids)
    assert stopped > 0 and cut_inside > 0


def test_prompts_that_fill_the_positions() -> None:
    """Drafts may point past the last position the model has; only their tokens are thrown away."""
    model = tiny.random_tiny("qwen3")
    prompt = tiny.prompts(3, seed=1, longest=9)[2] * 100
    for new in (1, 2, 5, 20):
        fits = prompt[: model.config.max_position - new]
        ar = generate(autoregressive.build(model.model), [fits], max_new_tokens=new)[0]
        for block_len in BLOCKS:
            got = generate(build(model, block_len), [fits], max_new_tokens=new)[0]
            assert got.token_ids == ar.token_ids


@pytest.mark.parametrize(
    "block_len", [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 8, 16))]
)
def test_smollm2_trust_ar_equals_ar(smollm_gguf: object, block_len: int) -> None:
    """Real weights: SmolLM2-135M, three prompts in one batch, 12 tokens."""
    checkpoint = pytest.importorskip("tidar_ref.checkpoint")
    loaded = checkpoint.load("embedded")
    texts = ("def fibonacci(n):\n", "1 2 3 4 5 6 7", "The capital of France is")
    prompts = [loaded.tokenizer.encode(text) for text in texts]
    ar = generate(autoregressive.build(loaded.model), prompts, max_new_tokens=12)
    decoder = tidar.build(
        loaded.model, mask_token_id=loaded.source.mask_token_id, block_len=block_len, beta=1.0
    )
    got = generate(decoder, prompts, max_new_tokens=12)
    assert [t.token_ids for t in got] == [t.token_ids for t in ar]


# --- any beta: the dense rewriting -------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block_len", [2, 3, 4, 8, 16])
def test_every_step_equals_the_dense_rewriting(block_len: int, beta: float) -> None:
    """Committed tokens of each step, so drafts and acceptance too, not only the final text."""
    seen: Counter[int] = Counter()
    for index, model in enumerate(models()):
        decoder = build(model, block_len, beta)
        for prompt in tiny.prompts(2, seed=60 + index):
            count = 20 if block_len < 16 else 10
            expected = list(
                oracles.tidar(
                    model.state,
                    model.config,
                    prompt,
                    count,
                    block_len=block_len,
                    beta=beta,
                    mask_id=tiny.MASK,
                )
            )
            trace = generate(decoder, [prompt], max_new_tokens=count)[0]
            got = [trace.prefill.committed[0], *(step.committed[0] for step in trace.steps)]
            assert got == expected
            seen.update(len(run) for run in got[1:])
    assert seen[block_len] and (seen[1] or block_len == 16), dict(seen)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
def test_output_does_not_depend_on_the_drafts(beta: float) -> None:
    """With v_r first, the text is the greedy text of the mixture, one token at a time."""
    for model in models():
        for block_len in (2, 4):
            for prompt in tiny.prompts(3, seed=70):
                tokens = list(prompt)
                for _ in range(12):
                    logits = oracles.next_token_logits(
                        model.state,
                        model.config,
                        torch.tensor([tokens]),
                        block_len,
                        beta,
                        tiny.MASK,
                    )
                    tokens.append(int(logits[0].argmax()))
                trace = generate(build(model, block_len, beta), [prompt], max_new_tokens=12)[0]
                assert list(trace.token_ids) == tokens[len(prompt) :]
                assert tiny.MASK not in trace.token_ids


# --- the cache ---------------------------------------------------------------------------------


def cache_error(
    decoder: tidar.TidarDecoder, model: tiny.Tiny, prompts: list[list[int]], count: int = 24
) -> float:
    """Worst deviation of cached K/V from a fresh causal forward over prompt + committed[:-1],
    relative to the largest entry, checked after every step; infinity if a length is wrong."""
    sequences = [list(p) for p in prompts]
    worst = 0.0

    def check(state: State, step: StepTrace) -> None:
        nonlocal worst
        for b, sequence in enumerate(sequences):
            if not step.committed[b]:
                continue
            if len(sequence) == len(
                prompts[b]
            ):  # the prefill's token, readable off the prefill only
                sequence.append(first[b])
            sequence.extend(step.committed[b])
            ids = sequence[:-1]
            if int(state.cache.kv_len[b]) != len(ids):
                worst = float("inf")
            expected = oracles.causal_keys_values(model.state, model.config, ids)
            for layer, pair in enumerate(expected):
                for stored, want in zip((state.cache.k, state.cache.v), pair, strict=True):
                    got = stored[layer, b, :, : len(ids)].transpose(0, 1).double()
                    worst = max(worst, float((got - want).abs().max() / want.abs().max()))

    first = [generate(decoder, [p], max_new_tokens=1)[0].token_ids[0] for p in prompts]
    generate(decoder, prompts, max_new_tokens=count, on_step=check)
    return worst


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("block_len", [2, 4, 16])
def test_cache_is_exact_after_every_step(block_len: int, beta: float) -> None:
    for model in models():
        prompts = tiny.prompts(3, seed=80)
        decoder = build(model, block_len, beta)
        for prompt in prompts:
            assert cache_error(decoder, model, [prompt]) < 1e-5
        assert cache_error(decoder, model, prompts) < 1e-5


def test_the_cache_check_sees_kept_rejections(monkeypatch: pytest.MonkeyPatch) -> None:
    """If rejected drafts stayed in the cache, lengths and then contents would be wrong."""
    model, prompt = tiny.trained_tiny(), tiny.prompts(3, seed=80)[2]
    decoder = build(model, 4)
    assert cache_error(decoder, model, [prompt]) < 1e-5
    advance = KVCache.advance

    def keep_rejected(cache: KVCache, counts: list[int]) -> None:
        advance(cache, [4 if 0 < n < 4 else n for n in counts])

    monkeypatch.setattr(KVCache, "advance", keep_rejected)
    assert cache_error(decoder, model, [prompt], count=4) == float("inf")


def test_the_cache_check_sees_a_leak() -> None:
    """If d_i saw d_{i+1}, its deeper keys would be contaminated; so would the text."""
    for model in models():
        decoder, prompts = build(model, 4), tiny.prompts(6, seed=80)
        decoder.new_mask = decoder.new_mask.clone()
        decoder.new_mask[0, 1] = True
        assert cache_error(decoder, model, prompts) > 1e-3
    expected = [tuple(tiny.random_tiny("qwen3").greedy(p, 24)) for p in prompts]
    got = generate(decoder, prompts, max_new_tokens=24)
    assert [t.token_ids for t in got] != expected


# --- chosen drafters ---------------------------------------------------------------------------


@pytest.mark.parametrize("block_len", BLOCKS)
def test_perfect_partial_and_hopeless_drafters(block_len: int) -> None:
    """A draft whose first `right` tested tokens are correct commits right + 1, and AR's text."""
    model = tiny.random_tiny("llama")
    prompt = [3, 1, 4, 1, 5]
    text = model.greedy(prompt, 80)
    decoder = build(model, block_len)
    for right in range(block_len):
        with torch.inference_mode():
            state, prefill = decoder.prefill([prompt], max_new_tokens=60, sampling=Sampling())
            done = list(prefill.committed[0])
            for _ in range(3):
                draft = text[len(done) - 1 : len(done) - 1 + block_len]
                for i in range(right + 1, block_len):
                    draft[i] = (draft[i] + 1) % model.config.vocab_size
                state.draft = torch.tensor([draft])
                trace = decoder.step(state)
                assert len(trace.committed[0]) == right + 1
                assert trace.accepted == (right,) and trace.drafted == (block_len - 1,)
                done += trace.committed[0]
        assert done == text[: len(done)]


def test_a_lucky_token_after_a_rejection_is_not_kept() -> None:
    """Acceptance stops at the first mismatch, whatever matches later."""
    model, prompt, block_len = tiny.random_tiny("llama"), [3, 1, 4, 1, 5], 8
    text, decoder = model.greedy(prompt, 20), build(model, block_len)
    with torch.inference_mode():
        state, _ = decoder.prefill([prompt], max_new_tokens=20, sampling=Sampling())
        draft = text[:block_len]
        draft[2] = (draft[2] + 1) % 16
        state.draft = torch.tensor([draft])
        assert decoder.step(state).committed[0] == tuple(text[1:3])


# --- counting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_len", BLOCKS)
def test_one_forward_a_step_and_the_paper_s_width(block_len: int) -> None:
    model = tiny.trained_tiny()
    calls: list[SimpleNamespace] = []
    handle = model.model.register_forward_hook(
        lambda _, args, __: calls.append(SimpleNamespace(width=args[0].shape[1]))
    )
    try:
        trace = generate(build(model, block_len), [[1, 2, 1, 2]], max_new_tokens=30)[0]
    finally:
        handle.remove()
    ledger = [trace.prefill, *trace.steps]
    assert len(calls) == sum(step.target_forwards for step in ledger)
    assert [call.width for call in calls] == [step.query_width for step in ledger]
    assert calls[0].width == 4 + block_len
    assert all(call.width == block_len * (block_len + 1) for call in calls[1:])
    assert sum(step.draft_forwards for step in ledger) == 0
