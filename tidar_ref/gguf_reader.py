"""Read a GGUF file: its metadata, and its tensors as float32 in the hub's row order.

The header is parsed here rather than by `gguf.GGUFReader`, which builds an array object per
vocabulary entry (seconds for 50 thousand of them) and fails on a cut file with a NumPy traceback;
the block formats are decoded by the `gguf` package. Format: ggml's docs/gguf.md, versions 2 and 3,
little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# Two quantisations of one table differ by 4-7 % of its norm (measured on the Qwen2.5-Coder files),
# two unrelated tables by about 140 %.
TIED_WITHIN = 0.2


@dataclass(frozen=True, kw_only=True)
class _Entry:
    shape: tuple[int, ...]  # rows first, as in torch
    kind: int  # ggml type
    start: int  # byte offset in the file
    size: int  # bytes


class GGUFFile:
    """An open GGUF file: `metadata` by key, `shapes` of the tensors, `tensor(name)` as float32.

    Raises UserError for a missing, foreign or cut file and for block formats `gguf` cannot decode.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read GGUF file {path}: {error}") from None
        if self._data[:4] != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it starts with {self._data[:4]!r})")
        try:
            self.metadata, self._entries = self._parse()
        except (struct.error, UnicodeDecodeError, KeyError):
            raise self._cut() from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def tensor(self, name: str, rows: int | None = None) -> np.ndarray:
        """Tensor `name` (its first `rows` rows if given) dequantised to float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self._entries[name]
        kind = GGMLQuantizationType(entry.kind)
        count, shape = entry.size, entry.shape
        if rows is not None:
            shape = (min(rows, shape[0]), *shape[1:])
            count = entry.size // entry.shape[0] * shape[0]
        raw = np.frombuffer(self._data, np.uint8, count, entry.start)
        # `dequantize` loops over 16 rows at a time: 64 rows seen as one make it 3 times faster.
        raw = raw.reshape(shape[0] // math.gcd(shape[0], 64) if len(shape) > 1 else 1, -1)
        try:
            return dequantize(raw, kind).reshape(shape)
        except NotImplementedError:
            raise UserError(
                f"tensor {name} of {self.path} is stored as {kind.name}, which the gguf package"
                " cannot decode: use a Q4_1, Q8_0, K-quant, F16 or BF16 file"
            ) from None

    def need(self, key: str) -> Any:
        """Metadata value `key`; UserError if the file lacks it."""
        if key not in self.metadata:
            raise UserError(f"{self.path} has no metadata key {key!r}: it is not a language model")
        return self.metadata[key]

    def _parse(self) -> tuple[dict[str, Any], dict[str, _Entry]]:
        version = struct.unpack_from("<I", self._data, 4)[0]
        if version not in (2, 3):
            raise UserError(f"{self.path} is GGUF version {version}: versions 2 and 3 are read")
        tensors, keys = struct.unpack_from("<QQ", self._data, 8)
        at, metadata = 24, {}
        for _ in range(keys):
            key, at = self._string(at)
            kind = struct.unpack_from("<I", self._data, at)[0]
            metadata[key], at = self._value(kind, at + 4)
        infos = []
        for _ in range(tensors):
            name, at = self._string(at)
            dims = struct.unpack_from("<I", self._data, at)[0]
            shape = struct.unpack_from(f"<{dims}Q", self._data, at + 4)[::-1]
            kind, offset = struct.unpack_from("<IQ", self._data, at + 4 + 8 * dims)
            infos.append((name, shape, kind, offset))
            at += 16 + 8 * dims
        alignment = metadata.get("general.alignment", 32)
        base = -(-at // alignment) * alignment
        entries = {name: self._entry(name, s, k, base + o) for name, s, k, o in infos}
        return metadata, entries

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> _Entry:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            raise UserError(
                f"tensor {name} of {self.path} has unknown quantization type {kind}"
            ) from None
        size = math.prod(shape) // block * size
        if start + size > len(self._data):
            raise self._cut()
        return _Entry(shape=tuple(shape), kind=kind, start=start, size=size)

    def _string(self, at: int) -> tuple[str, int]:
        end = at + 8 + struct.unpack_from("<Q", self._data, at)[0]
        if end > len(self._data):
            raise self._cut()
        return self._data[at + 8 : end].decode("utf-8"), end

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            code = _SCALARS[kind]
            return struct.unpack_from(code, self._data, at)[0], at + struct.calcsize(code)
        inner, count = struct.unpack_from("<IQ", self._data, at)
        at += 12
        if inner in _SCALARS:
            code = f"<{count}{_SCALARS[inner][1]}"
            return list(struct.unpack_from(code, self._data, at)), at + struct.calcsize(code)
        values = []
        for _ in range(count):
            value, at = self._value(inner, at)
            values.append(value)
        return values, at

    def _cut(self) -> UserError:
        return UserError(f"{self.path} is truncated or damaged: fetch it again, check its sha256")


def config_of(file: GGUFFile) -> ModelConfig:
    """The model configuration a GGUF file states; UserError for what we cannot run exactly."""
    architecture = file.need("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file.path} holds architecture {architecture!r}: {', '.join(ARCHITECTURES)} are read"
        )

    def value(key: str, default: Any = None) -> Any:
        full = f"{architecture}.{key}"
        return file.need(full) if default is None else file.metadata.get(full, default)

    hidden, heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", hidden // heads)
    shapes = file.shapes
    refusals = {
        "mixture of experts": value("expert_count", 0) > 0,
        "sliding-window attention": value("attention.sliding_window", 0) > 0,
        "rotary scaling": value("rope.scaling.type", "none") != "none"
        or "rope_freqs.weight" in shapes,
        "partly rotated heads": value("rope.dimension_count", head_dim) != head_dim,
        "values narrower than keys": value("attention.value_length", head_dim) != head_dim,
    }
    for what, present in refusals.items():
        if present:
            raise UserError(
                f"{file.path} uses {what}, which is not read from GGUF: use the hub's safetensors"
            )
    if "token_embd.weight" not in shapes:
        raise UserError(f"{file.path} lacks tensor token_embd.weight: it is no language model")
    return ModelConfig(
        family=architecture,
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=_short(value("rope.freq_base", 10000.0)),
        norm_eps=_short(value("attention.layer_norm_rms_epsilon")),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        tied_embeddings=is_tied(file),
        max_position=value("context_length"),
    )


def is_tied(file: GGUFFile, rows: int = 1024) -> bool:
    """Whether input and output embeddings are one table.

    True without an `output.weight`, or with one that is the same table in another quantisation
    (Qwen's own files store a tied table twice). Judged on the first `rows` rows.
    """
    shapes = file.shapes
    if "output.weight" not in shapes:
        return True
    if shapes["output.weight"] != shapes["token_embd.weight"]:
        return False
    embed, output = file.tensor("token_embd.weight", rows), file.tensor("output.weight", rows)
    distance = np.linalg.norm(embed - output) / max(np.linalg.norm(output), 1e-30)
    return bool(distance < TIED_WITHIN)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary halves: rows [heads * D, ...] -> half-split order."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, where widening gives 9.999999747378752e-06."""
    return float(str(np.float32(value)))
