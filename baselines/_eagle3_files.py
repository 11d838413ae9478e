"""Draft heads on disk: published EAGLE-3 checkpoints into `EagleHead`, and back.

Reads the layouts of SafeAILab (pytorch_model.bin), SpecForge and AngelSlim (safetensors, the same
names) and of Red Hat's speculators (nested settings, layers.0.*). What the head's network does not
compute exactly is refused, never approximated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baselines._eagle3_head import (
    RANDOM,
    EagleHead,
    HeadConfig,
    default_taps,
    random_head,
    ready,
)
from tidar_ref import shapes
from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError
from tidar_ref.model import Transformer
from tidar_ref.tokenizer import read_json

HEADS = Path(__file__).resolve().parent.parent / "results" / "heads"
NOTES_FILE = "tidar.json"  # what `bench train` writes beside a head
LAYER = "midlayer."  # SafeAILab, SpecForge, AngelSlim; speculators say layers.0.
LAYER_NAMES = {
    "layer.attn_norm.weight": "input_layernorm.weight",  # of the embedding
    "hidden_norm.weight": "hidden_norm.weight",  # of the feature
    "layer.mlp_norm.weight": "post_attention_layernorm.weight",
    "layer.o.weight": "self_attn.o_proj.weight",
    "layer.down.weight": "mlp.down_proj.weight",
}
VOCABULARY = ("d2t", "t2d")


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
    config = _config(raw, model, str(folder), own_embedding="embed_tokens.weight" in tensors)
    embed = model.embed
    if config.own_embedding:
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
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        digest.update(path.read_bytes())
    head.sha256 = digest.hexdigest()
    if (notes := read_json(folder / NOTES_FILE)).get("base_sha256"):
        head.target = [notes["base_sha256"], *notes.get("base_adapters", ())]
    return ready(head, model)


def save_head(head: EagleHead, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors as SpecForge does, so that engines load them too.

    dtype: of the weights on disk; None keeps the head's own.
    """
    from safetensors.torch import save_file

    layer, config, embed = head.config.layer, head.config, head.embed.weight
    if 0 in config.taps:
        raise UserError("taps of layer 0 have no place in this layout: choose layers from 1 on")
    found = dict(head.named_parameters())
    tensors = {
        source: found[name][first : first + rows]
        for name, sources in _sources(layer).items()
        for source, first, rows in sources
    }
    ids = head.target_ids
    tensors["d2t"] = ids - torch.arange(len(ids), device=ids.device)
    mask = torch.zeros(embed.shape[0], dtype=torch.bool, device=ids.device)
    tensors["t2d"] = mask.index_fill(0, ids, True)
    if config.own_embedding:
        tensors["embed_tokens.weight"] = embed
    rope = layer.rope_scaling
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "vocab_size": embed.shape[0],
        "draft_vocab_size": layer.vocab_size,
        "hidden_size": layer.hidden_size,
        "target_hidden_size": config.target_hidden,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": layer.norm_eps,
        "rope_theta": layer.rope_theta,
        "max_position_embeddings": layer.max_position,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in config.taps]},
        **({"rope_scaling": rope} if rope else {}),
        **{key: True for key in ("norm_before_residual", "norm_output") if getattr(config, key)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    whole = {
        name: value.detach().to(dtype if value.is_floating_point() else None).contiguous().cpu()
        for name, value in tensors.items()
    }
    save_file(whole, folder / "model.safetensors")


def _config(
    raw: Mapping[str, Any], model: Transformer, origin: str, *, own_embedding: bool
) -> HeadConfig:
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
        own_embedding=own_embedding,
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

    files = _weight_files(folder)
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


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


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
    parts = _sources(head.config.layer)
    wanted = {source for sources in parts.values() for source, _, _ in sources}
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
        for source, first, rows in sources:
            place = parameters[name][first : first + rows]
            _check_shape(source, found[source], tuple(place.shape), origin)
            place.copy_(found[source])


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], origin: str) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} of {origin} is {tuple(tensor.shape)}, expected {shape}")


def _sources(layer: ModelConfig) -> dict[str, list[tuple[str, int, int]]]:
    """Of every parameter the published tensors it holds: (name, first row, rows)."""
    q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    hidden, inner = layer.hidden_size, layer.intermediate_size
    mlp, attention = LAYER + "mlp.", LAYER + "self_attn."
    return {
        **{ours: [(LAYER + theirs, 0, hidden)] for ours, theirs in LAYER_NAMES.items()},
        **{name: [(name, 0, hidden)] for name in ("fc.weight", "norm.weight")},
        "lm_head.weight": [("lm_head.weight", 0, layer.vocab_size)],
        "layer.qkv.weight": [
            (attention + "q_proj.weight", 0, q),
            (attention + "k_proj.weight", q, kv),
            (attention + "v_proj.weight", q + kv, kv),
        ],
        "layer.gate_up.weight": [
            (mlp + "gate_proj.weight", 0, inner),
            (mlp + "up_proj.weight", inner, inner),
        ],
    }
