"""GGUF files: tiny ones of every family, refusals, and SmolLM2 against transformers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from baselines import autoregressive
from tidar_ref.checkpoint import EMBEDDED_SHA256, GGUF_NAMES, load, parts
from tidar_ref.config import ModelConfig
from tidar_ref.decoding import generate
from tidar_ref.errors import UserError
from tidar_ref.gguf_reader import GGUFFile, config_of, unpermute

gguf = pytest.importorskip("gguf")

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_LETTERS = [chr(b) if b in BYTES else "" for b in range(256)]
BYTE_LETTERS = [
    letter or chr(256 + sum(not earlier for earlier in BYTE_LETTERS[:b]))
    for b, letter in enumerate(BYTE_LETTERS)
]
TOKENS = [*BYTE_LETTERS, "Ġa", "<|endoftext|>", "<|im_end|>", "<|fim_pad|>"]


def permute(rows: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to q and k of a llama, spelled out row by row."""
    dim = rows.shape[0] // heads
    order = [h * dim + half * dim // 2 + i for h in range(heads) for i in range(dim // 2)
             for half in (0, 1)]  # fmt: skip
    return rows[order]


def tiny(family: str, tied: bool = True) -> tuple[ModelConfig, oracles.State]:
    config = oracles.tiny_config(family, vocab=len(TOKENS))
    config = ModelConfig(**{**vars(config), "tied_embeddings": tied, "rope_scaling": None})
    return config, oracles.random_state(config, 0)


def write(
    path: Path,
    config: ModelConfig,
    state: oracles.State,
    *,
    architecture: str | None = None,
    change: Callable[[dict[str, np.ndarray]], Any] = lambda tensors: None,
    metadata: Callable[[Any], Any] = lambda writer: None,
    pre: str = "qwen2",
) -> Path:
    """A GGUF file of these weights, all float32, in llama.cpp's names and row order."""
    architecture = architecture or config.family
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 257 + [3] * (len(TOKENS) - 257))
    writer.add_token_merges(["Ġ a"])
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    metadata(writer)
    tensors = {}
    for part in parts(config, GGUF_NAMES):
        rows = state[part.target][part.first : part.first + part.shape[0]]
        if part.heads and config.family == "llama":
            rows = permute(rows, part.heads)
        tensors[part.source] = rows.numpy().astype(np.float32)
    change(tensors)
    for name, rows in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_family_comes_back_exactly(family: str, tied: bool, tmp_path: Path) -> None:
    config, state = tiny(family, tied)
    loaded = load(str(write(tmp_path / "m.gguf", config, state)))
    assert loaded.model.config == config
    found = loaded.model.state_dict()
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    source = loaded.source
    assert (source.tier, source.name, source.origin) == ("local", "m", "file m.gguf")
    assert (source.mask_token_id, source.eos_token_ids) == (259, (258, 257))


def test_unpermute_undoes_the_converter() -> None:
    rows = torch.arange(24 * 3).view(24, 3)
    assert not torch.equal(permute(rows, 3), rows)
    assert np.array_equal(unpermute(permute(rows, 3).numpy(), 3), rows.numpy())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_block_formats_match_the_packages_own_decoding(kind: str, tmp_path: Path) -> None:
    """Rows are decoded in larger groups than the package's; numbers must not depend on that."""
    qtype = gguf.GGMLQuantizationType[kind]
    rows = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    packed = gguf.quants.quantize(rows, qtype)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("x", packed, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "q.gguf")
    expected = gguf.quants.dequantize(packed, qtype)
    assert file.shapes == {"x": (96, 64)}
    assert np.array_equal(file.tensor("x"), expected)
    assert np.array_equal(file.tensor("x", rows=10), expected[:10])


