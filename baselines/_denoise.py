"""From masks to tokens: the unmasking rules `block_diffusion` and `masked_diffusion` share.

A forward proposes a token and a score for every masked position of a block; a rule says which of
them become tokens. A token is never revised afterwards, so it is final, and committed, as soon as
everything before it is final too. Proposals are made on the device, the choice among the few
positions of a block on the host: one transfer a forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

RULES = ("one", "threshold", "steps")
ORDERS = ("confidence", "margin", "entropy")
LAST_NOISE = 1e-3  # where Dream's noise levels end; at 0 the last step would divide by it


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which masked positions of a block a forward turns into tokens.

    kind: "one" (the best scored; the paper's block diffusion "max"), "threshold" (every position
    scored at least `threshold`, and always the best), "steps" (the block is done after `steps`
    forwards). linear: of "steps", Dream's noise levels instead of LLaDA's equal portions.
    """

    kind: str
    threshold: float | None = None
    steps: int | None = None
    linear: bool = False

    def choose(self, scores: Mapping[int, float], forward: int, length: int) -> list[int]:
        """Positions to unmask among `scores`, in the block's forward number `forward` (from 0)."""
        best_first = sorted(scores, key=lambda position: (-scores[position], position))
        if self.kind == "threshold":
            sure = [p for p in best_first if scores[p] >= self.threshold]
            return sure or best_first[:1]
        return best_first[: 1 if self.kind == "one" else self.portion(len(scores), forward, length)]

    def portion(self, masked: int, forward: int, length: int) -> int:
        """Of rule "steps": how many of `masked` positions forward number `forward` unmasks."""
        if forward >= self.steps - 1:
            return masked
        if not self.linear:
            return length // self.steps + (forward < length % self.steps)
        t, s = (1 - (1 - LAST_NOISE) * i / self.steps for i in (forward, forward + 1))
        return int(masked * (1 - s / t))


class Block:
    """One block of one sequence on its way from masks to tokens.

    ids: its tokens, the mask token where there is none yet. forwards: how many it has had.
    final: its leading tokens, all committed.
    """

    def __init__(self, length: int, mask_token_id: int) -> None:
        self.ids = [mask_token_id] * length
        self.mask_token_id = mask_token_id
        self.forwards = self.final = 0

    @property
    def done(self) -> bool:
        return self.final == len(self.ids)

    def unmask(
        self,
        rule: Rule,
        tokens: Sequence[int],
        scores: Sequence[float],
        *,
        first_only: bool = False,
    ) -> tuple[int, ...]:
        """Apply a forward's proposals; gives the tokens that became final, left to right."""
        masked = [i for i, token in enumerate(self.ids) if token == self.mask_token_id]
        offered = {i: scores[i] for i in masked}
        chosen = [0] if first_only else rule.choose(offered, self.forwards, len(self.ids))
        for position in chosen:
            self.ids[position] = int(tokens[position])
        self.forwards += 1
        start = self.final
        while not self.done and self.ids[self.final] != self.mask_token_id:
            self.final += 1
        return tuple(self.ids[start : self.final])


def propose(
    logits: Tensor, mask_token_id: int, order: str = "confidence"
) -> tuple[list[list[int]], list[list[float]]]:
    """Per position the likeliest token and its score, [B, K] on the host, from logits [B, K, V].

    Scores in float32 (bfloat16 would tie what differs): the token's probability, its lead over the
    runner-up ("margin"), or the negative entropy. The mask token has probability 0.
    """
    logits = logits.float()
    logits[..., mask_token_id] = float("-inf")
    probs = torch.softmax(logits, dim=-1)
    best, tokens = probs.max(dim=-1)
    if order == "margin":
        top = probs.topk(2, dim=-1).values
        best = top[..., 0] - top[..., 1]
    elif order == "entropy":
        best = -torch.special.entr(probs).sum(dim=-1)
    tokens, scores = torch.stack([tokens.double(), best.double()]).tolist()
    return tokens, scores


def padded(mask: Tensor, width: int) -> Tensor:
    """Extend a square pattern to `width`; padding sees itself only, so no row is empty."""
    out = torch.eye(width, dtype=torch.bool)
    out[: mask.shape[0], : mask.shape[1]] = mask
    return out


def rule_from(
    rule: str, threshold: float | None, steps: int | None, *, linear: bool = False
) -> tuple[Rule, dict[str, Any]]:
    """(the rule, its parameters as a record states them); UserError for what does not fit."""
    if rule not in RULES:
        raise UserError(f"rule {rule!r} is unknown: use one of {', '.join(RULES)}")
    for name, value in (("threshold", threshold), ("steps", steps)):
        if value is not None and rule != name:
            raise UserError(f"{name}={value} has no effect under rule={rule}: use rule={name}")
    if rule == "threshold":
        threshold = 0.9 if threshold is None else threshold
        if not isinstance(threshold, int | float) or not 0.0 <= threshold <= 1.0:
            raise UserError(f"threshold is {threshold}: give a probability from 0 to 1")
        return Rule(kind=rule, threshold=threshold), {"rule": rule, "threshold": threshold}
    if rule == "steps":
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps is {steps}: give the whole number of forwards for one block")
        return Rule(kind=rule, steps=steps, linear=linear), {"rule": rule, "steps": steps}
    return Rule(kind=rule), {"rule": rule}


def check_steps(rule: Rule, length: int) -> None:
    """UserError if a block of `length` tokens is asked to take more forwards than that."""
    if rule.steps is not None and rule.steps > length:
        raise UserError(
            f"steps is {rule.steps} for blocks of {length} tokens: give at most {length}"
        )


def check_mask_token(name: str, mask_token_id: int | None, vocab_size: int) -> None:
    """UserError unless the mask token is an entry of the vocabulary."""
    if mask_token_id is None or not 0 <= mask_token_id < vocab_size:
        raise UserError(
            f"mask token id {mask_token_id} is not in the vocabulary of {vocab_size}: {name}"
            " needs one, pass mask_token_id"
        )


def check_greedy(name: str, sampling: Sampling) -> None:
    """UserError for temperature > 0: which tokens are drawn would change which are drawn next."""
    if sampling.mode != "greedy":
        raise UserError(
            f"{name} unmasks by confidence, which has no exact distribution to sample from:"
            f" temperature {sampling.temperature} is refused, use temperature 0"
        )
