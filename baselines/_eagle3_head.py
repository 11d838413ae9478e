"""The draft head of EAGLE-3 (arXiv 2503.01840): one decoder layer on the target's own features.

At position t it reads the target's hidden states there (three taps, fused by `fc`) and the token
t+1, and predicts token t+2 over its reduced vocabulary. What it returns is the feature of the next
draft step, where no target feature exists yet. Loads the layouts of SafeAILab, SpecForge, AngelSlim
and Red Hat's speculators; what it cannot compute exactly is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tidar_ref import shapes
from tidar_ref.cache import KVCache
from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError
from tidar_ref.linear import Linear, RMSNorm
from tidar_ref.model import FOLD_GROUPS_UP_TO, Layer, Transformer, attention_bias, rotary_tables
from tidar_ref.tokenizer import read_json

HEADS = Path(__file__).resolve().parent.parent / "results" / "heads"
RANDOM, RANDOM_VOCAB = "random", 32_000
LAYER = "midlayer."  # SafeAILab, SpecForge, AngelSlim; speculators say layers.0.
LAYER_NAMES = {
    "layer.attn_norm.weight": "input_layernorm.weight",  # of the embedding
    "hidden_norm.weight": "hidden_norm.weight",  # of the feature
    "layer.mlp_norm.weight": "post_attention_layernorm.weight",
    "layer.o.weight": "self_attn.o_proj.weight",
    "layer.down.weight": "mlp.down_proj.weight",
}
VOCABULARY = ("d2t", "t2d")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Shape of a head. `layer` describes its one decoder layer; layer.vocab_size is the draft's.

    taps: numbers of the target's layers whose input is read (num_layers: the last one's output).
    target_hidden: width of one tap. norm_before_residual: the residual carries the normed feature.
    norm_output: the feature passed on is taken after the final norm (EAGLE-3.1).
    """

    layer: ModelConfig
    taps: tuple[int, ...]
    target_hidden: int
    norm_before_residual: bool = False
    norm_output: bool = False


class EagleHead(nn.Module):
    """The draft network. `name` says where it came from; `trained` is False for random weights.

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
        return self.lm_head(rows).view(*features.shape[:-1], -1)

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


def load_head(spec: str, model: Transformer) -> EagleHead:
    """The head called `spec` for this target: a folder, a name under results/heads/, or "random".

    UserError for missing or misshapen tensors, a vocabulary map that does not fit, and settings
    the head's network does not compute.
    """
    if spec == RANDOM:
        return random_head(model)
    folder = Path(spec).expanduser()
    folder = folder if folder.is_dir() else HEADS / spec
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in HEADS.glob("*") if path.is_dir()))
        raise UserError(
            f"head {spec!r} is no folder, nor one of: {known or '(none here)'}; head=random runs"
            " an untrained one"
        )
    raw = read_json(folder / "config.json")
    if not raw:
        raise UserError(f"{folder} has no config.json: pass a folder in the hub's layout")
    tensors = _read(folder)
    config = _config(raw, model, str(folder))
    embed = model.embed
    if "embed_tokens.weight" in tensors:
        own = tensors.pop("embed_tokens.weight")
        shape = (model.config.vocab_size, config.layer.hidden_size)
        _check_shape("embed_tokens.weight", own, shape, str(folder))
        own = own.to(device=model.device, dtype=model.dtype)
        embed = nn.Embedding(*shape, _weight=own, _freeze=True)
    elif config.layer.hidden_size != model.config.hidden_size:
        raise UserError(
            f"head {folder} is {config.layer.hidden_size} wide without embeddings of its own, the"
            f" target {model.config.hidden_size}: use a head made for these weights"
        )
    vocabulary = {name: tensors.pop(name) for name in VOCABULARY if name in tensors}
    target_ids = _target_ids(vocabulary, config, model.config.vocab_size, str(folder))
    head = EagleHead(config, embed, target_ids, name=folder.resolve().name)
    _fill(head, tensors, str(folder))
    return _ready(head, model)


@torch.no_grad()
def random_head(model: Transformer, *, vocab: int = RANDOM_VOCAB, seed: int = 0) -> EagleHead:
    """An untrained head over the target's first `vocab` tokens; the same for the same seed."""
    config, vocab = model.config, min(vocab, model.config.vocab_size)
    layer = replace(
        config, family="llama", vocab_size=vocab, num_layers=1, qkv_bias=False, qk_norm=False,
        tied_embeddings=False,
    )  # fmt: skip
    shape = HeadConfig(
        layer=layer, taps=default_taps(config.num_layers), target_hidden=config.hidden_size
    )
    head = EagleHead(shape, model.embed, torch.arange(vocab), name=RANDOM)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in head.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return _ready(head, model)


def _ready(head: EagleHead, model: Transformer) -> EagleHead:
    product = model.layers[0].qkv
    if getattr(product, "kernel", None) is not None or getattr(product, "wide", None) is not None:
        head.prepare()  # as the target was
    return head.eval().requires_grad_(False)


