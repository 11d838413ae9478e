"""The backbone as a training network: packed rows in, the two losses out, autograd throughout.

Works on the parameters of a `Transformer` in place (full fine-tuning) or on adapters beside frozen
weights. Two streams where the adapter is gated to mask rows: the clean rows then run the base model
without gradients, so the AR half stays exactly the base's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidar_ref.errors import UserError
from tidar_ref.model import Layer, Transformer, rotate
from tidar_ref.training.adapters import PRODUCTS, AdapterConfig, LowRank
from tidar_ref.training.attention import Attend, attention
from tidar_ref.training.rows import IGNORE, Objective, Rows

# Up to this many logits (rows x vocabulary) are kept for the backward pass; of a larger batch the
# logits exist chunk by chunk and are computed again.
KEPT_LOGITS = 100_000_000
HEAD_ROWS = 256


@dataclass(frozen=True)
class Losses:
    """Weighted sums over rows: float32 scalars with gradient.

    `hits` counts mask rows whose most likely token is the label: the draft accuracy while training.
    """

    ar_sum: Tensor
    diffusion_sum: Tensor
    hits: int


class TrainingNetwork(nn.Module):
    """A Transformer's layers behind a packed, differentiable forward.

    adapters None: all parameters of the model train, or with products_only the four matrix products
    of every layer and, for the mask token, one embedding row: what a stored difference can hold.
    With adapters only low-rank matrices and that row do. recompute: drop activations layer by layer
    and compute them again in the backward pass (gradient checkpointing). compiled: torch.compile on
    everything but attention; the same results within float noise.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mask_token_id: int,
        adapters: AdapterConfig | None = None,
        products_only: bool = False,
        recompute: bool = False,
        compiled: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.adapters, self.recompute = model.config, adapters, recompute
        self.mask_token_id = mask_token_id
        self.gated = adapters is not None and adapters.placement == "mask"
        model.requires_grad_(adapters is None and not products_only)
        generator = torch.Generator().manual_seed(seed)
        self.embed, self.norm = model.embed, model.norm
        self.lm_head = None if model.config.tied_embeddings else model.lm_head
        self.layers = nn.ModuleList(
            TrainingLayer(layer, adapters, generator) for layer in model.layers
        )
        self.mask_embedding: nn.Parameter | None = None
        if products_only and adapters is None:
            for layer in model.layers:
                for name in PRODUCTS:
                    getattr(layer, name).weight.requires_grad_()
        if adapters is not None or products_only:
            row = model.embed.weight.data[mask_token_id].float().clone()
            self.mask_embedding = nn.Parameter(row)
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", model.sin, persistent=False)
        self._cross_entropy = _cross_entropy
        if compiled:
            check_compiler(model.device)
            self._cross_entropy = _compiled(_cross_entropy)
            for layer in self.layers:
                layer.compile_products()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, rows: Rows, objective: Objective) -> Losses:
        """Both loss sums over the rows of one packed batch (section 2.4, before averaging)."""
        return self._losses(self.hidden_states(rows), rows, objective)

    def hidden_states(self, rows: Rows) -> Tensor:
        """[N, H] after the final norm, in row order."""
        weight = self.embed.weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.gated):
            clean = F.embedding(rows.ids[: rows.clean], weight)
        masks = F.embedding(rows.ids[rows.clean :], weight)
        if self.mask_embedding is not None:
            hidden = rows.is_mask[rows.clean :, None]
            masks = torch.where(hidden, self.mask_embedding.to(masks.dtype), masks)
        kv_groups = self.config.num_heads // self.config.num_kv_heads
        attend = attention(rows, kv_groups=kv_groups, dtype=self._compute_dtype(masks))
        cos = self.cos[rows.positions].unsqueeze(1)
        sin = self.sin[rows.positions].unsqueeze(1)
        hidden = torch.cat([clean, masks]) if not self.gated else (clean, masks)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, cos, sin, attend, use_reentrant=False)
            else:
                hidden = layer(hidden, cos, sin, attend)
        if self.gated:
            hidden = torch.cat(hidden)
        return self.norm(hidden)

    def _compute_dtype(self, like: Tensor) -> torch.dtype:
        device = like.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return like.dtype

    def _losses(self, hidden: Tensor, rows: Rows, objective: Objective) -> Losses:
        table = self.embed.weight if self.lm_head is None else self.lm_head.weight
        wanted = rows.labels != IGNORE
        is_clean = torch.arange(rows.count, device=hidden.device) < rows.clean
        zero = hidden.new_zeros((), dtype=torch.float32)
        sums, hits = [zero, zero], 0
        for kind, part in enumerate((wanted & is_clean, wanted & ~is_clean)):
            if kind == 0 and (self.gated or objective.alpha == 0):
                continue  # frozen, or not asked for
            index = part.nonzero()[:, 0]
            keep = index.shape[0] * table.shape[0] <= KEPT_LOGITS
            whole = kind == 1 and objective.weighting == "arrival"
            sizes = _sizes(rows.block[index]) if whole else HEAD_ROWS
            for chunk in (index,) if keep else index.split(sizes):
                inputs = (hidden[chunk], table, rows.labels[chunk], rows.weights[chunk])
                blocks = rows.block[chunk] if whole else None
                if keep:
                    loss, right = self._cross_entropy(*inputs, blocks, self.mask_token_id)
                else:
                    loss, right = checkpoint(
                        self._cross_entropy,
                        *inputs,
                        blocks,
                        self.mask_token_id,
                        use_reentrant=False,
                    )
                sums[kind] = sums[kind] + loss
                hits += int(right) if kind else 0
        return Losses(sums[0], sums[1], hits)


