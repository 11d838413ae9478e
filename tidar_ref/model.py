"""One compact decoder-only transformer for the Llama / SmolLM2 / Qwen2 / Qwen2.5 / Qwen3 family.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; q/k/v bias (Qwen2) and q/k norm (Qwen3)
by configuration. Every decoder of the suite runs on this network: it takes token ids, positions, a
cache and the visibility pattern among the new tokens, and gives hidden states. Which of them go
through the (expensive) LM head is the decoder's business.

Shapes: B sequences, Q new tokens, L keys (prefix + new), Hq query heads, Hkv key/value heads,
G = Hq / Hkv, D head size, H width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar_ref.attention import TwoPart
from tidar_ref.cache import KVCache, OpenSlots
from tidar_ref.config import ModelConfig
from tidar_ref.flex_decode import FlexDecode
from tidar_ref.linear import Linear, RMSNorm, TiedHead

if TYPE_CHECKING:
    from tidar_ref.kernels_cpu import FewRows

__all__ = ["ModelConfig", "Transformer"]

# Up to this many new tokens the G query heads of a group are folded into the query axis, so that
# keys and values are read once and never repeated; beyond it the folded mask would be large.
FOLD_GROUPS_UP_TO = 512

# Drafts and masks near the last position look past it (by 3K - 1 at most, K <= 16) before they are
# thrown away, so the rotary tables are that much longer than the context.
POSITIONS_PAST_THE_END = 64
# Beyond them the compiled layers gain nothing over the plain ones, whose products are compiled too.
FEW_ROWS = 128


class Transformer(nn.Module):
    """The shared backbone. Parameters are uninitialised until loaded or `init_random` is called."""

    few_rows: FewRows | None = None  # compiled layers for a forward of few tokens, from `prepare`

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        # Built without storage or initialisation first: that would cost minutes at 8B.
        kind = {"dtype": dtype, "device": "meta"}
        table = torch.empty(config.vocab_size, config.hidden_size, **kind)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Layer(config, kind) for _ in range(config.num_layers))
        self.norm = _norm(config.hidden_size, config, kind)
        self.lm_head = (
            TiedHead(self.embed)
            if config.tied_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, **kind)
        )
        self.to_empty(device=device)
        cos, sin = rotary_tables(config)
        self.mask_adapter: MaskAdapter | None = None
        self.attention = "sdpa"  # or "two_part" (tidar_ref.attention), "flex" (.flex_decode)
        self.compiled = False  # torch.compile around attention, where it measures better
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def prepare(self) -> Transformer:
        """Choose the fastest matrix routes for inference on this device (`tidar_ref.linear`)."""
        for module in self.modules():
            if isinstance(module, Linear | TiedHead):
                module.prepare()
        self.few_rows = None
        if all(
            part.kernel is not None for part in self.layers.modules() if isinstance(part, Linear)
        ):
            self._compile_few_rows()
        return self

    def _compile_few_rows(self) -> None:
        from tidar_ref.kernels_cpu import FewRows

        self.few_rows = FewRows(self)

    def forget(self) -> Transformer:
        """Back to torch's plain products, which follow the weights wherever training moves them."""
        self.few_rows = None
        for module in self.modules():
            if isinstance(module, Linear | TiedHead):
                module.forget()
        return self

    @property
    def prepared(self) -> bool:
        """Whether some product runs on packed or converted copies of its weight."""
        parts = (part for part in self.modules() if isinstance(part, Linear | TiedHead))
        return any(part.kernel is not None or part.wide is not None for part in parts)

    def _apply(self, fn: Callable, recurse: bool = True) -> Transformer:
        self.few_rows = None  # moved or converted: it would multiply by the old weights
        return super()._apply(fn, recurse)

    def _takes_few_rows(self, cache: KVCache, new_mask: Tensor | None, rows: int) -> bool:
        """Whether the compiled layers serve this forward; hooks want the layers called, unless the
        compiled ones mark their halves themselves."""
        return (
            self.few_rows is not None
            and rows <= FEW_ROWS
            and len(cache.lengths) == 1
            and cache.uniform
            and self.attention == "sdpa"
            and (rows == 1 or not self.compiled)
            and (rows == 1 if new_mask is None else rows > 1 and new_mask.dim() == 2)
            and not torch.is_grad_enabled()
            and (not self.layers[0]._forward_pre_hooks or self.few_rows.mark is not None)
        )

    def attach_mask_adapter(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        scale: float,
        *,
        token_id: int,
        embedding: Tensor,
    ) -> None:
        """Add scale * B A x to products on the rows whose input is the mask token, on no others.

        factors["layers.3.qkv"] = (A [r, in], B [out, r]); embedding [H] is the mask's input.
        Rows of other tokens compute what they would without: exactly, x + 0 = x.
        """
        where = {"dtype": self.dtype, "device": self.device}
        # Thin products in float32 on a CPU: torch emulates bfloat16 there, many times slower.
        thin = {**where, "dtype": torch.float32} if self.device.type == "cpu" else where
        for index, layer in enumerate(self.layers):
            layer.low_rank = {
                name: ((a * scale).to(**thin), b.to(**thin))
                for name in ("qkv", "o", "gate_up", "down")
                for a, b in (factors[f"layers.{index}.{name}"],)
            }
        self.mask_adapter = MaskAdapter(token_id=token_id, embedding=embedding.to(**where))
        if self.few_rows is not None:
            self._compile_few_rows()

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @torch.no_grad()
    def init_random(self, seed: int = 0) -> Transformer:
        """Fill norms with 1, all other parameters with N(0, 0.02); the same for the same seed."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        return self

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        new_mask: Tensor | None,
        taps: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """One forward over Q new tokens a sequence; their K/V land in the cache behind `kv_len`.

        input_ids, positions: [B, Q] (int64). new_mask: [Q, Q] or [B, Q, Q], True where the query
        (row) may attend to the new token (column); None means Q = 1. All new tokens see the whole
        committed prefix. Returns hidden states [B, Q, H] after the final norm. `kv_len` does not
        move: the decoder advances the cache when it knows what was accepted.
        taps: filled with what enters every layer, [B, Q, H] by its index, and with what leaves the
        last one (before the norm) as number `num_layers`.
        """
        batch, width = input_ids.shape
        behind = max(cache.lengths) > 0  # a prefill has no prefix to take apart
        flex = self.attention == "flex" and behind
        fold = width <= FOLD_GROUPS_UP_TO and not flex
        groups = self.config.num_heads // self.config.num_kv_heads
        few = self._takes_few_rows(cache, new_mask, batch * width)
        bias: Tensor | TwoPart | FlexDecode | None
        if few:
            bias = None  # the compiled layers take the mask as it is
        elif flex:
            bias = FlexDecode(cache, new_mask, width)
        elif self.attention == "two_part" and fold and behind:
            bias = TwoPart(cache, new_mask, width, groups, self.dtype)
        else:
            bias = attention_bias(cache, new_mask, width, groups if fold else 1, self.dtype)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        if self.dtype != torch.float32:
            cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        hidden = self.embed(input_ids.reshape(-1))  # [B*Q, H]: rows of every matrix product
        is_mask = gate = None
        if self.mask_adapter is not None and width > 1:  # no decoder sends a lone mask
            is_mask = input_ids.reshape(-1) == self.mask_adapter.token_id
            hidden = torch.where(is_mask[:, None], self.mask_adapter.embedding, hidden)
        if few:
            size = cos.shape[-1]
            rotary = cos.view(width, size), sin.view(width, size)
            return self.norm(self.few_rows(hidden, *rotary, cache, new_mask, taps, is_mask))[None]
        if is_mask is not None:
            gate = is_mask[:, None].to(self.dtype)
        slots = cache.open(width)
        for index, layer in enumerate(self.layers):
            if taps is not None:
                taps[index] = hidden.view(batch, width, -1)
            hidden = layer(hidden, cos, sin, slots, index, bias, fold, gate, None, self.compiled)
        if taps is not None:
            taps[len(self.layers)] = hidden.view(batch, width, -1)
        return self.norm(hidden).view(batch, width, -1)


@dataclass(frozen=True, kw_only=True)
class MaskAdapter:
    """The token whose rows an adapter gated to masks acts on, and its embedding [H]."""

    token_id: int
    embedding: Tensor


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU; q/k/v and gate/up are one matrix product each."""

    def __init__(self, config: ModelConfig, kind: dict) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.groups = config.head_dim, config.num_heads // config.num_kv_heads
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attn_norm = _norm(hidden, config, kind)
        self.qkv = Linear(hidden, rows, bias=config.qkv_bias, **kind)
        self.q_norm = _norm(config.head_dim, config, kind) if config.qk_norm else None
        self.k_norm = _norm(config.head_dim, config, kind) if config.qk_norm else None
        self.o = Linear(config.num_heads * config.head_dim, hidden, bias=False, **kind)
        self.mlp_norm = _norm(hidden, config, kind)
        self.gate_up = Linear(hidden, 2 * inner, bias=False, **kind)
        self.down = Linear(inner, hidden, bias=False, **kind)
        self.low_rank: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: OpenSlots,
        index: int,
        bias: Tensor | TwoPart | FlexDecode | None,
        fold: bool,
        gate: Tensor | None = None,
        inputs: Tensor | None = None,
        compiled: bool = False,
    ) -> Tensor:
        """hidden [B*Q, H] -> [B*Q, H]; cos, sin [B, 1, Q, D]; bias broadcasts over heads.

        gate [B*Q, 1]: 1 on the rows where an attached adapter acts, or None. inputs [B*Q, I]: what
        q, k and v are made of if not the normed hidden (a draft head's layer). compiled: what lies
        before and behind attention goes through torch.compile.
        """
        batch, width = cos.shape[0], cos.shape[2]
        before, behind = compiled_halves() if compiled else (Layer.before, Layer.behind)
        q, k, v = before(self, hidden, cos, sin, gate, inputs)
        keys, values = slots.write(index, k, v)
        if fold:  # [B, Hq, Q, D] -> [B, Hkv, G*Q, D]: heads of one group share keys and values
            q = q.reshape(batch, self.kv_heads, self.groups * width, self.head_dim)
        if isinstance(bias, TwoPart | FlexDecode):
            out = bias(q, keys, values)
        else:
            out = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=bias, enable_gqa=not fold
            )
        out = out.reshape(batch, self.heads, width, self.head_dim)
        return behind(self, hidden, out, gate)

    def before(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, gate: Tensor | None, inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, Hq, Q, D], k and v [B, Hkv, Q, D], q and k rotated."""
        batch, width = cos.shape[0], cos.shape[2]
        inputs = self.attn_norm(hidden) if inputs is None else inputs
        heads = self._product("qkv", inputs, gate).view(batch, width, -1, self.head_dim)
        heads = heads.transpose(1, 2)  # [B, Hq + 2 Hkv, Q, D]
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def behind(self, hidden: Tensor, out: Tensor, gate: Tensor | None) -> Tensor:
        """hidden [B*Q, H] with attention's out [B, Hq, Q, D] and the MLP added."""
        out = out.transpose(1, 2).reshape(hidden.shape[0], self.heads * self.head_dim)
        hidden = hidden + self._product("o", out, gate)
        inner, up = self._product("gate_up", self.mlp_norm(hidden), gate).chunk(2, dim=-1)
        return hidden + self._product("down", F.silu(inner) * up, gate)

    def _product(self, name: str, x: Tensor, gate: Tensor | None) -> Tensor:
        y = getattr(self, name)(x)
        if gate is None:
            return y
        a, b = self.low_rank[name]
        return y + F.linear(F.linear(x.to(a.dtype), a), b).to(y.dtype) * gate


