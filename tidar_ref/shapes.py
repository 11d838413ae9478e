"""Model shapes: published ones by name (for random weights), and the one a config.json states.

Every number in SHAPES is the one in the named repository's config.json; tests/test_checkpoint.py
compares the resulting parameter counts with the published ones. No torch here: listing is instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LLaDAModelLM": "llada",
    "DreamModel": "dream",
}
BIASED = ("qwen2", "dream")  # q, k and v have a bias, whatever config.json says
# What a LLaDA config calls things, in the words of the others; and what it must not switch on.
LLADA_KEYS = {
    "hidden_size": "d_model", "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "max_position_embeddings": "max_sequence_length",
    "hidden_act": "activation_type", "tie_word_embeddings": "weight_tying",
}  # fmt: skip
LLADA_PLAIN = {
    "block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False,
    "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False,
    "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
    "layer_norm_with_affine": True, "multi_query_attention": None, "clip_qkv": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A configuration, where its numbers are published, and what it is good for."""

    config: ModelConfig
    source_url: str
    note: str


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _hub(hub_id: str, note: str, config: ModelConfig) -> Shape:
    url = f"https://huggingface.co/{hub_id}/blob/main/config.json"
    return Shape(config=config, source_url=url, note=note)


def _llama(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 49152,
    max_position: int = 8192,
    rope_theta: float = 100000.0,
    rope_scaling: dict | None = None,
    tied: bool = True,
    family: str = "llama",
) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tied_embeddings=tied,
        max_position=max_position,
    )


def _qwen(
    family: str,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    tied: bool,
    head_dim: int,
    vocab: int = 151936,
    max_position: int = 40960,
) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        qkv_bias=family in BIASED,
        qk_norm=family == "qwen3",
        tied_embeddings=tied,
        max_position=max_position,
    )


def _qwen2(*sizes: int, tied: bool, head_dim: int, max_position: int, vocab: int) -> ModelConfig:
    return _qwen(
        "qwen2", *sizes, tied=tied, head_dim=head_dim, max_position=max_position, vocab=vocab
    )


def _qwen3(*sizes: int, tied: bool) -> ModelConfig:
    return _qwen("qwen3", *sizes, tied=tied, head_dim=128)


def _tiny(family: str, note: str) -> Shape:
    if family == "llama":
        config = _llama(64, 128, 2, 4, 2, vocab=259, max_position=2048)
    else:
        config = _qwen(
            family, 64, 128, 2, 4, 2, tied=True, head_dim=16, vocab=259, max_position=2048
        )
    return Shape(config=config, source_url="", note=note)


# Positional sizes: width, MLP width, layers, query heads, key/value heads.
SHAPES: dict[str, Shape] = {
    "tiny": _tiny("llama", "our own, for tests and the smoke run; byte vocabulary"),
    "tiny-qwen2": _tiny("qwen2", "our own, as tiny, with q/k/v bias"),
    "tiny-qwen3": _tiny("qwen3", "our own, as tiny, with q/k norm"),
    "smollm2-135m": _hub(
        "HuggingFaceTB/SmolLM2-135M", "the embedded model's shape", _llama(576, 1536, 30, 9, 3)
    ),
    "smollm2-360m": _hub("HuggingFaceTB/SmolLM2-360M", "small llama", _llama(960, 2560, 32, 15, 5)),
    "qwen2.5-0.5b": _hub(
        "Qwen/Qwen2.5-0.5B",
        "shape of Qwen2.5-Coder-0.5B too",
        _qwen2(896, 4864, 24, 14, 2, tied=True, head_dim=64, max_position=32768, vocab=151936),
    ),
    "qwen2.5-1.5b": _hub(
        "Qwen/Qwen2.5-1.5B",
        "the paper's smaller base",
        _qwen2(1536, 8960, 28, 12, 2, tied=True, head_dim=128, max_position=131072, vocab=151936),
    ),
    "qwen2.5-7b": _hub(
        "Qwen/Qwen2.5-7B",
        "base of Dream-7B",
        _qwen2(3584, 18944, 28, 28, 4, tied=False, head_dim=128, max_position=131072, vocab=152064),
    ),
    "dream-7b": _hub(
        "Dream-org/Dream-v0-Base-7B",
        "masked diffusion; its attention sees both ways",
        _qwen(
            "dream", 3584, 18944, 28, 28, 4, tied=False, head_dim=128, vocab=152064,
            max_position=131072,
        ),
    ),
    "llada-8b": _hub(
        "GSAI-ML/LLaDA-8B-Base",
        "masked diffusion; its attention sees both ways",
        _llama(
            4096, 12288, 32, 32, 32, vocab=126464, max_position=4096, rope_theta=500000.0,
            tied=False, family="llada",
        ),
    ),
    "qwen3-0.6b": _hub("Qwen/Qwen3-0.6B", "", _qwen3(1024, 3072, 28, 16, 8, tied=True)),
    "qwen3-1.7b": _hub("Qwen/Qwen3-1.7B", "", _qwen3(2048, 6144, 28, 16, 8, tied=True)),
    "qwen3-4b": _hub("Qwen/Qwen3-4B", "", _qwen3(2560, 9728, 36, 32, 8, tied=True)),
    "qwen3-8b": _hub(
        "Qwen/Qwen3-8B", "the paper's larger base", _qwen3(4096, 12288, 36, 32, 8, tied=False)
    ),
    "qwen3-32b": _hub(
        "Qwen/Qwen3-32B", "free-slot study", _qwen3(5120, 25600, 64, 64, 8, tied=False)
    ),
    "llama-3.1-8b": _hub(
        "meta-llama/Llama-3.1-8B",
        "the published EAGLE-3 heads' base",
        _llama(
            4096,
            14336,
            32,
            32,
            8,
            vocab=128256,
            max_position=131072,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE,
            tied=False,
        ),
    ),
}


