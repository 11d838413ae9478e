"""The draft head of EAGLE-3 (arXiv 2503.01840): one decoder layer on the target's own features.

At position t it reads the target's hidden states there (three taps, fused by `fc`) and the token
t+1, and predicts token t+2 over its reduced vocabulary. What it returns is the feature of the next
draft step, where no target feature exists yet. `baselines/_eagle3_files.py` reads published heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tidar_ref.cache import KVCache
from tidar_ref.config import ModelConfig
from tidar_ref.linear import Linear, RMSNorm
from tidar_ref.model import FOLD_GROUPS_UP_TO, Layer, Transformer, attention_bias, rotary_tables

RANDOM, RANDOM_VOCAB = "random", 32_000


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Shape of a head. `layer` describes its one decoder layer; layer.vocab_size is the draft's.

    taps: numbers of the target's layers whose input is read (num_layers: the last one's output).
    target_hidden: width of one tap. norm_before_residual: the residual carries the normed feature.
    norm_output: the feature passed on is taken after the final norm (EAGLE-3.1). own_embedding:
    tokens are embedded by the head's table, not the target's.
    """

    layer: ModelConfig
    taps: tuple[int, ...]
    target_hidden: int
    norm_before_residual: bool = False
    norm_output: bool = False
    own_embedding: bool = False


class EagleHead(nn.Module):
    """The draft network. `name` says where it came from; `trained` is False for random weights.
    `sha256` is that of its weights' file, `target` names the weights it was trained for (sha256 and
    adapters); both are None where nobody says.

    embed: the target's table, or the head's own where a checkpoint has one. target_ids [Vd]: the
    target's token id of every draft id.
    """

    def __init__(
        self, config: HeadConfig, embed: nn.Embedding, target_ids: Tensor, *, name: str
    ) -> None:
        super().__init__()
        layer = config.layer
        device, dtype = embed.weight.device, embed.weight.dtype
        kind = {"device": device, "dtype": dtype}
        hidden, rows = layer.hidden_size, layer.num_heads + 2 * layer.num_kv_heads
        self.config, self.name, self.trained = config, name, name != RANDOM
        self.sha256: str | None = None
        self.target: list[str] | None = None
        self._embed = (embed,)  # in a tuple: the target's table is not a part of the head
        self.fc = Linear(len(config.taps) * config.target_hidden, hidden, bias=False, **kind)
        self.layer = Layer(layer, kind)
        self.layer.qkv = Linear(2 * hidden, rows * layer.head_dim, bias=False, **kind)
        self.hidden_norm = RMSNorm(hidden, eps=layer.norm_eps, **kind)
        self.norm = RMSNorm(hidden, eps=layer.norm_eps, **kind)
        self.lm_head = Linear(hidden, layer.vocab_size, bias=False, **kind)
        cos, sin = rotary_tables(layer)
        self.register_buffer("cos", cos.to(device=device, dtype=dtype), persistent=False)
        self.register_buffer("sin", sin.to(device=device, dtype=dtype), persistent=False)
        self.register_buffer("target_ids", target_ids.to(device), persistent=False)

    @property
    def embed(self) -> nn.Embedding:
        """The table of token embeddings, frozen."""
        return self._embed[0]

    def new_cache(self, *, batch: int, max_len: int, scratch: int) -> KVCache:
        """A cache for this layer's keys and values."""
        weight = self.fc.weight
        return KVCache(
            self.config.layer, batch=batch, max_len=max_len, scratch=scratch,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    def fuse(self, taps: Mapping[int, Tensor]) -> Tensor:
        """The target's hidden states [B, Q, Ht] by layer -> features [B, Q, H]."""
        joined = torch.cat([taps[index] for index in self.config.taps], dim=-1)
        return self.fc(joined.flatten(0, 1)).view(*joined.shape[:2], -1)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        new_mask: Tensor | None,
        features: Tensor,
    ) -> Tensor:
        """One draft forward: next features [B, Q, H] from tokens [B, Q] and features [B, Q, H].

        ids[b, q] is the token behind the position the feature belongs to. Masks and cache are
        those of `Transformer.forward`.
        """
        batch, width = ids.shape
        fold = width <= FOLD_GROUPS_UP_TO
        groups = self.config.layer.num_heads // self.config.layer.num_kv_heads if fold else 1
        bias = attention_bias(cache, new_mask, width, groups, features.dtype)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        feature = features.reshape(batch * width, -1)
        normed = self.hidden_norm(feature)
        token = self.layer.attn_norm(self.embed(ids.reshape(-1)))
        residual = normed if self.config.norm_before_residual else feature
        hidden = self.layer(
            residual, cos, sin, cache.open(width), 0, bias, fold,
            inputs=torch.cat([token, normed], dim=-1),
        )  # fmt: skip
        if self.config.norm_output:
            hidden = self.norm(hidden)
        return hidden.view(batch, width, -1)

    def logits(self, features: Tensor) -> Tensor:
        """Next-token logits [..., Vd] of features [..., H] that `forward` returned."""
        rows = features.reshape(-1, features.shape[-1])
        rows = rows if self.config.norm_output else self.norm(rows)
        return self.lm_head(rows).view(*features.shape[:-1], self.config.layer.vocab_size)

    def prepare(self) -> EagleHead:
        """Choose the fastest matrix routes on this device, as `Transformer.prepare`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepare()
        return self


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """Inputs of layers 2, L/2 and L-3 (the published choice), or an even spread if L < 6."""
    if num_layers < 6:
        return min(1, num_layers), (num_layers + 1) // 2, num_layers
    return 2, num_layers // 2, num_layers - 3


def random_head(model: Transformer, *, vocab: int = RANDOM_VOCAB, seed: int = 0) -> EagleHead:
    """An untrained head over the target's first `vocab` tokens; the same for the same seed."""
    ids = torch.arange(min(vocab, model.config.vocab_size))
    return ready(_drawn_head(model, ids, seed), model)


@torch.no_grad()
def head_to_train(model: Transformer, target_ids: Tensor, *, seed: int = 0) -> EagleHead:
    """A head over the target's tokens target_ids [Vd] that starts from what the target knows.

    Output rows are the target's, the fused feature is the last tap plus noise: a small budget goes
    into the layer.
    """
    head = _drawn_head(model, target_ids, seed)
    hidden = model.config.hidden_size
    head.fc.weight[:, -hidden:] += torch.eye(hidden, dtype=model.dtype, device=model.device)
    output = model.embed if model.config.tied_embeddings else model.lm_head
    head.lm_head.weight.copy_(output.weight[head.target_ids])
    head.norm.weight.copy_(model.norm.weight)
    return head


@torch.no_grad()
def _drawn_head(model: Transformer, target_ids: Tensor, seed: int) -> EagleHead:
    config = model.config
    layer = replace(
        config, family="llama", vocab_size=len(target_ids), num_layers=1, qkv_bias=False,
        qk_norm=False, tied_embeddings=False,
    )  # fmt: skip
    shape = HeadConfig(
        layer=layer, taps=default_taps(config.num_layers), target_hidden=config.hidden_size
    )
    head = EagleHead(shape, model.embed, target_ids, name=RANDOM)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in head.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return head


def ready(head: EagleHead, model: Transformer) -> EagleHead:
    """The head frozen, with the products the target was prepared with."""
    product = model.layers[0].qkv
    if getattr(product, "kernel", None) is not None or getattr(product, "wide", None) is not None:
        head.prepare()
    return head.eval().requires_grad_(False)
