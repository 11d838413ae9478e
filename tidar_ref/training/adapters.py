"""Low-rank adapters: two placements, peft's file layout, merging, and full fine-tunes as adapters.

placement "all": on every row (the paper's joint model); merged into the weights for decoding.
placement "mask": on mask rows only; the AR half then is the base model's. A variant the paper does
not have.

Files are peft's: adapter_config.json and adapter_model.safetensors with the hub's module names, so
`peft.PeftModel` reads an "all" adapter into transformers (a "mask" one it must refuse: on every row
it would be wrong). tidar.json beside them is ours: placement, mask token, what made it. The fused
products share one A: q, k and v (gate and up) get the same A and their own rows of B. The mask
token's embedding row is one tensor more, `tidar.mask_embedding`, which peft ignores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError
from tidar_ref.model import Transformer

PLACEMENTS = ("all", "mask")
PRODUCTS = ("qkv", "o", "gate_up", "down")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NOTES_FILE = "tidar.json"
PEFT_TYPES = {"all": "LORA", "mask": "TIDAR_MASK_LORA"}
MASK_ROW = "tidar.mask_embedding"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """rank r and scale alpha / r of B A x, and which rows it acts on."""

    rank: int = 32
    alpha: float = 32.0
    placement: str = "all"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"adapter rank is {self.rank}: give at least 1")
        if self.placement not in PLACEMENTS:
            raise UserError(f"adapter placement {self.placement!r}: use all or mask")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Adapter tensors: factors["layers.3.qkv"] = (A [r, in], B [out, r]); mask_embedding [H]."""

    config: AdapterConfig
    mask_token_id: int
    factors: dict[str, tuple[Tensor, Tensor]]
    mask_embedding: Tensor


class LowRank(nn.Module):
    """scale * B A x beside a frozen product; B starts at zero, so training starts at the base."""

    def __init__(self, weight: Tensor, config: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__()
        out, inner = weight.shape
        bound = 1 / math.sqrt(inner)
        a = torch.rand(config.rank, inner, generator=generator) * (2 * bound) - bound
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(out, config.rank, device=weight.device))
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]."""
        return F.linear(F.linear(x, self.a) * self.scale, self.b)


def adapter_of(network: nn.Module, *, mask_token_id: int) -> Adapter:
    """The adapter a TrainingNetwork has learned (float32, on the CPU)."""
    factors = {
        f"layers.{index}.{name}": (_whole(part.a).cpu().clone(), _whole(part.b).cpu().clone())
        for index, layer in enumerate(network.layers)
        for name, part in layer.low_rank.items()
    }
    return Adapter(
        config=network.adapters,
        mask_token_id=mask_token_id,
        factors=factors,
        mask_embedding=_whole(network.mask_embedding).cpu().clone(),
    )


def tuned_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a TrainingNetwork without adapters under the backbone's names.

    Where the mask token's row is a parameter of its own, it is put into the table.
    """
    tuned = {}
    for name, value in network.named_parameters():
        tuned[name.replace(".base.", ".")] = _whole(value)
    row = tuned.pop("mask_embedding", None)
    if row is not None:
        table = tuned["embed.weight"].clone()
        table[network.mask_token_id] = row.to(table)
        tuned["embed.weight"] = table
    return tuned


def _whole(value: Tensor) -> Tensor:
    """A parameter's values, gathered where it is sharded (of several ranks all must call)."""
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@torch.no_grad()
def merge(model: Transformer, adapter: Adapter) -> None:
    """Add an "all" adapter to the weights in place and set the mask token's row."""
    if adapter.config.placement != "all":
        raise UserError("an adapter gated to the mask positions cannot be merged into the weights")
    for name, (a, b) in adapter.factors.items():
        weight = model.get_parameter(f"{name}.weight")
        weight += (adapter.config.scale * (b.float() @ a.float())).to(weight)
    model.embed.weight[adapter.mask_token_id] = adapter.mask_embedding.to(model.embed.weight)
    if model.prepared:  # its kernels hold the old weights
        model.prepare()


@torch.no_grad()
def apply(model: Transformer, adapter: Adapter) -> None:
    """Put an adapter on a model for decoding: merged ("all"), or beside its mask rows ("mask")."""
    if adapter.config.placement == "all":
        merge(model, adapter)
    else:
        model.attach_mask_adapter(
            adapter.factors,
            adapter.config.scale,
            token_id=adapter.mask_token_id,
            embedding=adapter.mask_embedding,
        )


@torch.no_grad()
def difference(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, rank: int, mask_token_id: int
) -> tuple[Adapter, float]:
    """A full fine-tune as the best rank-r difference to its base, and the share of it captured.

    base, tuned: state dicts. The share is captured energy (sum of squares) over all products.
    Norms, biases and embeddings but for the mask token's row are not stored: train with them frozen
    (`products_only`), or see `outside_share`.
    """
    config = AdapterConfig(rank=rank, alpha=float(rank), placement="all")
    factors, kept, whole = {}, 0.0, 0.0
    for name in base:
        if not _is_product(name):
            continue
        product = name.removesuffix(".weight")
        delta = tuned[name].float() - base[name].float()
        u, s, v = (part.cpu() for part in torch.linalg.svd(delta, full_matrices=False))
        r = min(rank, s.shape[0])
        root = s[:r].sqrt()
        a, b = torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank)
        a[:r], b[:, :r] = root[:, None] * v[:r], u[:, :r] * root
        factors[product] = (a, b)
        kept, whole = kept + float((s[:r] ** 2).sum()), whole + float((s**2).sum())
    row = tuned["embed.weight"][mask_token_id].float().cpu().clone()
    adapter = Adapter(
        config=config, mask_token_id=mask_token_id, factors=factors, mask_embedding=row
    )
    return adapter, kept / whole if whole else 1.0


