"""`masked_diffusion` against a dense rewriting of LLaDA's and Dream's rules, forward by forward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import oracles
import pytest
import test_block_diffusion
import tiny
import torch
from test_block_diffusion import leading

from baselines import masked_diffusion
from tidar_ref.decoding import generate
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

CASES: list[dict[str, Any]] = [
    {"gen_length": 12, "rule": "steps", "steps": 5},
    {"gen_length": 12, "rule": "threshold", "threshold": 0.4},
    {"gen_length": 12, "block_len": 4, "rule": "one"},
    {"gen_length": 12, "block_len": 4, "rule": "steps", "steps": 3, "cache": "prefix"},
    {"gen_length": 12, "block_len": 4, "rule": "threshold", "threshold": 0.4, "cache": "prefix"},
    {"gen_length": 12, "block_len": 4, "rule": "threshold", "threshold": 0.4, "cache": "dual"},
    {"gen_length": 12, "block_len": 6, "rule": "one", "cache": "dual"},
    {"gen_length": 12, "block_len": 6, "rule": "steps", "steps": 4, "order": "margin"},
    {"gen_length": 12, "block_len": 6, "rule": "one", "order": "entropy"},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(model: tiny.Tiny, **params: Any) -> masked_diffusion.MaskedDiffusionDecoder:
    return masked_diffusion.build(model.model, mask_token_id=tiny.MASK, **params)


@cache
def lively(seed: int) -> tiny.Tiny:
    """Random weights large enough for texts of many different tokens."""
    config = oracles.tiny_config("qwen2", vocab=16)
    return tiny.Tiny(config, oracles.random_state(config, seed, std=0.5))


# --- the rules once more, dense and slow ---------------------------------------------------------


def portion(masked: int, forward: int, params: dict[str, Any], length: int, dream: bool) -> int:
    """How many of `masked` positions this forward unmasks under rule "steps"."""
    steps = params["steps"]
    if dream:  # noise levels from 1 to 0.001, all that is left at the last
        levels = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
        now, after = levels[forward : forward + 2]
        return masked if forward == steps - 1 else int(masked * (1 - after / now))
    portions = [0] * steps
    for token in range(length):
        portions[token % steps] += 1
    return portions[forward]


def dense(
    model: tiny.Tiny, prompt: list[int], params: dict[str, Any], convention: str
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(tokens made final, query width, cached positions read) of each forward."""
    params = {"cache": "none", "order": "confidence"} | params
    dream, kept = convention == "dream", params["cache"]
    length = params.get("block_len", params["gen_length"])
    text: list[int | None] = [*prompt, *[None] * params["gen_length"]]
    total = len(text)
    everyone = torch.ones(total, total, dtype=torch.bool)
    for start in range(len(prompt), total, length):
        stop, forward, stale = start + length, 0, None
        while None in text[start:stop]:
            ids = [tiny.MASK if token is None else token for token in text]
            logits, kv = oracles.forward(
                model.state, model.config, ids, range(total), everyone, stale=stale
            )
            read = 0 if stale is None else int(stale[0].sum())
            first = stale is None
            if first and kept != "none":
                outside = [p < start or (kept == "dual" and p >= stop) for p in range(total)]
                stale = torch.tensor(outside), kv
            probs = oracles.ban(logits, tiny.MASK).softmax(-1)
            score, token = {}, {}
            for p in range(start, stop):
                if text[p] is None:
                    row = probs[p - 1 if dream else p]
                    two = row.sort(descending=True).values[:2]
                    token[p] = int(row.argmax())
                    score[p] = {
                        "confidence": float(two[0]),
                        "margin": float(two[0] - two[1]),
                        "entropy": float((row * row.clamp_min(1e-300).log()).sum()),
                    }[params["order"]]
            ranked = sorted(score, key=lambda p: -score[p])
            if dream and kept != "none" and first:
                chosen = [start]
            elif params["rule"] == "one":
                chosen = ranked[:1]
            elif params["rule"] == "threshold":
                chosen = [p for p in ranked if score[p] >= params["threshold"] or p == ranked[0]]
            else:
                chosen = ranked[: portion(len(score), forward, params, length, dream)]
            before = leading(text)
            for p in chosen:
                text[p] = token[p]
            forward += 1
            yield tuple(text[before : leading(text)]), total - read, read


@pytest.mark.parametrize("convention", ["llada", "dream"])
@pytest.mark.parametrize("params", CASES, ids=lambda p: "-".join(map(str, p.values())))
def test_equals_the_dense_rule_forward_by_forward(params: dict[str, Any], convention: str) -> None:
    """Tokens, widths and cached lengths alone; the same tokens in a ragged batch."""
    for index, model in enumerate((test_block_diffusion.trained(), lively(1))):
        prompts = tiny.prompts(2, seed=index)
        decoder = build(model, convention=convention, **params)
        batch = generate(decoder, prompts, max_new_tokens=12)
        for prompt, together in zip(prompts, batch, strict=True):
            trace = generate(decoder, [prompt], max_new_tokens=12)[0]
            ledger = (trace.prefill, *trace.steps)
            got = [(s.committed[0], s.query_width, s.kv_len[0]) for s in ledger]
            assert got == list(dense(model, prompt, params, convention))
            assert together.token_ids == trace.token_ids
            assert [s.committed for s in together.steps] == [s.committed for s in trace.steps]


