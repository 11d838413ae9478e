"""Adapters: training starts at the base, files survive the round trip, peft reads them, gated ones
leave the clean rows alone, a full fine-tune becomes a low-rank difference."""

from __future__ import annotations

import json
from pathlib import Path

import oracles
import pytest
import tiny
import torch
from test_training import MASK, example, logits_of, rows_of

from tidar_ref.errors import UserError
from tidar_ref.training import adapters
from tidar_ref.training.adapters import AdapterConfig
from tidar_ref.training.network import TrainingNetwork
from tidar_ref.training.rows import Example, Objective
from tidar_ref.training.trainer import TrainConfig, Trainer

OBJECTIVE = Objective(block_lens=(3, 4), grids=2)
EXAMPLES = [example(2, 8, seed) for seed in range(6)]


def trained(folder: Path, family: str, placement: str, steps: int = 4) -> TrainingNetwork:
    config = oracles.tiny_config(family, vocab=16)
    state = oracles.random_state(config, 3)
    network = TrainingNetwork(
        tiny.model_of(config, state),
        mask_token_id=MASK,
        adapters=AdapterConfig(rank=3, alpha=6.0, placement=placement),
    )
    settings = TrainConfig(steps=steps, batch=4, micro_batch=4, lr=3e-2, weight_decay=0.0)
    Trainer(network, EXAMPLES, OBJECTIVE, settings, folder).run()
    return network


@pytest.mark.parametrize("placement", ["all", "mask"])
def test_it_starts_at_the_base(placement: str) -> None:
    model = tiny.random_tiny("qwen2")
    settings = AdapterConfig(rank=4, placement=placement)
    rows = rows_of(EXAMPLES[:2], OBJECTIVE)
    outs = [
        logits_of(
            TrainingNetwork(
                tiny.model_of(model.config, model.state), mask_token_id=MASK, adapters=choice
            ),
            rows,
        )
        for choice in (None, settings)
    ]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("placement", ["all", "mask"])
def test_base_weights_stay_and_both_matrices_learn(tmp_path: Path, placement: str) -> None:
    network = trained(tmp_path, "llama", placement)
    base = oracles.random_state(oracles.tiny_config("llama", vocab=16), 3)
    for index, layer in enumerate(network.layers):
        assert torch.equal(layer.base.qkv.weight, base[f"layers.{index}.qkv.weight"])
    assert torch.equal(network.embed.weight, base["embed.weight"])
    assert not torch.equal(network.mask_embedding, base["embed.weight"][MASK])
    found = adapters.adapter_of(network, mask_token_id=MASK)
    assert len(found.factors) == 4 * len(network.layers)
    assert all(b.abs().max() > 0 for _, b in found.factors.values())


def test_gated_adapter_leaves_clean_rows_bit_for_bit(tmp_path: Path) -> None:
    network = trained(tmp_path, "qwen3", "mask")
    config = oracles.tiny_config("qwen3", vocab=16)
    base = TrainingNetwork(
        tiny.model_of(config, oracles.random_state(config, 3)), mask_token_id=MASK
    )
    rows = rows_of(EXAMPLES, OBJECTIVE)
    alone = rows_of(EXAMPLES, Objective(kind="ar"))
    with torch.no_grad():
        ours, plain = network.hidden_states(rows), base.hidden_states(rows)
        assert torch.equal(ours[: rows.clean], plain[: rows.clean]) or torch.allclose(
            ours[: rows.clean], base.hidden_states(alone), atol=1e-6
        )
        assert (ours[rows.clean :] - plain[rows.clean :]).abs().max() > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_files_survive_the_round_trip_and_merge_to_the_same_logits(
    tmp_path: Path, family: str
) -> None:
    network = trained(tmp_path / "run", family, "all")
    config = oracles.tiny_config(family, vocab=16)
    learned = adapters.adapter_of(network, mask_token_id=MASK)
    adapters.save(learned, tmp_path / "a", config, base="tiny", notes={"recipe": "test"})
    back = adapters.read(tmp_path / "a", config)
    assert (back.config, back.mask_token_id) == (learned.config, MASK)
    for name, (a, b) in learned.factors.items():
        for ours, theirs in zip((a, b), back.factors[name], strict=True):
            assert torch.equal(ours.to(torch.bfloat16).float(), theirs)
    model = tiny.model_of(config, oracles.random_state(config, 3))
    adapters.apply(model, back)
    merged = TrainingNetwork(model, mask_token_id=MASK)
    rows = rows_of(EXAMPLES[:3], OBJECTIVE)
    with torch.no_grad():  # files hold bfloat16
        for layer in network.layers:
            for part in layer.low_rank.values():
                part.a.copy_(part.a.to(torch.bfloat16))
                part.b.copy_(part.b.to(torch.bfloat16))
    ours, real = logits_of(network, rows), torch.arange(16) != MASK
    torch.testing.assert_close(
        logits_of(merged, rows)[:, real], ours[:, real], atol=1e-4, rtol=1e-4
    )


