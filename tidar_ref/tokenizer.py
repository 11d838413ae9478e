"""Text to token ids and back: a tokenizer.json, a GGUF file's vocabulary, or plain bytes.

GGUF files hold a byte-level BPE vocabulary and the *name* of the text splitting it was trained
with; the splitting itself is rebuilt here as the models' own tokenizer.json files have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as backend_decoders

from tidar_ref.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# The splitting of the Llama 3 and Qwen2 vocabularies, which differ only in how digits are grouped.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(Protocol):
    """What the suite needs of a tokenizer."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    vocab_size: int
    has_chat_template: bool

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; a leading bos only if the model's own default adds one."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; special tokens are spelled out unless skipped."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation ({"role", "content"} each) as a prompt that awaits the assistant."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of the token spelled `token`, or None."""
        ...


class BPETokenizer:
    """A `tokenizers` pipeline with the model's end tokens and chat template."""

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: tuple[int, ...],
        bos_token_id: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.has_chat_template = chat_template is not None
        self._add_bos, self._template = add_bos, chat_template

    def encode(self, text: str) -> list[int]:
        """Token ids. A text that spells bos itself, as chat templates do, gets no second one."""
        ids = self.backend.encode(text).ids
        bos = self.bos_token_id
        if self._add_bos and ids[:1] != [bos]:
            ids = [bos, *ids]
        elif bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that end inside a character come out as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render the model's own chat template; UserError if it has none or rejects a message."""
        if self._template is None:
            raise UserError("these weights have no chat template: use prompt style 'base'")
        names = {"bos_token": self._spelled(self.bos_token_id)}
        names["eos_token"] = self._spelled(next(iter(self.eos_token_ids), None))
        return render_chat(self._template, messages, **names)

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def _spelled(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""


class ByteTokenizer:
    """Bytes as ids 0..255, then bos, eos and mask: for tests and random weights, no download.

    Random weights of a published shape emit ids beyond the 259; they decode to U+FFFD.
    """

    vocab_size = 259
    bos_token_id, mask_token_id = 256, 258
    eos_token_ids = (257,)
    has_chat_template = False
    _names = ("<bos>", "<eos>", "<mask>")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        out = bytearray()
        for token in ids:
            if token < 256:
                out.append(token)
            elif token >= self.vocab_size:
                out.extend("\ufffd".encode())
            elif not skip_special_tokens:
                out.extend(self._names[token - 256].encode())
        return out.decode("utf-8", errors="replace")

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        raise UserError("random weights have no chat template: use prompt style 'base'")

    def token_id(self, token: str) -> int | None:
        return 256 + self._names.index(token) if token in self._names else None


def from_folder(folder: Path, *, eos_token_ids: tuple[int, ...]) -> BPETokenizer:
    """The tokenizer of a folder in hub layout; UserError if tokenizer.json is missing or damaged.

    eos_token_ids: of generation_config.json or config.json; if empty, tokenizer_config.json's.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json: fetch it with the weights")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever it cannot parse
        raise UserError(f"{path} is not a tokenizer file: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    settings = read_json(folder / "tokenizer_config.json")
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(template, list):  # several named templates; "default" is the plain chat
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    bos, eos = (_named(backend, settings.get(key)) for key in ("bos_token", "eos_token"))
    return BPETokenizer(
        backend,
        eos_token_ids=eos_token_ids or (() if eos is None else (eos,)),
        bos_token_id=bos,
        chat_template=template,
    )


def from_gguf(metadata: Mapping[str, Any], *, origin: str) -> BPETokenizer:
    """The byte-level BPE tokenizer a GGUF file describes; UserError for other kinds.

    End tokens: the file's eos and eot, and a control token `<|endoftext|>` (Qwen's generation
    settings on the hub list it too, GGUF has room for one id).
    """
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _PIPELINES:
        raise UserError(
            f"{origin} has tokenizer {kind!r} with text splitting {split!r}: read are 'gpt2' with"
            f" {', '.join(_PIPELINES)}; use the hub's folder with its tokenizer.json"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it stands, even where merges would not build it.
    backend = Backend(models.BPE(vocab, merges, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PIPELINES[split]()
    backend.decoder = backend_decoders.ByteLevel()
    for wanted in (_CONTROL, _USER_DEFINED):
        special = wanted == _CONTROL
        added = [t for t, kind in zip(tokens, types, strict=True) if kind == wanted]
        backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    if types[vocab.get("<|endoftext|>", 0)] == _CONTROL:
        ends.append(vocab.get("<|endoftext|>"))
    return BPETokenizer(
        backend,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def render_chat(template: str, messages: Sequence[Mapping[str, str]], **names: str) -> str:
    """A chat template rendered as transformers does, in a sandbox: templates come with weights."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    try:
        return environment.from_string(template).render(
            messages=list(messages), tools=None, add_generation_prompt=True, **names
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template rejects these messages: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is none; UserError if it is not JSON."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from None


def _named(backend: Backend, token: Any) -> int | None:
    if isinstance(token, dict):  # older files store the token with its flags
        token = token.get("content")
    return None if token is None else backend.token_to_id(token)


def _digits_one_by_one() -> pre_tokenizers.PreTokenizer:
    """SmolLM: every digit apart *first*, so that whitespace before a number stays one run."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _by_regex(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT.format(digits=digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PIPELINES = {
    "smollm": _digits_one_by_one,
    "qwen2": lambda: _by_regex(""),
    "llama-bpe": lambda: _by_regex("{1,3}"),
}
