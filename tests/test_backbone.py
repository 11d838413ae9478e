"""The backbone against a forward written from scratch: no cache, dense mask, float64."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch

from tidar_ref.cache import KVCache
from tidar_ref.masks import causal_mask, decode_mask, decode_positions
from tidar_ref.model import Transformer

CASES = [(family, scaled) for family in tiny.FAMILIES for scaled in (False, True)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def new_cache(model: Transformer, batch: int = 1, max_len: int = 120, scratch: int = 80) -> KVCache:
    return KVCache(
        model.config,
        batch=batch,
        max_len=max_len,
        scratch=scratch,
        dtype=model.dtype,
        device=model.device,
    )


@torch.inference_mode()
def feed(model: Transformer, cache: KVCache, ids: list[int]) -> torch.Tensor:
    """Commit ids behind the cache of one sequence, return their logits [T, V]."""
    start = cache.lengths[0]
    positions = torch.arange(start, start + len(ids))[None]
    hidden = model(torch.tensor([ids]), positions, cache, causal_mask(len(ids)))
    cache.advance([len(ids)])
    return model.lm_head(hidden)[0]


def ids_of(length: int, vocab: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (length,), generator=generator).tolist()


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return float((got.double() - expected).abs().max()) <= tolerance * scale


def test_parameter_names_and_shapes() -> None:
    for family in tiny.FAMILIES:
        config = oracles.tiny_config(family)
        state = Transformer(config).state_dict()
        assert {k: tuple(v.shape) for k, v in state.items()} == oracles.parameter_shapes(config)


@pytest.mark.parametrize(("family", "scaled"), CASES)
@pytest.mark.parametrize("chunks", [[80], [1] * 20, [5, 1, 3, 1, 70]], ids=["whole", "ones", "mix"])
def test_cached_chunks_equal_one_dumb_pass(family: str, scaled: bool, chunks: list[int]) -> None:
    config = oracles.tiny_config(family, scaled=scaled)
    state = oracles.random_state(config, seed=3)
    model = tiny.model_of(config, state)
    ids, cache, logits = ids_of(sum(chunks), config.vocab_size, 4), new_cache(model), []
    start = 0
    for width in chunks:
        logits.append(feed(model, cache, ids[start : start + width]))
        start += width
    assert close(torch.cat(logits), oracles.causal_logits(state, config, ids))
    for layer, (keys, values) in enumerate(oracles.causal_keys_values(state, config, ids)):
        assert close(cache.k[layer, 0, :, : len(ids)].transpose(0, 1), keys)
        assert close(cache.v[layer, 0, :, : len(ids)].transpose(0, 1), values)


def test_scaling_bias_and_norms_matter() -> None:
    """Guards the test above: dropping a family's own feature must not go unnoticed."""
    ids = ids_of(80, 40, 4)
    plain, scaled = oracles.tiny_config("llama"), oracles.tiny_config("llama", scaled=True)
    state = oracles.random_state(plain, seed=3)
    expected = oracles.causal_logits(state, plain, ids)
    assert not close(oracles.causal_logits(state, scaled, ids), expected, 1e-2)
    for family, part in (("qwen2", "qkv.bias"), ("qwen3", "q_norm.weight")):
        config = oracles.tiny_config(family)
        state = oracles.random_state(config, seed=3)
        model = tiny.model_of(config, state)
        changed = dict(state)
        changed[f"layers.1.{part}"] = state[f"layers.1.{part}"] + 1.0
        assert not close(
            feed(model, new_cache(model), ids), oracles.causal_logits(changed, config, ids), 1e-3
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("block_len", [2, 3, 5])
@torch.inference_mode()
def test_ragged_batch_of_decode_forwards(family: str, block_len: int) -> None:
    """Three sequences of different kv_len in one TiDAR-shaped forward == the dumb one for each."""
    config = oracles.tiny_config(family)
    state = oracles.random_state(config, seed=5)
    model = tiny.model_of(config, state)
    prefixes = [ids_of(n, config.vocab_size, n) for n in (11, 3, 6)]
    cache = new_cache(model, batch=3)
    padded = torch.tensor([p + [0] * (11 - len(p)) for p in prefixes])
    model(padded, torch.arange(11).expand(3, 11), cache, causal_mask(11))
    cache.advance([len(p) for p in prefixes])
    assert cache.kv_len.tolist() == [11, 3, 6]

    width = block_len * (block_len + 1)
    new = [ids_of(width, config.vocab_size, 50 + b) for b in range(3)]
    positions = cache.kv_len[:, None] + decode_positions(block_len)
    hidden = model(torch.tensor(new), positions, cache, decode_mask(block_len))
    logits = model.lm_head(hidden)
    for b, prefix in enumerate(prefixes):
        rows = oracles.decode_rows(len(prefix), block_len)
        allowed = torch.tensor([[oracles.may_attend(q, k) for k in rows] for q in rows])
        where = [oracles.row_position(row, len(prefix)) for row in rows]
        expected, _ = oracles.forward(state, config, prefix + new[b], where, allowed)
        assert close(logits[b], expected[len(prefix) :])
    # What was written behind a sequence but not committed must not be seen by the next forward.
    single = torch.tensor([[1], [2], [3]])
    logits = model.lm_head(model(single, cache.kv_len[:, None], cache, None))
    for b, prefix in enumerate(prefixes):
        assert close(logits[b, 0], oracles.causal_logits(state, config, [*prefix, b + 1])[-1])


@torch.inference_mode()
def test_one_leaked_cell_changes_its_row() -> None:
    """Every forbidden cell of the decode mask matters: opening it changes that row."""
    block_len, config = 3, oracles.tiny_config("qwen3", layers=1)
    model = tiny.model_of(config, oracles.random_state(config, seed=6))
    cache = new_cache(model)
    feed(model, cache, [4, 9, 2])
    mask, width = decode_mask(block_len), block_len * (block_len + 1)
    # distinct "mask" tokens, so that no leak can hide behind two equal keys
    ids = torch.arange(10, 10 + width)[None]
    positions = cache.kv_len[:, None] + decode_positions(block_len)
    clean = model(ids, positions, cache, mask)[0]
    for query, key in (~mask).nonzero().tolist():
        leaky = mask.clone()
        leaky[query, key] = True
        change = (model(ids, positions, cache, leaky)[0] - clean).abs().amax(-1)
        assert change[query] > 1e-4, (query, key)
        assert (change[torch.arange(width) != query] < 1e-5).all()  # one layer: no other row moves


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_is_close(family: str) -> None:
    config = oracles.tiny_config(family)
    state = {k: v.bfloat16() for k, v in oracles.random_state(config, seed=7, std=0.1).items()}
    model = tiny.model_of(config, state, torch.bfloat16)
    ids = ids_of(40, config.vocab_size, 8)
    cache = new_cache(model)
    got = torch.cat([feed(model, cache, ids[:30]), *(feed(model, cache, [i]) for i in ids[30:])])
    expected = oracles.causal_logits(state, config, ids)
    error = (got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert got.dtype == torch.bfloat16
    assert error < 0.03
