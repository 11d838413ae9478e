"""`tidar`: verify last step's draft and pre-draft for every outcome in one forward (section 3.2).

Each step sends K drafted tokens (causal) and K blocks of K mask tokens (block j proposes what
follows if exactly j drafts are committed). The drafts' logits decide how many are committed; the
block of that outcome is the next draft, its first token being the verification token itself, so
that beta = 1 ("Trust AR") is greedy AR of the same weights, token for token.

Accounting: a token counts as committed when it is final. The verification token v_r is final in the
step that computes it, so a step commits d_1..d_{r-1}, v_r: r tokens, 1 <= r <= K.

With `outcomes` only those blocks are sent; `tidar_ref.outcomes` says what then follows an outcome
that was not drafted. Drafts may then be shorter than K: the query is padded behind them with mask
tokens, which nothing kept ever sees and which can never be accepted.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tidar_ref import graphed
from tidar_ref.cache import KVCache
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.masks import outcome_mask, outcome_positions, prefill_mask
from tidar_ref.model import Transformer
from tidar_ref.outcomes import layout, next_draft, parse_outcomes
from tidar_ref.sampling import Sampling, choose, draw, leading_matches, mix, probabilities, reject

BLOCK_LENS = range(2, 17)
TEXT_PARAMETERS = ("outcomes",)
STAND_INS = graphed.STAND_INS


class TidarState(State):
    """State plus the draft [B, K] (its first token is already committed) and, in mode "reject",
    draft_probs [B, K-1, V], the distributions its other tokens were drawn from. Of the draft,
    draft_len [B] tokens count, the rest is padding; `lengths` is the host's copy."""

    def __init__(self, *, draft: Tensor, draft_probs: Tensor | None, **rest: Any) -> None:
        super().__init__(**rest)
        self.draft = draft
        self.draft_probs = draft_probs
        self.lengths = [draft.shape[1]] * draft.shape[0]
        self.draft_len = torch.tensor(self.lengths, device=draft.device)