def test_peft_reads_an_everywhere_adapter_into_transformers(tmp_path: Path) -> None:
    """Our file on transformers' Qwen3 through PeftModel gives our merged model's logits."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from tidar_ref.checkpoint import load

    torch.manual_seed(0)
    settings = transformers.Qwen3Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    theirs = transformers.Qwen3ForCausalLM(settings).eval()
    theirs.save_pretrained(tmp_path / "base")
    _tokenizer(tmp_path / "base")
    ours = load(str(tmp_path / "base"), mask_token_id=MASK, prepare=False)
    network = TrainingNetwork(
        ours.model, mask_token_id=MASK, adapters=AdapterConfig(rank=3, alpha=6.0)
    )
    train = TrainConfig(steps=4, batch=4, micro_batch=4, lr=3e-2, weight_decay=0.0)
    Trainer(network, EXAMPLES, OBJECTIVE, train, tmp_path / "run").run()
    learned = adapters.adapter_of(network, mask_token_id=MASK)
    adapters.save(learned, tmp_path / "adapter", ours.model.config, base="base", notes={})

    gated = adapters.Adapter(
        **{**vars(learned), "config": AdapterConfig(rank=3, alpha=6.0, placement="mask")}
    )
    adapters.save(gated, tmp_path / "gated", ours.model.config, base="base", notes={})
    with pytest.raises((KeyError, ValueError, TypeError)):  # on every row it would be wrong
        peft.PeftModel.from_pretrained(theirs, str(tmp_path / "gated"))
    wrapped = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    ids = torch.randint(0, MASK, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = wrapped(ids).logits[0]
        back = adapters.read(tmp_path / "adapter", ours.model.config)
        fresh = load(str(tmp_path / "base"), mask_token_id=MASK, prepare=False)
        adapters.apply(fresh.model, back)
        rows = rows_of([_document(ids[0].tolist())], Objective(kind="ar"))
        got = logits_of(TrainingNetwork(fresh.model, mask_token_id=MASK), rows)
        plain = logits_of(
            TrainingNetwork(
                load(str(tmp_path / "base"), mask_token_id=MASK, prepare=False).model,
                mask_token_id=MASK,
            ),
            rows,
        )
    real = torch.arange(16) != MASK  # only ours moves the mask token's row of the tied table
    torch.testing.assert_close(got[:, real], wanted[:, real], atol=1e-4, rtol=1e-3)
    assert (plain - wanted)[:, real].abs().max() > 0.05  # the adapter does something


def _document(ids: list[int]) -> Example:
    return Example(prompt=(), response=tuple(ids))


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(16)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))


def test_a_full_fine_tune_is_stored_as_a_low_rank_difference() -> None:
    config = oracles.tiny_config("qwen2", vocab=16)
    base = oracles.random_state(config, 3)
    g = torch.Generator().manual_seed(0)
    tuned = dict(base)
    for name in base:
        if name.removesuffix(".weight").rpartition(".")[2] in adapters.PRODUCTS:
            out, inner = base[name].shape
            low = torch.randn(out, 4, generator=g) @ torch.randn(4, inner, generator=g)
            tuned[name] = base[name] + 0.1 * low
    exact, share = adapters.difference(base, tuned, rank=4, mask_token_id=MASK)
    assert share == pytest.approx(1.0, abs=1e-5)
    model = tiny.model_of(config, base)
    adapters.merge(model, exact)
    for name, value in tuned.items():
        torch.testing.assert_close(model.get_parameter(name).data, value, atol=1e-4, rtol=1e-4)
    _, less = adapters.difference(base, tuned, rank=2, mask_token_id=MASK)
    assert 0.3 < less < 0.95


def test_damaged_and_foreign_adapters_are_refused(tmp_path: Path) -> None:
    config = oracles.tiny_config("qwen3", vocab=16)
    learned = adapters.adapter_of(trained(tmp_path / "run", "qwen3", "all"), mask_token_id=MASK)
    folder = adapters.save(learned, tmp_path / "a", config, base="tiny", notes={})
    with pytest.raises(UserError, match="adapter_config.json"):
        adapters.read(tmp_path, config)
    with pytest.raises(UserError, match="use the base model"):
        adapters.read(folder, oracles.tiny_config("llama", vocab=16))
    text = json.loads((folder / adapters.NOTES_FILE).read_text())
    (folder / adapters.NOTES_FILE).write_text(json.dumps({**text, "placement": "up"}))
    with pytest.raises(UserError, match="up"):
        adapters.read(folder, config)
    (folder / adapters.NOTES_FILE).write_text(json.dumps(text))
    whole = (folder / adapters.WEIGHTS_FILE).read_bytes()
    (folder / adapters.WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        adapters.read(folder, config)
    with pytest.raises(UserError, match="cannot be merged"):
        gated = adapters.adapter_of(trained(tmp_path / "g", "qwen3", "mask"), mask_token_id=MASK)
        adapters.merge(tiny.model_of(config, oracles.random_state(config, 3)), gated)


@pytest.mark.parametrize("placement", ["all", "mask"])
def test_decoding_uses_the_adapter_as_training_did(tmp_path: Path, placement: str) -> None:
    """The logits of a training block that starts at s are those of the decoder's masks after s."""
    from tidar_ref.cache import KVCache
    from tidar_ref.masks import prefill_mask, prefill_positions

    network = trained(tmp_path / "run", "qwen3", placement)
    config = oracles.tiny_config("qwen3", vocab=16)
    model = tiny.model_of(config, oracles.random_state(config, 3))
    adapters.apply(model, adapters.adapter_of(network, mask_token_id=MASK))
    doc = example(5, 8, 4)
    rows = rows_of([doc], Objective(block_lens=(4,), random_offset=False))
    wanted = network.hidden_states(rows).detach()[rows.clean :].view(-1, 4, 32)
    for number, start in enumerate((5, 9)):
        cache = KVCache(config, batch=1, max_len=32, scratch=8, dtype=torch.float32, device="cpu")
        ids = torch.tensor([[*doc.tokens[:start], *[MASK] * 4]])
        with torch.inference_mode():
            hidden = model(ids, prefill_positions(start, 4)[None], cache, prefill_mask(start, 4))
        torch.testing.assert_close(hidden[0, start:], wanted[number], atol=1e-4, rtol=1e-3)


