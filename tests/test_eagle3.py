"""`eagle3`: published layouts, greedy AR's tokens, exact caches, exact draws, the tree itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import eagle_oracle
import oracles
import pytest
import test_sampling
import test_tidar
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baselines import _eagle3_files, _eagle3_head, eagle3
from bench.heads import draft_vocabulary
from bench.profiles import DecoderSpec
from bench.registry import check_decoder
from tidar_ref.config import ModelConfig
from tidar_ref.decoding import State, StepTrace, generate
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling
from tidar_ref.training import eagle
from tidar_ref.training.rows import Example, Objective, build_rows
from tidar_ref.training.trainer import TrainConfig, Trainer

CHAINS = [{"depth": 3}, {"depth": 5}, {"depth": 7}]
TREES = [
    {"depth": 4, "top_k": 3, "nodes": 9},
    {"depth": 5, "top_k": 4, "nodes": 16},
    {"depth": 8, "top_k": 10, "nodes": 60},
]
DRAFTED = [0, 1, 3, 4, 5, 8, 9, 11, 13, 14]  # the reduced vocabulary of the tests' checkpoints


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# --- checkpoints in the published layouts --------------------------------------------------------


def layer_config(vocab: int, hidden: int = 32) -> ModelConfig:
    return replace(
        oracles.tiny_config("llama", vocab=vocab, layers=1),
        hidden_size=hidden,
        tied_embeddings=False,
    )


def write_head(folder: Path, layout: str, target: tiny.Tiny, seed: int = 5) -> eagle_oracle.Drafter:
    """A random head as this publisher writes it, and the oracle that holds the same weights."""
    layers = target.config.num_layers
    taps = (0, layers, 1) if layout in ("specforge", "speculators") else (1, (layers + 1) // 2, 2)
    layer = layer_config(len(DRAFTED))
    state = eagle_oracle.random_head(layer, seed, target_hidden=target.config.hidden_size)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 64,
        "vocab_size": target.config.vocab_size,
        "draft_vocab_size": len(DRAFTED),
    }
    ids = torch.tensor(DRAFTED)
    tensors = dict(state) | {
        "d2t": ids - torch.arange(len(DRAFTED)),
        "t2d": torch.zeros(target.config.vocab_size, dtype=torch.bool).index_fill(0, ids, True),
    }
    if layout == "safeailab":
        config["architectures"] = ["LlamaForCausalLM"]
    if layout == "specforge":  # outputs of layers
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in taps]}
    if layout == "angelslim":
        tensors["embed_tokens.weight"] = target.state["embed.weight"].clone()
    if layout == "speculators":  # inputs of layers, the layer's settings nested, its own names
        names = ("vocab_size", "draft_vocab_size", "architectures")
        config = {name: config.pop(name) for name in names} | {
            "transformer_layer_config": {**config, "vocab_size": target.config.vocab_size},
            "speculators_model_type": "eagle3",
            "eagle_aux_hidden_state_layer_ids": list(taps),
            "norm_before_residual": False,
        }
        tensors = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "safeailab":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return eagle_oracle.Drafter(target.state, target.config, state, layer, taps, DRAFTED)


LAYOUTS = ("safeailab", "specforge", "angelslim", "speculators")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_load_and_draft(layout: str, tmp_path: Path) -> None:
    """Taps, weights, vocabulary map: drafts are the oracle's, caches its keys and values."""
    target = tiny.random_tiny("qwen2")
    oracle = write_head(tmp_path, layout, target)
    decoder = eagle3.build(target.model, head=str(tmp_path), depth=3)
    assert decoder.drafter.config.taps == tuple(oracle.taps) and decoder.drafter.trained
    assert decoder.params == {"head": str(tmp_path), "depth": 3}
    prompt = [3, 9, 1, 4]
    with torch.inference_mode():
        state, prefill = decoder.prefill([prompt], max_new_tokens=9, sampling=Sampling())
        text = [*prompt, *prefill.committed[0]]
        step = decoder.step(state)
    path: list[int] = []
    for token in step.draft_tokens[0]:
        assert token == DRAFTED[int(oracle.after(text, path).argmax())]
        path.append(token)
    assert head_cache_error(oracle, state, 0, [*text, *step.committed[0]]) < 1e-5


