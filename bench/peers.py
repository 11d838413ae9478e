"""`python -m bench peers`: our AR decoder against transformers' `generate` on the same weights.

A speed-up over a slow baseline is worth nothing, so the AR row itself is compared with the stock
engine: dynamic and static cache, interleaved in one process (ABC, CAB, BCA ...), fixed length,
whole calls timed (prefill included on both sides). The ratio is the median over rounds of paired
tokens/s, with a bootstrap interval over rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidar_ref.model import Transformer

OURS = "ours"
PEERS = ("transformers-dynamic", "transformers-static")


@dataclass(frozen=True, kw_only=True)
class PeerResult:
    """One engine under one dtype: tokens per second of whole calls, one value a round.

    ratio: ours over this engine, median of paired rounds; low and high bound its 95 % bootstrap
    interval. same_tokens: share of prompts whose tokens equal ours (exact in float32). kernels:
    what multiplies our few rows (`tidar_ref.linear.kernel_route`).
    """

    engine: str
    dtype: str
    tokens_per_s: tuple[float, ...]
    ratio: float
    ratio_low: float
    ratio_high: float
    same_tokens: float
    kernels: str


def compare(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[PeerResult]:
    """Time `rounds` interleaved rounds of all prompts on our AR and both transformers caches."""
    import torch

    from baselines.autoregressive import build
    from tidar_ref.decoding import generate
    from tidar_ref.linear import kernel_route

    peer = to_transformers(model)
    decoder = build(model)

    def ours(prompt: list[int]) -> list[int]:
        trace = generate(decoder, [prompt], max_new_tokens=max_new_tokens)[0]
        return list(trace.token_ids)

    def theirs(cache: str) -> Callable[[list[int]], list[int]]:
        def run(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt], device=model.device)
            out = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                cache_implementation=cache,
            )
            return out[0, len(prompt) :].tolist()

        return run

    engines = {OURS: ours, PEERS[0]: theirs("dynamic"), PEERS[1]: theirs("static")}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[list[int]]] = {}
    with torch.inference_mode():
        for name, run in engines.items():  # warm-up, and the tokens to compare
            texts[name] = [run(prompt) for prompt in prompts]
        names = list(engines)
        for index in range(rounds):
            for name in names[index % 3 :] + names[: index % 3]:
                started = time.perf_counter()
                tokens = sum(len(engines[name](prompt)) for prompt in prompts)
                speeds[name].append(tokens / (time.perf_counter() - started))
                progress(f"round {index + 1}/{rounds} {name}: {speeds[name][-1]:.1f} tokens/s")
    dtype = str(model.dtype).removeprefix("torch.")
    return [_result(name, dtype, speeds, texts, kernel_route(model)) for name in engines]


def _result(
    name: str,
    dtype: str,
    speeds: dict[str, list[float]],
    texts: dict[str, list[list[int]]],
    kernels: str,
) -> PeerResult:
    import random

    ratios = [a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    same = [a == b for a, b in zip(texts[OURS], texts[name], strict=True)]
    return PeerResult(
        engine=name,
        dtype=dtype,
        tokens_per_s=tuple(speeds[name]),
        ratio=statistics.median(ratios),
        ratio_low=medians[50],
        ratio_high=medians[-51],
        same_tokens=sum(same) / len(same),
        kernels=kernels,
    )


def to_transformers(model: Transformer) -> Any:
    """The same weights as a transformers model (Llama, Qwen2 or Qwen3), fused matrices split."""
    import torch
    import transformers

    config = model.config
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_position,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **(config.rope_scaling or {"rope_type": "default"}),
        },
        "eos_token_id": None,
        "bos_token_id": None,
    }
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.family]
    hub_config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device(model.device):
        peer = getattr(transformers, f"{family}ForCausalLM")(hub_config).to(model.dtype).eval()
    sizes = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    renamed = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    inner = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "o": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "down": "mlp.down_proj",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("layers."):
            state[renamed.get(name, name)] = tensor
            continue
        _, layer, part, kind = name.split(".")
        prefix = f"model.layers.{layer}."
        if part == "qkv":
            for letter, piece in zip("qkv", tensor.split(sizes), strict=True):
                state[f"{prefix}self_attn.{letter}_proj.{kind}"] = piece
        elif part == "gate_up":
            gate, up = tensor.chunk(2)
            state[f"{prefix}mlp.gate_proj.{kind}"], state[f"{prefix}mlp.up_proj.{kind}"] = gate, up
        else:
            state[f"{prefix}{inner[part]}.{kind}"] = tensor
    if config.tied_embeddings:
        state["lm_head.weight"] = model.embed.weight
    peer.load_state_dict(state)
    return peer


def main(
    *,
    weights: str,
    device: str,
    dtypes: tuple[str, ...],
    threads: int | None,
    max_new_tokens: int,
    rounds: int,
    out: Path | None,
) -> None:
    """Run the comparison for each dtype, print a table, write peers.json into `out` if given."""
    import torch

    from bench.environment import describe
    from tidar_ref.checkpoint import load
    from tidar_ref.linear import kernel_route

    if threads:
        torch.set_num_threads(threads)
    results, source = [], None
    for dtype in dtypes:
        loaded = load(weights, device=device, dtype=dtype)
        source = loaded.source
        texts = (
            "def fibonacci(n):\n",
            "The capital of France is",
            "Q: Tom has 3 apples and buys 4 more. How many apples has he now?\nA:",
        )
        prompts = [loaded.tokenizer.encode(text) for text in texts]
        route = kernel_route(loaded.model)
        print(f"{source.name}, {dtype}, {torch.get_num_threads()} threads, {route}", flush=True)
        results += compare(
            loaded.model,
            prompts,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            progress=lambda line: print("  " + line, flush=True),
        )
    print("\nengine                 dtype     tokens/s   ours is   95% interval     same tokens")
    for r in results:
        print(
            f"{r.engine:22s} {r.dtype:9s} {statistics.median(r.tokens_per_s):8.1f}"
            f"  {r.ratio:7.2f}x   [{r.ratio_low:.2f}, {r.ratio_high:.2f}]   {r.same_tokens:9.0%}"
        )
    if out:
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "what": "whole-call tokens/s at batch 1, fixed length, engines interleaved",
            "weights": asdict(source),
            "max_new_tokens": max_new_tokens,
            "rounds": rounds,
            "environment": describe(),
            "results": [asdict(r) for r in results],
        }
        (out / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {out / 'peers.json'}")
