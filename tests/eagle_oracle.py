"""EAGLE-3 written down slowly: target features, the head without a cache, drafts node by node.

Head weights go by the published names (SafeAILab), so loading is checked against them as well.
Nothing here calls the code under test except `tidar_ref.config` (plain data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import oracles
import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_ref.config import ModelConfig

HeadState = Mapping[str, Tensor]


def head_shapes(layer: ModelConfig, taps: int, target_hidden: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head in the published layout, without embeddings and vocabulary maps."""
    hidden, inner, dim = layer.hidden_size, layer.intermediate_size, layer.head_dim
    q, kv, mid = layer.num_heads * dim, layer.num_kv_heads * dim, "midlayer."
    return {
        "fc.weight": (hidden, taps * target_hidden),
        mid + "hidden_norm.weight": (hidden,),
        mid + "input_layernorm.weight": (hidden,),
        mid + "post_attention_layernorm.weight": (hidden,),
        mid + "self_attn.q_proj.weight": (q, 2 * hidden),
        mid + "self_attn.k_proj.weight": (kv, 2 * hidden),
        mid + "self_attn.v_proj.weight": (kv, 2 * hidden),
        mid + "self_attn.o_proj.weight": (hidden, q),
        mid + "mlp.gate_proj.weight": (inner, hidden),
        mid + "mlp.up_proj.weight": (inner, hidden),
        mid + "mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (layer.vocab_size, hidden),
    }