class TrainingLayer(nn.Module):
    """One Layer of the backbone over packed rows, with adapters on its four matrix products."""

    def __init__(
        self, layer: Layer, adapters: AdapterConfig | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = layer
        self.low_rank = nn.ModuleDict(
            {}
            if adapters is None
            else {
                name: LowRank(getattr(layer, name).weight, adapters, generator) for name in PRODUCTS
            }
        )

    def compile_products(self) -> None:
        """Compile what comes before attention and what comes after it, for any number of rows."""
        self._project, self._finish = _compiled(self._project), _compiled(self._finish)

    def forward(
        self, hidden: Tensor | tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden [N, H] or, gated, (clean rows, mask rows); the same back."""
        if isinstance(hidden, Tensor):
            q, k, v = self._project(hidden, cos, sin, self._with)
            return self._finish(hidden, attend(q, k, v), self._with)
        clean, masks = hidden
        n = clean.shape[0]
        with torch.no_grad():
            first = self._project(clean, cos[:n], sin[:n], self._without)
        second = self._project(masks, cos[n:], sin[n:], self._with)
        out = attend(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
        with torch.no_grad():
            clean = self._finish(clean, out[:n], self._without)
        return clean, self._finish(masks, out[n:], self._with)

    def _with(self, name: str, x: Tensor) -> Tensor:
        y = self._without(name, x)
        return y if name not in self.low_rank else y + self.low_rank[name](x)

    def _without(self, name: str, x: Tensor) -> Tensor:
        linear = getattr(self.base, name)
        return F.linear(x, linear.weight, linear.bias)

    def _project(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, linear: Callable[[str, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.base
        heads = linear("qkv", layer.attn_norm(hidden)).view(hidden.shape[0], -1, layer.head_dim)
        q, k, v = heads.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
        if layer.q_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v

    def _finish(
        self, hidden: Tensor, out: Tensor, linear: Callable[[str, Tensor], Tensor]
    ) -> Tensor:
        hidden = hidden + linear("o", out.reshape(hidden.shape[0], -1))
        gate, up = linear("gate_up", self.base.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + linear("down", F.silu(gate) * up)


def objective_loss(
    losses: Losses, objective: Objective, *, ar_rows: int, diffusion_weight: float
) -> Tensor:
    """Section 2.4 from sums: each term is a (weighted) mean over its own targets.

    The totals are those of the whole (global) batch, so that sums over micro-batches and ranks add
    up to the loss of the batch as one.
    """
    ar = losses.ar_sum / max(ar_rows, 1)
    diffusion = losses.diffusion_sum / max(diffusion_weight, 1.0)
    if objective.kind == "ar":
        return ar
    if objective.kind in ("block_diffusion", "eagle3"):
        return diffusion
    return (objective.alpha * ar + diffusion) / (1 + objective.alpha)


def _sizes(block: Tensor) -> list[int]:
    """Chunks of some HEAD_ROWS rows that cut no block."""
    sizes = [0]
    for count in torch.unique_consecutive(block, return_counts=True)[1].tolist():
        if sizes[-1] + count > HEAD_ROWS and sizes[-1]:
            sizes.append(0)
        sizes[-1] += count
    return sizes


def arrival(log_p: Tensor, block: Tensor) -> Tensor:
    """How likely a draft is looked at: the product of p of those between it and its block's first.

    log_p [n]: of the right token, rows of a block side by side and none missing before the last;
    block [n]: its number. 1 for the first two of a block.
    """
    first = torch.ones_like(block, dtype=torch.bool)
    first[1:] = block[1:] != block[:-1]
    begins = torch.where(first, torch.arange(len(block), device=block.device), 0).cummax(0).values
    # Sums in float64: a difference of two long ones is left.
    before = F.pad(torch.where(first, 0.0, log_p.double()).cumsum(0)[:-1], (1, 0))
    return (before - before[begins]).exp().to(log_p.dtype)


def _cross_entropy(
    hidden: Tensor,
    table: Tensor,
    labels: Tensor,
    weights: Tensor,
    blocks: Tensor | None,
    mask_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Weighted loss sum and number of right guesses; float32, the mask token never a guess.

    blocks: of the rows, to weigh them by arrival too.
    """
    logits = F.linear(hidden, table).float()
    logits[:, mask_token_id] = float("-inf")
    loss = F.cross_entropy(logits, labels, reduction="none")
    if blocks is not None:
        weights = weights * arrival(-loss.detach(), blocks)
    return (loss * weights).sum(), (logits.detach().argmax(dim=-1) == labels).sum()


def check_compiler(device: torch.device) -> None:
    """UserError if torch.compile cannot make code for `device` (no C++ compiler, no Triton)."""

    def probe(x: Tensor) -> Tensor:
        return (x * x).sum()

    try:
        x = torch.ones(3, device=device, requires_grad=True)
        _compiled(probe)(x).backward()
    except Exception as error:  # whatever the compiler behind it raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch.compile does not work here ({reason}): leave it out") from error


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: what cannot be compiled, or again and again, is an error instead of slow.
    return torch.compile(function, dynamic=True, fullgraph=True)
