"""`block_diffusion`: blocks of K masks denoised one after the other, exact cache between blocks.

The family of BD3-LM, SBD and Fast-dLLM v2: autoregressive over blocks, diffusion inside. A block
sees all text before it and all of itself; each forward sends its K tokens, masks and tokens found
so far alike, against the cached prefix, and a rule unmasks some. The K/V of a block still holding
masks is never kept: once clean, one more forward stores it, which counts and commits nothing.

What is seen is what `tidar_ref.training.rows` trains as "block_diffusion": the prompt is causal,
blocks of K start at the first token of the response, and the logits at a mask predict its own
position (no shift). K should be the trained one.

Accounting: a token is committed once it and all before it are tokens, so a stop condition ends a
sequence inside a block, and the last block is not stored. As for `tidar`, the prefill is fused: the
first block's masks ride behind the prompt, and what they settle is committed by the prefill.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from baselines._denoise import (
    Block,
    check_greedy,
    check_mask_token,
    check_steps,
    padded,
    propose,
    rule_from,
)
from tidar_ref.cache import KVCache
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.masks import prefill_mask
from tidar_ref.model import Transformer
from tidar_ref.sampling import Sampling

BLOCK_LENS = range(2, 65)
TEXT_PARAMETERS = ("rule",)


class BlockState(State):
    """State plus the current block of each sequence, whose K/V is not in the cache yet."""

    def __init__(self, *, blocks: list[Block], **rest: Any) -> None:
        super().__init__(**rest)
        self.blocks = blocks


class BlockDiffusionDecoder:
    """block_len: K in 2..64. rule: one, threshold or steps (`baselines._denoise.Rule`).

    threshold: of its rule, 0..1, 0.9 if not given. steps: of its rule, forwards per block, 1..K.
    """

    name = "block_diffusion"
    lossless = False

    def __init__(
        self,
        model: Transformer,
        *,
        mask_token_id: int | None,
        block_len: int = 8,
        rule: str = "threshold",
        threshold: float | None = None,
        steps: int | None = None,
    ) -> None:
        if not isinstance(block_len, int) or block_len not in BLOCK_LENS:
            raise UserError(f"block_len is {block_len}: give a whole K from 2 to 64")
        check_mask_token(self.name, mask_token_id, model.config.vocab_size)
        self.rule, chosen = rule_from(rule, threshold, steps)
        check_steps(self.rule, block_len)
        self.model, self.mask_token_id, self.block_len = model, mask_token_id, block_len
        self.params = MappingProxyType({"block_len": block_len, **chosen})
        self.scratch = block_len  # the last block may reach past the limit
        self.block_mask = torch.ones(block_len, block_len, dtype=torch.bool, device=model.device)
        self.slots = torch.arange(block_len, device=model.device)

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[BlockState, StepTrace]:
        """One forward over prompt and first block; commits what that forward settles, maybe none.

        The prompts' K/V stay; the block's is dropped by not advancing over it.
        """
        check_greedy(self.name, sampling)
        model, k, batch = self.model, self.block_len, len(prompts)
        lengths = [len(p) for p in prompts]
        width = max(lengths) + k
        cache = KVCache(
            model.config,
            batch=batch,
            max_len=max(lengths) + max_new_tokens,
            scratch=self.scratch,
            dtype=model.dtype,
            device=model.device,
        )
        ids = torch.full((batch, width), self.mask_token_id, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        mask = prefill_mask(lengths[0], k)
        if len(set(lengths)) > 1:
            mask = torch.stack([padded(prefill_mask(n, k), width) for n in lengths])
        positions = torch.arange(width, device=model.device).expand(batch, width)
        hidden = model(ids.to(model.device), positions, cache, mask.to(model.device))
        cache.advance(lengths)
        ends = torch.tensor(lengths, device=model.device)[:, None]
        rows = torch.arange(batch, device=model.device)[:, None]
        state = BlockState(
            cache=cache,
            active=[True] * batch,
            sampling=sampling,
            generator=sampling.generator(model.device),
            blocks=[Block(k, self.mask_token_id) for _ in prompts],
        )
        committed = self._unmask(state, hidden[rows, ends + self.slots])
        return state, _trace(committed, width, (0,) * batch)

    def step(self, state: BlockState) -> StepTrace:
        """One forward over each sequence's block: unmask some of it, or store it if it is clean."""
        cache, k = state.cache, self.block_len
        before = tuple(cache.lengths)
        ids = torch.tensor([block.ids for block in state.blocks], device=self.model.device)
        positions = cache.kv_len[:, None] + self.slots
        hidden = self.model(ids, positions, cache, self.block_mask)
        stored = [b.done and a for b, a in zip(state.blocks, state.active, strict=True)]
        committed = self._unmask(state, hidden)
        cache.advance([k if now else 0 for now in stored])
        state.blocks = [
            Block(k, self.mask_token_id) if now else block
            for block, now in zip(state.blocks, stored, strict=True)
        ]
        return _trace(committed, k, before)

    def _unmask(self, state: BlockState, hidden: Tensor) -> tuple[tuple[int, ...], ...]:
        """Tokens that hidden [B, K, H] makes final; a clean block needs no LM head."""
        open_ = [a and not b.done for b, a in zip(state.blocks, state.active, strict=True)]
        if not any(open_):
            return ((),) * len(open_)
        tokens, scores = propose(self.model.lm_head(hidden), self.mask_token_id)
        return tuple(
            block.unmask(self.rule, tokens[row], scores[row]) if open_[row] else ()
            for row, block in enumerate(state.blocks)
        )


def build(
    model: Transformer, *, mask_token_id: int | None = None, **params: Any
) -> BlockDiffusionDecoder:
    """The `block_diffusion` decoder with parameters block_len (K), rule, threshold and steps."""
    unknown = sorted(set(params) - {"block_len", "rule", "threshold", "steps"})
    if unknown:
        raise UserError(
            f"decoder block_diffusion has no parameter {', '.join(unknown)}: use block_len, rule,"
            " threshold, steps"
        )
    return BlockDiffusionDecoder(model, mask_token_id=mask_token_id, **params)


def _trace(
    committed: tuple[tuple[int, ...], ...], width: int, kv_len: tuple[int, ...]
) -> StepTrace:
    none = (0,) * len(committed)
    return StepTrace(
        committed=committed,
        target_forwards=1,
        query_width=width,
        kv_len=kv_len,
        drafted=none,
        accepted=none,
    )