def random_head(
    layer: ModelConfig, seed: int, *, taps: int = 3, target_hidden: int, std: float = 0.25
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in head_shapes(layer, taps, target_hidden).items():
        noise = torch.randn(shape, generator=generator)
        state[name] = 1.0 + 0.2 * noise if "norm" in name else std * noise
    return state


def _attend(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """Causal attention of [T, heads, D] on [T, kv heads, D], heads side by side."""
    allowed, mixed = oracles.causal(q.shape[0]), []
    for head in range(config.num_heads):
        group = head // (config.num_heads // config.num_kv_heads)
        scores = q[:, head] @ k[:, group].T / math.sqrt(config.head_dim)
        mixed.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v[:, group])
    return torch.cat(mixed, dim=-1)


def streams(state: oracles.State, config: ModelConfig, ids: Sequence[int]) -> list[Tensor]:
    """What enters each layer of the target [T, H], and last what leaves the last one."""
    w = {name: value.double() for name, value in state.items()}
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    positions = torch.arange(len(ids))
    x = w["embed.weight"][torch.tensor(list(ids))]
    found = [x]
    for layer in range(config.num_layers):
        name = f"layers.{layer}."
        h = oracles.rms_norm(x, w[name + "attn_norm.weight"], config.norm_eps)
        qkv = h @ w[name + "qkv.weight"].T
        if config.qkv_bias:
            qkv = qkv + w[name + "qkv.bias"]
        parts = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in parts)
        if config.qk_norm:
            q = oracles.rms_norm(q, w[name + "q_norm.weight"], config.norm_eps)
            k = oracles.rms_norm(k, w[name + "k_norm.weight"], config.norm_eps)
        q, k = (oracles.rotate(part, positions, config) for part in (q, k))
        x = x + _attend(q, k, v, config) @ w[name + "o.weight"].T
        h = oracles.rms_norm(x, w[name + "mlp_norm.weight"], config.norm_eps)
        gate, up = (h @ w[name + "gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ w[name + "down.weight"].T
        found.append(x)
    return found


def head_layer(
    head: HeadState,
    layer: ModelConfig,
    table: Tensor,
    tokens: Sequence[int],
    features: Tensor,
    *,
    norm_before_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [T, H], keys, values [T, Hkv, D]) of slots 0.. with these tokens and features."""
    w, mid = {name: value.double() for name, value in head.items()}, "midlayer."
    positions = torch.arange(len(tokens))
    embedded = table.double()[torch.tensor(list(tokens))]
    feature = features.double()
    normed = oracles.rms_norm(feature, w[mid + "hidden_norm.weight"], layer.norm_eps)
    token = oracles.rms_norm(embedded, w[mid + "input_layernorm.weight"], layer.norm_eps)
    both = torch.cat([token, normed], dim=-1)
    q, k, v = (
        (both @ w[f"{mid}self_attn.{x}_proj.weight"].T).unflatten(-1, (-1, layer.head_dim))
        for x in "qkv"
    )
    q, k = (oracles.rotate(part, positions, layer) for part in (q, k))
    x = normed if norm_before_residual else feature
    x = x + _attend(q, k, v, layer) @ w[mid + "self_attn.o_proj.weight"].T
    h = oracles.rms_norm(x, w[mid + "post_attention_layernorm.weight"], layer.norm_eps)
    inner = F.silu(h @ w[mid + "mlp.gate_proj.weight"].T) * (h @ w[mid + "mlp.up_proj.weight"].T)
    return x + inner @ w[mid + "mlp.down_proj.weight"].T, k, v


def head_log_probs(head: HeadState, layer: ModelConfig, hidden: Tensor) -> Tensor:
    normed = oracles.rms_norm(hidden, head["norm.weight"].double(), layer.norm_eps)
    return (normed @ head["lm_head.weight"].double().T).log_softmax(-1)


class Drafter:
    """What the head says behind a text [x_0 .. x_n] followed by a path of drafts."""

    def __init__(
        self,
        state: oracles.State,
        config: ModelConfig,
        head: HeadState,
        layer: ModelConfig,
        taps: Sequence[int],
        target_ids: Sequence[int],
    ) -> None:
        self.state, self.config, self.head, self.layer = state, config, head, layer
        self.taps, self.target_ids = taps, list(target_ids)

    def features(self, ids: Sequence[int]) -> Tensor:
        """[T, H]: the fused taps of the target's own pass."""
        found = streams(self.state, self.config, ids)
        joined = torch.cat([found[index] for index in self.taps], dim=-1)
        return joined @ self.head["fc.weight"].double().T

    def keys_values(self, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The head's cache once `text` is committed: one slot fewer than tokens."""
        slots = head_layer(
            self.head, self.layer, self.state["embed.weight"], text[1:], self.features(text[:-1])
        )
        return slots[1], slots[2]

    def after(self, text: Sequence[int], path: Sequence[int] = ()) -> Tensor:
        """Log-probabilities [Vd] of the token behind text + path; the path lives on its own
        outputs."""
        table, features = self.state["embed.weight"], self.features(text[:-1])
        tokens = list(text[1:])
        for token in (*path, None):
            hidden = head_layer(self.head, self.layer, table, tokens, features)[0]
            if token is not None:
                tokens.append(token)
                features = torch.cat([features, hidden[-1:]])
        return head_log_probs(self.head, self.layer, hidden[-1])

    def tree(self, text: Sequence[int], k: int, nodes: int, depth: int) -> set[tuple[int, ...]]:
        """The drafted nodes, each as its path of tokens from the root."""
        pool: dict[tuple[int, ...], float] = {}
        beam: list[tuple[int, ...]] = [()]
        for _ in range(depth):
            children: dict[tuple[int, ...], float] = {}
            for path in beam:
                for score, best in zip(*self.after(text, path).topk(k), strict=True):
                    child = (*path, self.target_ids[int(best)])
                    children[child] = pool.get(path, 0.0) + float(score)
            beam = sorted(children, key=children.__getitem__, reverse=True)[:k]
            pool |= children
        return set(sorted(pool, key=pool.__getitem__, reverse=True)[:nodes])


def sequential_law(p: Tensor, children: Sequence[int]) -> Tensor:
    """Law of the token a node ends with under the published rule: children one after the other,
    each accepted with its share of what is left, else a draw from the rest."""
    law, left = torch.zeros_like(p), p.clone()
    reached = 1.0
    for child in children:
        share = float(left[child] / left.sum())
        law[child] = reached * share
        reached *= 1.0 - share
        left[child] = 0.0
    return law + reached * left / left.sum()