def test_vocabulary_map_round_trip(tmp_path: Path) -> None:
    target = tiny.random_tiny("llama")
    write_head(tmp_path, "specforge", target)
    head = _eagle3_files.load_head(str(tmp_path), target.model)
    assert head.target_ids.tolist() == DRAFTED
    assert head.lm_head.weight.shape[0] == len(DRAFTED)


def test_a_saved_head_loads_again(tmp_path: Path) -> None:
    """What `save_head` writes is what was loaded, tensor by tensor, and drafts the same."""
    target = tiny.random_tiny("llama")
    write_head(tmp_path, "safeailab", target)
    head = _eagle3_files.load_head(str(tmp_path), target.model)
    _eagle3_files.save_head(head, tmp_path / "again")
    again = _eagle3_files.load_head(str(tmp_path / "again"), target.model)
    assert again.config == head.config and again.target_ids.tolist() == DRAFTED
    published = torch.load(tmp_path / "pytorch_model.bin")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)


def test_a_head_is_not_asked_to_fit_another_model() -> None:
    """Parameters are checked on a small model before weights are loaded; the head waits."""
    params = (("head", "of/another/target"), ("depth", 3))
    model = tiny.random_tiny("llama").model
    check_decoder(DecoderSpec(name="eagle3", params=params), model, mask_token_id=None)
    for wrong in (("depth", 99), ("phase_of_moon", 1)):
        spec = DecoderSpec(name="eagle3", params=(params[0], wrong))
        with pytest.raises(UserError, match=str(wrong[0])):
            check_decoder(spec, model, mask_token_id=None)


def test_norm_before_residual_is_obeyed(tmp_path: Path) -> None:
    target = tiny.random_tiny("llama")
    oracle = write_head(tmp_path, "specforge", target)
    edit_config(tmp_path, norm_before_residual=True)
    head = _eagle3_files.load_head(str(tmp_path), target.model)
    text = [3, 9, 1, 4, 7]
    features = oracle.features(text[:-1])
    store = head.new_cache(batch=1, max_len=4, scratch=0)
    with torch.inference_mode():
        got = head(
            torch.tensor([text[1:]]), torch.arange(4)[None], store,
            torch.ones(4, 4).tril().bool(), features[None].float(),
        )  # fmt: skip
    for setting, close in ((True, True), (False, False)):
        want = eagle_oracle.head_layer(
            oracle.head, oracle.layer, target.state["embed.weight"], text[1:], features,
            norm_before_residual=setting,
        )[0]  # fmt: skip
        assert torch.allclose(got[0].double(), want, atol=1e-4) == close


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("fc.weight"), "lacks 1 tensors, such as fc.weight"),
        (without("midlayer.hidden_norm.weight"), "midlayer.hidden_norm.weight"),
        (without("d2t"), "lacks d2t"),
        (put("fc.weight", torch.zeros(32, 64)), r"fc.weight .* is \(32, 64\), expected \(32, 96\)"),
        (put("midlayer.self_attn.k_proj.weight", torch.zeros(16, 32)), "k_proj.weight"),
        (
            put("midlayer.self_attn.q_proj.bias", torch.zeros(32)),
            "does not use: midlayer",
        ),
        (put("lm_head.weight", torch.zeros(11, 32)), "lm_head.weight"),
        (put("d2t", torch.zeros(9, dtype=torch.long)), r"d2t .* is \(9,\)"),
        (put("d2t", torch.arange(10, 0, -1)), "names tokens twice"),
        (put("d2t", torch.full((10,), 9)), "outside 0..15"),
        (put("t2d", torch.arange(16) < 10), "different tokens"),
    ],
)
def test_damaged_heads_are_refused(
    change: Callable[[dict], None], words: str, tmp_path: Path
) -> None:
    target = tiny.random_tiny("llama")
    write_head(tmp_path, "safeailab", target)
    file = tmp_path / "pytorch_model.bin"
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)
    with pytest.raises(UserError, match=words):
        _eagle3_files.load_head(str(tmp_path), target.model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 2}, "has 2 layers"),
        ({"fc_norm": True}, "fc_norm"),
        ({"vocab_size": 99}, "99 tokens"),
        ({"hidden_size": 24}, "24 wide without embeddings"),
        ({"architectures": ["DFlashModel"]}, "DFlashModel"),
        ({"attention_bias": True}, "attention_bias"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}, "2 layers"),
    ],
)
def test_heads_of_another_kind_are_refused(changes: dict, words: str, tmp_path: Path) -> None:
    target = tiny.random_tiny("llama")
    write_head(tmp_path, "safeailab", target)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        _eagle3_files.load_head(str(tmp_path), target.model)