def _config(raw: Mapping[str, Any], model: Transformer, origin: str) -> HeadConfig:
    raw = {**raw, **raw.get("transformer_layer_config", {})}  # speculators nest the layer
    named = (raw.get("architectures") or ["LlamaForCausalLM"])[0]
    if named != "LlamaForCausalLM" and "eagle3" not in named.lower():
        raise UserError(f"{origin} has architecture {named!r}: not an EAGLE-3 head")
    for key in ("fc_norm", "norm_before_fc"):
        if raw.get(key):
            raise UserError(f"{origin} uses {key}, which this head does not compute: use another")
    if raw.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{origin} has {raw['num_hidden_layers']} layers: an EAGLE-3 head has 1")
    target = model.config
    wanted = raw.get("target_hidden_size") or target.hidden_size
    vocab = raw.get("vocab_size", target.vocab_size)
    if (wanted, vocab) != (target.hidden_size, target.vocab_size):
        raise UserError(
            f"{origin} was made for a target {wanted} wide with {vocab} tokens, this one is"
            f" {target.hidden_size} wide with {target.vocab_size}: use its own target"
        )
    layer = shapes.from_config_json(
        {
            **raw,
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 1,
            "vocab_size": raw.get("draft_vocab_size") or vocab,
            # A head is trained on short texts; its rotary positions go on as the target's do.
            "max_position_embeddings": target.max_position,
        },
        origin,
    )
    return HeadConfig(
        layer=layer,
        taps=_taps(raw, target.num_layers, origin),
        target_hidden=target.hidden_size,
        # speculators' own default; the others know no such setting.
        norm_before_residual=raw.get(
            "norm_before_residual", raw.get("speculators_model_type") == "eagle3"
        ),
        norm_output=bool(raw.get("norm_output")),
    )


def _taps(raw: Mapping[str, Any], num_layers: int, origin: str) -> tuple[int, ...]:
    """As inputs of layers. `eagle_config` numbers outputs of layers (SGLang, SpecForge), the same
    key at the top level inputs (vLLM, speculators)."""
    outputs = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    inputs = raw.get("eagle_aux_hidden_state_layer_ids")
    taps = tuple(i + 1 for i in outputs) if outputs else tuple(inputs or default_taps(num_layers))
    if not all(0 <= index <= num_layers for index in taps):
        raise UserError(
            f"{origin} reads the inputs of layers {taps}, the target has {num_layers} layers: use"
            " the target the head was made for"
        )
    return taps


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder by SafeAILab's names."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} has neither *.safetensors nor pytorch_model.bin: fetch it again")
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            part = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
        except Exception as error:  # safetensors, zip and pickle errors share no base class
            raise UserError(f"{path} cannot be read ({error}): fetch it again") from None
        found |= {_canonical(name): tensor for name, tensor in part.items()}
    return found


def _canonical(name: str) -> str:
    name = name.removeprefix("model.")
    return LAYER + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _target_ids(
    found: Mapping[str, Tensor], config: HeadConfig, target_vocab: int, origin: str
) -> Tensor:
    """[Vd] from the offsets d2t, checked against the mask t2d: target id = draft id + d2t."""
    vocab = config.layer.vocab_size
    if "d2t" not in found:
        if vocab != target_vocab:
            raise UserError(
                f"{origin} drafts {vocab} of {target_vocab} tokens but lacks d2t, which tells"
                " them apart: fetch it again"
            )
        return torch.arange(vocab)
    _check_shape("d2t", found["d2t"], (vocab,), origin)
    ids = torch.arange(vocab) + found["d2t"].long()
    if int(ids.min()) < 0 or int(ids.max()) >= target_vocab or len(ids.unique()) != vocab:
        raise UserError(f"d2t of {origin} names tokens twice or outside 0..{target_vocab - 1}")
    if "t2d" in found:
        _check_shape("t2d", found["t2d"], (target_vocab,), origin)
        mask = found["t2d"].bool()
        if int(mask.sum()) != vocab or not bool(mask[ids].all()):
            raise UserError(f"t2d and d2t of {origin} name different tokens: fetch it again")
    return ids


@torch.no_grad()
def _fill(head: EagleHead, found: dict[str, Tensor], origin: str) -> None:
    """Copy every tensor into its rows; refuse missing, misshapen and unknown ones."""
    layer = head.config.layer
    q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    parts: dict[str, list[tuple[str, int]]] = {  # parameter: its sources and their rows
        **{ours: [(LAYER + theirs, -1)] for ours, theirs in LAYER_NAMES.items()},
        **{name: [(name, -1)] for name in ("fc.weight", "norm.weight", "lm_head.weight")},
        "layer.qkv.weight": [
            (f"{LAYER}self_attn.{x}_proj.weight", n) for x, n in (("q", q), ("k", kv), ("v", kv))
        ],
        "layer.gate_up.weight": [
            (f"{LAYER}mlp.{x}_proj.weight", layer.intermediate_size) for x in ("gate", "up")
        ],
    }
    wanted = {source for sources in parts.values() for source, _ in sources}
    if missing := sorted(wanted - set(found)):
        raise UserError(f"{origin} lacks {len(missing)} tensors, such as {', '.join(missing[:3])}")
    # A tensor nobody reads (a bias, a second layer) would change the drafts silently.
    unknown = sorted(n for n in set(found) - wanted if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise UserError(f"{origin} has tensors this head does not use: {', '.join(unknown[:3])}")
    parameters = dict(head.named_parameters())
    if set(parts) != set(parameters):
        raise AssertionError(f"unfilled parameters: {set(parts) ^ set(parameters)}")
    for name, sources in parts.items():
        first = 0
        for source, rows in sources:
            rows = parameters[name].shape[0] if rows < 0 else rows
            place = parameters[name][first : first + rows]
            _check_shape(source, found[source], tuple(place.shape), origin)
            place.copy_(found[source])
            first += rows


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], origin: str) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} of {origin} is {tuple(tensor.shape)}, expected {shape}")
