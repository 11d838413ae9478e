"""Tokenizers: bytes, folders, chat templates, and the GGUF vocabulary against transformers' own."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tidar_ref.errors import UserError
from tidar_ref.gguf_reader import GGUFFile
from tidar_ref.tokenizer import BPETokenizer, ByteTokenizer, from_gguf, render_chat

HAND_WRITTEN = [
    "", " ", "\n", "  \n\t ", "Hello, world!", "def f(x):\n    return x ** 2 + 1\n",
    "if a <= b and c != d:\n\tprint('%d' % 10)\n", "3.14159 and 1,000,000 and 0xFF", "2024-01-31",
    "1\n2\n\n3", "a  12", "x =  5", "\n\n1. First\n\n2. Second", "tab\t9", "I'm you're we'll DON'T",
    "naïve café Ångström résumé", "e\u0301 combining", "你好，世界", "日本語のテキスト", "한국어",
    "Россия", "مرحبا بالعالم", "😀👍🏽🇺🇸", "½ ² ٣ Ⅷ", "zero\u200bwidth\u00a0nbsp", "end  ",
    "<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b", "<repo_name>x<file_sep>y<empty_output>",
    "<|im_end|", "< |im_end| >", "```python\nprint(1)\n```", "http://a.b/c?d=e&f=1#g", "\r\n\r\n",
    '{"k": [1, 2.5, null]}', "A" * 300, "1" * 70, " " * 33 + "x", "\x00\x07\x7f", "don’t “quote” …",
]  # fmt: skip
PIECES = [
    " ", "  ", "\n", "\t", "the", " and", "Token", "return", "self.", "()", "[i]", "==", "'s", "7",
    "42", "1999", "é", "ß", "漢", "字", "😀", "—", "...", "$", "_x", "<|im_end|>", "<jupyter_code>",
    "\r\n", "    ", "№", "Ω", "١",
]  # fmt: skip


def texts() -> list[str]:
    """Hand-written edge cases and seeded random mixtures of awkward pieces."""
    rng = random.Random(0)
    mixed = ["".join(rng.choices(PIECES, k=rng.randint(2, 20))) for _ in range(400)]
    return HAND_WRITTEN + mixed


@pytest.fixture(scope="module")
def smollm(smollm_gguf: Path) -> BPETokenizer:
    return from_gguf(GGUFFile(smollm_gguf).metadata, origin="test")


@pytest.fixture(scope="module")
def theirs(smollm_gguf: Path) -> Any:
    """transformers' tokenizer of the same file (10 s)."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(
        smollm_gguf.parent, gguf_file=smollm_gguf.name
    )


