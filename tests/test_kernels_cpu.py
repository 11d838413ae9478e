"""Compiled CPU kernels against float64 and torch, on every route a product or a layer can take."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import oracles
import pytest
import tiny
import torch

from bench.profiles import parse_decoders
from bench.registry import build_decoder
from bench.regress import PROMPTS, VOCAB, tiny_model
from tidar_ref import linear
from tidar_ref.cache import KVCache
from tidar_ref.decoding import generate
from tidar_ref.linear import Linear, TiedHead, kernel_route
from tidar_ref.model import Transformer
from tidar_ref.training import adapters

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((5, 2), (33, 10), (96, 64), (70, 130))  # outputs, inputs: not only multiples of a block
ROWS = (1, 2, 3, 4, 5, 7, 20, 72, linear.KERNEL_UP_TO_ROWS + 1)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> Linear:
    module = Linear(inputs, outputs, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(outputs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    module.prepare()
    return module


def off(got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> float:
    """Largest error in units of what rounding allows: sums in float32, one rounding of the result.

    terms: sum of the absolute values of what was added up.
    """
    allowed = terms * 2.0**-20
    if got.dtype == torch.bfloat16:
        allowed = allowed + exact.abs() * 2.0**-8
    return float(((got.double() - exact).abs() / allowed).max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_products_of_all_heights_equal_float64(
    dtype: torch.dtype, bias: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    for outputs, inputs in SHAPES:
        module = product(outputs, inputs, bias, dtype)
        for rows in ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            added = module.bias.double() if bias else torch.zeros(outputs, dtype=torch.float64)
            exact = x.double() @ module.weight.double().t() + added
            terms = x.double().abs() @ module.weight.double().abs().t() + added.abs()
            got = module(x)
            assert got.dtype == dtype and got.shape == (rows, outputs)
            assert off(got, exact, terms) <= 1.0, (outputs, inputs, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_prepared_again_kernels_have_the_new_weights(dtype: torch.dtype) -> None:
    module = product(6, 4, False, dtype)
    x = torch.ones(1, 4, dtype=dtype)
    module.weight.fill_(2.0)
    module.prepare()
    assert module(x).tolist() == [[8.0] * 6]


def random_adapter(model: Transformer, placement: str) -> adapters.Adapter:
    """Rank 3, which fills no panel; its mask token is the last of the vocabulary."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        f"layers.{index}.{name}": getattr(layer, name).weight.shape
        for index, layer in enumerate(model.layers)
        for name in adapters.PRODUCTS
    }
    return adapters.Adapter(
        config=adapters.AdapterConfig(rank=3, alpha=6.0, placement=placement),
        mask_token_id=model.config.vocab_size - 1,
        factors={
            name: (
                torch.randn(3, inputs, generator=generator) / inputs**0.5,
                torch.randn(outputs, 3, generator=generator).to(torch.bfloat16).float() / 4,
            )
            for name, (outputs, inputs) in shapes.items()
        },
        mask_embedding=torch.randn(model.config.hidden_size, generator=generator),
    )