def test_no_head_and_damaged_files_are_refused(tmp_path: Path) -> None:
    model = tiny.random_tiny("llama").model
    for spec, words in (("nowhere", "'nowhere' is no folder"), (str(tmp_path), "no config.json")):
        with pytest.raises(UserError, match=words):
            _eagle3_files.load_head(spec, model)
    write_head(tmp_path, "specforge", tiny.random_tiny("llama"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be read"):
        _eagle3_files.load_head(str(tmp_path), model)
    file.unlink()
    with pytest.raises(UserError, match="neither"):
        _eagle3_files.load_head(str(tmp_path), model)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "needs a draft head"),
        ({"head": "random", "depth": 0}, "depth is 0"),
        ({"head": "random", "depth": 2.5}, "depth is 2.5"),
        ({"head": "random", "top_k": 33}, "top_k is 33"),
        ({"head": "random", "top_k": 17}, "drafts 16 tokens"),
        ({"head": "random", "depth": 3, "nodes": 9}, "nodes is 9, but a chain"),
        ({"head": "random", "depth": 2, "top_k": 3, "nodes": 13}, "from 1 to 12"),
    ],
)
def test_impossible_parameters_are_refused(params: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        eagle3.build(tiny.random_tiny("llama").model, **params)


def test_adapters_gated_to_masks_are_refused() -> None:
    target = tiny.Tiny(tiny.random_tiny("llama").config, tiny.random_tiny("llama").state)
    target.model.mask_adapter = SimpleNamespace(token_id=tiny.MASK)
    with pytest.raises(UserError, match="load their base"):
        eagle3.build(target.model, head="random")


# --- a head that is often right ------------------------------------------------------------------


def motifs(seed: int, count: int = 24, length: int = 18) -> Iterator[Tensor]:
    """The texts `trained_tiny` has learned: sequences of period 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        motif = torch.randint(0, tiny.MASK, (count, 2), generator=generator)
        period = torch.randint(1, 3, (count, 1), generator=generator)
        yield motif.gather(1, torch.arange(length) % period)


@cache
def trained_head() -> tuple[_eagle3_head.EagleHead, list[float]]:
    """(head for `trained_tiny`, its losses)."""
    model = tiny.trained_tiny().model
    head = _eagle3_head.random_head(model, seed=1)
    config = eagle.EagleConfig(unrolls=3)
    network = eagle.HeadNetwork(head, model, config, mask_token_id=tiny.MASK)
    texts = [row for _, batch in zip(range(70), motifs(2), strict=False) for row in batch.tolist()]
    settings = TrainConfig(
        steps=70, batch=24, micro_batch=24, lr=1e-2, min_lr_ratio=1.0, warmup=0.0, clip=0.5
    )
    with tempfile.TemporaryDirectory() as folder:
        examples = [Example(prompt=(), response=tuple(text)) for text in texts]
        trainer = Trainer(network, examples, Objective(kind="eagle3"), settings, Path(folder))
        losses: list[float] = []
        trainer.run(lambda log: losses.append(log.diffusion_loss or 0.0))
    head.requires_grad_(False)
    return head, losses


@cache
def trained_oracle() -> eagle_oracle.Drafter:
    """The trained head's weights by their published names, and `trained_tiny`'s."""
    head, target = trained_head()[0], tiny.trained_tiny()
    w, layer = dict(head.state_dict()), head.config.layer
    q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    found = {name: w[name] for name in ("fc.weight", "norm.weight", "lm_head.weight")}
    for ours, theirs in _eagle3_files.LAYER_NAMES.items():
        found["midlayer." + theirs] = w[ours]
    for x, part in zip("qkv", w["layer.qkv.weight"].split([q, kv, kv]), strict=True):
        found[f"midlayer.self_attn.{x}_proj.weight"] = part
    for x, part in zip(("gate", "up"), w["layer.gate_up.weight"].chunk(2), strict=True):
        found[f"midlayer.mlp.{x}_proj.weight"] = part
    return eagle_oracle.Drafter(
        target.state, target.config, found, layer, head.config.taps, range(16)
    )


def cases() -> list[tuple[tiny.Tiny, str | _eagle3_head.EagleHead]]:
    """Targets with a head that is often right, and with ones that mostly are not."""
    return [
        (tiny.trained_tiny(), trained_head()[0]),
        *((tiny.random_tiny(family), "random") for family in ("llama", "qwen2")),
    ]


@pytest.mark.parametrize("params", [*CHAINS, *TREES])
def test_equals_dumb_greedy(params: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token in float32, alone and in a ragged batch; the proof is not hollow."""
    paths: set[tuple[int, ...]] = set()
    keep = eagle3.KVCache.keep

    def watched(self: eagle3.KVCache, indices: Tensor, counts: list[int]) -> None:
        paths.update(tuple(row[:n]) for row, n in zip(indices.tolist(), counts, strict=True))
        keep(self, indices, counts)

    monkeypatch.setattr(eagle3.KVCache, "keep", watched)
    accepted = []
    for index, (target, head) in enumerate(cases()):
        prompts = tiny.prompts(3, seed=index)
        expected = [tuple(target.greedy(prompt, 17)) for prompt in prompts]
        decoder = eagle3.build(target.model, head=head, **params)
        for traces in (
            [generate(decoder, [p], max_new_tokens=17)[0] for p in prompts],
            generate(decoder, prompts, max_new_tokens=17),
        ):
            assert [t.token_ids for t in traces] == expected
            steps = [step for t in traces for step in t.steps]
            accepted += [step.accepted[0] for step in steps]
            assert all(step.draft_forwards == params["depth"] for step in steps)
            assert all(step.query_width == 1 + step.drafted[0] for step in steps)
    assert {0, 1, params["depth"]} <= set(accepted)
    if params in TREES:  # paths that leave slots out, so that K/V really moved
        assert any(path != tuple(range(len(path))) for path in paths)


def test_a_wrong_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: the first child is taken whatever the target says."""

    def first_child(ids: Tensor, parents: Tensor, chosen: Tensor, depth: int) -> tuple:
        hit = (parents == 0).long().argmax(dim=1, keepdim=True)
        path = torch.cat([torch.zeros_like(hit), *([hit] * depth)], dim=1)
        return path, torch.full_like(ids[:, 0], 2)

    monkeypatch.setattr(eagle3, "walk", first_child)
    target, head = cases()[1]
    prompts = tiny.prompts(5, seed=0)
    decoder = eagle3.build(target.model, head=head, **TREES[0])
    got = [t.token_ids for t in generate(decoder, prompts, max_new_tokens=24)]
    assert got != [tuple(target.greedy(prompt, 24)) for prompt in prompts]


def test_kv_left_where_it_was_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: the accepted nodes' K/V are not moved together."""
    monkeypatch.setattr(eagle3.KVCache, "keep", lambda cache, _, counts: cache.advance(counts))
    target, head = cases()[0]
    decoder = eagle3.build(target.model, head=head, **TREES[2])
    assert test_tidar.cache_error(decoder, target, tiny.prompts(4, seed=80)) > 1e-2


# --- caches --------------------------------------------------------------------------------------


def head_cache_error(
    oracle: eagle_oracle.Drafter, state: State, row: int, text: list[int]
) -> float:
    """Worst deviation of the head's cache from a fresh pass over `text`; infinity at a length."""
    if state.head_cache.lengths[row] != len(text) - 1:
        return float("inf")
    worst = 0.0
    wanted = oracle.keys_values(text)
    for stored, want in zip((state.head_cache.k, state.head_cache.v), wanted, strict=True):
        got = stored[0, row, :, : len(text) - 1].transpose(0, 1).double()
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    return worst


@pytest.mark.parametrize("params", [CHAINS[0], *TREES[:2]])
def test_both_caches_are_exact_after_every_step(params: dict) -> None:
    target, oracle = tiny.trained_tiny(), trained_oracle()
    decoder = eagle3.build(target.model, head=trained_head()[0], **params)
    prompts = tiny.prompts(3, seed=80)
    assert test_tidar.cache_error(decoder, target, prompts, count=12) < 1e-5
    texts = [[*p, target.greedy(p, 1)[0]] for p in prompts]
    accepted = 0

    def check(state: State, step: StepTrace) -> None:
        nonlocal accepted
        for row, text in enumerate(texts):
            if step.committed[row]:
                text.extend(step.committed[row])
                assert head_cache_error(oracle, state, row, text) < 1e-5
        accepted += sum(step.accepted)

    generate(decoder, prompts, max_new_tokens=12, on_step=check)
    assert accepted > 6


def test_features_other_than_the_target_s_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wrong on purpose: after a verification the head sees nearly the target's features."""
    target = tiny.random_tiny("qwen2")
    oracle = write_head(tmp_path, "specforge", target)
    decoder = eagle3.build(target.model, head=str(tmp_path), depth=3)
    [prompt] = tiny.prompts(1, seed=80)
    errors = []
    for wrong in (0.0, 0.05):
        with torch.inference_mode():
            state, prefill = decoder.prefill([prompt], max_new_tokens=9, sampling=Sampling())
            fuse = decoder.drafter.fuse
            monkeypatch.setattr(decoder.drafter, "fuse", lambda t, e=wrong, f=fuse: f(t) + e)
            step = decoder.step(state)
        text = [*prompt, *prefill.committed[0], *step.committed[0]]
        errors.append(head_cache_error(oracle, state, 0, text))
    assert errors[0] < 1e-5 and 1e-3 < errors[1] < float("inf")


# --- the tree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", TREES[:2])
def test_the_tree_is_the_oracle_s(params: dict, tmp_path: Path) -> None:
    """Every node's path, in a ragged batch: masks, positions and scores of the drafting."""
    target = tiny.random_tiny("qwen2")
    oracle = write_head(tmp_path, "specforge", target)
    decoder = eagle3.build(target.model, head=str(tmp_path), **params)
    prompts = tiny.prompts(2, seed=6)
    with torch.inference_mode():
        state, prefill = decoder.prefill(prompts, max_new_tokens=9, sampling=Sampling())
        tokens, parents = decoder._draft_tree(state)
    for row, prompt in enumerate(prompts):
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tokens[row].tolist(), parents[row, 1:].tolist(), strict=True):
            assert parent < len(paths)  # parents come first
            paths.append((*paths[parent], token))
        text = [*prompt, *prefill.committed[row]]
        wanted = oracle.tree(text, params["top_k"], params["nodes"], params["depth"])
        assert set(paths[1:]) == wanted