def test_ids_equal_transformers_with_digits_apart(smollm: BPETokenizer, theirs: Any) -> None:
    """transformers 5.23 knows no splitting called "smollm" and uses GPT-2's; the model's own
    tokenizer.json separates digits first. With that step put in, all ids are equal."""
    backend = Backend.from_str(theirs.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    samples = texts()
    assert len(samples) >= 200
    for text in samples:
        assert smollm.encode(text) == backend.encode(text).ids, text
        ids = smollm.encode(text)
        assert smollm.decode(ids) == theirs.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def test_only_whitespace_before_digits_differs_from_transformers(
    smollm: BPETokenizer, theirs: Any
) -> None:
    """Whitespace runs before a digit, and a space before a digit that is not ASCII."""
    before_digit = re.compile(r"\s\s\d|\s[½²٣Ⅷ١]")
    plain = [text for text in texts() if not before_digit.search(text)]
    assert len(plain) >= 200
    assert all(smollm.encode(text) == theirs.encode(text) for text in plain)
    assert smollm.encode("a  12") != theirs.encode("a  12")


def test_digits_are_single_tokens(smollm: BPETokenizer) -> None:
    for text in ("1234567890", "a12b345", "3.14", "x  99", "٣٣"):
        spelled = [smollm.decode([i]) for i in smollm.encode(text)]
        assert all(len(piece.strip()) == 1 for piece in spelled if re.search(r"\d", piece))
    assert len(smollm.encode("a  12")) == 4  # the two spaces stay one token


def test_text_survives_a_round_trip(smollm: BPETokenizer) -> None:
    for text in texts():
        assert smollm.decode(smollm.encode(text)) == text


def test_special_tokens_are_kept_unless_skipped(smollm: BPETokenizer) -> None:
    ids = smollm.encode("hi<|im_end|>")
    assert ids[-1] == 2 and smollm.token_id("<|im_end|>") == 2
    assert smollm.decode(ids) == "hi<|im_end|>"
    assert smollm.decode(ids, skip_special_tokens=True) == "hi"
    assert smollm.token_id("<|no such token|>") is None


def test_chat_equals_transformers(smollm: BPETokenizer, theirs: Any) -> None:
    user = {"role": "user", "content": "What is 1 + 1?\n"}
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "2"}
    for messages in ([user], [system, user], [user, answer, user]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smollm.chat(messages) == expected
    assert smollm.encode(smollm.chat([user]))[:2] == [1, smollm.encode("system")[0]]


def test_templates_see_what_they_expect_and_nothing_more() -> None:
    messages = [{"role": "user", "content": "é"}]
    assert render_chat("{{ bos_token }}{{ messages | tojson }}", messages, bos_token="<s>") == (
        '<s>[{"role": "user", "content": "é"}]'
    )
    loop = "{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% break %}{% endfor %}"
    assert render_chat(loop, messages) == "x\n"
    with pytest.raises(UserError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", messages)
    with pytest.raises(UserError, match="rejects"):
        render_chat("{{ messages.__class__.__mro__ }}", messages)
    with pytest.raises(UserError, match="rejects"):
        render_chat("{% for %}", messages)


def vocabulary(pre: str, **more: Any) -> dict[str, Any]:
    """GGUF metadata of a vocabulary with all bytes, a few merges and three control tokens."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokens = [*sorted(letters), "ab", "12", "123", "abc", "<|endoftext|>", "<|im_end|>", "<bos>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 260 + [3] * 3,
        "tokenizer.ggml.merges": ["a b", "1 2", "12 3"],
        "tokenizer.ggml.eos_token_id": 261,
        "tokenizer.ggml.bos_token_id": 262,
        **more,
    }


def spelled(pre: str, text: str, **more: Any) -> list[str]:
    tokenizer = from_gguf(vocabulary(pre, **more), origin="test")
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_digit_groups_by_splitting() -> None:
    assert spelled("smollm", "ab123") == ["ab", "1", "2", "3"]
    assert spelled("qwen2", "ab123") == ["ab", "1", "2", "3"]
    assert spelled("llama-bpe", "ab123412") == ["<bos>", "ab", "123", "4", "12"]


def test_qwen_normalises_and_llama_takes_whole_words() -> None:
    assert "".join(spelled("qwen2", "e\u0301")) == "\ufffd\ufffd"  # é, its two bytes one by one
    assert len(spelled("qwen2", "e\u0301")) == 2 and len(spelled("smollm", "e\u0301")) == 3
    assert spelled("llama-bpe", "abc")[1:] == ["abc"] and spelled("qwen2", "abc") == ["ab", "c"]


def test_qwen_splitting_equals_transformers() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for pre in ("qwen2", "llama-bpe"):
        ours = from_gguf(vocabulary(pre), origin="test").backend.pre_tokenizer
        split = Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[pre])
        theirs = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        for text in texts():
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_bos_is_added_once_and_only_if_the_file_says_so() -> None:
    assert spelled("smollm", "ab") == ["ab"]
    more = {"tokenizer.ggml.add_bos_token": True}
    assert spelled("smollm", "ab", **more) == ["<bos>", "ab"]
    assert spelled("smollm", "<bos>ab", **more) == ["<bos>", "ab"]
    assert spelled("llama-bpe", "ab", **{"tokenizer.ggml.add_bos_token": False}) == ["ab"]


def test_end_tokens_of_a_gguf() -> None:
    ids = from_gguf(vocabulary("qwen2"), origin="test").eos_token_ids
    assert ids == (261, 260)
    more = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eos_token_id": 260}
    assert from_gguf(vocabulary("qwen2", **more), origin="test").eos_token_ids == (260, 5)


@pytest.mark.parametrize("change", [{"pre": "tekken"}, {"model": "llama"}])
def test_other_vocabularies_are_refused(change: dict[str, str]) -> None:
    more = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(UserError, match="x.gguf.*tokenizer.json"):
        from_gguf(vocabulary("qwen2") | more, origin="x.gguf")


def test_a_model_without_template_says_so() -> None:
    tokenizer = from_gguf(vocabulary("qwen2"), origin="test")
    assert not tokenizer.has_chat_template
    for each in (tokenizer, ByteTokenizer()):
        with pytest.raises(UserError, match="style 'base'"):
            each.chat([{"role": "user", "content": "hi"}])


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    for text in texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([104, 257]) == "h<eos>"
    assert tokenizer.decode([104, 257], skip_special_tokens=True) == "h"
    assert tokenizer.decode([104, 151000]) == "h\ufffd"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    assert (tokenizer.token_id("<mask>"), tokenizer.token_id("x")) == (258, None)
    assert tokenizer.vocab_size == 259 and tokenizer.eos_token_ids == (257,)