def shape(name: str) -> Shape:
    """The shape called `name`; UserError lists the known ones."""
    if name not in SHAPES:
        raise UserError(f"shape {name!r} is unknown: use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def from_config_json(raw: Mapping[str, Any], origin: str) -> ModelConfig:
    """The configuration in a config.json; UserError for what the backbone cannot run exactly.

    Reads both spellings of the rotary settings: top-level rope_theta and rope_scaling, and
    rope_parameters (transformers 5).
    """
    named = (raw.get("architectures") or [None])[0]
    family = FAMILIES.get(named) if named else str(raw.get("model_type")).lower()
    if family not in FAMILIES.values():
        raise UserError(
            f"{origin} has architecture {named or raw.get('model_type')!r}: supported are"
            f" {', '.join(FAMILIES)}"
        )
    if family == "llada":
        raw = _llada_in_our_words(raw, origin)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
    if absent := [key for key in needed if raw.get(key) is None]:
        raise UserError(f"config.json of {origin} lacks {', '.join(absent)}: fetch it again")
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta")} | (
        raw.get("rope_scaling") or {}
    )
    _refuse(raw, rope, family, origin)
    kind = rope.get("rope_type", rope.get("type"))
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        # 10000 is what the format means by leaving it out (Llama 1 and 2 do).
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=None if kind != "llama3" else {
            "rope_type": kind,
            **{key: rope[key] for key in LLAMA3_ROPE if key != "rope_type"},
        },
        norm_eps=raw["rms_norm_eps"],
        qkv_bias=family in BIASED,
        qk_norm=family == "qwen3",
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position=raw["max_position_embeddings"],
    )  # fmt: skip


def _llada_in_our_words(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A LLaDA config under the names the others use; UserError for switches it does not set."""
    for key, plain in LLADA_PLAIN.items():
        if raw.get(key, plain) != plain:
            raise UserError(
                f"{origin} uses {key} {raw[key]!r}, which this backbone does not compute exactly"
            )
    # The table may be longer than the vocabulary (rounded up); the tensors have its length.
    table = raw.get("embedding_size") or raw.get("vocab_size")
    return dict(raw) | {ours: raw.get(theirs) for ours, theirs in LLADA_KEYS.items()} | {
        "vocab_size": table
    }


def _refuse(raw: Mapping[str, Any], rope: Mapping[str, Any], family: str, origin: str) -> None:
    kind = rope.get("rope_type", rope.get("type")) or "default"
    lacking = [key for key in LLAMA3_ROPE if key != "rope_type" and key not in rope]
    sliding = raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ())
    if family == "llama":
        sliding = sliding or raw.get("sliding_window")
    quantised = raw.get("quantization_config") or raw.get("compression_config")
    refusals = {
        f"quantization {(quantised or {}).get('quant_method')!r}": quantised,
        "attention_bias": family not in BIASED and raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "sliding-window attention": sliding,
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        f"rope_scaling type {kind!r}": kind not in ("default", "llama3"),
        f"llama3 rope_scaling without {', '.join(lacking)}": kind == "llama3" and lacking,
        "rope_interleaved": raw.get("rope_interleaved"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        not in (None, 1, 1.0),
    }
    for what, present in refusals.items():
        if present:
            raise UserError(f"{origin} uses {what}, which this backbone does not compute exactly")
