"""`tidar_two_forward` commits what dense `tidar` commits, step by step, in twice the forwards."""

from __future__ import annotations

from collections import Counter

import pytest
import test_sampling
import test_tidar
import tiny
import torch

from baselines import tidar_two_forward
from tidar_ref.decoding import generate
from tidar_ref.errors import UserError

BLOCKS = (2, 4, 8, 16)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(model: tiny.Tiny, block_len: int) -> tidar_two_forward.TwoForwardDecoder:
    return tidar_two_forward.build(model.model, mask_token_id=tiny.MASK, block_len=block_len)


@pytest.mark.parametrize("block_len", BLOCKS)
def test_equals_dumb_greedy(block_len: int) -> None:
    """Token for token in float32, one by one and in a ragged batch."""
    seen: Counter[int] = Counter()
    for index, model in enumerate(test_tidar.models()):
        prompts = tiny.prompts(6, seed=index)
        expected = [tuple(model.greedy(prompt, 24)) for prompt in prompts]
        decoder = build(model, block_len)
        alone = [generate(decoder, [p], max_new_tokens=24)[0] for p in prompts]
        assert [t.token_ids for t in alone] == expected
        batch = generate(decoder, prompts, max_new_tokens=24)
        assert [t.token_ids for t in batch] == expected
        for trace in alone:
            seen.update(len(step.committed[0]) for step in trace.steps)
    assert seen[1] and seen[block_len], f"hollow proof, committed counts were {dict(seen)}"


@pytest.mark.parametrize("block_len", BLOCKS)
def test_each_step_commits_what_the_dense_step_commits(block_len: int) -> None:
    """The masks behind the accepted prefix see what block r sees, so the drafts are the same."""
    for index, model in enumerate(test_tidar.models()):
        for prompt in tiny.prompts(2, seed=30 + index):
            dense = generate(test_tidar.build(model, block_len), [prompt], max_new_tokens=24)[0]
            twice = generate(build(model, block_len), [prompt], max_new_tokens=24)[0]
            for name in ("committed", "drafted", "accepted", "kv_len"):
                assert [getattr(s, name) for s in twice.steps] == [
                    getattr(s, name) for s in dense.steps
                ]


def test_two_forwards_of_width_k() -> None:
    model, widths = tiny.trained_tiny(), []
    handle = model.model.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    try:
        trace = generate(build(model, 4), [[1, 2, 1, 2]], max_new_tokens=20)[0]
    finally:
        handle.remove()
    assert widths == [4 + 4] + [4, 4] * len(trace.steps)
    assert all(s.target_forwards == 2 and s.query_width == 8 for s in trace.steps)


@pytest.mark.parametrize("block_len", [2, 4, 16])
def test_cache_is_exact_after_every_step(block_len: int) -> None:
    for model in test_tidar.models()[:2]:
        prompts = tiny.prompts(3, seed=80)
        assert test_tidar.cache_error(build(model, block_len), model, prompts) < 1e-5


def test_the_cache_check_sees_kept_rejections(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = test_tidar.KVCache.advance

    def keep_all(cache: test_tidar.KVCache, counts: list[int]) -> None:
        advance(cache, [4 if 0 < n < 4 else n for n in counts])

    monkeypatch.setattr(test_tidar.KVCache, "advance", keep_all)
    model, prompts = tiny.trained_tiny(), tiny.prompts(3, seed=80)[2:]
    assert test_tidar.cache_error(build(model, 4), model, prompts, count=4) == float("inf")


def test_masks_that_do_not_see_each_other_are_noticed() -> None:
    """Wrong on purpose: a causal draft pattern. The text stays AR's, the drafts do not."""
    model, prompts = tiny.trained_tiny(), tiny.prompts(6, seed=30)
    decoder = build(model, 8)
    right = generate(decoder, prompts, max_new_tokens=24)
    decoder.draft_mask = decoder.verify_mask
    wrong = generate(decoder, prompts, max_new_tokens=24)
    assert [t.token_ids for t in wrong] == [t.token_ids for t in right]
    assert [len(t.steps) for t in wrong] != [len(t.steps) for t in right]


@pytest.mark.parametrize("mode", ["match", "reject"])
def test_draws_are_ar_s(mode: str) -> None:
    decoder = tidar_two_forward.build(
        test_sampling.model().model, mask_token_id=test_sampling.MASK, block_len=3
    )
    observed = test_sampling.counts(decoder, mode, draws=test_sampling.FEWER_DRAWS)
    assert test_sampling.p_value(observed) > test_sampling.EQUAL


@pytest.mark.parametrize("params", [{"block_len": 17}, {"beta": 1.0}, {"outcomes": "1"}])
def test_impossible_parameters_are_refused(params: dict) -> None:
    with pytest.raises(UserError, match=next(iter(params))):
        tidar_two_forward.build(tiny.random_tiny("llama").model, mask_token_id=tiny.MASK, **params)