# --- caches --------------------------------------------------------------------------------------


def texts(model: tiny.Tiny, **params: Any) -> list[tuple[int, ...]]:
    decoder = build(model, gen_length=12, **params)
    return [
        generate(decoder, [prompt], max_new_tokens=12)[0].token_ids
        for prompt in tiny.prompts(3, seed=5)
    ]


def test_caches_read_again_every_forward_are_no_caches() -> None:
    """A block settled by its first forward never reads cached K/V: all three agree exactly."""
    for model in (test_block_diffusion.trained(), lively(1)):
        none, prefix, dual = (
            texts(model, block_len=3, threshold=0.0, cache=cache)
            for cache in ("none", "prefix", "dual")
        )
        assert none == prefix == dual


def test_caches_are_approximate_and_said_to_be() -> None:
    """On random weights stale K/V change tokens: were they not read, this would be equality."""
    none, prefix, dual = (
        texts(lively(2), block_len=6, rule="one", cache=cache)
        for cache in ("none", "prefix", "dual")
    )
    assert none != prefix and none != dual and prefix != dual
    assert not masked_diffusion.MaskedDiffusionDecoder.lossless
    assert "approximate" in (masked_diffusion.__doc__ or "")


# --- conventions ---------------------------------------------------------------------------------


def test_a_model_copies_under_its_own_convention_only() -> None:
    """Ours predicts at the mask itself; read one position to the left it is another answer."""
    model = test_block_diffusion.trained()
    right = {}
    for convention in ("llada", "dream"):
        decoder = build(model, gen_length=4, rule="one", convention=convention)
        hits = [
            generate(decoder, [[a, b] * 3], max_new_tokens=4)[0].token_ids == (a, b, a, b)
            for a, b in ((1, 2), (3, 9), (7, 4), (11, 5), (13, 6), (8, 2))
        ]
        right[convention] = sum(hits)
    assert right["llada"] > right["dream"] == 0, right


def test_the_convention_of_the_weights_is_the_default() -> None:
    import dataclasses

    model = tiny.random_tiny("qwen2")
    plain = model.model.config
    try:
        for family, shift in (("llada", 0), ("dream", 1), ("qwen2", 0)):
            model.model.config = dataclasses.replace(plain, family=family)
            assert build(model).shift == shift
        model.model.config = dataclasses.replace(plain, family="dream")
        with pytest.raises(UserError, match="convention=llada does not fit"):
            build(model, convention="llada")
    finally:
        model.model.config = plain


# --- limits and refusals -------------------------------------------------------------------------


def test_without_a_length_the_canvas_is_the_limit() -> None:
    model, prompt = tiny.random_tiny("llama"), [4, 4, 1]
    trace = generate(build(model, rule="one"), [prompt], max_new_tokens=7)[0]
    assert {s.query_width for s in (trace.prefill, *trace.steps)} == {3 + 7}
    trace = generate(build(model, rule="one", block_len=4), [prompt], max_new_tokens=7)[0]
    assert {s.query_width for s in (trace.prefill, *trace.steps)} == {3 + 8}
    assert len(trace.token_ids) == 7


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"block_len": 1}, "block_len is 1"),
        ({"gen_length": 2.5}, "2.5"),
        ({"gen_length": 10, "block_len": 4}, "10 is no multiple of block_len 4"),
        ({"cache": "triple", "block_len": 4}, "'triple'.*none, prefix, dual"),
        ({"cache": "dual"}, "give block_len"),
        ({"convention": "gpt"}, "'gpt'.*llada, dream"),
        ({"order": "luck", "rule": "one"}, "'luck'"),
        ({"order": "entropy"}, "no probability"),
        ({"rule": "steps", "steps": 5, "block_len": 4}, "5 for blocks of 4"),
        ({"rule": "one", "steps": 5}, "no effect"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_impossible_parameters_are_refused(params: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        build(tiny.random_tiny("llama"), **params)


def test_impossible_requests_are_refused() -> None:
    model = tiny.random_tiny("llama")
    with pytest.raises(UserError, match="gen_length is 8 but 9"):
        generate(build(model, gen_length=8), [[1]], max_new_tokens=9)
    with pytest.raises(UserError, match="20 for blocks of 9"):
        generate(build(model, rule="steps", steps=20), [[1]], max_new_tokens=9)
    with pytest.raises(UserError, match="temperature 0.7 is refused"):
        sampling = Sampling(temperature=0.7, mode="reject")
        generate(build(model), [[1]], max_new_tokens=2, sampling=sampling)