@functools.cache
def compiled_halves() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`Layer.before` and `.behind` through torch.compile; one code for all layers."""
    return torch.compile(Layer.before), torch.compile(Layer.behind)


def attention_bias(
    cache: KVCache, new_mask: Tensor | None, width: int, groups: int, dtype: torch.dtype
) -> Tensor | None:
    """Additive bias [B or 1, 1, groups*Q, L] over prefix and new keys, or None if all is visible.

    Built once a forward, not once a layer. Slots past a shorter sequence's new tokens are hidden.
    new_mask [Q, S] or [B, Q, S] with S > Q: its first columns are the S - Q newest tokens in the
    cache, which are then seen by the mask too and not by everyone (branches of a tree).
    """
    device = cache.k.device
    if new_mask is None:
        if width != 1:
            raise ValueError(f"new_mask may be None for one new token only, not for {width}")
        new_mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        if cache.uniform:
            return None
    seen = new_mask.shape[-1]
    if cache.uniform and new_mask.dim() == 2:
        free = cache.lengths[0] - (seen - width)
        prefix = torch.ones(width, free, dtype=torch.bool, device=device)
        visible = torch.cat([prefix, new_mask], dim=1)[None]
    else:
        new = new_mask.expand(len(cache.lengths), width, seen)
        slots = torch.arange(max(cache.lengths) + width, device=device)
        free = cache.kv_len - (seen - width)
        offset = slots[None, :] - free[:, None]  # [B, L]: index among the mask's columns
        among_new = (offset >= 0) & (offset < seen)
        index = offset.clamp(0, seen - 1)[:, None, :].expand(-1, width, -1)
        visible = torch.where(among_new[:, None, :], new.gather(2, index), offset[:, None, :] < 0)
    bias = torch.zeros(visible.shape, dtype=dtype, device=device)
    bias.masked_fill_(~visible, float("-inf"))
    return bias.repeat(1, groups, 1).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split form; x [B, heads, Q, D], sin negated in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [max_position + 64, D] in float32, "llama3" frequency scaling if configured.

    The first half of sin is negated: the rotation is then x * cos + roll(x, D/2) * sin.
    Scaling as published with Llama 3.1: wavelengths beyond the original context are stretched by
    `factor`, short ones kept, those between blended linearly.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freq = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling:
        scaling = config.rope_scaling
        context = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / freq
        blend = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        freq = (1 - blend) * freq / scaling["factor"] + blend * freq
    rows = config.max_position + POSITIONS_PAST_THE_END
    angles = torch.arange(rows, dtype=torch.float32)[:, None] * freq[None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _norm(size: int, config: ModelConfig, kind: dict) -> RMSNorm:
    return RMSNorm(size, eps=config.norm_eps, **kind)
