"""Logits to tokens: greedy match, the two exact sampling rules, AR/diffusion mixing.

Verification at temperature > 0 (our choice where the paper is silent; `docs/method.md`):
`match` draws the verification token from p and accepts while the draft equals it, `reject` accepts
a sampled draft with probability min(1, p/q) and redraws from the residual. Both give exactly p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_ref.errors import UserError

MODES = ("greedy", "match", "reject")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. temperature 0 goes with mode "greedy" and only with it."""

    temperature: float = 0.0
    mode: str = "greedy"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(
                f"sampling mode {self.mode!r} is unknown: use one of {', '.join(MODES)}"
            )
        if self.temperature < 0 or (self.temperature == 0) != (self.mode == "greedy"):
            raise UserError(
                f"temperature {self.temperature} does not go with mode {self.mode!r}: use"
                " temperature 0 with greedy, a positive one with match or reject"
            )

    def generator(self, device: torch.device | str) -> torch.Generator:
        """A fresh random stream seeded with `seed`."""
        return torch.Generator(device=device).manual_seed(self.seed)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) in float32, [..., V]."""
    return torch.softmax(logits.float() / temperature, dim=-1)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """A token id for every row of logits [..., V]: argmax, or a draw from the softmax."""
    if sampling.mode == "greedy":
        return logits.argmax(dim=-1)
    return draw(probabilities(logits, sampling.temperature), generator)


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One draw a row from probs [..., V] (rows need not be normalised)."""
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
    return flat.view(probs.shape[:-1])


def mix(ar_logits: Tensor, diffusion_logits: Tensor, beta: float) -> Tensor:
    """beta * AR + (1 - beta) * diffusion on logits (section 4.4.3), float32, for 0 <= beta < 1."""
    return beta * ar_logits.float() + (1.0 - beta) * diffusion_logits.float()


def leading_matches(draft: Tensor, verified: Tensor) -> Tensor:
    """Committed tokens r in 1..K for draft [B, K] and verification tokens v_1..v_K [B, K].

    r = 1 + number of leading i = 1..K-1 with d_i = v_i (section 3.2; d_0 is never tested).
    """
    same = (draft[:, 1:] == verified[:, :-1]).long()
    return 1 + same.cumprod(dim=1).sum(dim=1)


def reject(
    draft: Tensor, p: Tensor, q: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Speculative sampling of drawn drafts: (r [B] in 1..K, first token of the next draft [B]).

    draft [B, K]; p [B, K, V] where p[:, i] is the target distribution of the token after d_i;
    q [B, K-1, V] where q[:, i-1] is the distribution d_i was drawn from, i = 1..K-1.
    """
    batch, block_len = draft.shape
    tested = draft[:, 1:, None]
    p_draft = p[:, :-1].gather(2, tested).squeeze(2)
    q_draft = q.gather(2, tested).squeeze(2)
    uniform = torch.rand(p_draft.shape, generator=generator, device=p.device)
    accepted = (uniform * q_draft < p_draft).long().cumprod(dim=1)
    r = 1 + accepted.sum(dim=1)
    at = (r - 1)[:, None, None].expand(batch, 1, p.shape[-1])
    # Past the last draft there is nothing to subtract: the residual is p itself.
    padded_q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
    residual = (p.gather(1, at) - padded_q.gather(1, at)).squeeze(1).clamp_min(0.0)
    # p == q up to rounding leaves an all-zero residual; a rejection is then a rounding event too.
    empty = residual.sum(dim=-1, keepdim=True) <= 0
    residual = torch.where(empty, p.gather(1, at).squeeze(1), residual)
    return r, draw(residual, generator)
