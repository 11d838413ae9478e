"""`prompt_lookup`: drafts copied from prompt and generated text, verified in one forward.

The last n tokens (n = 3, then 2, then 1) are looked up in all text so far; what followed their
latest occurrence is the draft. A copy that runs into the end of the text goes on in itself, so a
loop is drafted whole. No network drafts: the cheapest speculation there is, and lossless.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tidar_ref.cache import KVCache
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.masks import causal_mask
from tidar_ref.model import Transformer
from tidar_ref.sampling import Sampling, choose
from tidar_ref.tidar import verify_draft

DRAFT_LENS, NGRAMS = range(1, 33), range(1, 9)


class NgramIndex:
    """Text of one sequence; for each n-gram up to `max_ngram` what followed it last."""

    def __init__(self, max_ngram: int, tokens: Sequence[int]) -> None:
        self.max_ngram = max_ngram
        self.tokens: list[int] = []
        self.followed_at: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; an n-gram counts once something has followed it."""
        for token in tokens:
            end = len(self.tokens)
            for n in range(1, min(self.max_ngram, end) + 1):
                self.followed_at[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """The next `count` tokens if the text repeats itself, or none if its end is new."""
        end = len(self.tokens)
        for n in range(min(self.max_ngram, end), 0, -1):
            start = self.followed_at.get(tuple(self.tokens[end - n :]))
            if start is not None:
                # Tokens from `start` to the end, over and over.
                return [self.tokens[start + i % (end - start)] for i in range(count)]
        return []


class PromptLookupState(State):
    """State plus one index per sequence, whose last token is committed but not cached yet."""

    def __init__(self, *, texts: list[NgramIndex], **rest: Any) -> None:
        super().__init__(**rest)
        self.texts = texts


class PromptLookupDecoder:
    """draft_len: tokens drafted when there is a match, 1..32. max_ngram: longest key, 1..8.

    A step without a match is an `ar` step. The draft is certain, not drawn: in mode "reject" it is
    accepted with probability p(d), and after a rejection p without d is drawn from.
    """

    name = "prompt_lookup"
    lossless = True

    def __init__(self, model: Transformer, *, draft_len: int = 10, max_ngram: int = 3) -> None:
        for key, value, allowed in (
            ("draft_len", draft_len, DRAFT_LENS),
            ("max_ngram", max_ngram, NGRAMS),
        ):
            if not isinstance(value, int) or value not in allowed:
                raise UserError(
                    f"{key} is {value}: give a whole number from {allowed[0]} to {allowed[-1]}"
                )
        self.model, self.draft_len, self.max_ngram = model, draft_len, max_ngram
        self.params = MappingProxyType({"draft_len": draft_len, "max_ngram": max_ngram})
        # The last step may commit draft_len tokens past the limit and others draft behind those.
        self.scratch = 2 * (draft_len + 1)
        self.mask = causal_mask(draft_len + 1).to(model.device)

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[PromptLookupState, StepTrace]:
        """One causal forward over the (right-padded) prompts; commits the first token of each."""
        model, lengths = self.model, [len(p) for p in prompts]
        width, batch = max(lengths), len(prompts)
        cache = KVCache(
            model.config,
            batch=batch,
            max_len=width + max_new_tokens,
            scratch=self.scratch,
            dtype=model.dtype,
            device=model.device,
        )
        ids = _padded(prompts, width).to(model.device)
        positions = torch.arange(width, device=model.device).expand(batch, width)
        hidden = model(ids, positions, cache, causal_mask(width).to(model.device))
        cache.advance(lengths)
        last = torch.tensor(lengths, device=model.device) - 1
        rows = torch.arange(batch, device=model.device)
        generator = sampling.generator(model.device)
        token = choose(model.lm_head(hidden[rows, last]), sampling, generator).tolist()
        state = PromptLookupState(
            cache=cache,
            active=[True] * batch,
            sampling=sampling,
            generator=generator,
            texts=[
                NgramIndex(self.max_ngram, [*prompt, first])
                for prompt, first in zip(prompts, token, strict=True)
            ],
        )
        none = (0,) * batch
        return state, StepTrace(
            committed=tuple((t,) for t in token),
            target_forwards=1,
            query_width=width,
            kv_len=none,
            drafted=none,
            accepted=none,
        )

    def step(self, state: PromptLookupState) -> StepTrace:
        """Look up, verify in one forward, commit 1 to draft_len + 1 tokens."""
        cache, active, device = state.cache, list(state.active), self.model.device
        before = tuple(cache.lengths)
        # Query of a row: its uncached token, then the draft; the shorter rows are padded.
        queries = [
            [text.tokens[-1], *(text.draft(self.draft_len) if a else ())]
            for text, a in zip(state.texts, active, strict=True)
        ]
        lengths = [len(query) for query in queries]
        width = max(lengths)
        ids = _padded(queries, width).to(device)
        positions = cache.kv_len[:, None] + torch.arange(width, device=device)
        mask = None if width == 1 else self.mask[:width, :width]
        hidden = self.model(ids, positions, cache, mask)
        r, following = verify_draft(
            ids,
            self.model.lm_head(hidden),
            self._certain(ids, state.sampling),
            state.sampling,
            state.generator,
            torch.tensor(lengths, device=device),
        )
        committed = tuple(
            (*query[1:count], token) if a else ()
            for query, count, token, a in zip(
                queries, r.tolist(), following.tolist(), active, strict=True
            )
        )
        cache.advance([len(tokens) for tokens in committed])
        for text, tokens in zip(state.texts, committed, strict=True):
            text.extend(tokens)
        return StepTrace(
            committed=committed,
            target_forwards=1,
            query_width=width,
            kv_len=before,
            drafted=tuple(n - 1 for n in lengths),
            accepted=tuple(max(0, len(tokens) - 1) for tokens in committed),
            draft_tokens=tuple(tuple(query[1:]) for query in queries),
        )

    def _certain(self, ids: Tensor, sampling: Sampling) -> Tensor | None:
        """The draft's distribution [B, W-1, V]: all its weight on the drafted token."""
        if sampling.mode != "reject":
            return None
        vocab = self.model.config.vocab_size
        return torch.nn.functional.one_hot(ids[:, 1:], vocab).float()


def build(
    model: Transformer, *, mask_token_id: int | None = None, **params: Any
) -> PromptLookupDecoder:
    """The `prompt_lookup` decoder with parameters draft_len and max_ngram."""
    unknown = sorted(set(params) - {"draft_len", "max_ngram"})
    if unknown:
        raise UserError(
            f"decoder prompt_lookup has no parameter {', '.join(unknown)}: use draft_len, max_ngram"
        )
    return PromptLookupDecoder(model, **params)


def _padded(rows: list[list[int]], width: int) -> Tensor:
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids
