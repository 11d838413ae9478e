"""The sampling modes draw from exactly the right distribution, and these tests could tell if not.

The exact joint distribution of the first tokens is enumerated with the dumb forward. For any beta
the verification logits depend on the committed tokens alone (block j sees nothing else), so the
mixture has a closed form too, and beta = 1 is plain AR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import oracles
import pytest
import tiny
import torch
from torch import Tensor

from baselines import autoregressive
from tidar_ref import tidar
from tidar_ref.decoding import Decoder, generate
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling, leading_matches, reject

VOCAB, MASK, PROMPT, TOKENS = 8, 7, [2, 5], 3
TEMPERATURE = 0.8
DRAWS, FEWER_DRAWS, BATCH = 20_000, 6_000, 2_000
EQUAL, DIFFERENT = 1e-3, 1e-9  # p-values; the seeds are fixed, so neither is a matter of luck


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def model() -> tiny.Tiny:
    """Distributions neither flat nor peaked; drafts right at times, wrong at times."""
    config = replace(
        oracles.tiny_config("llama", vocab=VOCAB, layers=1),
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
    )
    state = oracles.random_state(config, seed=11, std=0.28)
    return tiny.Tiny(config, state)


@cache
def exact(beta: float, block_len: int) -> Tensor:
    def logits_after(contexts: Tensor) -> Tensor:
        return oracles.next_token_logits(
            model().state, model().config, contexts, block_len, beta, MASK
        )

    return oracles.exact_joint(logits_after, VOCAB, PROMPT, TOKENS, TEMPERATURE)


def counts(decoder: Decoder, mode: str, seed: int = 0, draws: int = DRAWS) -> Tensor:
    """How often each continuation of TOKENS tokens came out, [V] * TOKENS."""
    total = torch.zeros(VOCAB**TOKENS, dtype=torch.long)
    digits = VOCAB ** torch.arange(TOKENS - 1, -1, -1)
    for start in range(0, draws, BATCH):  # small batches stay in the processor's cache
        sampling = Sampling(temperature=TEMPERATURE, mode=mode, seed=seed * 1_000_000 + start)
        prompts = [PROMPT] * min(BATCH, draws - start)
        traces = generate(decoder, prompts, max_new_tokens=TOKENS, sampling=sampling)
        drawn = torch.tensor([trace.token_ids for trace in traces])
        total += torch.bincount((drawn * digits).sum(1), minlength=VOCAB**TOKENS)
    return total.reshape([VOCAB] * TOKENS)


def build(block_len: int, beta: float = 1.0) -> Decoder:
    return tidar.build(model().model, mask_token_id=MASK, block_len=block_len, beta=beta)


def p_value(observed: Tensor, beta: float = 1.0, block_len: int = 2) -> float:
    return oracles.chi_square_p(observed, exact(beta, block_len) * observed.sum())


def test_chi_square_itself() -> None:
    """Known value (statistic 4, 3 degrees of freedom), and sums of the enumeration."""
    observed, expected = torch.tensor([60, 40, 50, 50]), torch.tensor([50.0, 50, 50, 50])
    assert oracles.chi_square_p(observed, expected) == pytest.approx(0.2614641, abs=1e-6)
    assert float(exact(1.0, 2).sum()) == pytest.approx(1.0)
    assert exact(1.0, 2).sum((0, 1)).max() < 0.7  # something to get wrong
    assert torch.allclose(exact(1.0, 2), exact(1.0, 4))
    assert not torch.allclose(exact(1.0, 2), exact(0.5, 2), atol=0.01)


def test_ar_draws_from_the_softmax() -> None:
    decoder = autoregressive.build(model().model)
    assert p_value(counts(decoder, "match")) > EQUAL
    assert p_value(counts(decoder, "reject", draws=FEWER_DRAWS)) > EQUAL


@pytest.mark.parametrize(
    ("beta", "mode", "block_len"),
    [
        (1.0, "match", 2),
        (1.0, "match", 4),
        (1.0, "reject", 2),
        (1.0, "reject", 4),
        (0.5, "match", 4),
        (0.5, "reject", 2),
        (0.0, "match", 2),
        (0.0, "reject", 4),
    ],
)
def test_tidar_draws_from_the_mixture(beta: float, mode: str, block_len: int) -> None:
    draws = DRAWS if beta == 1 else FEWER_DRAWS
    observed = counts(build(block_len, beta), mode, draws=draws)
    assert p_value(observed, beta, block_len) > EQUAL


def test_both_outcomes_of_a_draft_occur() -> None:
    """Otherwise the distribution tests would only exercise one branch."""
    for mode in ("match", "reject"):
        sampling = Sampling(temperature=TEMPERATURE, mode=mode)
        traces = generate(build(4), [PROMPT] * 500, max_new_tokens=8, sampling=sampling)
        runs = {len(step.committed[0]) for trace in traces for step in trace.steps}
        assert runs == {1, 2, 3, 4}


def no_residual(
    draft: Tensor, p: Tensor, q: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: after a rejection the next token is drawn from p, not from (p - q)+."""
    r, _ = reject(draft, p, q, generator)
    at = (r - 1)[:, None, None].expand(-1, 1, p.shape[-1])
    return r, torch.multinomial(p.gather(1, at)[:, 0], 1, generator=generator)[:, 0]