def random_tree(seed: int, count: int) -> tuple[list[int], list[int]]:
    """(tokens, parents) with distinct siblings, parents first."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents, taken = [0], [-1], set()
    while len(tokens) < count:
        parent = int(torch.randint(0, len(tokens), (1,), generator=generator))
        token = int(torch.randint(0, 6, (1,), generator=generator))
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    return tokens, parents


def test_ancestors_and_walk_by_hand() -> None:
    for seed in range(20):
        tokens, parents = random_tree(seed, 12)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(0, 6, (12,), generator=generator).tolist()
        mask = eagle3.ancestors(torch.tensor([parents]), 12)[0]
        for node in range(12):
            above, at = set(), node
            while at >= 0:
                above.add(at)
                at = parents[at]
            assert set(mask[node].nonzero()[:, 0].tolist()) == above
        path = [0]
        while following := [
            n for n in range(12) if parents[n] == path[-1] and tokens[n] == chosen[path[-1]]
        ]:
            path += following
        rows = (torch.tensor([x]) for x in (tokens, parents, chosen))
        got, length = eagle3.walk(*rows, 12)
        assert got[0, : int(length)].tolist() == path
        assert set(got[0, int(length) :].tolist()) <= {path[-1]}


def test_a_tree_without_branches_is_a_chain() -> None:
    parents = torch.arange(-1, 5)[None]
    assert torch.equal(eagle3.ancestors(parents, 5)[0], torch.ones(6, 6).tril().bool())
    ids, chosen = torch.tensor([[7, 1, 2, 3, 4, 5]]), torch.tensor([[1, 2, 9, 4, 5, 6]])
    path, length = eagle3.walk(ids, parents, chosen, 5)
    assert int(length) == 3 and path[0].tolist() == [0, 1, 2, 2, 2, 2]


class Fixed(nn.Module):
    """A drafter that says next_of[token], whatever it is shown; its cache holds lengths only."""

    def __init__(self, next_of: Tensor) -> None:
        super().__init__()
        self.next_of, self.vocab, self.name = next_of, len(next_of), "fixed"
        self.target_ids = torch.arange(self.vocab)
        self.config = SimpleNamespace(taps=(0,))

    def new_cache(self, *, batch: int, max_len: int, scratch: int) -> eagle3.KVCache:
        config = layer_config(self.vocab)
        kind = {"dtype": torch.float32, "device": "cpu"}
        return eagle3.KVCache(config, batch=batch, max_len=max_len, scratch=scratch, **kind)

    def fuse(self, taps: dict[int, Tensor]) -> Tensor:
        return taps[0][:, :, : self.vocab]

    def forward(self, ids: Tensor, *_: object) -> Tensor:
        return nn.functional.one_hot(self.next_of[ids], self.vocab).float()

    def logits(self, features: Tensor) -> Tensor:
        return 50 * features


@cache
def first_order() -> tiny.Tiny:
    """A target whose next token depends on the last one only: its layers add nothing."""
    config = oracles.tiny_config("llama", vocab=16)
    state = oracles.random_state(config, 4)
    for name, value in state.items():
        if name.endswith(("o.weight", "down.weight")):
            value.zero_()
    return tiny.Tiny(config, state)


@pytest.mark.parametrize("params", [*CHAINS, TREES[0], TREES[2]])
def test_perfect_and_hopeless_drafters(params: dict) -> None:
    target = first_order()
    next_of = torch.tensor([target.greedy([token], 1)[0] for token in range(16)])
    limit = 1 + 3 * (params["depth"] + 1)
    for shift, committed in ((0, params["depth"] + 1), (1, 1)):
        drafter = Fixed((next_of + shift) % 16)
        decoder = eagle3.build(target.model, head=drafter, **params)
        trace = generate(decoder, [[3, 5]], max_new_tokens=limit)[0]
        assert list(trace.token_ids) == target.greedy([3, 5], limit)
        lengths = {len(step.committed[0]) for step in trace.steps}
        # A tree also drafts what its drafter thinks unlikely, so it is never quite hopeless.
        assert lengths == {committed} if params in CHAINS or not shift else min(lengths) >= 1


# --- sampling ------------------------------------------------------------------------------------


@cache
def sampled_head() -> _eagle3_head.EagleHead:
    """Random weights large enough for opinions; 6 of 8 tokens are drafted."""
    head = _eagle3_head.random_head(test_sampling.model().model, vocab=6, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.3, generator=generator)
        head.target_ids.copy_(torch.tensor([0, 2, 3, 4, 6, 7]))
    return head


SAMPLED = [{"depth": 2}, {"depth": 2, "top_k": 3, "nodes": 7}]


def sampled_p(params: dict, mode: str) -> float:
    decoder = eagle3.build(test_sampling.model().model, head=sampled_head(), **params)
    observed = test_sampling.counts(decoder, mode, draws=test_sampling.FEWER_DRAWS)
    return test_sampling.p_value(observed)


@pytest.mark.parametrize("mode", ["match", "reject"])
@pytest.mark.parametrize("params", SAMPLED)
def test_draws_are_ar_s(params: dict, mode: str) -> None:
    assert sampled_p(params, mode) > test_sampling.EQUAL
    decoder = eagle3.build(test_sampling.model().model, head=sampled_head(), **params)
    sampling = Sampling(temperature=test_sampling.TEMPERATURE, mode=mode)
    traces = generate(decoder, [test_sampling.PROMPT] * 300, max_new_tokens=5, sampling=sampling)
    assert {s.accepted[0] for t in traces for s in t.steps} == {0, 1, 2}


def test_taking_every_draft_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose, chain: no draft is ever rejected."""
    verify = eagle3.verify_draft

    def accept_all(draft: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        _, following = verify(draft, *rest)
        return torch.full_like(following, draft.shape[1]), following

    monkeypatch.setattr(eagle3, "verify_draft", accept_all)
    for mode in ("match", "reject"):
        assert sampled_p(SAMPLED[0], mode) < test_sampling.DIFFERENT


def test_a_chain_s_drafts_taken_for_certain_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: drawn drafts accepted with p, as if the head could say nothing else."""
    draft_chain = eagle3.EagleDecoder._draft_chain

    def certain(self: eagle3.EagleDecoder, state: State) -> tuple[Tensor, Tensor]:
        drafts, probs = draft_chain(self, state)
        return drafts, torch.full_like(probs, 1 / test_sampling.VOCAB)

    monkeypatch.setattr(eagle3.EagleDecoder, "_draft_chain", certain)
    assert sampled_p(SAMPLED[0], "reject") < test_sampling.DIFFERENT


def test_a_tree_that_draws_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong on purpose: after no child was chosen the target is asked once more."""
    walk = eagle3.walk

    def twice(ids: Tensor, parents: Tensor, chosen: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        path, length = walk(ids, parents, chosen, depth)
        chosen[:] = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
        return path, length

    monkeypatch.setattr(eagle3, "walk", twice)
    assert sampled_p(SAMPLED[1], "reject") < test_sampling.DIFFERENT


def test_trying_children_in_turn_is_drawing_once() -> None:
    """The published acceptance of certain drafts has the law of a draw from p."""
    p = torch.tensor([0.05, 0.3, 0.15, 0.1, 0.4], dtype=torch.float64)
    for children in ([], [1], [4, 0, 2], [3, 1, 0, 2, 4][:4]):
        assert torch.allclose(eagle_oracle.sequential_law(p, children), p)


# --- training-time test --------------------------------------------------------------------------


def test_an_unroll_equals_that_many_drafts(tmp_path: Path) -> None:
    """Diagonal attention: unroll i at slot t says what a drafter says after i drafts behind t."""
    target = tiny.random_tiny("qwen2")
    oracle = write_head(tmp_path, "specforge", target)
    head = _eagle3_files.load_head(str(tmp_path), target.model)
    text = [3, 9, 1, 4, 4, 12, 0, 7]
    tokens = torch.tensor([text])
    taps, logits = eagle.target_outputs(target.model, tokens)
    wanted = oracles.causal_logits(target.state, target.config, text)
    assert torch.allclose(logits[0].double(), wanted, atol=1e-4)
    with torch.no_grad():
        for feature, i in eagle.unroll(head, taps, tokens, 7):
            draft = head.logits(feature)
            assert draft.shape == (1, len(text) - 1 - i, len(DRAFTED))
            for slot in range(draft.shape[1]):
                want = oracle.after(text[: slot + 2], text[slot + 2 : slot + 2 + i])
                assert torch.allclose(draft[0, slot].double().log_softmax(-1), want, atol=1e-4)


def test_the_loss_by_hand(tmp_path: Path) -> None:
    """Soft targets over the draft vocabulary, unknown argmaxes out of the sum but in the mean."""
    target = tiny.random_tiny("qwen2")
    oracle = write_head(tmp_path, "specforge", target)
    head = _eagle3_files.load_head(str(tmp_path), target.model)
    text = [3, 9, 1, 4, 4, 12]
    tokens = torch.tensor([text])
    taps, logits = eagle.target_outputs(target.model, tokens)
    truth = oracles.causal_logits(target.state, target.config, text)
    wanted = torch.tensor([[False, False, False, True, True, True]])
    for mask in (None, wanted):
        total, left_out = 0.0, 0
        for i in range(2):
            for slot in range(len(text) - 1 - i):
                at = slot + 1 + i  # the target's view behind this token is the teacher
                masked = mask is not None and (at + 1 >= len(text) or not mask[0, at + 1])
                if int(truth[at].argmax()) not in DRAFTED or masked:
                    left_out += 1
                    continue
                said = oracle.after(text[: slot + 2], text[slot + 2 : slot + 2 + i])
                teacher = truth[at][DRAFTED].softmax(-1)
                total -= 0.8**i * float((teacher * said).sum()) / (len(text) - 1)
        with torch.no_grad():
            config = eagle.EagleConfig(unrolls=2)
            loss = eagle.ttt_loss(head, taps, tokens, logits, config, wanted=mask)
        assert float(loss) == pytest.approx(total, rel=1e-4) and left_out


def test_a_batch_is_its_documents(tmp_path: Path) -> None:
    """Documents of unlike lengths, padded together: sums over responses equal those of each."""
    target = tiny.random_tiny("qwen2")
    write_head(tmp_path, "specforge", target)
    head = _eagle3_files.load_head(str(tmp_path), target.model)
    config = eagle.EagleConfig(unrolls=3)
    network = eagle.HeadNetwork(head, target.model, config, mask_token_id=tiny.MASK)
    texts = [((3, 9, 1), (4, 4, 12)), ((5,), (8, 0, 1, 3, 9, 2)), ((), (1, 13, 4))]
    examples = [Example(prompt=p, response=r) for p, r in texts]
    objective = Objective(kind="eagle3")
    rows = build_rows(examples, objective, mask_token_id=tiny.MASK, seeds=[0, 1, 2])
    with torch.no_grad():
        together = network(rows, objective)
        alone = []
        for example in examples:
            tokens = torch.tensor([example.tokens])
            wanted = torch.zeros_like(tokens, dtype=torch.bool)
            wanted[:, max(len(example.prompt), 1) :] = True
            taps, logits = eagle.target_outputs(target.model, tokens)
            loss = eagle.ttt_loss(head, taps, tokens, logits, config, wanted=wanted)
            alone.append(float(loss) * (tokens.shape[1] - 1))
    assert float(together.diffusion_sum) == pytest.approx(sum(alone), rel=1e-5)
    assert sum(alone) > 0 and float(together.ar_sum) == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)  # tied output rows and untied ones
def test_a_head_to_train_starts_from_the_target(family: str) -> None:
    """Output rows and norm are the target's, for exactly the tokens that were asked for."""
    model = tiny.random_tiny(family).model
    head = _eagle3_head.head_to_train(model, torch.tensor([2, 3, 5, 11]))
    features = torch.randn(3, model.config.hidden_size)
    assert torch.allclose(head.lm_head(features), model.lm_head(features)[:, [2, 3, 5, 11]])
    assert torch.equal(head.norm.weight, model.norm.weight)
    assert draft_vocabulary([[7, 7, 9], [9, 9, 15]], 4, never=15) == [0, 1, 7, 9]
    assert draft_vocabulary([[7, 7, 9], [9, 9, 15]], 1, never=15) == [9]


def test_the_head_learns() -> None:
    """The loss falls and drafts of a trained head are accepted far more often."""
    head, losses = trained_head()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    model, rates = tiny.trained_tiny().model, []
    prompts = [next(motifs(9))[row, :6].tolist() for row in range(8)]
    for drafter in (head, "random"):
        decoder = eagle3.build(model, head=drafter, depth=3)
        traces = generate(decoder, prompts, max_new_tokens=16)
        steps = [step for trace in traces for step in trace.steps]
        rates.append(sum(s.accepted[0] for s in steps) / sum(s.drafted[0] for s in steps))
    assert rates[0] > 0.6 > 0.3 > rates[1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, tiny.trained_tiny().state[name])  # the target stays as it was