@torch.no_grad()
def outside_share(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, mask_token_id: int
) -> float:
    """Share of a fine-tune's energy in what `difference` cannot hold, 0 to 1."""
    outside = whole = 0.0
    for name, value in tuned.items():
        delta = value.float() - base[name].float()
        if name == "embed.weight":
            delta[mask_token_id] = 0.0
        energy = float((delta**2).sum())
        whole += energy
        outside += 0.0 if _is_product(name) else energy
    return outside / whole if whole else 0.0


def rounded(adapter: Adapter) -> Adapter:
    """The adapter as its file holds it: factors in bfloat16."""
    return replace(
        adapter,
        factors={
            name: (a.to(torch.bfloat16).float(), b.to(torch.bfloat16).float())
            for name, (a, b) in adapter.factors.items()
        },
    )


def _is_product(name: str) -> bool:
    product, _, kind = name.rpartition(".")
    return kind == "weight" and product.rpartition(".")[2] in PRODUCTS


def save(
    adapter: Adapter, folder: Path, config: ModelConfig, *, base: str, notes: Mapping[str, Any]
) -> Path:
    """Write peft's two files, tensors in bfloat16, and tidar.json with `notes`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {MASK_ROW: adapter.mask_embedding.float()}
    for name, (a, b) in adapter.factors.items():
        for module, rows in _modules(name, config):
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = a.to(torch.bfloat16).contiguous()
            tensors[f"{prefix}.lora_B.weight"] = b[rows].to(torch.bfloat16).contiguous()
    # q, k and v hold the same A: safetensors wants no shared storage.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    modules = sorted(
        {m.rpartition(".")[2] for n in adapter.factors for m, _ in _modules(n, config)}
    )
    text = {
        "peft_type": PEFT_TYPES[adapter.config.placement],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    own = {
        "placement": adapter.config.placement,
        "mask_token_id": adapter.mask_token_id,
        **notes,
    }
    for name, content in ((CONFIG_FILE, text), (NOTES_FILE, own)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def read(folder: Path, config: ModelConfig) -> Adapter:
    """An adapter folder; UserError if a file is missing, damaged, or made for another shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    text, notes = read_json(folder, CONFIG_FILE), read_json(folder, NOTES_FILE)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        settings = AdapterConfig(
            rank=int(text["r"]),
            alpha=float(text["lora_alpha"]),
            placement=str(notes["placement"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"adapter {folder.name} is damaged ({error}): fetch it again") from None
    factors = {}
    for layer in range(config.num_layers):
        for product in PRODUCTS:
            name = f"layers.{layer}.{product}"
            factors[name] = _joined(name, tensors, config, folder)
    row = tensors.get(MASK_ROW)
    if row is None or row.shape != (config.hidden_size,) or "mask_token_id" not in notes:
        raise UserError(
            f"adapter {folder.name} has no mask embedding of width {config.hidden_size}: it was not"
            " made by `python -m bench train` for this shape"
        )
    return Adapter(
        config=settings,
        mask_token_id=int(notes["mask_token_id"]),
        factors=factors,
        mask_embedding=row.float(),
    )


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of an adapter's two JSON files as a dict."""
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder.name} holds no readable {name} ({error.__class__.__name__}): name an adapter"
            " folder that `python -m bench train` wrote"
        ) from None


def _joined(
    name: str, tensors: Mapping[str, Tensor], config: ModelConfig, folder: Path
) -> tuple[Tensor, Tensor]:
    """A and B of a fused product from its modules' (peft has one pair per module)."""
    pairs = []
    for module, rows in _modules(name, config):
        keys = [f"base_model.model.{module}.lora_{x}.weight" for x in "AB"]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise UserError(
                f"adapter {folder.name} has no tensor {missing[0]}: it fits no fused {name}"
            )
        a, b = (tensors[key].float() for key in keys)
        if b.shape[0] != rows.stop - rows.start:
            raise UserError(
                f"adapter {folder.name}: {keys[1]} has {b.shape[0]} rows, this shape needs"
                f" {rows.stop - rows.start}: use the base model it was trained for"
            )
        pairs.append((a, b))
    first = pairs[0][0]
    if all(torch.equal(a, first) for a, _ in pairs):
        return first, torch.cat([b for _, b in pairs])
    # Foreign adapters have one A per module: stack them, B becomes block-diagonal.
    return torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))


def _modules(name: str, config: ModelConfig) -> list[tuple[str, slice]]:
    """Hub module names of a fused product and the rows each owns."""
    layer, product = name.rsplit(".", 1)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner, hidden = config.intermediate_size, config.hidden_size
    sizes = {
        "qkv": (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
        "o": (("self_attn.o_proj", hidden),),
        "gate_up": (("mlp.gate_proj", inner), ("mlp.up_proj", inner)),
        "down": (("mlp.down_proj", hidden),),
    }[product]
    found, start = [], 0
    for module, size in sizes:
        found.append((f"model.{layer}.{module}", slice(start, start + size)))
        start += size
    return found
