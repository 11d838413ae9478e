"""`eagle3`: a one-layer head drafts from the target's own features, one forward verifies (EAGLE-3).

A chain of `depth` drafts, or (top_k > 1) a dynamic tree: every level the head proposes top_k
children for each of the top_k best nodes, and the `nodes` likeliest of all are verified at once
(EAGLE-2's tree, arXiv 2406.16858). A step drafts, verifies, keeps K/V of the accepted path, and
runs the head over what was committed with the target's true features, so that nothing it guessed
stays in its cache: `depth` draft forwards and one target forward a step.

Acceptance: greedy and `match` let the target choose a token at every node and follow the drafts
that agree. `reject` draws a chain's drafts and accepts with min(1, p/q). The children of a tree's
node are certain, not drawn; trying them one after the other, each with its share of what is left of
p (the published rule), is drawing from p once and asking whether a child says so: there `reject` is
`match`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from baselines._eagle3_files import load_head
from baselines._eagle3_head import EagleHead
from tidar_ref.cache import KVCache
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.masks import causal_mask
from tidar_ref.model import Transformer
from tidar_ref.sampling import Sampling, choose, draw, probabilities
from tidar_ref.tidar import verify_draft

DEPTHS, TOP_KS, NODES = range(1, 17), range(1, 33), range(1, 257)
TEXT_PARAMETERS = ("head",)
STAND_INS = {"head": "random"}  # a head fits one target: what checks parameters on another model


class EagleState(State):
    """State plus the head's cache, feature [B, H] (what it returned for the last committed token)
    and pending [B], the committed tokens whose K/V is not in the target's cache yet."""

    def __init__(
        self, *, head_cache: KVCache, feature: Tensor, pending: Tensor, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.head_cache, self.feature, self.pending = head_cache, feature, pending


class EagleDecoder:
    """head: a folder, a name under results/heads/, "random" (untrained), or a network.

    depth: levels of drafts, 1..16; a chain (top_k 1) has one draft a level. top_k: children per
    node and nodes extended per level, 1..32. nodes: drafts verified, 1..256 (60 if not given).
    """

    name = "eagle3"
    lossless = True

    def __init__(
        self,
        model: Transformer,
        *,
        head: str | EagleHead | None = None,
        depth: int = 5,
        top_k: int = 1,
        nodes: int | None = None,
    ) -> None:
        for key, value, allowed in (("depth", depth, DEPTHS), ("top_k", top_k, TOP_KS)):
            if not isinstance(value, int) or value not in allowed:
                raise UserError(
                    f"{key} is {value}: give a whole number from {allowed[0]} to {allowed[-1]}"
                )
        if head is None:
            raise UserError(
                "decoder eagle3 needs a draft head: give head=<folder or name>, or head=random for"
                " an untrained one"
            )
        if model.mask_adapter is not None:
            # A drafted mask token would switch the adapter on where AR has none.
            raise UserError(
                "eagle3 verifies plain rows, these weights have an adapter that acts on mask"
                " tokens: load their base"
            )
        self.model, self.depth, self.top_k = model, depth, top_k
        self.drafter = head if not isinstance(head, str | int) else load_head(str(head), model)
        params: dict[str, Any] = {"head": self.drafter.name if head is self.drafter else head}
        params["depth"] = depth
        self.nodes = self._checked_nodes(nodes)
        if top_k > 1:
            params |= {"top_k": top_k, "nodes": self.nodes}
        self.params = MappingProxyType(params)
        # The last step may commit depth + 1 tokens past the limit; drafts lie behind those.
        self.scratch = depth + 1 + max(self.nodes, depth * top_k) + 1
        self.causal = causal_mask(self.nodes + 1).to(model.device)

    @property
    def provenance(self) -> dict[str, str]:
        """What a record's header says of the head."""
        sha256 = self.drafter.sha256
        return {} if sha256 is None else {"head_sha256": sha256}

    def _checked_nodes(self, nodes: int | None) -> int:
        if self.top_k == 1:
            if nodes not in (None, self.depth):
                raise UserError(
                    f"nodes is {nodes}, but a chain (top_k=1) verifies depth={self.depth} drafts:"
                    " leave it out"
                )
            return self.depth
        pool = self.top_k + (self.depth - 1) * self.top_k**2
        nodes = min(60, pool) if nodes is None else nodes
        if not isinstance(nodes, int) or nodes not in NODES or nodes > pool:
            raise UserError(
                f"nodes is {nodes}: give a whole number from 1 to {min(NODES[-1], pool)}, as many"
                f" drafts as depth={self.depth} and top_k={self.top_k} make"
            )
        if self.top_k > (vocab := len(self.drafter.target_ids)):
            raise UserError(f"top_k is {self.top_k}, but the head drafts {vocab} tokens: lower it")
        return nodes

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[EagleState, StepTrace]:
        """One forward of the target and one of the head over the prompts; commits one token."""
        model, lengths = self.model, [len(p) for p in prompts]
        width, batch, device = max(lengths), len(prompts), model.device
        cache = KVCache(
            model.config,
            batch=batch,
            max_len=width + max_new_tokens,
            scratch=self.scratch,
            dtype=model.dtype,
            device=device,
        )
        ids = torch.zeros(batch, width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(device)
        positions = torch.arange(width, device=device).expand(batch, width)
        taps: dict[int, Tensor] = {}
        hidden = model(ids, positions, cache, causal_mask(width).to(device), taps)
        cache.advance(lengths)
        ends = torch.tensor(lengths, device=device)
        rows = torch.arange(batch, device=device)
        generator = sampling.generator(device)
        token = choose(model.lm_head(hidden[rows, ends - 1]), sampling, generator)
        state = EagleState(
            cache=cache,
            active=[True] * batch,
            sampling=sampling,
            generator=generator,
            head_cache=self.drafter.new_cache(
                batch=batch, max_len=width + max_new_tokens, scratch=self.scratch
            ),
            feature=hidden[:, 0],
            pending=token,
        )
        shifted = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        shifted[rows, ends - 1] = token
        self._catch_up(state, shifted, self.drafter.fuse(taps), lengths)
        none = (0,) * batch
        return state, StepTrace(
            committed=tuple((t,) for t in token.tolist()),
            target_forwards=1,
            draft_forwards=1,
            query_width=width,
            kv_len=none,
            drafted=none,
            accepted=none,
        )

    def step(self, state: EagleState) -> StepTrace:
        """Draft, verify in one forward, commit 1 to depth + 1 tokens, show them to the head."""
        before, active = tuple(state.cache.lengths), list(state.active)
        if self.top_k == 1:
            ids, path, r, following, taps = self._chain_step(state)
        else:
            ids, path, r, following, taps = self._tree_step(state)
        report = torch.cat([r[:, None], following[:, None], path, ids], dim=1).tolist()
        counts = [row[0] if a else 0 for row, a in zip(report, active, strict=True)]
        width = max(1, *counts)
        path = path[:, :width]
        if self.top_k == 1:
            state.cache.advance(counts)
        else:
            state.cache.keep(path, counts)
        # Row b: its accepted drafts, then the target's own token; what follows is padding.
        kept = torch.cat([ids.gather(1, path)[:, 1:], following[:, None]], dim=1)
        kept.scatter_(1, r.clamp_max(width)[:, None] - 1, following[:, None])
        chosen = path[:, :, None]
        true = {
            index: taps[index].gather(1, chosen.expand(-1, -1, taps[index].shape[-1]))
            for index in set(self.drafter.config.taps)
        }
        self._catch_up(state, kept, self.drafter.fuse(true), counts)
        state.pending = following
        drafts = [_told(row, self.depth + 1, a) for row, a in zip(report, active, strict=True)]
        return StepTrace(
            committed=tuple(
                (*draft[: row[0] - 1], row[1]) if a else ()
                for row, draft, a in zip(report, drafts, active, strict=True)
            ),
            target_forwards=1,
            draft_forwards=self.depth,
            query_width=self.nodes + 1,
            kv_len=before,
            drafted=tuple(len(draft) for draft in drafts),
            accepted=tuple(max(0, count - 1) for count in counts),
            draft_tokens=tuple(drafts),
        )

    def _catch_up(
        self, state: EagleState, tokens: Tensor, features: Tensor, counts: list[int]
    ) -> None:
        """The head over committed tokens [B, W] and the true features [B, W, H] before them.

        Of row b the first counts[b] count. What the last one gives is the next first draft's.
        """
        cache, width = state.head_cache, tokens.shape[1]
        steps = torch.arange(width, device=tokens.device)
        mask = None if width == 1 else causal_mask(width).to(tokens.device)
        hidden = self.drafter(tokens, cache.kv_len[:, None] + steps, cache, mask, features)
        rows = torch.arange(len(counts), device=tokens.device)
        last = torch.tensor(counts, device=tokens.device).clamp_min(1) - 1
        state.feature = hidden[rows, last]
        cache.advance(counts)

    # --- chain ---

    def _chain_step(self, state: EagleState) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """(ids [B, depth+1], path [B, depth+1], r [B], the token after r tokens [B], taps)."""
        drafts, probs = self._draft_chain(state)
        ids = torch.cat([state.pending[:, None], drafts], dim=1)
        width = ids.shape[1]
        path = torch.arange(width, device=ids.device).expand(ids.shape)
        taps: dict[int, Tensor] = {}
        positions = state.cache.kv_len[:, None] + path
        hidden = self.model(ids, positions, state.cache, self.causal, taps)
        full = torch.full_like(state.pending, width)
        logits = self.model.lm_head(hidden)
        r, following = verify_draft(ids, logits, probs, state.sampling, state.generator, full)
        return ids, path, r, following, taps

    def _draft_chain(self, state: EagleState) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, depth] and, in mode "reject", the distributions [B, depth, V] behind them."""
        head, cache, sampling = self.drafter, state.head_cache, state.sampling
        batch, feature = len(cache.lengths), state.feature[:, None]
        tokens, probs = [], []
        for level in range(self.depth):
            if level:
                feature = head(tokens[-1], cache.kv_len[:, None], cache, None, feature)
                cache.advance([1] * batch)
            logits = head.logits(feature)  # [B, 1, Vd]
            if sampling.mode == "reject":
                q = probabilities(logits, sampling.temperature)
                probs.append(q.new_zeros(batch, 1, self.model.config.vocab_size))
                probs[-1][:, :, head.target_ids] = q
                tokens.append(head.target_ids[draw(q, state.generator)])
            else:
                tokens.append(head.target_ids[logits.argmax(dim=-1)])
        cache.advance([1 - self.depth] * batch)  # guessed features do not stay
        return torch.cat(tokens, dim=1), torch.cat(probs, dim=1) if probs else None

    # --- tree ---

    def _tree_step(self, state: EagleState) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """As `_chain_step` with the nodes of a tree as ids and an accepted path through it."""
        tokens, parents = self._draft_tree(state)
        ids = torch.cat([state.pending[:, None], tokens], dim=1)
        mask = ancestors(parents, self.depth)
        positions = state.cache.kv_len[:, None] + mask.sum(dim=2) - 1
        taps: dict[int, Tensor] = {}
        hidden = self.model(ids, positions, state.cache, _shared(mask), taps)
        chosen = choose(self.model.lm_head(hidden), state.sampling, state.generator)
        path, r = walk(ids, parents, chosen, self.depth)
        following = chosen.gather(1, path[:, -1:])[:, 0]
        return ids, path, r, following, taps

    def _draft_tree(self, state: EagleState) -> tuple[Tensor, Tensor]:
        """Tokens [B, nodes] of the likeliest nodes and parents [B, nodes+1] in the verified order.

        Node 0 of the order is the pending token, whose parent is -1.
        """
        head, cache, k = self.drafter, state.head_cache, self.top_k
        batch, first = len(cache.lengths), cache.kv_len
        itself = torch.eye(k, dtype=torch.bool, device=first.device).expand(batch, k, k)
        scores, best = head.logits(state.feature).float().log_softmax(dim=-1).topk(k)
        beam = torch.arange(k, device=first.device).expand(batch, k)  # as numbers in the pool
        tokens, feature, seen = head.target_ids[best], state.feature[:, None], itself
        feature = feature.expand(-1, k, -1)
        pool = [(tokens, scores, torch.full_like(beam, -1))]
        size = k
        for level in range(1, self.depth):
            positions = (first + level - 1)[:, None].expand(-1, k)
            hidden = head(tokens, positions, cache, _shared(seen), feature)
            cache.advance([k] * batch)
            own, best = head.logits(hidden).float().log_softmax(dim=-1).topk(k)
            of_children = (scores[:, :, None] + own).flatten(1)  # [B, k * k]
            children = head.target_ids[best].flatten(1)
            pool.append((children, of_children, beam.repeat_interleave(k, dim=1)))
            scores, at = of_children.topk(k)
            tokens, beam, parent = children.gather(1, at), at + size, at // k
            feature = hidden.gather(1, parent[:, :, None].expand_as(hidden))
            above = seen.gather(1, parent[:, :, None].expand(-1, -1, seen.shape[2]))
            seen = torch.cat([above, itself], dim=2)
            size += k * k
        cache.advance([-k * (self.depth - 1)] * batch)  # guessed features do not stay
        all_tokens, all_scores, all_parents = (
            torch.cat(parts, dim=1) for parts in zip(*pool, strict=True)
        )
        # Stable: of equal scores the earlier node wins, so a node never comes without its parent.
        order = all_scores.sort(dim=1, descending=True, stable=True).indices
        picked = order[:, : self.nodes].sort(dim=1).values
        place = torch.zeros_like(order).scatter_(
            1, picked, torch.arange(1, self.nodes + 1, device=first.device).expand_as(picked)
        )
        parents = all_parents.gather(1, picked)
        parents = torch.where(parents < 0, 0, place.gather(1, parents.clamp_min(0)))
        root = torch.full_like(parents[:, :1], -1)
        return all_tokens.gather(1, picked), torch.cat([root, parents], dim=1)


def ancestors(parents: Tensor, depth: int) -> Tensor:
    """[B, N, N], True where the column's node is the row's or above it, for parents [B, N]."""
    batch, count = parents.shape
    itself = torch.eye(count, dtype=torch.bool, device=parents.device)
    above = itself.expand(batch, -1, -1)
    row_of_parent = parents.clamp_min(0)[:, :, None].expand(-1, -1, count)
    for _ in range(depth):
        above = itself | above.gather(1, row_of_parent)
    return above


def walk(ids: Tensor, parents: Tensor, chosen: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """(path [B, depth+1], its length r [B]): from the root on to the child that was chosen.

    ids, parents, chosen [B, N]: the nodes' tokens, parents, and the target's choice behind each.
    Past its end a path repeats its last node.
    """
    node = torch.zeros_like(ids[:, :1])
    path, length = [node], torch.ones_like(ids[:, 0])
    for _ in range(depth):
        hit = (parents == node) & (ids == chosen.gather(1, node))
        found = hit.any(dim=1)
        length = length + found
        node = torch.where(found[:, None], hit.long().argmax(dim=1, keepdim=True), node)
        path.append(node)
    return torch.cat(path, dim=1), length


def build(model: Transformer, *, mask_token_id: int | None = None, **params: Any) -> EagleDecoder:
    """The `eagle3` decoder with parameters head, depth, top_k and nodes."""
    unknown = sorted(set(params) - {"head", "depth", "top_k", "nodes"})
    if unknown:
        raise UserError(
            f"decoder eagle3 has no parameter {', '.join(unknown)}: use head, depth, top_k, nodes"
        )
    return EagleDecoder(model, **params)


def _shared(mask: Tensor) -> Tensor:
    """One row's mask [1, Q, S] as the [Q, S] that needs no index per sequence."""
    return mask[0] if mask.shape[0] == 1 else mask


def _told(row: list[int], steps: int, active: bool) -> tuple[int, ...]:
    """The drafts of one row of a step's report, accepted ones first."""
    if not active:
        return ()
    path, ids = row[2 : 2 + row[0]], row[2 + steps :]
    rest = [i for i in range(1, len(ids)) if i not in path]
    return tuple(ids[i] for i in (*path[1:], *rest))
