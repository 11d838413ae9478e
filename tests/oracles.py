"""Slow, obvious re-writings of the rules, used as oracles: forward pass, AR, TiDAR, chi-square.

Nothing here calls the code under test except `tidar_ref.config` (plain data). The forward takes a
state dict with the documented names, recomputes everything from scratch each time (no cache) and
applies one dense boolean mask. The TiDAR step lays the whole sequence out and fills the mask cell
by cell from the paper's rules (Figure 3, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_ref.config import ModelConfig

State = Mapping[str, Tensor]
KeysValues = list[tuple[Tensor, Tensor]]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


# --- tiny models -------------------------------------------------------------------------------


def tiny_config(
    family: str, *, vocab: int = 40, layers: int = 2, scaled: bool = False
) -> ModelConfig:
    """A config of a few thousand parameters with every feature of its family switched on."""
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16 if family == "qwen3" else 8,
        rope_theta=10_000.0 if family == "llama" else 1_000_000.0,
        norm_eps=1e-5 if family == "llama" else 1e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=family != "llama",
        max_position=512,
        rope_scaling=dict(LLAMA3_SCALING) if scaled else None,
    )


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter name of the backbone with its shape."""
    hidden, head_dim = config.hidden_size, config.head_dim
    rows = (config.num_heads + 2 * config.num_kv_heads) * head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        name = f"layers.{layer}."
        shapes[name + "attn_norm.weight"] = (hidden,)
        shapes[name + "qkv.weight"] = (rows, hidden)
        if config.qkv_bias:
            shapes[name + "qkv.bias"] = (rows,)
        if config.qk_norm:
            shapes[name + "q_norm.weight"] = (head_dim,)
            shapes[name + "k_norm.weight"] = (head_dim,)
        shapes[name + "o.weight"] = (hidden, config.num_heads * head_dim)
        shapes[name + "mlp_norm.weight"] = (hidden,)
        shapes[name + "gate_up.weight"] = (2 * config.intermediate_size, hidden)
        shapes[name + "down.weight"] = (hidden, config.intermediate_size)
    shapes["norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def random_state(config: ModelConfig, seed: int, *, std: float = 0.25) -> dict[str, Tensor]:
    """Float32 weights N(0, std); norms near 1 but not 1, so a forgotten norm weight shows."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        state[name] = 1.0 + 0.2 * noise if "norm" in name else std * noise
    return state


# --- forward -----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotary_frequencies(config: ModelConfig) -> list[float]:
    """Angle per position of each half-dimension, with the published "llama3" stretching."""
    out = []
    for index in range(config.head_dim // 2):
        freq = config.rope_theta ** (-2.0 * index / config.head_dim)
        if config.rope_scaling is not None:
            factor = config.rope_scaling["factor"]
            low = config.rope_scaling["low_freq_factor"]
            high = config.rope_scaling["high_freq_factor"]
            turns = config.rope_scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
            keep = min(1.0, max(0.0, (turns - low) / (high - low)))
            freq = keep * freq + (1.0 - keep) * freq / factor
        out.append(freq)
    return out


def rotate(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """Rotary embedding, half-split: pair (i, i + D/2). x is [..., T, heads, D]."""
    freqs = torch.tensor(rotary_frequencies(config), dtype=torch.float64)
    angles = (positions.to(torch.float64)[..., None] * freqs)[..., None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(config.head_dim // 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def forward(
    state: State,
    config: ModelConfig,
    ids: Tensor | Sequence[int],
    positions: Tensor | Sequence[int],
    allowed: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    stale: tuple[Tensor, KeysValues] | None = None,
) -> tuple[Tensor, KeysValues]:
    """Logits [..., T, V] and each layer's rotated (keys, values) [..., T, Hkv, D], no cache.

    `ids` and `positions` are [..., T]; `allowed` [T, T] says which key a query may read. stale:
    where its flags [T] are set, all read its keys and values instead of this pass's.
    """
    weights = {name: value.to(dtype) for name, value in state.items()}
    ids, positions = torch.as_tensor(ids), torch.as_tensor(positions)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    x = weights["embed.weight"][ids]
    stored: KeysValues = []
    for layer in range(config.num_layers):
        name = f"layers.{layer}."
        h = rms_norm(x, weights[name + "attn_norm.weight"], config.norm_eps)
        qkv = h @ weights[name + "qkv.weight"].T
        if config.qkv_bias:
            qkv = qkv + weights[name + "qkv.bias"]
        q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in (q, k, v))
        if config.qk_norm:
            q = rms_norm(q, weights[name + "q_norm.weight"], config.norm_eps)
            k = rms_norm(k, weights[name + "k_norm.weight"], config.norm_eps)
        q, k = rotate(q, positions, config), rotate(k, positions, config)
        if stale is not None:
            old, flags = stale[1][layer], stale[0][:, None, None]
            k, v = (torch.where(flags, o, new) for o, new in zip(old, (k, v), strict=True))
        stored.append((k, v))
        mixed = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[..., head, :] @ k[..., group, :].transpose(-1, -2) / math.sqrt(dim)
            scores = scores.masked_fill(~allowed, float("-inf"))
            mixed.append(scores.softmax(-1) @ v[..., group, :])
        x = x + torch.cat(mixed, dim=-1) @ weights[name + "o.weight"].T
        h = rms_norm(x, weights[name + "mlp_norm.weight"], config.norm_eps)
        gate, up = (h @ weights[name + "gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ weights[name + "down.weight"].T
    x = rms_norm(x, weights["norm.weight"], config.norm_eps)
    head_weight = weights["embed.weight" if config.tied_embeddings else "lm_head.weight"]
    return x @ head_weight.T, stored


def causal(length: int) -> Tensor:
    return torch.tensor([[key <= query for key in range(length)] for query in range(length)])


def causal_logits(state: State, config: ModelConfig, ids: Sequence[int] | Tensor) -> Tensor:
    """Logits of an ordinary causal pass over whole sequences."""
    length = torch.as_tensor(ids).shape[-1]
    return forward(state, config, ids, list(range(length)), causal(length))[0]


def causal_keys_values(state: State, config: ModelConfig, ids: Sequence[int]) -> KeysValues:
    """What an exact cache over `ids` must hold: per layer keys and values [T, Hkv, D]."""
    return forward(state, config, list(ids), list(range(len(ids))), causal(len(ids)))[1]


# --- decoders ----------------------------------------------------------------------------------


def greedy(state: State, config: ModelConfig, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy AR: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(causal_logits(state, config, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def may_attend(query: tuple, key: tuple) -> bool:
    """The paper's decode rule for one cell. Rows: ("prefix", p), ("draft", i), ("mask", j, m)."""
    if query[0] == "prefix":
        return key[0] == "prefix" and key[1] <= query[1]
    if key[0] == "prefix":
        return True
    if query[0] == "draft":
        return key[0] == "draft" and key[1] <= query[1]
    block = query[1]
    if key[0] == "draft":
        return key[1] <= block - 1
    return key[1] == block


def decode_rows(prefix: int, block_len: int) -> list[tuple]:
    """All rows of one decode forward: prefix, drafts, then block 1, block 2, ..., block K."""
    rows: list[tuple] = [("prefix", p) for p in range(prefix)]
    rows += [("draft", i) for i in range(block_len)]
    rows += [("mask", j, m) for j in range(1, block_len + 1) for m in range(block_len)]
    return rows


def row_position(row: tuple, prefix: int) -> int:
    if row[0] == "prefix":
        return row[1]
    return prefix + (row[1] if row[0] == "draft" else row[1] + row[2])


def mix(causal_row: Tensor, diffusion_row: Tensor, beta: float) -> Tensor:
    """Verification logits; beta=1 never looks at the diffusion row (its ban is -inf)."""
    return causal_row if beta == 1 else beta * causal_row + (1 - beta) * diffusion_row


def ban(logits: Tensor, token: int) -> Tensor:
    logits = logits.clone()
    logits[..., token] = float("-inf")
    return logits


def prefill_logits(
    state: State, config: ModelConfig, contexts: Tensor, block_len: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Over contexts [N, P]: AR logits after the last token [N, V], mask logits [N, K, V]."""
    count, length = contexts.shape
    rows = [("prompt", p) for p in range(length)] + [("mask", m) for m in range(block_len)]
    positions = [at if kind == "prompt" else length + at for kind, at in rows]
    allowed = torch.tensor(
        [
            [(k == "prompt" and (q == "mask" or b <= a)) or (q == k == "mask") for k, b in rows]
            for q, a in rows
        ]
    )
    ids = torch.cat((contexts, torch.full((count, block_len), mask_id)), dim=1)
    logits, _ = forward(state, config, ids, positions, allowed)
    return logits[:, length - 1], ban(logits[:, length:], mask_id)


def tidar_prefill(
    state: State,
    config: ModelConfig,
    prompt: Sequence[int],
    block_len: int,
    beta: float,
    mask_id: int,
) -> list[int]:
    """The first draft; its first token is committed already."""
    contexts = torch.tensor([list(prompt)])
    after, diffusion = (x[0] for x in prefill_logits(state, config, contexts, block_len, mask_id))
    first = mix(after, diffusion[0], beta).argmax()
    return [int(first), *diffusion[1:].argmax(-1).tolist()]


def next_token_logits(
    state: State, config: ModelConfig, contexts: Tensor, block_len: int, beta: float, mask_id: int
) -> Tensor:
    """TiDAR's verification logits [N, V] after each context, whatever was drafted.

    Block j of a decode forward sees exactly the committed tokens, so the mixture is a function of
    the context alone and equals that of a prefill over it. beta=1 is plain AR.
    """
    after, diffusion = prefill_logits(state, config, contexts, block_len, mask_id)
    return mix(after, diffusion[:, 0], beta)


def tidar_step(
    state: State,
    config: ModelConfig,
    prefix: Sequence[int],
    draft: Sequence[int],
    beta: float,
    mask_id: int,
) -> tuple[int, list[int]]:
    """(r, next draft): keep draft[:r]; the next draft's first token is the verified token v_r."""
    block_len = len(draft)
    rows = decode_rows(len(prefix), block_len)
    ids = list(prefix) + list(draft) + [mask_id] * block_len**2
    allowed = torch.tensor([[may_attend(q, k) for k in rows] for q in rows])
    positions = [row_position(row, len(prefix)) for row in rows]
    logits, _ = forward(state, config, ids, positions, allowed)
    at = {row: logits[index] for index, row in enumerate(rows)}
    verified = {
        j: int(mix(at["draft", j - 1], ban(at["mask", j, 0], mask_id), beta).argmax())
        for j in range(1, block_len + 1)
    }
    kept = 1
    while kept < block_len and draft[kept] == verified[kept]:
        kept += 1
    tail = [int(ban(at["mask", kept, m], mask_id).argmax()) for m in range(1, block_len)]
    return kept, [verified[kept], *tail]


def tidar(
    state: State,
    config: ModelConfig,
    prompt: Sequence[int],
    count: int,
    *,
    block_len: int,
    beta: float,
    mask_id: int,
) -> Iterator[tuple[int, ...]]:
    """Tokens made final by prefill, then by each step, until at least `count` are final."""
    draft = tidar_prefill(state, config, prompt, block_len, beta, mask_id)
    yield (draft[0],)
    prefix, done = list(prompt), 1
    while done < count:
        kept, following = tidar_step(state, config, prefix, draft, beta, mask_id)
        yield (*draft[1:kept], following[0])
        prefix, draft, done = prefix + draft[:kept], following, done + kept


# --- a model whose drafts are sometimes right -----------------------------------------------------


def trained_state(config: ModelConfig, *, mask_id: int, steps: int = 220) -> dict[str, Tensor]:
    """Tiny TiDAR model: doubled layout and both losses of the paper, on short-period sequences.

    Trained with the oracle's own forward, so acceptance is non-trivial without the code under test.
    """
    generator = torch.Generator().manual_seed(0)
    length, block = 24, 8
    state = {k: v.requires_grad_() for k, v in random_state(config, 1, std=0.15).items()}
    optimiser = torch.optim.Adam(state.values(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rows = [("clean", i) for i in range(length)] + [("mask", i) for i in range(length)]

    def visible(query: tuple[str, int], key: tuple[str, int]) -> bool:
        if query[0] == "clean":
            return key[0] == "clean" and key[1] <= query[1]
        start = query[1] // block
        return key[1] < block * start if key[0] == "clean" else key[1] // block == start

    allowed = torch.tensor([[visible(q, k) for k in rows] for q in rows])
    positions = torch.tensor([at for _, at in rows])
    for _ in range(steps):
        motif = torch.randint(0, mask_id, (24, 2), generator=generator)
        period = torch.randint(1, 3, (24, 1), generator=generator)
        clean = motif.gather(1, torch.arange(length + 1) % period)
        ids = torch.cat((clean[:, :length], torch.full_like(clean[:, :length], mask_id)), dim=1)
        logits, _ = forward(state, config, ids, positions, allowed, dtype=torch.float32)
        ar_loss = F.cross_entropy(logits[:, 2:length].flatten(0, 1), clean[:, 3:].flatten())
        drafts = logits[:, length + block :]
        diffusion_loss = F.cross_entropy(drafts.flatten(0, 1), clean[:, block:length].flatten())
        optimiser.zero_grad()
        (ar_loss + diffusion_loss).backward()
        optimiser.step()
        scheduler.step()
    return {name: value.detach() for name, value in state.items()}


# --- distributions -----------------------------------------------------------------------------


def exact_joint(
    logits_after: Callable[[Tensor], Tensor],
    vocab: int,
    prompt: Sequence[int],
    count: int,
    temperature: float,
) -> Tensor:
    """Probability of every continuation of `count` tokens, shape [V] * count, float64.

    `logits_after` maps contexts [N, T] to next-token logits [N, V].
    """
    joint = torch.ones((), dtype=torch.float64)
    for depth in range(count):
        contexts = torch.tensor([[*prompt, *tail] for tail in product(range(vocab), repeat=depth)])
        probs = (logits_after(contexts) / temperature).softmax(-1)
        joint = joint[..., None] * probs.reshape(*[vocab] * depth, vocab)
    return joint


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """p-value of counts against expected counts; cells expecting under 8 are pooled into one."""
    observed, expected = observed.flatten().double(), expected.flatten().double()
    rare = expected < 8
    seen = torch.cat((observed[~rare], observed[rare].sum()[None]))
    want = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if want[-1] <= 0:
        if seen[-1] > 0:
            return 0.0
        seen, want = seen[:-1], want[:-1]
    statistic = ((seen - want) ** 2 / want).sum()
    return float(
        torch.special.gammaincc(torch.tensor((len(want) - 1) / 2.0).double(), statistic / 2)
    )
