"""What every registered decoder owes the loop, whatever its method."""

from __future__ import annotations

import pytest
import tiny
import torch

from bench.registry import decoder_module, decoder_names
from tidar_ref.decoding import Decoder, GenerationTrace, generate
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

VARIANTS = {
    "ar": [{}],
    "tidar": [
        {"block_len": 2, "beta": 1.0},
        {"block_len": 4, "beta": 0.3},
        {"block_len": 16, "beta": 0.0},
        {"block_len": 4, "beta": 1.0, "outcomes": "2-4"},
        {"block_len": 8, "beta": 1.0, "outcomes": "1-4-8"},
    ],
    "tidar_two_forward": [{"block_len": 2}, {"block_len": 8}],
    "eagle3": [
        {"head": "random", "depth": 3},
        {"head": "random", "depth": 4, "top_k": 3, "nodes": 9},
    ],
    "prompt_lookup": [
        {"draft_len": 1, "max_ngram": 1},
        {"draft_len": 7, "max_ngram": 3},
    ],
    "block_diffusion": [
        {"block_len": 8, "rule": "threshold", "threshold": 0.6},
        {"block_len": 5, "rule": "steps", "steps": 3},
    ],
    "masked_diffusion": [
        {"gen_length": 20, "rule": "steps", "steps": 6, "cache": "none", "convention": "llada"},
        {"gen_length": 20, "block_len": 4, "rule": "one", "cache": "dual", "convention": "dream"},
    ],
}
CASES = [
    pytest.param(name, params, id=f"{name}-{'-'.join(str(v) for v in params.values())}")
    for name in decoder_names()
    for params in VARIANTS.get(name, [{}])
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str, params: dict, model: tiny.Tiny | None = None) -> Decoder:
    model = model or tiny.trained_tiny()
    return decoder_module(name).build(model.model, mask_token_id=tiny.MASK, **params)


def check_ledger(decoder: Decoder, trace: GenerationTrace, prompt: list[int], limit: int) -> None:
    """Invariants of one finished sequence."""
    ledger = (trace.prefill, *trace.steps)
    committed = sum((step.committed[0] for step in ledger), ())
    assert len(committed) == trace.tokens_generated >= len(trace.token_ids)
    assert committed[: len(trace.token_ids)] == trace.token_ids
    assert 1 <= len(trace.token_ids) <= limit
    assert trace.prompt_tokens == len(prompt)
    final = 0
    for index, step in enumerate(ledger):
        assert len(step.committed) == len(step.kv_len) == 1
        assert step.target_forwards >= 1 and step.draft_forwards >= 0 and step.query_width >= 1
        assert 0 <= step.accepted[0] <= step.drafted[0]
        if index and decoder.name == "block_diffusion":
            blocks = final // decoder.block_len  # the last clean one may not be stored yet
            stored = [len(prompt) + n * decoder.block_len for n in (blocks - 1, blocks)]
            assert step.kv_len[0] in stored
        elif index and decoder.name == "masked_diffusion":
            assert 0 <= step.kv_len[0] < len(prompt) + decoder.gen_length
        elif index:
            assert step.kv_len[0] == len(prompt) + final - 1  # all committed tokens but the last
        final += len(step.committed[0])
    assert final - len(ledger[-1].committed[0]) < len(trace.token_ids)  # no step after the end


def check_drafts(trace: GenerationTrace) -> None:
    """Draft tokens, where told: as many as drafted, the accepted ones first and committed."""
    for step in trace.steps:
        if step.draft_tokens is not None:
            [draft] = step.draft_tokens
            assert len(draft) == step.drafted[0]
            assert draft[: step.accepted[0]] == step.committed[0][: step.accepted[0]]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_names_and_promises(name: str, params: dict) -> None:
    decoder = build(name, params)
    assert decoder.name == name
    assert dict(decoder.params) == params
    assert isinstance(decoder.lossless, bool) and decoder.scratch >= 0


@pytest.mark.parametrize(("name", "params"), CASES)
def test_ledger_and_determinism(name: str, params: dict) -> None:
    prompts = tiny.prompts(6, seed=20)
    decoder = build(name, params)
    calls: list[int] = []
    drafts: list[int] = []
    drafter = getattr(decoder, "drafter", None)  # a separate network, if the method has one
    handles = [
        decoder.model.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[1]))
    ]
    if drafter is not None:
        handles.append(drafter.register_forward_hook(lambda *_: drafts.append(1)))
    try:
        for limit in (1, 2, 17):
            for prompt in prompts:
                calls.clear()
                drafts.clear()
                trace = generate(decoder, [prompt], max_new_tokens=limit)[0]
                check_ledger(decoder, trace, prompt, limit)
                check_drafts(trace)
                assert len(trace.token_ids) == limit and trace.finish == "length"
                ledger = (trace.prefill, *trace.steps)
                assert len(calls) == sum(s.target_forwards for s in ledger)
                assert len(drafts) == sum(s.draft_forwards for s in ledger)
                assert sum(calls) == sum(s.query_width for s in ledger)
        batch = generate(decoder, prompts, max_new_tokens=17)
        again = generate(decoder, prompts, max_new_tokens=17)
        assert [t.token_ids for t in batch] == [t.token_ids for t in again]
        for prompt, trace in zip(prompts, batch, strict=True):
            check_ledger(decoder, trace, prompt, 17)
            check_drafts(trace)
            assert trace.token_ids == generate(decoder, [prompt], max_new_tokens=17)[0].token_ids
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("name", "params"), CASES)
def test_limits_only_cut(name: str, params: dict) -> None:
    """A smaller limit or an end token never changes earlier tokens."""
    decoder, prompt = build(name, params), [3, 9, 3, 9, 3]
    full = generate(decoder, [prompt], max_new_tokens=20)[0].token_ids
    for limit in range(1, 20):
        assert generate(decoder, [prompt], max_new_tokens=limit)[0].token_ids == full[:limit]
    for eos in set(full):
        trace = generate(decoder, [prompt], max_new_tokens=20, eos_ids=frozenset({eos}))[0]
        assert trace.token_ids == full[: full.index(eos) + 1] and trace.finish == "eos"
        check_ledger(decoder, trace, prompt, 20)