class TidarDecoder:
    """TiDAR with all K outcomes drafted, or the given ones; the query width never changes.

    block_len: K in 2..16. beta: weight of the AR logits in the verification mixture, 0..1.
    outcomes: which of 1..K are drafted ("1-4-8"), None for all. mask_token_id: the vocabulary
    entry used as mask; it is never drafted.
    """

    name = "tidar"

    def __init__(
        self,
        model: Transformer,
        *,
        mask_token_id: int,
        block_len: int = 8,
        beta: float = 1.0,
        outcomes: str | int | None = None,
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
        params: dict[str, Any] = {"block_len": block_len, "beta": self.beta}
        every = tuple(range(1, block_len + 1))
        self.outcomes = every if outcomes is None else parse_outcomes(outcomes, block_len)
        if outcomes is not None:
            params["outcomes"] = outcomes
        if self.beta < 1.0 and self.outcomes != every:
            # The text would depend on which blocks happened to be drafted.
            raise UserError(
                f"beta {self.beta:g} mixes in the first slot of every outcome's block, but only"
                f" outcomes {outcomes} are drafted: use beta=1 with chosen outcomes"
            )
        self.params = MappingProxyType(params)
        self.lossless = self.beta == 1.0
        masks = block_len * len(self.outcomes)
        # The last step may commit up to K tokens past the limit; masks and drafts lie behind those.
        self.scratch = 2 * block_len + masks
        self.width = block_len + masks
        self.most = block_len  # tokens a step commits at most
        self.columns = block_len + 2  # of a report
        self.new_mask = outcome_mask(block_len, self.outcomes).to(model.device)
        self.offsets = outcome_positions(block_len, self.outcomes).to(model.device)
        self.mask_ids = torch.full(
            (1, masks), mask_token_id, dtype=torch.int64, device=model.device
        )
        self._tabulate()

    def _tabulate(self) -> None:
        """The rules of `tidar_ref.outcomes` as tables on the device.

        Rows stand for the draft's length L = 1..K, columns of the last two for the outcome 1..K.
        """
        k, device = self.block_len, self.model.device
        layouts = [layout(self.outcomes, length) for length in range(1, k + 1)]
        chosen = [[next_draft(drafted, r, k) for r in range(1, k + 1)] for drafted in layouts]
        self.short_masks = torch.stack([outcome_mask(k, drafted) for drafted in layouts]).to(device)
        self.short_offsets = torch.stack([outcome_positions(k, d) for d in layouts]).to(device)
        self.block_of, self.length_after = torch.tensor(chosen, device=device).unbind(dim=2)

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
        """Verify the draft, commit r tokens, take the block of outcome r (or what serves it)."""
        k, cache, sampling = self.block_len, state.cache, state.sampling
        batch, lengths = state.draft.shape[0], state.lengths
        before = tuple(cache.lengths)
        ids = torch.cat([state.draft, self.mask_ids.expand(batch, -1)], dim=1)
        mask, offsets = self.new_mask, self.offsets
        if min(lengths) < k:
            at = lengths[0] - 1 if batch == 1 else state.draft_len - 1
            mask, offsets = self.short_masks[at], self.short_offsets[at]
        hidden = self.model(ids, cache.kv_len[:, None] + offsets, cache, mask)
        held = (state.draft, state.draft_len, state.draft_probs)
        following, _, report = self._decide(hidden, held, sampling, state.generator)
        state.draft, state.draft_len, state.draft_probs = following
        # One transfer to the host a step: how many were committed, and which.
        trace, counts, state.lengths = self.trace(
            report.tolist(), lengths, before, tuple(state.active)
        )
        cache.advance(counts)
        return trace

    def _decide(
        self,
        hidden: Tensor,
        held: tuple[Tensor, Tensor, Tensor | None],
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor, Tensor]:
        """The half of a step behind the backbone, all of it on the device.

        held: draft, draft_len, draft_probs. Returns theirs of the next step, r [B], and the report
        [B, K + 2]: r, next length, d_1..d_{K-1}, the token after d_{r-1}.
        """
        draft, draft_len, draft_probs = held
        k = self.block_len
        mixed = self._mixed(self.model.lm_head(hidden[:, :k]), hidden[:, k::k])  # p of v_1..v_K
        r, following = verify_draft(draft, mixed, draft_probs, sampling, generator, draft_len)
        # Only the chosen block goes through the LM head: K-1 rows instead of K*K. Of a block for a
        # smaller outcome the slots up to P+r are skipped; what lies past its end is padding.
        row = (draft_len - 1, r - 1)
        block, length = self.block_of[row], self.length_after[row]
        slots = (k - length)[:, None] + torch.arange(1, k, device=hidden.device)
        slots = (block + 1)[:, None] * k + slots.clamp_max(k - 1)
        chosen = hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[-1]))
        next_draft, next_probs = self._draft(
            following[:, None], chosen, sampling, generator, length
        )
        report = torch.cat([r[:, None], length[:, None], draft[:, 1:], following[:, None]], 1)
        return (next_draft, length, next_probs), r, report

    def trace(
        self,
        report: list[list[int]],
        lengths: list[int],
        before: tuple[int, ...],
        active: tuple[bool, ...],
    ) -> tuple[StepTrace, list[int], list[int]]:
        """A report as ledger line, tokens each cache row keeps, and the next drafts' lengths.

        lengths: those of the drafts verified; before: the prefix lengths read.
        """
        counts, following, drafts, last = _split(report)
        trace = StepTrace(
            committed=tuple(
                (*draft[: n - 1], token) if a else ()
                for n, draft, token, a in zip(counts, drafts, last, active, strict=True)
            ),
            target_forwards=1,
            query_width=self.width,
            kv_len=before,
            drafted=tuple(n - 1 if a else 0 for n, a in zip(lengths, active, strict=True)),
            accepted=tuple(n - 1 if a else 0 for n, a in zip(counts, active, strict=True)),
            draft_tokens=tuple(
                tuple(draft[: n - 1]) if a else ()
                for n, draft, a in zip(lengths, drafts, active, strict=True)
            ),
        )
        return trace, [n if a else 0 for n, a in zip(counts, active, strict=True)], following

    def held(self, state: TidarState) -> tuple[Tensor, ...]:
        """What `turn` starts from, after a prefill."""
        return state.draft, state.draft_len

    def turn(
        self, held: tuple[Tensor, ...], cache: KVCache
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """A greedy step without the host: what the next starts from, r [B], the report.

        Shapes depend on nothing but the cache's view; `tidar_ref.graphed` captures it.
        """
        draft, draft_len = held
        ids = torch.cat([draft, self.mask_ids.expand(draft.shape[0], -1)], dim=1)
        mask, offsets = self.new_mask, self.offsets
        if self.outcomes != tuple(range(1, self.block_len + 1)):  # drafts may be short
            mask, offsets = self.short_masks[draft_len - 1], self.short_offsets[draft_len - 1]
        hidden = self.model(ids, cache.kv_len[:, None] + offsets, cache, mask)
        (*following, _), r, report = self._decide(hidden, (*held, None), Sampling(), None)
        return tuple(following), r, report

    def _mixed(self, ar_logits: Tensor, first_slots: Tensor) -> Tensor:
        """Verification logits from the AR logits and the first slots' hidden states of the blocks.

        At beta = 1 the AR logits are returned untouched and the slots skip the head.
        """
        if self.beta == 1.0:
            return ar_logits
        return mix(ar_logits, self._without_mask_token(first_slots), self.beta)

    def _draft(
        self,
        first: Tensor,
        slots: Tensor,
        sampling: Sampling,
        generator: torch.Generator,
        length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Next draft [B, K] from its first token [B, 1] and the hidden states of slots 1..K-1.

        Tokens from `length` [B] on are padding: mask tokens.
        """
        logits = self._without_mask_token(slots)
        probs = None
        if sampling.mode == "reject":
            probs = probabilities(logits, sampling.temperature)
            rest = draw(probs, generator)
        else:
            rest = logits.argmax(dim=-1)
        if length is not None:
            padding = torch.arange(1, rest.shape[1] + 1, device=rest.device) >= length[:, None]
            rest = rest.masked_fill(padding, self.mask_token_id)
        return torch.cat([first, rest], dim=1), probs

    def _without_mask_token(self, hidden: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        logits[..., self.mask_token_id].fill_(float("-inf"))
        return logits


def build(
    model: Transformer, *, mask_token_id: int, **params: Any
) -> TidarDecoder | graphed.StaticDecoder:
    """The `tidar` decoder: block_len (K), beta, outcomes, and graphs or static (`graphed`)."""
    burst, params = graphed.split_params(params)
    unknown = sorted(set(params) - {"block_len", "beta", "outcomes"})
    if unknown:
        raise UserError(
            f"decoder tidar has no parameter {', '.join(unknown)}: use block_len, beta, outcomes,"
            " graphs"
        )
    return graphed.wrap(TidarDecoder(model, mask_token_id=mask_token_id, **params), burst)


def verify_draft(
    draft: Tensor,
    logits: Tensor,
    draft_probs: Tensor | None,
    sampling: Sampling,
    generator: torch.Generator,
    draft_len: Tensor,
) -> tuple[Tensor, Tensor]:
    """(r [B], the token after d_{r-1} [B]) of a draft [B, K], for every sampling mode.

    logits [B, K, V]: those of the token after each d_i. draft_probs [B, K-1, V] only in mode
    "reject". draft_len [B]: tokens of the draft that count, 1 <= r <= draft_len.
    """
    if sampling.mode == "reject":
        # An infinite q is never accepted and leaves the residual p: right for padding.
        padding = torch.arange(1, draft.shape[1], device=draft.device) >= draft_len[:, None]
        q = draft_probs.masked_fill(padding[:, :, None], float("inf"))
        return reject(draft, probabilities(logits, sampling.temperature), q, generator)
    verified = choose(logits, sampling, generator)
    r = leading_matches(draft, verified).minimum(draft_len)
    return r, verified.gather(1, (r - 1)[:, None])[:, 0]


def _split(
    report: list[list[int]],
) -> tuple[list[int], list[int], list[list[int]], list[int]]:
    """Columns of a step's report: r, next length, d_1..d_{K-1}, the token after d_{r-1}."""
    return (
        [row[0] for row in report],
        [row[1] for row in report],
        [row[2:-1] for row in report],
        [row[-1] for row in report],
    )


def _padded(mask: Tensor, width: int) -> Tensor:
    """Extend a square pattern to `width`; padding sees itself only, so no row is empty."""
    padded = torch.eye(width, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded
