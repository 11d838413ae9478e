"""`tidar` with chosen outcomes: greedy AR's tokens, the stated fallback step by step, exact draws.

The oracle states the rules in its own words: the drafted outcomes are found from the top down, and
the block that serves an outcome is looked up by position instead of by index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import oracles
import pytest
import test_sampling
import tiny
import torch

from bench.profiles import parse_decoders
from bench.registry import build_decoder
from tidar_ref import masks, tidar
from tidar_ref.decoding import GenerationTrace, generate
from tidar_ref.errors import UserError
from tidar_ref.outcomes import layout, next_draft, parse_outcomes
from tidar_ref.sampling import Sampling

SUBSETS = {
    2: ("1", "2"),
    4: ("1", "2", "4", "1-3", "2-4", "1-4"),
    8: ("1", "5", "8", "1-4-8", "3-6", "1-2-3-4"),
    16: ("1-4-8-16", "9"),
}
CASES = [(k, chosen) for k, some in SUBSETS.items() for chosen in some]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(model: tiny.Tiny, block_len: int, outcomes: str | int | None) -> tidar.TidarDecoder:
    return tidar.build(model.model, mask_token_id=tiny.MASK, block_len=block_len, outcomes=outcomes)


def models() -> list[tiny.Tiny]:
    return [tiny.trained_tiny(), *(tiny.random_tiny(family) for family in tiny.FAMILIES)]


# --- the rules as integers ---------------------------------------------------------------------


def drafted_beside(outcomes: Sequence[int], length: int) -> list[int]:
    """The oracle's layout: from the largest down, each at most one below the one before."""
    found, cap = [], length
    for j in sorted(outcomes, reverse=True):
        found.append(max(1, min(j, cap)))
        cap = found[-1] - 1
    return sorted(found)


@pytest.mark.parametrize("block_len", [2, 5, 8])
def test_layout_and_fallback_over_all_subsets(block_len: int) -> None:
    for size in range(1, block_len + 1):
        for outcomes in combinations(range(1, block_len + 1), size):
            assert layout(outcomes, block_len) == outcomes
            for length in range(1, block_len + 1):
                drafted = layout(outcomes, length)
                assert list(drafted) == drafted_beside(outcomes, length)
                assert max(drafted) <= length
                assert length > outcomes[-1] or length in drafted
                assert len(set(drafted)) == min(size, length) or length > outcomes[-1]
                for r in range(1, length + 1):
                    index, following = next_draft(drafted, r, block_len)
                    smaller = [j for j in drafted if j <= r]
                    if smaller:
                        assert drafted[index] == max(smaller)
                        assert drafted[index] + block_len == r + following
                    else:
                        assert following == 1


@pytest.mark.parametrize(
    "text", ["", "0", "9", "1-9", "4-1", "1-1", "1-", "-1", "1--2", "a", "1.5", "²", 0, 1.5]
)
def test_impossible_outcomes_are_refused(text: str | int) -> None:
    with pytest.raises(UserError, match="outcomes"):
        parse_outcomes(text, 8)
    with pytest.raises(UserError, match="outcomes"):
        build(tiny.random_tiny("llama"), 8, text)


def test_chosen_outcomes_need_beta_one() -> None:
    """And the whole set, written out, does not: it is the dense layout."""
    model = tiny.random_tiny("llama").model
    with pytest.raises(UserError, match="beta=1"):
        tidar.build(model, mask_token_id=tiny.MASK, block_len=4, beta=0.5, outcomes="1-4")
    tidar.build(model, mask_token_id=tiny.MASK, block_len=4, beta=0.5, outcomes="1-2-3-4")


def test_the_command_line_s_form() -> None:
    """The label is what was typed; only `outcomes` may be text."""
    model = tiny.random_tiny("llama").model
    [spec] = parse_decoders(["tidar:block_len=8,outcomes=1-4-8"])
    assert spec.label == "tidar:block_len=8,outcomes=1-4-8"
    decoder = build_decoder(spec, model, mask_token_id=tiny.MASK)
    assert decoder.outcomes == (1, 4, 8) and decoder.params["outcomes"] == "1-4-8"
    [spec] = parse_decoders(["tidar:block_len=8,outcomes=4"])
    assert build_decoder(spec, model, mask_token_id=tiny.MASK).outcomes == (4,)
    [spec] = parse_decoders(["tidar:block_len=four"])
    with pytest.raises(UserError, match="block_len='four' is not a number"):
        build_decoder(spec, model, mask_token_id=tiny.MASK)


# --- the pattern -------------------------------------------------------------------------------


