"""`ar`: one token per forward with an exact cache; the 1.00x of every table."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tidar_ref import graphed
from tidar_ref.cache import KVCache
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.masks import causal_mask
from tidar_ref.model import Transformer
from tidar_ref.sampling import Sampling, choose

STAND_INS = graphed.STAND_INS


class AutoregressiveDecoder:
    """Next-token decoding, greedy or sampled."""

    name = "ar"
    lossless = True
    scratch = 0
    width, most, columns = 1, 1, 1  # of a step: query tokens, commits at most, report columns

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.params = MappingProxyType({})

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[State, StepTrace]:
        """One causal forward over the (right-padded) prompts; commits the first token of each."""
        model, lengths = self.model, [len(p) for p in prompts]
        width, batch = max(lengths), len(prompts)
        cache = KVCache(
            model.config,
            batch=batch,
            max_len=width + max_new_tokens,
            scratch=0,
            dtype=model.dtype,
            device=model.device,
        )
        ids = torch.zeros(batch, width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(width, device=model.device).expand(batch, width)
        mask = causal_mask(width).to(model.device)
        hidden = model(ids.to(model.device), positions, cache, mask)
        last = torch.tensor(lengths, device=model.device) - 1
        rows = torch.arange(batch, device=model.device)
        generator = sampling.generator(model.device)
        token = choose(model.lm_head(hidden[rows, last]), sampling, generator)
        cache.advance(lengths)
        state = ARState(
            cache=cache,
            active=[True] * batch,
            sampling=sampling,
            generator=generator,
            pending=token[:, None],
        )
        return state, _trace(token.tolist(), [True] * batch, width, (0,) * batch)

    def step(self, state: ARState) -> StepTrace:
        """Read the pending token, commit the next one."""
        cache = state.cache
        before = tuple(cache.lengths)
        hidden = self.model(state.pending, cache.kv_len[:, None], cache, None)
        token = choose(self.model.lm_head(hidden[:, 0]), state.sampling, state.generator)
        state.pending = token[:, None]
        active = list(state.active)
        cache.advance([int(a) for a in active])
        return _trace(token.tolist(), active, 1, before)

    def held(self, state: ARState) -> tuple[Tensor, ...]:
        """What `turn` starts from, after a prefill."""
        return (state.pending,)

    def turn(
        self, held: tuple[Tensor, ...], cache: KVCache
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """A greedy step without the host: next pending token, 1 for each row, the report [B, 1]."""
        hidden = self.model(held[0], cache.kv_len[:, None], cache, None)
        token = self.model.lm_head(hidden[:, 0]).argmax(dim=-1)[:, None]
        return (token,), torch.ones_like(token[:, 0]), token

    def trace(
        self,
        report: list[list[int]],
        lengths: list[int],
        before: tuple[int, ...],
        active: tuple[bool, ...],
    ) -> tuple[StepTrace, list[int], list[int]]:
        """A report as ledger line, and the tokens each cache row keeps."""
        trace = _trace([row[0] for row in report], list(active), 1, before)
        return trace, [int(a) for a in active], lengths


class ARState(State):
    """State plus pending [B, 1], the committed tokens whose K/V is not in the cache yet."""

    def __init__(self, *, pending: Tensor, **rest: Any) -> None:
        super().__init__(**rest)
        self.pending = pending


def build(
    model: Transformer, *, mask_token_id: int | None = None, **params: Any
) -> AutoregressiveDecoder | graphed.StaticDecoder:
    """The `ar` decoder; graphs or static (`tidar_ref.graphed`) is all it can be told."""
    burst, params = graphed.split_params(params)
    if params:
        raise UserError(f"decoder ar takes no parameter {', '.join(sorted(params))}: remove it")
    return graphed.wrap(AutoregressiveDecoder(model), burst)


def _trace(tokens: list[int], active: list[bool], width: int, kv_len: tuple[int, ...]) -> StepTrace:
    none = (0,) * len(tokens)
    return StepTrace(
        committed=tuple((t,) if a else () for t, a in zip(tokens, active, strict=True)),
        target_forwards=1,
        query_width=width,
        kv_len=kv_len,
        drafted=none,
        accepted=none,
    )