def accept_all(
    draft: Tensor, p: Tensor, q: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: every draft is taken."""
    last = torch.multinomial(p[:, -1], 1, generator=generator)[:, 0]
    return torch.full((draft.shape[0],), draft.shape[1]), last


def wrong_q(
    draft: Tensor, p: Tensor, q: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: accept as if the drafts had been drawn uniformly."""
    return reject(draft, p, torch.full_like(q, 1 / VOCAB), generator)


@pytest.mark.parametrize("wrong", [no_residual, accept_all, wrong_q])
@pytest.mark.parametrize("block_len", [2, 4])
def test_wrong_rejection_is_noticed(
    wrong: Callable, block_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidar, "reject", wrong)
    assert p_value(counts(build(block_len), "reject", draws=FEWER_DRAWS)) < DIFFERENT


def all_match(draft: Tensor, verified: Tensor) -> Tensor:
    """Wrong on purpose: every draft is taken."""
    return torch.full((draft.shape[0],), draft.shape[1])


def match_one_too_many(draft: Tensor, verified: Tensor) -> Tensor:
    """Wrong on purpose: the first mismatch is kept as well."""
    return (leading_matches(draft, verified) + 1).clamp_max(draft.shape[1])


@pytest.mark.parametrize("wrong", [all_match, match_one_too_many])
@pytest.mark.parametrize("block_len", [2, 4])
def test_wrong_matching_is_noticed(
    wrong: Callable, block_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidar, "leading_matches", wrong)
    assert p_value(counts(build(block_len), "match", draws=FEWER_DRAWS)) < DIFFERENT


def test_redrawing_after_a_mismatch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: draw v_r again unless it is the likeliest token."""
    choose = tidar.choose

    def keep_draft_likely(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        first, second = (choose(logits, sampling, generator) for _ in range(2))
        likely = logits.argmax(-1)
        return torch.where(first == likely, first, second)

    monkeypatch.setattr(tidar, "choose", keep_draft_likely)
    assert p_value(counts(build(2), "match", draws=FEWER_DRAWS)) < DIFFERENT


def test_seed_fixes_the_draws() -> None:
    for mode in ("match", "reject"):
        first, again, other = (counts(build(4), mode, seed, 200) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("mode", ["match", "reject"])
def test_cold_sampling_is_greedy(mode: str) -> None:
    expected = tuple(model().greedy(PROMPT, 12))
    sampling = Sampling(temperature=1e-4, mode=mode)
    for decoder in (build(2), build(4), autoregressive.build(model().model)):
        trace = generate(decoder, [PROMPT], max_new_tokens=12, sampling=sampling)[0]
        assert trace.token_ids == expected


@pytest.mark.parametrize(
    ("temperature", "mode"), [(0.0, "match"), (1.0, "greedy"), (-1.0, "reject"), (1.0, "nucleus")]
)
def test_impossible_sampling_is_refused(temperature: float, mode: str) -> None:
    with pytest.raises(UserError):
        Sampling(temperature=temperature, mode=mode)