def rows_of(block_len: int, drafted: Sequence[int]) -> list[tuple]:
    rows: list[tuple] = [("draft", i) for i in range(block_len)]
    return rows + [("mask", j, m) for j in drafted for m in range(block_len)]


@pytest.mark.parametrize(("block_len", "chosen"), CASES)
def test_mask_and_positions_every_cell(block_len: int, chosen: str) -> None:
    outcomes = parse_outcomes(chosen, block_len)
    rows = rows_of(block_len, outcomes)
    expected = [[oracles.may_attend(query, key) for key in rows] for query in rows]
    assert masks.outcome_mask(block_len, outcomes).tolist() == expected
    positions = masks.outcome_positions(block_len, outcomes) + 5
    assert positions.tolist() == [oracles.row_position(row, 5) for row in rows]


# --- greedy AR, token for token ----------------------------------------------------------------


@pytest.mark.parametrize(("block_len", "chosen"), CASES)
def test_every_subset_equals_dumb_greedy(block_len: int, chosen: str) -> None:
    """Alone and in a ragged batch, where drafts of different length share a forward."""
    seen: Counter[int] = Counter()
    for index, model in enumerate(models()):
        prompts = tiny.prompts(4, seed=index)
        expected = [tuple(model.greedy(prompt, 24)) for prompt in prompts]
        decoder = build(model, block_len, chosen)
        alone = [generate(decoder, [p], max_new_tokens=24)[0] for p in prompts]
        assert [t.token_ids for t in alone] == expected
        batch = generate(decoder, prompts, max_new_tokens=24)
        assert [t.token_ids for t in batch] == expected
        for trace, same in zip(alone, batch, strict=True):
            assert [s.committed for s in trace.steps] == [s.committed for s in same.steps]
            assert [s.drafted for s in trace.steps] == [s.drafted for s in same.steps]
            seen.update(len(step.committed[0]) for step in trace.steps)
    assert seen[1] and max(seen) > 1, f"hollow proof, committed counts were {dict(seen)}"


# --- the fallback, step by step ----------------------------------------------------------------


