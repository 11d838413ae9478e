"""EAGLE-3's training-time test: the draft head is unrolled on its own outputs (arXiv 2503.01840).

Unroll i starts at every position t at once: it reads token t+1+i, the feature the unroll before
gave at t (the target's own at i = 0) and sits at position t+i. It sees the true keys up to t and
its own keys of unrolls 1..i, exactly what the i-th draft of a decode step sees. The loss follows
the target's distribution over the draft vocabulary; there is no feature loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar_ref.cache import KVCache
from tidar_ref.errors import UserError
from tidar_ref.linear import Linear
from tidar_ref.masks import causal_mask
from tidar_ref.model import Transformer, rotate
from tidar_ref.training.network import Losses
from tidar_ref.training.rows import IGNORE, Objective, Rows


@dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """unrolls of the training-time test and the weight decay^i of unroll i (both published)."""

    unrolls: int = 7
    decay: float = 0.8

    def __post_init__(self) -> None:
        if not isinstance(self.unrolls, int) or self.unrolls < 1:
            raise UserError(f"unrolls is {self.unrolls}: the head is unrolled at least once")


@torch.no_grad()
def target_outputs(model: Transformer, tokens: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """(hidden states [B, T, H] by layer, logits [B, T, V]) of the target on tokens [B, T]."""
    batch, width = tokens.shape
    cache = KVCache(
        model.config, batch=batch, max_len=width, scratch=0, dtype=model.dtype, device=model.device
    )
    taps: dict[int, Tensor] = {}
    positions = torch.arange(width, device=tokens.device).expand(batch, -1)
    hidden = model(tokens, positions, cache, causal_mask(width).to(tokens.device), taps)
    return taps, model.lm_head(hidden)


def unroll(
    head: Any, taps: Mapping[int, Tensor], tokens: Tensor, unrolls: int
) -> Iterator[tuple[Tensor, int]]:
    """(features [B, T-1-i, H], i) of unroll i = 0, 1, ...: slot t predicts token t+2+i.

    head: a draft head (`baselines/_eagle3_head.py`); its `logits` turns features into drafts.
    tokens [B, T] are those the taps belong to.
    Slots whose token t+1+i lies past the end are left out.
    """
    layer, count = head.layer, tokens.shape[1] - 1
    feature = head.fuse(taps)[:, :count]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for i in range(min(unrolls, count)):
        slots = count - i  # the last ones have run out of tokens
        feature = feature[:, :slots]
        ids, positions = tokens[:, 1 + i :], torch.arange(i, i + slots, device=tokens.device)
        normed = head.hidden_norm(feature)
        both = torch.cat([layer.attn_norm(head.embed(ids)), normed], dim=-1)
        rows = layer.qkv(both.flatten(0, 1)).view(*ids.shape, -1, layer.head_dim).transpose(1, 2)
        qk, v = rows.split([layer.heads + layer.kv_heads, layer.kv_heads], dim=1)
        qk = rotate(qk, head.cos[positions][None, None], head.sin[positions][None, None])
        q, k = qk.split([layer.heads, layer.kv_heads], dim=1)
        keys.append(k.repeat_interleave(layer.groups, dim=1))
        values.append(v.repeat_interleave(layer.groups, dim=1))
        mixed = _attend(q, keys, values).transpose(1, 2).flatten(2)
        residual = normed if head.config.norm_before_residual else feature
        hidden = residual + layer.o(mixed.flatten(0, 1)).view_as(residual)
        inner, up = layer.gate_up(layer.mlp_norm(hidden).flatten(0, 1)).chunk(2, dim=-1)
        hidden = hidden + layer.down(F.silu(inner) * up).view_as(hidden)
        feature = head.norm(hidden) if head.config.norm_output else hidden
        yield feature, i


def _attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """q [B, H, S, D] on the true keys up to each slot and on its own key of every later unroll."""
    slots = q.shape[2]
    k, v = keys[0][:, :, :slots], values[0][:, :, :slots]
    hidden = torch.ones(slots, slots, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    own = [(q * later[:, :, :slots]).sum(-1, keepdim=True) for later in keys[1:]]
    weights = (torch.cat([scores, *own], dim=-1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    out = weights[..., :slots] @ v
    for index, later in enumerate(values[1:]):
        out = out + weights[..., slots + index, None] * later[:, :, :slots]
    return out


def ttt_loss(
    head: Any,
    taps: Mapping[int, Tensor],
    tokens: Tensor,
    logits: Tensor,
    config: EagleConfig,
    *,
    wanted: Tensor | None = None,
) -> Tensor:
    """Sum over unrolls of decay^i times the soft cross-entropy (nats), a mean over all slots.

    logits [B, T, V]: the target's. wanted [B, T]: True on tokens to learn (responses), None for
    all. Slots whose target argmax the draft vocabulary lacks add nothing but stay in the mean.
    """
    batch, length = tokens.shape
    return _ttt(head, taps, tokens, logits, config, wanted)[0] / (batch * (length - 1))


def _ttt(
    head: Any,
    taps: Mapping[int, Tensor],
    tokens: Tensor,
    logits: Tensor,
    config: EagleConfig,
    wanted: Tensor | None,
) -> tuple[Tensor, int]:
    """(`ttt_loss` as a sum over slots, counted slots whose first draft is the target's choice)."""
    known = torch.zeros(logits.shape[-1], dtype=torch.bool, device=tokens.device)
    known[head.target_ids] = True
    counts = known[logits.argmax(dim=-1)]  # [B, T]: of the token behind each
    if wanted is not None:
        counts[:, :-1] &= wanted[:, 1:]
        counts[:, -1] = False
    total, hits = logits.new_zeros((), dtype=torch.float32), 0
    for feature, i in unroll(head, taps, tokens, config.unrolls):
        counted = counts[:, 1 + i :]  # only these slots pay for an output product
        draft = head.logits(feature[counted]).float()
        teacher = logits[:, 1 + i :][counted][:, head.target_ids].float().softmax(dim=-1)
        total = total - config.decay**i * (teacher * draft.log_softmax(dim=-1)).sum()
        if i == 0:
            hits = int((draft.argmax(dim=-1) == teacher.argmax(dim=-1)).sum())
    return total, hits


class HeadNetwork(nn.Module):
    """A draft head behind the trainer's interface (objective "eagle3"): the target stays as it is.

    head: a draft head of `model`, trained in place. The embedding is the target's, frozen.
    """

    gated, adapters = False, None

    def __init__(
        self, head: Any, model: Transformer, config: EagleConfig, *, mask_token_id: int
    ) -> None:
        super().__init__()
        for module in head.modules():
            if isinstance(module, Linear):
                module.forget()  # prepared products hold copies of the weights
        self.head, self.config, self.mask_token_id = head.requires_grad_(), config, mask_token_id
        self._model = (model.requires_grad_(False),)  # in a tuple: not a part of what is trained

    @property
    def embed(self) -> nn.Embedding:
        """The target's table."""
        return self._model[0].embed

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return dict(self.named_parameters())

    def forward(self, rows: Rows, objective: Objective) -> Losses:
        """`ttt_loss` of the packed documents as a sum over labels; hits are those of unroll 0."""
        tokens, wanted = padded(rows)
        taps, logits = target_outputs(self._model[0], tokens)
        loss, hits = _ttt(self.head, taps, tokens, logits, self.config, wanted)
        return Losses(loss.new_zeros(()), loss, hits)


def padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Clean rows as (tokens [B, T], wanted [B, T]: True on tokens to learn), zeros behind the end.

    What is behind a text is seen by nothing before it.
    """
    spans = [clean for clean, _ in rows.documents]
    longest = max(span.stop - span.start for span in spans)
    tokens = rows.ids.new_zeros(len(spans), longest)
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    for index, span in enumerate(spans):
        count = span.stop - span.start
        tokens[index, :count] = rows.ids[span]
        wanted[index, 1:count] = (rows.labels[span] != IGNORE)[:-1]
    return tokens, wanted