def test_a_tied_table_stored_twice_is_recognised(tmp_path: Path) -> None:
    """Qwen's files: the coarse copy is dropped, the finer `output` serves both ends."""
    config, state = tiny("qwen2")
    coarse = state["embed.weight"] * 1.05

    def twice(tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"]
        tensors["token_embd.weight"] = coarse.numpy()

    model = load(str(write(tmp_path / "m.gguf", config, state, change=twice))).model
    assert model.config.tied_embeddings
    assert torch.equal(model.embed.weight, state["embed.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_q.weight"), "lacks 1 tensors, such as blk.1.attn_q.weight"),
        (lambda t: t.update({"blk.0.ffn_up.weight": np.zeros((3, 4), np.float32)}),
         r"blk.0.ffn_up.weight .* shape \(3, 4\)"),
        (lambda t: t.update({"blk.0.attn_output.bias": np.zeros(4, np.float32)}), "attn_output"),
        (lambda t: t.update({"rope_freqs.weight": np.ones(4, np.float32)}), "rotary scaling"),
        (lambda t: t.pop("token_embd.weight"), "lacks tensor token_embd.weight"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(
    change: Callable[[dict[str, np.ndarray]], Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", *tiny("llama"), change=change)
    with pytest.raises(UserError, match=message):
        load(str(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda w: w.add_expert_count(8), "mixture of experts"),
        (lambda w: w.add_sliding_window(128), "sliding-window"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rotary scaling"),
        (lambda w: w.add_rope_dimension_count(2), "partly rotated"),
    ],
)
def test_what_is_not_read_exactly_is_refused(
    metadata: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", *tiny("qwen2"), metadata=metadata)
    with pytest.raises(UserError, match=message):
        load(str(path))


def test_unknown_architecture_and_tokenizer(tmp_path: Path) -> None:
    config, state = tiny("llama")
    with pytest.raises(UserError, match="'gemma3': llama, qwen2, qwen3"):
        load(str(write(tmp_path / "a.gguf", config, state, architecture="gemma3")))
    with pytest.raises(UserError, match="splitting 'tekken'"):
        load(str(write(tmp_path / "b.gguf", config, state, pre="tekken")))


def test_foreign_cut_and_newer_files(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", *tiny("llama"))
    whole = path.read_bytes()
    for keep in (12, 30, 200, 3000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="truncated or damaged"):
            load(str(path))
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(UserError, match="not a GGUF file"):
        load(str(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot read GGUF"):
        load(str(path))
    path.write_bytes(whole[:4] + struct.pack("<I", 9) + whole[8:])
    with pytest.raises(UserError, match="version 9"):
        load(str(path))


def test_smollm2_metadata_and_provenance(smollm_gguf: Path) -> None:
    file = GGUFFile(smollm_gguf)
    config = config_of(file)
    assert config.parameter_count == 134_515_008
    assert (config.norm_eps, config.rope_theta, config.max_position) == (1e-5, 1e5, 8192)
    reader = gguf.GGUFReader(smollm_gguf)
    assert {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors} == file.shapes
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"):
        assert file.metadata[key] == reader.fields[key].contents()


def test_the_embedded_model_loads(smollm_gguf: Path, tmp_path: Path) -> None:
    source = load("embedded", dtype="bfloat16").source
    assert (source.tier, source.name) == ("embedded", "SmolLM2-135M-Instruct")
    assert source.sha256 == EMBEDDED_SHA256
    assert (source.mask_token_id, source.eos_token_ids) == (4, (2, 0))


def test_other_bytes_are_not_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tidar_ref.checkpoint

    path = write(tmp_path / "m.gguf", *tiny("llama"))
    monkeypatch.setattr(tidar_ref.checkpoint, "_embedded_file", lambda: path)
    with pytest.raises(UserError, match="reinstall the package"):
        load("embedded")


PROMPTS = [
    "Once upon a time", "The capital of France is", "def fibonacci(n):\n", "1, 2, 3, 4,",
    "Question: What is 12 + 30?\nAnswer:", "import numpy as np\n\n", "Dear Sir or Madam,",
    "The three laws of motion are", "for i in range(10):\n    print(", "A haiku about rain:\n",
    "SELECT name FROM", "Water boils at", "To be, or not to be", "class Stack:\n    def __init__",
    "Die Hauptstadt von Deutschland ist", "In 1969, humans", "x = [3, 1, 2]\nx.sort()\nprint(x)  #",
    "Roses are red,", "HTTP status 404 means", "The recipe needs two eggs,",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(smollm_gguf: Path) -> Any:
    """transformers' reading of the same file: up to a minute, so once for all."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm_gguf.parent, gguf_file=smollm_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def ours(smollm_gguf: Path) -> Any:
    return load("embedded")


@pytest.mark.slow
def test_smollm2_weights_equal_transformers(theirs: Any, ours: Any) -> None:
    found, expected = ours.model.state_dict(), theirs.state_dict()
    layer = "model.layers.{}.self_attn.{}_proj.weight"
    for index in range(ours.model.config.num_layers):
        fused = torch.cat([expected[layer.format(index, kind)] for kind in "qkv"])
        assert torch.equal(found[f"layers.{index}.qkv.weight"], fused)
        mlp = [expected[f"model.layers.{index}.mlp.{k}_proj.weight"] for k in ("gate", "up")]
        assert torch.equal(found[f"layers.{index}.gate_up.weight"], torch.cat(mlp))
        for name, other in {
            "o": "self_attn.o_proj", "down": "mlp.down_proj", "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
        }.items():  # fmt: skip
            theirs_ = expected[f"model.layers.{index}.{other}.weight"]
            assert torch.equal(found[f"layers.{index}.{name}.weight"], theirs_)
    assert torch.equal(found["embed.weight"], expected["model.embed_tokens.weight"])
    assert torch.equal(found["norm.weight"], expected["model.norm.weight"])


@pytest.mark.slow
def test_smollm2_greedy_text_equals_transformers(theirs: Any, ours: Any) -> None:
    """20 prompts, 32 tokens each, float32, token for token.

    One forward of theirs over prompt and answer shows its choice at every place; if each equals
    our next token, greedy decoding with it gives our answer. Two prompts go through its `generate`.
    """
    decoder = autoregressive.build(ours.model)
    prompts = [ours.tokenizer.encode(prompt) for prompt in PROMPTS]
    answers = []
    for start in range(0, len(prompts), 5):
        answers += generate(decoder, prompts[start : start + 5], max_new_tokens=32)
    for number, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        prompt, mine = PROMPTS[number], answer.token_ids
        assert len(mine) == 32
        with torch.inference_mode():
            chosen = theirs(torch.tensor([[*ids, *mine]])).logits[0, len(ids) - 1 : -1].argmax(-1)
            assert list(mine) == chosen.tolist(), prompt
            if number < 2:
                out = theirs.generate(
                    torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=-1,
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long), pad_token_id=0,
                )  # fmt: skip
                assert list(mine) == out[0, len(ids) :].tolist(), prompt
