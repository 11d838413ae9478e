"""Attention in two parts, and by Flex, against one masked softmax; halves through torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from baselines import autoregressive
from tidar_ref import graphed, tidar
from tidar_ref.attention import masked_part, merge, part
from tidar_ref.cache import BoundedCache, KVCache
from tidar_ref.decoding import generate
from tidar_ref.flex_decode import BLOCK, FlexDecode
from tidar_ref.masks import causal_mask, decode_mask


@pytest.mark.parametrize("seed", range(3))
def test_merging_two_parts_is_one_softmax(seed: int) -> None:
    """Large scores included: neither part may overflow, nor drown the other wrongly."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    q, keys, values = 20**seed * draw(2, 3, 5, 8), draw(2, 3, 11, 8), draw(2, 3, 11, 8)
    whole = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    for cut in (1, 6, 10):
        halves = [
            part(q, keys[:, :, where], values[:, :, where], None)
            for where in (slice(cut), slice(cut, None))
        ]
        torch.testing.assert_close(merge(*halves), whole, atol=1e-5, rtol=1e-5)


def test_a_part_that_sees_nothing_has_no_say() -> None:
    q, keys = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    blind = masked_part(q, keys, keys, torch.full((2, 3), float("-inf")))
    assert blind[1].isneginf().all() and not blind[0].any()
    seeing = masked_part(q, keys, keys, None)
    torch.testing.assert_close(merge(blind, seeing), seeing[0])


def filled(model: tiny.Tiny, lengths: list[int], scratch: int) -> KVCache:
    cache = KVCache(
        model.config, batch=len(lengths), max_len=max(lengths), scratch=scratch,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for tensor in (cache.k, cache.v):
        tensor.normal_(generator=generator)
    cache.advance(lengths)
    return cache


@pytest.mark.parametrize("lengths", [[1], [9], [7, 7], [3, 9, 1], [0, 5]])
@pytest.mark.parametrize("bounded", [False, True])
def test_backbone_hidden_states_are_the_same(lengths: list[int], bounded: bool) -> None:
    """Every family and pattern: one row, causal, TiDAR's, a branch that is masked in the cache."""
    # Flex uncompiled takes long: alone and ragged is what tells its patterns apart.
    routes = ("two_part", "flex") if lengths in ([9], [3, 9, 1]) else ("two_part",)
    for family in tiny.FAMILIES:
        model = tiny.random_tiny(family)
        masks: list[tuple[int, Any]] = [(1, None), (4, causal_mask(4)), (6, decode_mask(2))]
        masks.append((20, decode_mask(4).expand(len(lengths), -1, -1)))
        if min(lengths) >= 3:  # the three newest cached tokens are seen by the mask only
            masks.append((2, torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)))
        for width, mask in masks:
            cache = filled(model, lengths, scratch=40)
            view = BoundedCache(cache, max(lengths) + 32, width) if bounded else cache
            ids = torch.arange(len(lengths) * width).view(len(lengths), width) % 15
            positions = cache.kv_len[:, None] + torch.arange(width)
            found = {}
            for route in ("sdpa", *routes):
                model.model.attention = route
                try:
                    with torch.inference_mode():
                        found[route] = model.model(ids, positions, view, mask)
                finally:
                    model.model.attention = "sdpa"
            for route in routes:
                torch.testing.assert_close(found[route], found["sdpa"], atol=1e-5, rtol=1e-5)


def test_decoders_write_the_same_text() -> None:
    model, prompts = tiny.trained_tiny(), tiny.prompts(3)
    decoders = [autoregressive.build(model.model)]
    decoders += [
        tidar.build(model.model, mask_token_id=tiny.MASK, block_len=4, **more)
        for more in ({}, {"static": 4})
    ]
    assert isinstance(decoders[-1], graphed.StaticDecoder)
    for decoder in decoders:
        texts = []
        for route in ("sdpa", "two_part", "flex"):
            model.model.attention = route
            try:
                traces = generate(decoder, prompts, max_new_tokens=16)
            finally:
                model.model.attention = "sdpa"
            texts.append([trace.token_ids for trace in traces])
        assert texts[0] == texts[1] == texts[2]


def test_flex_blocks_over_long_prefixes() -> None:
    """Several key blocks, ragged: full ones skip the pattern, the rest hold it; none is lost."""
    model = tiny.random_tiny("qwen2")
    lengths = [2 * BLOCK, 3 * BLOCK - 2, 5, 0]
    cache = filled(model, lengths, scratch=40)
    found = FlexDecode(cache, decode_mask(4), 20).mask
    assert found.full_kv_num_blocks[:, 0, 0].tolist() == [2, 2, 0, 0]
    ids = torch.arange(4 * 20).view(4, 20) % 15
    positions = cache.kv_len[:, None] + torch.arange(20)
    hidden = []
    for route in ("sdpa", "flex"):
        model.model.attention = route
        try:
            with torch.inference_mode():
                hidden.append(model.model(ids, positions, cache, decode_mask(4)))
        finally:
            model.model.attention = "sdpa"
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # the compiler takes a minute on two cores
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_compiled_halves_give_the_same_hidden_states(family: str) -> None:
    model = tiny.random_tiny(family).model
    cache = filled(tiny.random_tiny(family), [3, 9], scratch=40)
    for width, mask in ((1, None), (4, causal_mask(4)), (20, decode_mask(4))):
        ids = torch.arange(2 * width).view(2, width) % 15
        positions = cache.kv_len[:, None] + torch.arange(width)
        found = []
        for compiled in (False, True):
            model.compiled = compiled
            with torch.inference_mode():
                found.append(model(ids, positions, cache, mask))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