@torch.inference_mode()
def test_an_adapter_merged_into_a_prepared_model_counts() -> None:
    model = tiny_model()
    adapter = random_adapter(model, "all")
    before = [few_tokens(model, rows)[0] for rows in (1, 4)]
    adapters.apply(model, adapter)
    after = [few_tokens(model, rows)[0] for rows in (1, 4)]
    plain = [few_tokens(copy.deepcopy(model), rows)[0] for rows in (1, 4)]  # copies have no kernels
    for old, new, exact in zip(before, after, plain, strict=True):
        torch.testing.assert_close(new, exact, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(old, new, atol=1e-2)


@torch.inference_mode()
def test_strided_rows_and_not_a_number() -> None:
    module = product(6, 4, False, torch.float32)
    x = torch.randn(4, 3).t()
    assert torch.allclose(module(x), x @ module.weight.t(), atol=1e-5)
    x = torch.full((2, 4), float("nan"))
    assert module(x).isnan().all() and module(x[:1]).isnan().all()


def test_gradients_flow_through_prepared_products() -> None:
    module = product(6, 4, True, torch.float32)
    module(torch.randn(2, 4)).sum().backward()
    assert module.weight.grad is not None and module.weight.is_contiguous()


def few_tokens(
    model: Transformer, rows: int = 1, masks: bool = False
) -> tuple[torch.Tensor, KVCache]:
    """Final hidden states of `rows` tokens behind 37 random cached ones, and the cache.

    Several tokens see each other by a pattern that is neither causal nor whole. masks: all but
    every third of them are the mask token, the last of the vocabulary.
    """
    cache = KVCache(
        model.config, batch=1, max_len=50, scratch=70, dtype=model.dtype, device=model.device
    )
    generator = torch.Generator().manual_seed(1)
    for stored in (cache.k, cache.v):
        stored.copy_(torch.randn(stored.shape, generator=generator))
    cache.advance([37])
    ids = 3 + torch.arange(rows)[None] % 20
    if masks:
        ids[ids % 3 > 0] = model.config.vocab_size - 1
    mask = None
    if rows > 1:
        mask = (torch.rand(rows, rows, generator=generator) < 0.5) | torch.eye(rows).bool()
    return model(ids, 37 + torch.arange(rows)[None] % 5, cache, mask), cache


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 20, 65])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_compiled_layers_equal_the_plain_ones(family: str, threads: int, rows: int) -> None:
    torch.set_num_threads(threads)
    model = Transformer(oracles.tiny_config(family)).init_random(0)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.mul_(10)  # so that attention and gates are not flat
    expected, plain = few_tokens(model, rows)
    assert "not prepared" in kernel_route(model)
    model.prepare()
    if model.few_rows is None:
        pytest.skip(kernel_route(model))
    calls = []
    few_rows = model.few_rows
    model.few_rows = lambda *args: calls.append(1) or few_rows(*args)
    got, cache = few_tokens(model, rows)
    assert calls == [1]
    assert torch.allclose(got, expected, atol=2e-5, rtol=2e-5)
    assert torch.allclose(cache.k, plain.k, atol=2e-5, rtol=2e-5)
    assert torch.allclose(cache.v, plain.v, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 4, 20])
@torch.inference_mode()
def test_compiled_bfloat16_layers_are_as_exact_as_torch(rows: int) -> None:
    model = Transformer(oracles.tiny_config("qwen3"), dtype=torch.bfloat16).init_random(0)
    plain = float((few_tokens(model, rows)[0].double() - _exact(model, rows)).norm())
    model.prepare()
    if model.few_rows is None:
        pytest.skip(kernel_route(model))
    got = float((few_tokens(model, rows)[0].double() - _exact(model, rows)).norm())
    assert got <= 1.5 * plain + 1e-3


