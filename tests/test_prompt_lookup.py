"""`prompt_lookup` against a brute-force search, greedy AR, and the exact distribution."""

from __future__ import annotations

from functools import cache

import oracles
import pytest
import test_sampling
import test_tidar
import tiny
import torch

from baselines import autoregressive, prompt_lookup
from tidar_ref.decoding import generate
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

LOOPING = [2, 5, 2, 5, 2]  # something to look up from the first step on


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def search(text: list[int], count: int, max_ngram: int) -> list[int]:
    """Longest n first, then the latest earlier occurrence; the copy grows as it is read."""
    for n in range(max_ngram, 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if n <= len(text) and text[start : start + n] == text[-n:]:
                grown = list(text)
                for i in range(count):
                    grown.append(grown[start + n + i])
                return grown[len(text) :]
    return []


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5])
def test_the_index_equals_a_search(max_ngram: int) -> None:
    generator = torch.Generator().manual_seed(max_ngram)
    found = 0
    for vocab in (1, 2, 4, 30):
        text = torch.randint(0, vocab, (60,), generator=generator).tolist()
        index = prompt_lookup.NgramIndex(max_ngram, [])
        assert index.draft(3) == []
        for end, token in enumerate(text, start=1):
            index.extend([token])
            draft = index.draft(7)
            assert draft == search(text[:end], 7, max_ngram)
            found += bool(draft)
    assert 100 < found < 240


def test_a_loop_is_drafted_whole() -> None:
    assert prompt_lookup.NgramIndex(3, [9, 1, 2, 3, 1, 2, 3]).draft(5) == [1, 2, 3, 1, 2]
    assert prompt_lookup.NgramIndex(3, [1, 2, 8, 1, 2, 9, 4, 1, 2]).draft(3) == [9, 4, 1]
    assert prompt_lookup.NgramIndex(3, [1, 2, 3]).draft(3) == []


@pytest.mark.parametrize(("draft_len", "max_ngram"), [(1, 1), (3, 2), (10, 3), (32, 8)])
def test_equals_dumb_greedy(draft_len: int, max_ngram: int) -> None:
    """Token for token in float32, alone and in a ragged batch; the drafts are the search's."""
    accepted = rejected = 0
    for index, model in enumerate(test_tidar.models()):
        prompts = tiny.prompts(6, seed=index)
        expected = [tuple(model.greedy(prompt, 24)) for prompt in prompts]
        decoder = prompt_lookup.build(model.model, draft_len=draft_len, max_ngram=max_ngram)
        alone = [generate(decoder, [p], max_new_tokens=24)[0] for p in prompts]
        assert [t.token_ids for t in alone] == expected
        batch = generate(decoder, prompts, max_new_tokens=24)
        assert [t.token_ids for t in batch] == expected
        for prompt, trace in zip(prompts, alone, strict=True):
            text = [*prompt, *trace.prefill.committed[0]]
            for step in trace.steps:
                draft = search(text, draft_len, max_ngram)
                assert step.drafted[0] == len(draft) and step.query_width == 1 + len(draft)
                assert draft[: step.accepted[0]] == list(step.committed[0][:-1])
                accepted += step.accepted[0]
                rejected += step.drafted[0] > step.accepted[0]
                text += step.committed[0]
    assert accepted and rejected


def test_cache_is_exact_after_every_step() -> None:
    for model in test_tidar.models()[:2]:
        decoder = prompt_lookup.build(model.model, draft_len=5)
        assert test_tidar.cache_error(decoder, model, tiny.prompts(3, seed=80)) < 1e-5


def test_prompts_that_fill_the_positions() -> None:
    model = tiny.random_tiny("qwen3")
    prompt = (LOOPING * 120)[: model.config.max_position - 6]
    decoder = prompt_lookup.build(model.model, draft_len=32)
    got, want = (
        generate(d, [prompt, prompt[:-1]], max_new_tokens=6)
        for d in (decoder, autoregressive.build(model.model))
    )
    assert [t.token_ids for t in got] == [t.token_ids for t in want]


# --- sampling ----------------------------------------------------------------------------------


@cache
def exact() -> torch.Tensor:
    model = test_sampling.model()

    def logits_after(contexts: torch.Tensor) -> torch.Tensor:
        return oracles.causal_logits(model.state, model.config, contexts)[:, -1]

    return oracles.exact_joint(
        logits_after, test_sampling.VOCAB, LOOPING, 3, test_sampling.TEMPERATURE
    )


def p_value(mode: str, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(test_sampling, "PROMPT", LOOPING)
    decoder = prompt_lookup.build(test_sampling.model().model, draft_len=3)
    observed = test_sampling.counts(decoder, mode, draws=test_sampling.FEWER_DRAWS)
    return oracles.chi_square_p(observed, exact() * observed.sum())


@pytest.mark.parametrize("mode", ["match", "reject"])
def test_draws_are_ar_s(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert p_value(mode, monkeypatch) > test_sampling.EQUAL
    decoder = prompt_lookup.build(test_sampling.model().model, draft_len=3)
    sampling = Sampling(temperature=test_sampling.TEMPERATURE, mode=mode)
    traces = generate(decoder, [LOOPING] * 200, max_new_tokens=3, sampling=sampling)
    runs = {(s.drafted[0], s.accepted[0]) for t in traces for s in t.steps}
    assert {(0, 0), (3, 0), (3, 1), (3, 2)} <= runs


def test_a_draft_taken_for_drawn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: p/q with a uniform q, as if the copy had been drawn from it."""
    certain = prompt_lookup.PromptLookupDecoder._certain

    def uniform(self: object, ids: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        return torch.full_like(certain(self, ids, sampling), 1 / test_sampling.VOCAB)

    monkeypatch.setattr(prompt_lookup.PromptLookupDecoder, "_certain", uniform)
    assert p_value("reject", monkeypatch) < test_sampling.DIFFERENT


@pytest.mark.parametrize(
    "params",
    [{"draft_len": 0}, {"draft_len": 33}, {"draft_len": 2.5}, {"max_ngram": 0}, {"beta": 1.0}],
)
def test_impossible_parameters_are_refused(params: dict) -> None:
    with pytest.raises(UserError, match=next(iter(params))):
        prompt_lookup.build(tiny.random_tiny("llama").model, **params)
