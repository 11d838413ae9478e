"""`masked_diffusion`: LLaDA's and Dream's decoding, bidirectional over prompt and canvas.

The canvas is gen_length masks behind the prompt, all visible to all. Each forward proposes a token
for every mask of the current block (block_len; without it the whole canvas is one block), a rule
unmasks some, and the next block follows when this one is clean. Without a cache every forward
reads prompt and canvas anew. Fast-dLLM v1's two caches are **approximate**, K/V of a bidirectional
network being right only for the canvas they were computed with:

- cache=prefix: a block's first forward reads everything, and the K/V in front of the block stay;
  the block's other forwards send the block and all behind it.
- cache=dual: the K/V behind the block stay too; the other forwards send only the block. (In the
  cache the block lies last: attention does not care about the order of keys.)

Conventions: "llada", the logits at a mask predict its own position (also what this repository
trains), "dream", the logits one position to the left do. Under "dream" with a cache a block's first
forward settles its first token only, the others' left neighbours not being in later queries
(Fast-dLLM's rule). Dream's "steps" follow its noise levels, LLaDA's are equal portions.

Accounting: a token is committed once it and all before it are tokens. The published samplers always
fill the canvas; the common loop ends a sequence as soon as a stop condition is final, which is to
this method's advantage. The prefill is the first forward of the first block.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from baselines._denoise import (
    ORDERS,
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
from tidar_ref.model import Transformer
from tidar_ref.sampling import Sampling

CACHES = ("none", "prefix", "dual")
CONVENTIONS = ("llada", "dream")
TEXT_PARAMETERS = ("rule", "convention", "cache", "order")


class Canvas:
    """Prompt and blocks of one sequence, and which of its positions the next forward sends."""

    def __init__(self, prompt: list[int], blocks: list[Block], cache: str) -> None:
        self.prompt, self.blocks, self.cache = prompt, blocks, cache
        self.current = 0
        self.fresh = True  # the next forward reads everything

    @property
    def block(self) -> Block:
        return self.blocks[self.current]

    @property
    def start(self) -> int:
        """Position of the current block."""
        return len(self.prompt) + self.current * len(self.block.ids)

    @property
    def kept(self) -> int:
        """Positions whose K/V stay in the cache while the current block is open."""
        length = len(self.block.ids)
        rest = len(self.prompt) + (len(self.blocks) - 1) * length
        return {"none": 0, "prefix": self.start, "dual": rest}[self.cache]

    def query(self) -> tuple[list[int], list[int]]:
        """(token ids, positions) of the next forward, what stays in the cache first."""
        ids = [*self.prompt, *(token for block in self.blocks for token in block.ids)]
        start, end = self.start, self.start + len(self.block.ids)
        order = list(range(len(ids)))
        if self.cache == "dual":
            order = order[:start] + order[end:] + order[start:end]
        order = order[0 if self.fresh else self.kept :]
        return [ids[position] for position in order], order

    def rows(self, shift: int) -> list[int]:
        """Where in the query the logits of the block's positions are.

        Under a shift and without the row in front, the first position gets some row: it is settled.
        """
        at = (self.kept if self.cache == "dual" else self.start) if self.fresh else 0
        rows = [at + slot - shift for slot in range(len(self.block.ids))]
        if shift:
            rows[0] = self.start - 1 if self.fresh else 0
        return rows

    def move_on(self) -> None:
        """After a forward: the next block if this one is clean, else its cached forwards."""
        self.fresh = self.cache == "none" or self.block.done
        if self.block.done and self.current + 1 < len(self.blocks):
            self.current += 1


class CanvasState(State):
    """State plus the canvas of each sequence."""

    def __init__(self, *, canvases: list[Canvas], **rest: Any) -> None:
        super().__init__(**rest)
        self.canvases = canvases


class MaskedDiffusionDecoder:
    """gen_length: tokens of the canvas, a multiple of block_len; without it max_new_tokens, rounded
    up. block_len: tokens of a block, from 2; without it the canvas is one block.

    rule, threshold, steps: as for `block_diffusion`, steps being forwards per block. order: what a
    position is scored by under "one" and "steps". convention: by default that of the weights.
    """

    name = "masked_diffusion"
    lossless = False

    def __init__(
        self,
        model: Transformer,
        *,
        mask_token_id: int | None,
        gen_length: int | None = None,
        block_len: int | None = None,
        rule: str = "threshold",
        threshold: float | None = None,
        steps: int | None = None,
        cache: str = "none",
        convention: str | None = None,
        order: str = "confidence",
    ) -> None:
        check_mask_token(self.name, mask_token_id, model.config.vocab_size)
        for key, value in (("gen_length", gen_length), ("block_len", block_len)):
            if value is not None and (not isinstance(value, int) or value < 2):
                raise UserError(f"{key} is {value}: give a whole number of tokens from 2")
        if gen_length and block_len and gen_length % block_len:
            raise UserError(
                f"gen_length {gen_length} is no multiple of block_len {block_len}: make it one"
            )
        for key, value, known in (
            ("cache", cache, CACHES),
            ("order", order, ORDERS),
            ("convention", convention or CONVENTIONS[0], CONVENTIONS),
        ):
            if value not in known:
                raise UserError(f"{key} {value!r} is unknown: use one of {', '.join(known)}")
        if cache != "none" and block_len is None:
            raise UserError(f"cache={cache} needs blocks to keep K/V between: give block_len")
        if rule == "threshold" and order != "confidence":
            raise UserError(f"order={order} is no probability: use it with rule=one or steps")
        family = model.config.family
        if family in CONVENTIONS and convention not in (None, family):
            raise UserError(
                f"convention={convention} does not fit weights of family {family}: leave it out"
            )
        convention = convention or (family if family in CONVENTIONS else "llada")
        self.rule, chosen = rule_from(rule, threshold, steps, linear=convention == "dream")
        if block_len or gen_length:
            check_steps(self.rule, block_len or gen_length)
        self.model, self.mask_token_id = model, mask_token_id
        self.gen_length, self.block_len, self.cache, self.order = (
            gen_length, block_len, cache, order,
        )  # fmt: skip
        self.shift = int(convention == "dream")
        given = {"gen_length": gen_length, "block_len": block_len}
        self.params = MappingProxyType(
            {key: value for key, value in given.items() if value is not None}
            | chosen
            | {"cache": cache, "convention": convention}
            | ({"order": order} if order != "confidence" else {})
        )
        # Positions the canvas may need past the limit.
        self.scratch = (gen_length or block_len or 1) - 1

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[CanvasState, StepTrace]:
        """Lay out the canvases and send the first forward; commits what it settles, maybe none."""
        check_greedy(self.name, sampling)
        length = self.gen_length or max_new_tokens
        if length < max_new_tokens:
            raise UserError(
                f"gen_length is {length} but {max_new_tokens} new tokens are asked for: raise it or"
                " lower --max-new-tokens"
            )
        block = self.block_len or length
        check_steps(self.rule, block)
        blocks = -(-length // block)
        model, batch = self.model, len(prompts)
        longest = max(len(p) for p in prompts) + blocks * block
        cache = KVCache(
            model.config,
            batch=batch,
            max_len=longest,
            # In a batch one sequence may be inside a block while another reads everything.
            scratch=0 if batch == 1 else longest,
            dtype=model.dtype,
            device=model.device,
        )
        state = CanvasState(
            cache=cache,
            active=[True] * batch,
            sampling=sampling,
            generator=sampling.generator(model.device),
            canvases=[
                Canvas(p, [Block(block, self.mask_token_id) for _ in range(blocks)], self.cache)
                for p in prompts
            ],
        )
        return state, self.step(state)

    def step(self, state: CanvasState) -> StepTrace:
        """One forward, unmask, and keep or drop K/V."""
        cache, canvases, device = state.cache, state.canvases, self.model.device
        before = tuple(cache.lengths)
        queries = [canvas.query() for canvas in canvases]
        lengths = [len(ids) for ids, _ in queries]
        width = max(lengths)
        ids, positions = torch.zeros(2, len(queries), width, dtype=torch.int64)
        for row, (tokens, places) in enumerate(queries):
            ids[row, : lengths[row]] = torch.tensor(tokens)
            positions[row, : lengths[row]] = torch.tensor(places)
        hidden = self.model(ids.to(device), positions.to(device), cache, self._mask(lengths))
        rows = torch.tensor([canvas.rows(self.shift) for canvas in canvases], device=device)
        hidden = hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[-1]))
        tokens, scores = propose(self.model.lm_head(hidden), self.mask_token_id, self.order)

        committed, moved = [], []
        for row, canvas in enumerate(canvases):
            if not state.active[row]:
                committed.append(())
                moved.append(0)
                continue
            first_only = bool(self.shift) and self.cache != "none" and canvas.fresh
            committed.append(
                canvas.block.unmask(self.rule, tokens[row], scores[row], first_only=first_only)
            )
            kept = canvas.kept
            canvas.move_on()
            # The clean block is other text than the cached K/V were computed with: drop them all.
            moved.append((0 if canvas.fresh else kept) - before[row])
        cache.advance(moved)
        none = (0,) * len(canvases)
        return StepTrace(
            committed=tuple(committed),
            target_forwards=1,
            query_width=width,
            kv_len=before,
            drafted=none,
            accepted=none,
        )

    def _mask(self, lengths: list[int]) -> Tensor:
        """All of a sequence's query sees all of it; what pads it to the longest sees itself."""
        width = max(lengths)
        mask = torch.ones(width, width, dtype=torch.bool)
        if min(lengths) < width:
            mask = torch.stack([padded(mask[:n, :n], width) for n in lengths])
        return mask.to(self.model.device)


def build(
    model: Transformer, *, mask_token_id: int | None = None, **params: Any
) -> MaskedDiffusionDecoder:
    """The `masked_diffusion` decoder; its parameters are those of `MaskedDiffusionDecoder`."""
    known = ("gen_length", "block_len", "rule", "threshold", "steps",
             "cache", "convention", "order")  # fmt: skip
    if unknown := sorted(set(params) - set(known)):
        raise UserError(
            f"decoder masked_diffusion has no parameter {', '.join(unknown)}: use"
            f" {', '.join(known)}"
        )
    return MaskedDiffusionDecoder(model, mask_token_id=mask_token_id, **params)