@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("first", ["prepare", "attach"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_a_mask_adapter_in_compiled_layers_equals_the_plain_one(
    family: str, first: str, rows: int
) -> None:
    model = Transformer(oracles.tiny_config(family)).init_random(0)
    alone = few_tokens(model, rows, masks=True)[0]
    adapter = random_adapter(model, "mask")
    if first == "prepare":
        model.prepare()
    adapters.apply(model, adapter)
    model.prepare()
    few_rows = model.few_rows
    if few_rows is None:
        pytest.skip(kernel_route(model))
    served = []
    model.few_rows = lambda *args: served.append(1) or few_rows(*args)
    got, cache = few_tokens(model, rows, masks=True)
    model.few_rows = None
    expected, plain = few_tokens(model, rows, masks=True)
    assert served == [1]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close((cache.k, cache.v), (plain.k, plain.v), atol=2e-5, rtol=2e-5)
    # No decoder sends a lone mask.
    assert torch.allclose(alone, expected, atol=1e-3, rtol=1e-3) == (rows == 1)


@torch.inference_mode()
def test_a_mask_adapter_in_compiled_bfloat16_layers_is_as_exact_as_torch() -> None:
    model = Transformer(oracles.tiny_config("llama"), dtype=torch.bfloat16).init_random(0)
    adapters.apply(model, random_adapter(model, "mask"))
    exact = _exact(model, 20, masks=True)
    plain = float((few_tokens(model, 20, masks=True)[0].double() - exact).norm())
    model.prepare()
    if model.few_rows is None:
        pytest.skip(kernel_route(model))
    got = float((few_tokens(model, 20, masks=True)[0].double() - exact).norm())
    assert got <= 1.5 * plain + 1e-3


def _exact(model: Transformer, rows: int, masks: bool = False) -> torch.Tensor:
    return few_tokens(copy.deepcopy(model).double(), rows, masks)[0]


@pytest.mark.parametrize("label", [
    "ar", "tidar:block_len=2", "tidar:block_len=4", "tidar:block_len=8,beta=0.5",
    "tidar:block_len=8,outcomes=1-4-8", "tidar_two_forward:block_len=4", "prompt_lookup",
    "eagle3:head=random,depth=4,top_k=3,nodes=9", "block_diffusion:block_len=4",
])  # fmt: skip
def test_decoders_write_the_same_on_compiled_layers(label: str) -> None:
    """Text and ledger in float32, steps of many widths behind growing prefixes of one sequence."""
    model = tiny_model()
    if model.few_rows is None:
        pytest.skip(kernel_route(model))
    [spec] = parse_decoders([label])
    decoder = build_decoder(spec, model, mask_token_id=VOCAB - 1)
    few_rows, widths, found = model.few_rows, set(), []
    for served in (lambda *a: widths.add(len(a[0])) or few_rows(*a), None):
        model.few_rows = served
        traces = [generate(decoder, [list(p)], max_new_tokens=40)[0] for p in PROMPTS.values()]
        found.append([(t.token_ids, [s.committed for s in t.steps]) for t in traces])
    assert found[0] == found[1]
    assert widths and (label == "ar" or max(widths) > 1)


def test_columns_before_the_new_tokens_are_seen_by_the_mask_alone() -> None:
    """A tree's branch: the newest tokens in the cache are not everyone's prefix. Taps too."""
    model = tiny_model()
    if model.few_rows is None:
        pytest.skip(kernel_route(model))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    few_rows, hidden, taps = model.few_rows, [], [{}, {}]
    for index, served in enumerate((few_rows, None)):
        model.few_rows = served
        cache = KVCache(model.config, batch=1, max_len=20, scratch=4, dtype=torch.float32,
                        device="cpu")  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        for tensor in (cache.k, cache.v):
            tensor.normal_(generator=generator)
        cache.advance([9])
        with torch.inference_mode():
            ids, at = torch.tensor([[3, 5]]), torch.tensor([[7, 7]])
            hidden.append(model(ids, at, cache, mask, taps[index]))
    assert taps[0].keys() == taps[1].keys() == set(range(len(model.layers) + 1))
    torch.testing.assert_close(*taps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_hooks_and_converted_models_get_the_plain_layers() -> None:
    model = Transformer(oracles.tiny_config("qwen2")).init_random(0).prepare()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    few_tokens(model)
    assert seen == [1]
    model.double()
    assert model.few_rows is None and "not prepared" in kernel_route(model)
    assert few_tokens(model)[0].dtype == torch.float64


@pytest.fixture
def chosen_again() -> Iterator[None]:
    linear.kernel_maker.cache_clear()
    yield
    linear.kernel_maker.cache_clear()


@torch.inference_mode()
def test_without_numba_torch_multiplies_and_the_route_says_so(
    monkeypatch: pytest.MonkeyPatch, chosen_again: None
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "tidar_ref.kernels_cpu", raising=False)
    monkeypatch.delattr("tidar_ref.kernels_cpu", raising=False)
    model = Transformer(oracles.tiny_config("qwen2")).init_random(0).prepare()
    assert kernel_route(model).startswith("torch (no numba")
    assert model.few_rows is None
    x = torch.randn(2, 32)
    assert torch.equal(TiedHead(model.embed)(x), torch.nn.functional.linear(x, model.embed.weight))


@torch.inference_mode()
def test_another_thread_layer_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, chosen_again: None
) -> None:
    kernels = pytest.importorskip("tidar_ref.kernels_cpu")
    kernels.start.cache_clear()
    monkeypatch.setattr(kernels.numba, "threading_layer", lambda: "workqueue")
    model = Transformer(oracles.tiny_config("qwen2")).init_random(0).prepare()
    assert kernel_route(model) == "torch (numba runs on its workqueue threads)"
    kernels.start.cache_clear()


def test_an_odd_width_is_named() -> None:
    module = product(4, 3, False, torch.float32)
    assert module.kernel is None and kernel_route(module) == "torch (odd width or layout)"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untied_head_takes_hidden_states_of_any_shape(dtype: torch.dtype) -> None:
    head = product(96, 64, False, dtype)
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        flat = head(hidden.reshape(6, 64))
        assert torch.equal(head(hidden), flat.view(2, 3, 96))
        assert torch.equal(head(hidden[0, 0]), head(hidden[0, :1])[0])
