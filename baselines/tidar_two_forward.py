"""`tidar_two_forward`: TiDAR's network in two forwards a step, verify, then draft once.

The first forward verifies the K drafted tokens; when it is known what was accepted, the second
sends K masks behind the accepted prefix. They see what block r of the dense step sees, so drafts
and commits are those of `tidar` at beta = 1: 2K query tokens in two forwards instead of K(K+1) in
one. Both are forwards of the target and both count in T/NFE.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from tidar_ref.decoding import StepTrace
from tidar_ref.errors import UserError
from tidar_ref.masks import causal_mask
from tidar_ref.model import Transformer
from tidar_ref.tidar import TidarDecoder, TidarState, verify_draft


class TwoForwardDecoder(TidarDecoder):
    """Prefill and draft rule of `tidar`; block_len is K in 2..16.

    There is no beta: the mixture needs the first slot of every outcome's block, and here only the
    block of the true outcome is ever computed.
    """

    name = "tidar_two_forward"

    def __init__(self, model: Transformer, *, mask_token_id: int, block_len: int = 8) -> None:
        super().__init__(model, mask_token_id=mask_token_id, block_len=block_len)
        self.params = MappingProxyType({"block_len": block_len})
        # The last step may commit up to K tokens past the limit; K masks lie behind those.
        self.scratch = 2 * block_len
        self.verify_mask = causal_mask(block_len).to(model.device)
        self.draft_mask = torch.ones_like(self.verify_mask)
        self.slots = torch.arange(block_len, device=model.device)

    def step(self, state: TidarState) -> StepTrace:
        """Verify, commit r tokens, then draft behind them; two forwards."""
        k, cache, sampling = self.block_len, state.cache, state.sampling
        batch, active = state.draft.shape[0], list(state.active)
        before, old_draft = tuple(cache.lengths), state.draft
        positions = cache.kv_len[:, None] + self.slots
        hidden = self.model(old_draft, positions, cache, self.verify_mask)
        r, following = verify_draft(
            old_draft,
            self.model.lm_head(hidden),
            state.draft_probs,
            sampling,
            state.generator,
            state.draft_len,
        )
        report = torch.cat([r[:, None], old_draft[:, 1:], following[:, None]], dim=1).tolist()
        cache.advance([row[0] if a else 0 for row, a in zip(report, active, strict=True)])

        masks = self.mask_ids[:, :k].expand(batch, -1)
        positions = cache.kv_len[:, None] + self.slots
        hidden = self.model(masks, positions, cache, self.draft_mask)
        state.draft, state.draft_probs = self._draft(
            following[:, None], hidden[:, 1:], sampling, state.generator
        )
        return StepTrace(
            committed=tuple(
                (*row[1 : row[0]], row[-1]) if a else ()
                for row, a in zip(report, active, strict=True)
            ),
            target_forwards=2,
            query_width=2 * k,
            kv_len=before,
            drafted=tuple(k - 1 if a else 0 for a in active),
            accepted=tuple(row[0] - 1 if a else 0 for row, a in zip(report, active, strict=True)),
            draft_tokens=tuple(
                tuple(row[1:k]) if a else () for row, a in zip(report, active, strict=True)
            ),
        )


def build(model: Transformer, *, mask_token_id: int, **params: Any) -> TwoForwardDecoder:
    """The `tidar_two_forward` decoder with parameter block_len (K)."""
    unknown = sorted(set(params) - {"block_len"})
    if unknown:
        raise UserError(
            f"decoder tidar_two_forward has no parameter {', '.join(unknown)}: use block_len"
        )
    return TwoForwardDecoder(model, mask_token_id=mask_token_id, **params)