def test_gated_adapter_changes_drafts_and_no_token(tmp_path: Path) -> None:
    """AR with the adapter attached is the base bit for bit; TiDAR's text is the base's greedy text,
    while its drafts are others than without the adapter."""
    from baselines.autoregressive import build as build_ar
    from tidar_ref.decoding import generate
    from tidar_ref.tidar import build as build_tidar

    network = trained(tmp_path / "run", "llama", "mask", steps=30)
    config = oracles.tiny_config("llama", vocab=16)
    state = oracles.random_state(config, 3)
    base, model = tiny.model_of(config, state), tiny.model_of(config, state)
    adapters.apply(model, adapters.adapter_of(network, mask_token_id=MASK))
    prompts = [[t for t in p if t != MASK] or [1] for p in tiny.prompts(6)]
    drafted = []
    for prompt in prompts:
        wanted = oracles.greedy(state, config, prompt, 20)
        assert MASK not in wanted
        for decoder in (build_ar(base), build_ar(model)):
            trace = generate(decoder, [prompt], max_new_tokens=20)[0]
            assert list(trace.token_ids) == wanted
        pair = []
        for weights in (base, model):
            decoder = build_tidar(weights, mask_token_id=MASK, block_len=4)
            trace = generate(decoder, [prompt], max_new_tokens=20)[0]
            assert list(trace.token_ids) == wanted
            pair.append([step.draft_tokens for step in trace.steps])
        drafted.append(pair[0] != pair[1])
    assert any(drafted)