class AtMost:
    """Stop rule: keep everything up to the first token of `ending`, told in any portions."""

    def __init__(self, ending: frozenset[int]) -> None:
        self.ending, self.seen = ending, 0

    def __call__(self, token_ids: list[int], new: int) -> int | None:
        assert new >= 1 and self.seen + new == len(token_ids)  # every token is told once, in order
        self.seen = len(token_ids)
        for index in range(len(token_ids) - new, len(token_ids)):
            if token_ids[index] in self.ending:
                return index + 1
        return None


@pytest.mark.parametrize(("name", "params"), CASES)
def test_stop_rules_only_cut(name: str, params: dict) -> None:
    """In a batch, where sequences end at different steps."""
    decoder, prompts = build(name, params), tiny.prompts(5, seed=22)
    full = [t.token_ids for t in generate(decoder, prompts, max_new_tokens=20)]
    inside = 0
    for ending in {text[index] for text in full for index in (0, 3, 11)}:
        rule = frozenset({ending})
        traces = generate(decoder, prompts, max_new_tokens=20, stop=lambda r=rule: AtMost(r))
        for prompt, text, trace in zip(prompts, full, traces, strict=True):
            stops = ending in text
            assert trace.token_ids == (text[: text.index(ending) + 1] if stops else text)
            assert trace.finish == ("stop" if stops else "length")
            check_ledger(decoder, trace, prompt, 20)
            inside += stops and len(trace.token_ids) > 1
    assert inside


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_seed_fixes_the_draws(name: str, params: dict) -> None:
    """A sampling mode is refused before anything is generated, or obeys the contract."""
    decoder, prompts = build(name, params), tiny.prompts(4, seed=23)
    for mode in ("match", "reject"):

        def draw(seed: int, mode: str = mode) -> list[tuple[int, ...]]:
            sampling = Sampling(temperature=1.5, mode=mode, seed=seed)
            traces = generate(decoder, prompts, max_new_tokens=12, sampling=sampling)
            for prompt, trace in zip(prompts, traces, strict=True):
                check_ledger(decoder, trace, prompt, 12)
            return [trace.token_ids for trace in traces]

        try:
            first = draw(1)
        except UserError as error:
            assert mode in str(error) or "temperature" in str(error)
            continue
        assert first == draw(1) and first != draw(2)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_lossless_means_greedy_ar(name: str, params: dict) -> None:
    for model in (tiny.trained_tiny(), tiny.random_tiny("qwen2")):
        decoder = build(name, params, model)
        prompts = tiny.prompts(4, seed=21)
        expected = [tuple(model.greedy(p, 20)) for p in prompts]
        got = [t.token_ids for t in generate(decoder, prompts, max_new_tokens=20)]
        if decoder.lossless:
            assert got == expected


@pytest.mark.parametrize(("name", "params"), CASES)
def test_impossible_requests_are_refused(name: str, params: dict) -> None:
    decoder = build(name, params)
    longest = decoder.model.config.max_position
    for prompt in ([1] * (longest + 1), [1] * longest):
        with pytest.raises(UserError, match=str(longest)):
            generate(decoder, [prompt], max_new_tokens=4)
    with pytest.raises(UserError):
        generate(decoder, [[]], max_new_tokens=4)
    with pytest.raises(UserError, match="phase_of_moon"):
        build(name, {**params, "phase_of_moon": 3})


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"block_len": 1}, "1"),
        ({"block_len": 0}, "0"),
        ({"block_len": 17}, "17"),
        ({"block_len": 4.5}, "4.5"),
        ({"beta": -0.1}, "-0.1"),
        ({"beta": 1.1}, "1.1"),
        ({"beta": float("nan")}, "nan"),
    ],
)
def test_tidar_parameters_out_of_range(params: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        build("tidar", params)


@pytest.mark.parametrize("mask_token_id", [None, -1, 16])
def test_tidar_needs_a_mask_token_of_the_vocabulary(mask_token_id: int | None) -> None:
    with pytest.raises(UserError, match=str(mask_token_id)):
        decoder_module("tidar").build(tiny.trained_tiny().model, mask_token_id=mask_token_id)


def test_ar_takes_no_parameters() -> None:
    with pytest.raises(UserError, match="block_len"):
        build("ar", {"block_len": 4})


def test_unknown_decoder_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="ar, tidar"):
        decoder_module("warp")
