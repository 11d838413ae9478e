"""`block_diffusion` against a dense, cache-free rewriting of its rule, forward by forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import oracles
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import block_diffusion
from baselines._denoise import Block
from tidar_ref.decoding import State, StepTrace, generate
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling
from tidar_ref.training.rows import Example, Objective, build_rows, visible

K = 4  # block length of the trained tiny model
RULES: list[dict[str, Any]] = [
    {"rule": "one"},
    {"rule": "threshold", "threshold": 0.5},
    {"rule": "threshold", "threshold": 0.95},
    {"rule": "steps", "steps": 3},
    {"rule": "steps", "steps": 1},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def trained() -> tiny.Tiny:
    """Block diffusion learned with the recipe's rows on sequences of period 1 and 2."""
    config = oracles.tiny_config("qwen3", vocab=16)
    state = {k: v.requires_grad_() for k, v in oracles.random_state(config, 1, std=0.15).items()}
    optimiser = torch.optim.Adam(state.values(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    objective = Objective(kind="block_diffusion", block_lens=(K,), random_offset=False)
    for step in range(120):
        packs = []
        for index in range(12):
            motif = torch.randint(0, tiny.MASK, (2,), generator=generator)
            text = motif[torch.arange(10) % (1 + index % 2)].tolist()
            example = Example(prompt=tuple(text[:2]), response=tuple(text[2:]))
            packs.append(
                build_rows([example], objective, mask_token_id=tiny.MASK, seeds=[12 * step + index])
            )
        ids, labels = (torch.stack([getattr(p, n) for p in packs]) for n in ("ids", "labels"))
        logits, _ = oracles.forward(
            state, config, ids, packs[0].positions, visible(packs[0]), dtype=torch.float32
        )
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return tiny.Tiny(config, {name: value.detach() for name, value in state.items()})


def models() -> list[tiny.Tiny]:
    return [trained(), tiny.random_tiny("llama"), tiny.random_tiny("qwen2")]


def build(model: tiny.Tiny, **params: Any) -> block_diffusion.BlockDiffusionDecoder:
    return block_diffusion.build(model.model, mask_token_id=tiny.MASK, **params)


# --- the rule once more, dense and slow ----------------------------------------------------------


def pattern(prompt: int, total: int, k: int) -> Tensor:
    """Who sees whom: the prompt is causal, a later position sees up to its block's end."""

    def limit(query: int) -> int:
        return query + 1 if query < prompt else prompt + ((query - prompt) // k + 1) * k

    return torch.tensor([[key < limit(query) for key in range(total)] for query in range(total)])


def unmasked(sure: dict[int, float], params: dict[str, Any], forward: int, k: int) -> set[int]:
    """Positions that become tokens, given the probability of each masked position's best token."""
    best = max(sure, key=lambda i: sure[i])
    if params["rule"] == "one":
        return {best}
    if params["rule"] == "threshold":
        return {i for i in sure if sure[i] >= params["threshold"]} | {best}
    portions = [0] * params["steps"]
    for token in range(k):
        portions[token % params["steps"]] += 1
    return set(sorted(sure, key=lambda i: -sure[i])[: portions[forward]])


def proposals(logits: Tensor, block: Sequence[int | None]) -> dict[int, tuple[int, float]]:
    """(token, probability) of each masked position from the block's logits [K, V]."""
    probs = oracles.ban(logits, tiny.MASK).softmax(-1)
    return {
        i: (int(probs[i].argmax()), float(probs[i].max()))
        for i, token in enumerate(block)
        if token is None
    }


def leading(block: Sequence[int | None]) -> int:
    return next((i for i, token in enumerate(block) if token is None), len(block))


def dense(
    model: tiny.Tiny, prompt: list[int], k: int, params: dict[str, Any]
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(tokens made final, query width, prefix length) of each forward, without end."""
    text, width, prefix = list(prompt), len(prompt) + k, 0
    while True:
        block: list[int | None] = [None] * k
        forward = 0
        while None in block:
            ids = text + [tiny.MASK if token is None else token for token in block]
            allowed = pattern(len(prompt), len(ids), k)
            logits, _ = oracles.forward(model.state, model.config, ids, range(len(ids)), allowed)
            found = proposals(logits[-k:], block)
            before = leading(block)
            for i in unmasked({i: p for i, (_, p) in found.items()}, params, forward, k):
                block[i] = found[i][0]
            forward += 1
            yield tuple(block[before : leading(block)]), width, prefix
            width, prefix = k, len(text)
        yield (), k, len(text)
        text += block
        prefix = len(text)


def expected(
    model: tiny.Tiny, prompt: list[int], k: int, params: dict[str, Any], count: int
) -> list[tuple[tuple[int, ...], int, int]]:
    """The forwards until `count` tokens are final."""
    out, done = [], 0
    for forward in dense(model, prompt, k, params):
        out.append(forward)
        done += len(forward[0])
        if done >= count:
            return out
    raise AssertionError("unreachable")


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", RULES, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize("k", [K, 7])
def test_equals_the_dense_rule_forward_by_forward(k: int, params: dict[str, Any]) -> None:
    """Tokens, widths and prefix lengths alone; the same tokens in a ragged batch."""
    for index, model in enumerate(models()):
        prompts = tiny.prompts(2, seed=index)
        decoder = build(model, block_len=k, **params)
        batch = generate(decoder, prompts, max_new_tokens=11)
        for prompt, together in zip(prompts, batch, strict=True):
            trace = generate(decoder, [prompt], max_new_tokens=11)[0]
            ledger = (trace.prefill, *trace.steps)
            got = [(s.committed[0], s.query_width, s.kv_len[0]) for s in ledger]
            assert got == expected(model, prompt, k, params, 11)
            assert together.token_ids == trace.token_ids
            assert [s.committed for s in together.steps] == [s.committed for s in trace.steps]


def test_the_trained_model_is_sure_of_some_tokens_and_not_of_others() -> None:
    """Without this the equalities above would be hollow: forwards settle 0, 1 and more tokens."""
    decoder = build(trained(), block_len=K, rule="threshold", threshold=0.9)
    seen: Counter[int] = Counter()
    for prompt in tiny.prompts(9, seed=3):
        trace = generate(decoder, [prompt], max_new_tokens=24)[0]
        seen.update(len(step.committed[0]) for step in trace.steps if step.committed[0])
        assert len(set(trace.token_ids)) <= 3 or len(set(prompt)) > 2
    assert seen[1] and seen[K], dict(seen)


def test_one_and_everything_cost_what_they_must() -> None:
    """A forward a token and a forward a stored block; threshold 0: two forwards a block."""
    model, prompt = trained(), [3, 9, 3]
    for params, forwards in (({"rule": "one"}, K + 1), ({"threshold": 0.0}, 2)):
        decoder = build(model, block_len=K, **params)
        trace = generate(decoder, [prompt], max_new_tokens=4 * K)[0]
        # The prefill holds the first forward, and the last block is not stored.
        assert sum(s.target_forwards for s in trace.steps) == 4 * forwards - 2
        assert len(trace.token_ids) == trace.tokens_generated == 4 * K


def test_an_end_inside_a_block_ends_the_sequence_there() -> None:
    """Not at the block's end: later positions of the block need no tokens, nor a stored block."""
    model, prompt = tiny.random_tiny("llama"), [1, 2, 3]
    decoder = build(model, block_len=8, rule="one")
    full = generate(decoder, [prompt], max_new_tokens=24)[0]
    eos = full.token_ids[0]
    short = generate(decoder, [prompt], max_new_tokens=24, eos_ids=frozenset({eos}))[0]
    assert short.token_ids == (eos,) and short.finish == "eos"
    assert len(short.steps) < 8


# --- cache and training --------------------------------------------------------------------------


def test_the_cache_is_exact_between_blocks() -> None:
    """After every forward: the K/V of a fresh pass over the prompt and the clean blocks."""
    worst, checked = 0.0, 0
    for model in models():
        for prompt in tiny.prompts(2, seed=40):
            texts = list(prompt)

            def check(
                state: State, step: StepTrace, texts: list[int] = texts, model: Any = model,
                prompt: list[int] = prompt,
            ) -> None:  # fmt: skip
                nonlocal worst, checked
                texts += step.committed[0]
                length = state.cache.lengths[0]
                assert length <= len(texts) and (length - len(prompt)) % K == 0
                _, fresh = oracles.forward(
                    model.state, model.config, texts[:length], range(length),
                    pattern(len(prompt), length, K),
                )  # fmt: skip
                for layer, (k, v) in enumerate(fresh):
                    for held, want in ((state.cache.k, k), (state.cache.v, v)):
                        got = held[layer, 0, :, :length].transpose(0, 1).double()
                        worst = max(worst, float((got - want).abs().max()))
                checked += length > len(prompt)

            decoder = build(model, block_len=K, rule="threshold", threshold=0.6)
            prefill_tokens = generate(decoder, [prompt], max_new_tokens=1)[0].prefill.committed[0]
            texts += prefill_tokens
            generate(decoder, [prompt], max_new_tokens=14, on_step=check)
    assert worst < 1e-5 and checked > 20


def test_inference_sees_what_training_showed() -> None:
    """Logits of each noised block of a training row equal the decoder's on the cached prefix."""
    model = tiny.random_tiny("qwen3")
    noise = torch.randint(0, tiny.MASK, (13,), generator=torch.Generator().manual_seed(5)).tolist()
    example = Example(prompt=tuple(noise[:5]), response=tuple(noise[5:]))
    objective = Objective(kind="block_diffusion", block_lens=(K,), random_offset=False)
    rows = build_rows([example], objective, mask_token_id=tiny.MASK, seeds=[2])
    logits, _ = oracles.forward(model.state, model.config, rows.ids, rows.positions, visible(rows))
    noised = rows.ids[rows.clean :].view(-1, K)
    assert 0 < int((noised == tiny.MASK).sum()) < noised.numel()

    decoder = build(model, block_len=K, rule="one")
    seen: list[Tensor] = []
    handle = decoder.model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    try:
        with torch.inference_mode():
            state, _ = decoder.prefill(
                [list(example.prompt)], max_new_tokens=8, sampling=Sampling()
            )
            for index, ids in enumerate(noised.tolist()):
                block = state.blocks[0] = Block(K, tiny.MASK)
                block.ids = [*ids[:-1], tiny.MASK]  # one mask at least, or it would be stored
                row = rows.clean + index * K
                before, _ = oracles.forward(
                    model.state, model.config,
                    torch.cat([rows.ids[: row + K - 1], torch.tensor([tiny.MASK]),
                               rows.ids[row + K :]]),
                    rows.positions, visible(rows),
                )  # fmt: skip
                decoder.step(state)
                torch.testing.assert_close(
                    seen[-1][0].double(), before[row : row + K], atol=1e-4, rtol=1e-4
                )
                if ids[-1] == tiny.MASK:
                    assert torch.equal(before, logits)
                block.ids, block.final = noise[5 + index * K :][:K], K
                decoder.step(state)
                assert state.cache.lengths[0] == 5 + (index + 1) * K
    finally:
        handle.remove()


@pytest.mark.parametrize("broken", ["block", "store"])
def test_a_wrong_pattern_is_noticed(broken: str) -> None:
    """Wrong on purpose: a causal block, or a store forward that is left out."""
    model, prompt, params = tiny.random_tiny("llama"), [1, 2, 3], {"rule": "one"}
    decoder = build(model, block_len=K, **params)
    if broken == "block":
        decoder.block_mask = decoder.block_mask.tril()
    else:
        step = decoder.step

        def skip(state: Any) -> StepTrace:
            if state.blocks[0].done:  # keeps the K/V of the forward that saw masks
                state.cache.advance([K])
                state.blocks = [Block(K, tiny.MASK)]
            return step(state)

        decoder.step = skip
    trace = generate(decoder, [prompt], max_new_tokens=24)[0]
    want = [t for tokens, _, _ in expected(model, prompt, K, params, 24) for t in tokens]
    assert list(trace.token_ids) != want[:24]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"block_len": 1}, "block_len is 1"),
        ({"block_len": 65}, "65"),
        ({"block_len": 4.5}, "4.5"),
        ({"rule": "best"}, "'best'.*one, threshold, steps"),
        ({"threshold": 1.5}, "1.5"),
        ({"threshold": float("nan")}, "nan"),
        ({"rule": "one", "threshold": 0.5}, "no effect under rule=one"),
        ({"rule": "steps"}, "steps is None"),
        ({"rule": "steps", "steps": 0}, "steps is 0"),
        ({"rule": "steps", "steps": 9, "block_len": 8}, "9 for blocks of 8"),
        ({"beta": 1.0}, "beta"),
    ],
)
def test_impossible_parameters_are_refused(params: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        build(tiny.random_tiny("llama"), **params)


@pytest.mark.parametrize("mask_token_id", [None, -1, 16])
def test_a_mask_token_of_the_vocabulary_is_needed(mask_token_id: int | None) -> None:
    with pytest.raises(UserError, match=str(mask_token_id)):
        block_diffusion.build(tiny.random_tiny("llama").model, mask_token_id=mask_token_id)


def test_sampling_is_refused() -> None:
    decoder = build(tiny.random_tiny("llama"))
    with pytest.raises(UserError, match="temperature 0.7 is refused"):
        generate(decoder, [[1]], max_new_tokens=2, sampling=Sampling(temperature=0.7, mode="match"))


def test_prompts_that_fill_the_positions() -> None:
    model = tiny.random_tiny("qwen3")
    prompt = ([2, 5, 7] * 200)[: model.config.max_position - 6]
    decoder = build(model, block_len=64, rule="steps", steps=4)
    [first, second] = generate(decoder, [prompt, prompt[:-1]], max_new_tokens=6)
    assert len(first.token_ids) == len(second.token_ids) == 6
