"""`tidar`: verify last step's draft and pre-draft for every outcome in one forward (section 3.2).

Each step sends K drafted tokens (causal) and K blocks of K mask tokens (block j proposes what
follows if exactly j drafts are committed). The drafts' logits decide how many are committed; the
block of that outcome is the next draft, its first token being the verification token itself, so
that beta = 1 ("Trust AR") is greedy AR of the same weights, token for token.

Accounting: a token counts as committed when it is final. The verification token v_r is final in the
step that computes it, so a step commits d_1..d_{r-1}, v_r: r tokens, 1 <= r <= K.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tidar_ref.cache import KVCache
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.masks import decode_mask, decode_positions, prefill_mask
from tidar_ref.model import Transformer
from tidar_ref.sampling import Sampling, choose, draw, leading_matches, mix, probabilities, reject

BLOCK_LENS = range(2, 17)


class TidarState(State):
    """State plus the draft [B, K] (its first token is already committed) and, in mode "reject",
    draft_probs [B, K-1, V], the distributions its other tokens were drawn from."""

    def __init__(self, *, draft: Tensor, draft_probs: Tensor | None, **rest: Any) -> None:
        super().__init__(**rest)
        self.draft = draft
        self.draft_probs = draft_probs


class TidarDecoder:
    """Dense TiDAR: all K outcomes are drafted. Query width K(K+1) never changes.

    block_len: K in 2..16. beta: weight of the AR logits in the verification mixture, 0..1.
    mask_token_id: the vocabulary entry used as mask; it is never drafted.
    """

    name = "tidar"

    def __init__(
        self, model: Transformer, *, mask_token_id: int, block_len: int = 8, beta: float = 1.0
    ) -> None:
        if not isinstance(block_len, int) or block_len not in BLOCK_LENS:
            raise UserError(f"block_len is {block_len}: TiDAR takes a whole K from 2 to 16")
        if not 0.0 <= beta <= 1.0:
            raise UserError(f"beta is {beta}: give a weight from 0 (diffusion) to 1 (AR)")
        if mask_token_id is None or not 0 <= mask_token_id < model.config.vocab_size:
            raise UserError(
                f"mask token id {mask_token_id} is not in the vocabulary of"
                f" {model.config.vocab_size}: name an unused token of the tokenizer"
            )
        self.model, self.block_len, self.beta = model, block_len, float(beta)
        self.mask_token_id = mask_token_id
        self.params = MappingProxyType({"block_len": block_len, "beta": self.beta})
        self.lossless = self.beta == 1.0
        # The last step may commit up to K tokens past the limit, and writes K(K+1) behind those.
        self.scratch = block_len + block_len * (block_len + 1)
        self.new_mask = decode_mask(block_len).to(model.device)
        self.offsets = decode_positions(block_len).to(model.device)
        self.mask_ids = torch.full(
            (1, block_len * block_len), mask_token_id, dtype=torch.int64, device=model.device
        )

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[TidarState, StepTrace]:
        """One forward over prompt and K masks (fused bootstrap, Appendix B); commits one token.

        The prompts' K/V stay; the masks' are dropped by not advancing over them.
        """
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
        # Masks directly behind each prompt; what lies behind the masks of a shorter one is padding.
        ids = torch.full((batch, width), self.mask_token_id, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        mask = prefill_mask(lengths[0], k)
        if len(set(lengths)) > 1:
            mask = torch.stack([_padded(prefill_mask(n, k), width) for n in lengths])
        positions = torch.arange(width, device=model.device).expand(batch, width)
        hidden = model(ids.to(model.device), positions, cache, mask.to(model.device))
        cache.advance(lengths)

        ends = torch.tensor(lengths, device=model.device)[:, None]
        rows = torch.arange(batch, device=model.device)[:, None]
        slots = hidden[rows, ends + torch.arange(k, device=model.device)]  # [B, K, H]
        generator = sampling.generator(model.device)
        mixed = self._mixed(model.lm_head(hidden[rows, ends - 1]), slots[:, :1])
        first = choose(mixed, sampling, generator)  # [B, 1]
        draft, draft_probs = self._draft(first, slots[:, 1:], sampling, generator)
        state = TidarState(
            cache=cache,
            active=[True] * batch,
            sampling=sampling,
            generator=generator,
            draft=draft,
            draft_probs=draft_probs,
        )
        none = (0,) * batch
        return state, StepTrace(
            committed=tuple((t,) for t in first[:, 0].tolist()),
            target_forwards=1,
            query_width=width,
            kv_len=none,
            drafted=none,
            accepted=none,
        )

    def step(self, state: TidarState) -> StepTrace:
        """Verify the draft, commit r tokens, take block r as the next draft; one forward."""
        k, cache, sampling = self.block_len, state.cache, state.sampling
        batch = state.draft.shape[0]
        before = tuple(cache.lengths)
        ids = torch.cat([state.draft, self.mask_ids.expand(batch, -1)], dim=1)
        hidden = self.model(ids, cache.kv_len[:, None] + self.offsets, cache, self.new_mask)

        mixed = self._mixed(self.model.lm_head(hidden[:, :k]), hidden[:, k::k])  # p of v_1..v_K
        if sampling.mode == "reject":
            target = probabilities(mixed, sampling.temperature)
            r, following = reject(state.draft, target, state.draft_probs, state.generator)
        else:
            verified = choose(mixed, sampling, state.generator)
            r = leading_matches(state.draft, verified)
            following = verified.gather(1, (r - 1)[:, None])[:, 0]

        # Only the chosen block goes through the LM head: K-1 rows instead of K*K.
        slots = r[:, None] * k + torch.arange(1, k, device=hidden.device)
        chosen = hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[-1]))
        old_draft = state.draft
        state.draft, state.draft_probs = self._draft(
            following[:, None], chosen, sampling, state.generator
        )
        # One transfer to the host a step: how many were committed, and which.
        report = torch.cat([r[:, None], old_draft[:, 1:], following[:, None]], dim=1).tolist()
        active = list(state.active)
        cache.advance([row[0] if a else 0 for row, a in zip(report, active, strict=True)])
        return StepTrace(
            committed=tuple(
                (*row[1 : row[0]], row[-1]) if a else ()
                for row, a in zip(report, active, strict=True)
            ),
            target_forwards=1,
            query_width=ids.shape[1],
            kv_len=before,
            drafted=tuple(k - 1 if a else 0 for a in active),
            accepted=tuple(row[0] - 1 if a else 0 for row, a in zip(report, active, strict=True)),
        )

    def _mixed(self, ar_logits: Tensor, first_slots: Tensor) -> Tensor:
        """Verification logits from the AR logits and the first slots' hidden states of the blocks.

        At beta = 1 the AR logits are returned untouched and the slots skip the head.
        """
        if self.beta == 1.0:
            return ar_logits
        return mix(ar_logits, self._without_mask_token(first_slots), self.beta)

    def _draft(
        self, first: Tensor, slots: Tensor, sampling: Sampling, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Next draft [B, K] from its first token [B, 1] and the hidden states of slots 1..K-1."""
        logits = self._without_mask_token(slots)
        if sampling.mode != "reject":
            return torch.cat([first, logits.argmax(dim=-1)], dim=1), None
        probs = probabilities(logits, sampling.temperature)
        return torch.cat([first, draw(probs, generator)], dim=1), probs

    def _without_mask_token(self, hidden: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        logits[..., self.mask_token_id] = float("-inf")
        return logits


def build(model: Transformer, *, mask_token_id: int, **params: Any) -> TidarDecoder:
    """The `tidar` decoder with parameters block_len (K) and beta."""
    unknown = sorted(set(params) - {"block_len", "beta"})
    if unknown:
        raise UserError(f"decoder tidar has no parameter {', '.join(unknown)}: use block_len, beta")
    return TidarDecoder(model, mask_token_id=mask_token_id, **params)


def _padded(mask: Tensor, width: int) -> Tensor:
    """Extend a square pattern to `width`; padding sees itself only, so no row is empty."""
    padded = torch.eye(width, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded
