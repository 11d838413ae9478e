"""LLaDA's and Dream's checkpoint layouts, read into the backbone: equal to a dense forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import write_tokenizer
from torch import Tensor

from baselines import masked_diffusion
from tidar_ref import checkpoint
from tidar_ref.cache import KVCache
from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError
from tidar_ref.shapes import SHAPES, from_config_json

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 96, 32, 48, 2, 4
# As the published config.json files state them, with our sizes.
LLADA = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama",
    "d_model": HIDDEN, "mlp_hidden_size": INNER, "n_layers": LAYERS, "n_heads": HEADS,
    "n_kv_heads": HEADS, "vocab_size": VOCAB, "embedding_size": VOCAB, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "max_sequence_length": 128, "activation_type": "silu", "rope": True,
    "alibi": False, "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False,
    "attention_layer_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "input_emb_norm": False, "multi_query_attention": None, "scale_logits": False,
    "weight_tying": False, "mask_token_id": 91, "eos_token_id": 88, "block_group_size": 1,
}  # fmt: skip
DREAM = {
    "architectures": ["DreamModel"], "model_type": "Dream", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "hidden_act": "silu", "rope_scaling": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
    "max_window_layers": 2, "use_mrope": False, "mask_token_id": 92, "eos_token_id": 88,
}  # fmt: skip


def config_of(name: str) -> ModelConfig:
    """The shape, said here once more and not read from the config under test."""
    llada = name == "llada"
    return ModelConfig(
        family="llama" if llada else "qwen2",
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_layers=LAYERS,
        num_heads=HEADS, num_kv_heads=HEADS if llada else 2, head_dim=HIDDEN // HEADS,
        rope_theta=5e5 if llada else 1e6, norm_eps=1e-5 if llada else 1e-6, qkv_bias=not llada,
        qk_norm=False, tied_embeddings=False, max_position=128,
    )  # fmt: skip


def layout(name: str, state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same weights under the published tensor names, fused products taken apart."""
    q = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    if name == "llada":
        out = {
            "model.transformer.wte.weight": state["embed.weight"],
            "model.transformer.ln_f.weight": state["norm.weight"],
            "model.transformer.ff_out.weight": state["lm_head.weight"],
        }
    else:
        out = {
            "model.embed_tokens.weight": state["embed.weight"],
            "model.norm.weight": state["norm.weight"],
            "lm_head.weight": state["lm_head.weight"],
        }
    for index in range(config.num_layers):
        ours = f"layers.{index}."
        wq, wk, wv = state[ours + "qkv.weight"].split([q, kv, kv])
        gate, up = state[ours + "gate_up.weight"].chunk(2)
        norms = state[ours + "attn_norm.weight"], state[ours + "mlp_norm.weight"]
        if name == "llada":
            theirs = f"model.transformer.blocks.{index}."
            out |= {
                theirs + "attn_norm.weight": norms[0],
                theirs + "ff_norm.weight": norms[1],
                theirs + "q_proj.weight": wq,
                theirs + "k_proj.weight": wk,
                theirs + "v_proj.weight": wv,
                theirs + "attn_out.weight": state[ours + "o.weight"],
                theirs + "ff_proj.weight": gate,
                theirs + "up_proj.weight": up,
                theirs + "ff_out.weight": state[ours + "down.weight"],
            }
            continue
        theirs = f"model.layers.{index}."
        biases = state[ours + "qkv.bias"].split([q, kv, kv])
        for letter, weight, bias in zip("qkv", (wq, wk, wv), biases, strict=True):
            out[f"{theirs}self_attn.{letter}_proj.weight"] = weight
            out[f"{theirs}self_attn.{letter}_proj.bias"] = bias
        out |= {
            theirs + "input_layernorm.weight": norms[0],
            theirs + "post_attention_layernorm.weight": norms[1],
            theirs + "self_attn.o_proj.weight": state[ours + "o.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "down.weight"],
        }
    return out


def write(folder: Path, name: str, **changes: Any) -> dict[str, Tensor]:
    """A tiny random checkpoint in the layout; gives its weights under our names."""
    config = config_of(name)
    state = oracles.random_state(config, seed=7)
    tensors = {key: value.contiguous() for key, value in layout(name, state, config).items()}
    save_file(tensors, folder / "model.safetensors")
    raw = {"llada": LLADA, "dream": DREAM}[name] | changes
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder)
    return state


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_bidirectional_logits_equal_a_dense_forward(name: str, tmp_path: Path) -> None:
    state = write(tmp_path, name)
    loaded = checkpoint.load(str(tmp_path), prepare=False)
    assert loaded.model.config.family == name
    assert loaded.source.mask_token_id == {"llada": 91, "dream": 92}[name]
    assert loaded.source.eos_token_ids == (88,)
    assert loaded.source.parameters == sum(value.numel() for value in state.values())
    ids = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    everyone = torch.ones(20, 20, dtype=torch.bool)
    want, _ = oracles.forward(state, config_of(name), ids, range(20), everyone)
    cache = KVCache(
        loaded.model.config, batch=1, max_len=20, scratch=0, dtype=torch.float32, device="cpu"
    )
    with torch.inference_mode():
        hidden = loaded.model(ids, torch.arange(20)[None], cache, everyone)
        got = loaded.model.lm_head(hidden)
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_the_decoder_takes_the_convention_from_the_weights(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    loaded = checkpoint.load(str(tmp_path))
    decoder = masked_diffusion.build(loaded.model, mask_token_id=loaded.source.mask_token_id)
    assert decoder.params["convention"] == name


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_config_without_a_mask_token_gets_the_published_one(name: str, tmp_path: Path) -> None:
    """Which these 96 tokens do not have: it is refused, not replaced by a spare one."""
    write(tmp_path, name, mask_token_id=None)
    published = {"llada": "126336", "dream": "151666"}[name]
    with pytest.raises(UserError, match=published):
        checkpoint.load(str(tmp_path))
    assert checkpoint.load(str(tmp_path), mask_token_id=5).source.mask_token_id == 5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada", {"block_type": "sequential"}, "block_type 'sequential'"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias True"),
        ("llada", {"alibi": True}, "alibi"),
        ("llada", {"attention_layer_norm": True}, "attention_layer_norm"),
        ("llada", {"activation_type": "swiglu"}, "activation 'swiglu'"),
        ("llada", {"n_layers": None}, "lacks n"),
        ("dream", {"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_what_the_backbone_does_not_compute_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, name, **changes)
    with pytest.raises(UserError, match=message):
        checkpoint.load(str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "raw"),
    [
        ("llada-8b", LLADA | {
            "d_model": 4096, "mlp_hidden_size": 12288, "n_layers": 32, "n_heads": 32,
            "n_kv_heads": 32, "vocab_size": 126464, "embedding_size": 126464,
            "max_sequence_length": 4096}),
        ("dream-7b", DREAM | {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "max_position_embeddings": 131072}),
    ],
)  # fmt: skip
def test_published_configs_give_the_named_shapes(shape: str, raw: dict[str, Any]) -> None:
    assert from_config_json(raw, "x") == SHAPES[shape].config