def oracle_steps(
    model: tiny.Tiny, prompt: list[int], count: int, block_len: int, outcomes: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """(tokens committed by prefill and steps, tokens drafted for each step)."""
    draft = oracles.tidar_prefill(model.state, model.config, prompt, block_len, 1.0, tiny.MASK)
    committed, lengths, prefix = [(draft[0],)], [], list(prompt)
    while sum(map(len, committed)) < count:
        drafted = sorted(set(drafted_beside(outcomes, len(draft))))
        rows = [("prefix", p) for p in range(len(prefix))]
        rows += [("draft", i) for i in range(len(draft))]
        rows += [("mask", j, m) for j in drafted for m in range(block_len)]
        ids = prefix + draft + [tiny.MASK] * (block_len * len(drafted))
        allowed = torch.tensor([[oracles.may_attend(q, k) for k in rows] for q in rows])
        positions = [oracles.row_position(row, len(prefix)) for row in rows]
        logits, _ = oracles.forward(model.state, model.config, ids, positions, allowed)
        at = {row: logits[index] for index, row in enumerate(rows)}
        r = 1
        while r < len(draft) and draft[r] == int(at["draft", r - 1].argmax()):
            r += 1
        following = int(at["draft", r - 1].argmax())
        lengths.append(len(draft) - 1)
        committed.append((*draft[1:r], following))
        prefix += draft[:r]
        serving = max((j for j in drafted if j <= r), default=None)
        draft = [following]
        if serving is not None:  # every slot that guesses a token behind P + r
            draft += [
                int(oracles.ban(at["mask", serving, m], tiny.MASK).argmax())
                for m in range(block_len)
                if serving + m > r
            ]
    return committed, lengths


@pytest.mark.parametrize(("block_len", "chosen"), CASES)
def test_every_step_equals_the_dense_rewriting(block_len: int, chosen: str) -> None:
    outcomes = parse_outcomes(chosen, block_len)
    short = 0
    for index, model in enumerate(models()[:3]):
        decoder = build(model, block_len, chosen)
        for prompt in tiny.prompts(3, seed=60 + index):
            count = 16 if block_len < 16 else 8
            expected, lengths = oracle_steps(model, prompt, count, block_len, outcomes)
            trace = generate(decoder, [prompt], max_new_tokens=count)[0]
            got = [trace.prefill.committed[0], *(step.committed[0] for step in trace.steps)]
            assert got == expected
            assert [step.drafted[0] for step in trace.steps] == lengths
            assert {s.query_width for s in trace.steps} == {block_len * (1 + len(outcomes))}
            short += sum(length < block_len - 1 for length in lengths)
    assert short, "no outcome was ever missing: hollow proof"


@pytest.mark.parametrize("block_len", [4, 8])
def test_all_outcomes_written_out_are_the_dense_layout(block_len: int) -> None:
    every = "-".join(map(str, range(1, block_len + 1)))
    for model in models():
        prompts = tiny.prompts(4, seed=5)
        dense, written = (
            generate(build(model, block_len, o), prompts, max_new_tokens=20) for o in (None, every)
        )
        assert [t.steps for t in dense] == [t.steps for t in written]


def tokens_per_forward(traces: Sequence[GenerationTrace]) -> float:
    steps = [step for trace in traces for step in trace.steps]
    return sum(len(step.committed[0]) for step in steps) / len(steps)


@pytest.mark.parametrize("chosen", ["1-4-8", "4-8", "2-8", "8"])
def test_the_fallback_beats_starting_from_scratch(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the tail of a smaller outcome's block is used: more tokens a forward, the same text."""
    model, prompts = tiny.trained_tiny(), tiny.prompts(12, seed=7)
    kept = generate(build(model, 8, chosen), prompts, max_new_tokens=40)

    def from_scratch(drafted: tuple[int, ...], r: int, block_len: int) -> tuple[int, int]:
        return (drafted.index(r), block_len) if r in drafted else (0, 1)

    monkeypatch.setattr(tidar, "next_draft", from_scratch)
    dropped = generate(build(model, 8, chosen), prompts, max_new_tokens=40)
    assert [t.token_ids for t in kept] == [t.token_ids for t in dropped]
    assert tokens_per_forward(kept) >= tokens_per_forward(dropped)


def test_a_padding_token_is_never_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where AR would choose the mask token itself; without the limit the ledger is wrong."""
    state = {name: value.clone() for name, value in tiny.random_tiny("llama").state.items()}
    state["lm_head.weight"][tiny.MASK] *= 30  # the mask token is AR's choice half the time
    model = tiny.Tiny(tiny.random_tiny("llama").config, state)
    prompts = tiny.prompts(6, seed=3)
    expected = [tuple(model.greedy(prompt, 24)) for prompt in prompts]
    assert tiny.MASK in {token for text in expected for token in text}

    def run() -> list[GenerationTrace]:
        return generate(build(model, 4, "3"), prompts, max_new_tokens=24)

    assert [t.token_ids for t in run()] == expected
    assert all(s.accepted[0] <= s.drafted[0] for t in run() for s in t.steps)
    matches = tidar.leading_matches

    class Unlimited(torch.Tensor):
        def minimum(self, _: torch.Tensor) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(tidar, "leading_matches", lambda *a: matches(*a).as_subclass(Unlimited))
    broken = run()
    assert any(s.accepted[0] > s.drafted[0] for t in broken for s in t.steps)


# --- sampling ----------------------------------------------------------------------------------


@cache
def counted(block_len: int, chosen: str, mode: str) -> torch.Tensor:
    decoder = tidar.build(
        test_sampling.model().model,
        mask_token_id=test_sampling.MASK,
        block_len=block_len,
        outcomes=chosen,
    )
    return test_sampling.counts(decoder, mode, draws=test_sampling.FEWER_DRAWS)


@pytest.mark.parametrize("mode", ["match", "reject"])
@pytest.mark.parametrize(("block_len", "chosen"), [(4, "2"), (3, "1-3")])
def test_draws_are_ar_s(block_len: int, chosen: str, mode: str) -> None:
    assert test_sampling.p_value(counted(block_len, chosen, mode)) > test_sampling.EQUAL


def test_short_drafts_occur_while_sampling() -> None:
    for mode in ("match", "reject"):
        sampling = Sampling(temperature=test_sampling.TEMPERATURE, mode=mode)
        decoder = tidar.build(
            test_sampling.model().model, mask_token_id=test_sampling.MASK, block_len=4, outcomes="2"
        )
        traces = generate(
            decoder, [test_sampling.PROMPT] * 200, max_new_tokens=3, sampling=sampling
        )
        runs = {(s.drafted[0], len(s.committed[0])) for t in traces for s in t.steps}
        assert {length for length, _ in runs} >= {0, 3}
        assert all(1 <= count <= length + 1 for length, count in runs)


def test_redrawing_padding_as_if_drafted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: the limit of short drafts is forgotten in mode "reject"."""
    verify = tidar.verify_draft

    def forgetful(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        draft, rest = args[0], args[1:-1]
        return verify(draft, *rest, torch.full((draft.shape[0],), draft.shape[1]))

    monkeypatch.setattr(tidar, "verify_draft", forgetful)
    counted.cache_clear()
    assert test_sampling.p_value(counted(4, "2", "reject")) < test_sampling.DIFFERENT
    counted.cache_clear()
