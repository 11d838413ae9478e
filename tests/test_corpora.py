"""Training text: chains parse, template arithmetic is right, splits are apart, nothing leaks."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import random
import re
from pathlib import Path

import pytest

from bench.corpora import hygiene, instructions, python_sources
from bench.corpora.chains import DEV_ROWS, chain_answer, chain_of, gsm8k_chains
from bench.corpora.hygiene import Filter, Reference, References, filter_pairs
from bench.corpora.pairs import Document, Pair, pairs_sha256
from bench.corpora.template_texts import NAMES, RANGES, TEMPLATES, THINGS
from bench.corpora.templates import LARGEST, draw, split_of, template_pairs, worked
from bench.tasks import data
from tidar_ref.errors import UserError


def pair(prompt: str, response: str = "x", id: str = "made/0", source: str = "made") -> Pair:
    return Pair(source=source, id=id, prompt=prompt, response=response)


# Chains


def test_chain_of_keeps_marks_and_the_final_number() -> None:
    answer = "In May 48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>72, $1.\n#### 72"
    assert chain_of(answer) == "<<48/2=24>><<48+24=72>>#### 72"
    assert chain_of("<<1000*1.5=1500>>\n#### 1,500") == "<<1000*1.5=1500>>#### 1500"
    assert chain_of("<<(3+4)*.5=3.5>>\n#### -3.5") == "<<(3+4)*.5=3.5>>#### -3.5"


@pytest.mark.parametrize(
    "answer",
    [
        "Half of 48 is 24.\n#### 24",
        "<<48/2>>24\n#### 24",
        "<<48/2=>>24\n#### 24",
        "<<48/2=24=24>>24\n#### 24",
        "<<x/2=24>>24\n#### 24",
        "<<48/2=24>24\n#### 24",
        "<<48/2=24>>24 and <<1+1\n#### 24",
        "<<48/2=24>>24",
        "<<48/2=24>>24\n#### twenty",
        "<<48/2=24>>24\n#### 24\n#### 25",
    ],
)
def test_no_chain_from_malformed_answers(answer: str) -> None:
    assert chain_of(answer) is None


def test_chains_of_the_whole_training_file(shared_data: Path) -> None:
    path = shared_data / "gsm8k" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    train, dev = gsm8k_chains(path), gsm8k_chains(path, split="dev")
    marked = [i for i, row in enumerate(rows) if "<<" in row["answer"]]
    assert len(rows) == 7473 and len(marked) == 7378
    assert [int(p.id.removeprefix("gsm8k-train/")) for p in train + dev] == marked
    assert len(dev) == DEV_ROWS and not {p.id for p in train} & {p.id for p in dev}
    for p in train + dev:
        row = rows[int(p.id.split("/")[1])]
        assert p.prompt == row["question"] + "\n" and p.source == "gsm8k-train"
        final = row["answer"].split("####")[1].strip().replace(",", "")
        assert chain_answer(p.response) is not None and p.response.endswith(f"#### {final}")
        assert p.response.count("<<") == row["answer"].count("<<")
        # No prose: nothing is left when marks and the final number are gone.
        assert re.sub(r"<<[^<>]*>>", "", p.response) == f"#### {final}"
    with pytest.raises(UserError, match="'test'.*train or dev"):
        gsm8k_chains(path, split="test")


def test_a_wrong_training_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(UserError, match="train.jsonl is missing"):
        gsm8k_chains(path)
    path.write_text(json.dumps({"question": "q", "answer": "<<1+1=2>>2\n#### 2"}) + "\n")
    with pytest.raises(UserError, match="1 usable rows"):
        gsm8k_chains(path)
    path.write_text(json.dumps({"question": "q"}) + "\n")
    with pytest.raises(UserError, match="row 0 lacks"):
        gsm8k_chains(path)


# Templates


def dumb(expression: str) -> int:
    """Value of "a?b" by counting: no operator of Python but +1 and -1."""
    left, sign, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
    x, y = range(int(left)), range(int(right))
    if sign == "+":
        return len([*x, *y])
    if sign == "*":
        return len(list(itertools.product(x, y)))
    rest, taken = len(x), 0
    if sign == "-":
        for _ in y:
            rest -= 1
        return rest
    while rest > 0:
        for _ in y:
            rest -= 1
        taken += 1
    assert rest == 0, f"{expression} is not exact"
    return taken


def test_every_chain_is_right_and_within_the_small_numbers() -> None:
    for p in template_pairs(3000, seed=7) + template_pairs(500, seed=7, split="heldout"):
        marks = re.findall(r"<<([^=]+)=(\d+)>>", p.response)
        assert 1 <= len(marks) <= 3
        for expression, result in marks:
            assert dumb(expression) == int(result) and 1 <= int(result) <= LARGEST, p
            left, sign, right = re.fullmatch(r"(\d+)(.)(\d+)", expression).groups()
            factors = {"*": (left, right), "/": (right, result)}.get(sign, ("2", "2"))
            assert min(map(int, factors)) <= 9 and max(map(int, factors)) <= 12, p
        assert p.response.endswith(f">>#### {marks[-1][1]}")
        assert p.response == "".join(f"<<{e}={r}>>" for e, r in marks) + f"#### {marks[-1][1]}"


def test_a_chain_uses_the_numbers_of_its_story_and_all_of_them() -> None:
    for p in template_pairs(2000, seed=3):
        said = {int(n) for n in re.findall(r"\d+", p.prompt)}
        halves = {2} if re.search(r"\bhalf\b", p.prompt) else set()
        known = said | halves
        used: set[int] = set()
        for left, _, right, result in re.findall(r"<<(\d+)(.)(\d+)=(\d+)>>", p.response):
            assert {int(left), int(right)} <= known, p
            used |= {int(left), int(right)}
            known.add(int(result))
        assert said <= used, p


def test_templates_are_many_and_every_wording_names_every_number() -> None:
    assert len(TEMPLATES) >= 24 and len({t.name for t in TEMPLATES}) == len(TEMPLATES)
    assert {len(t.steps) for t in TEMPLATES} == {1, 2, 3}
    texts = [text for t in TEMPLATES for text in t.texts]
    assert len(set(texts)) == len(texts)
    assert len({name for name, _ in NAMES}) == len(NAMES) and len(set(THINGS)) == len(THINGS)
    for t in TEMPLATES:
        assert len(t.texts) >= 2 and set(t.numbers.values()) <= set(RANGES), t.name
        for text in t.texts:
            fields = re.findall(r"\{(\w+)\}", text)
            letters = [field for field in fields if len(field) == 1]
            assert sorted(letters) == sorted(t.numbers), (t.name, text)
            assert text.endswith("?"), (t.name, text)
        # The last step uses the one before it, so that the answer is the end of one chain.
        if len(t.steps) > 1:
            assert f"r{len(t.steps) - 1}" in t.steps[-1], t.name


def test_examples_are_a_function_of_seed_and_index() -> None:
    first = template_pairs(50, seed=1)
    assert template_pairs(80, seed=1)[:50] == first
    assert template_pairs(50, seed=2) != first
    drawn = draw(17, seed=1)
    assert (drawn.prompt, drawn.response) == (first[17].prompt, first[17].response)
    assert [p.id for p in first[:2]] == ["own-templates/train/1/0", "own-templates/train/1/1"]
    assert len({p.id for p in first + template_pairs(50, seed=1, split="heldout")}) == 100
    many = [p.prompt for p in template_pairs(3000, seed=1)]
    assert len(set(many)) > 2900
    # The same on every machine and Python: what was trained on can be named.
    assert pairs_sha256(first).startswith("5ad3bfefd506be66")


def test_no_numbers_of_a_template_are_in_both_splits() -> None:
    seen = {}
    for split, count in (("train", 4000), ("heldout", 1500)):
        drawn = [draw(i, seed=seed, split=split) for seed in (0, 1) for i in range(count // 2)]
        seen[split] = {(d.template, d.numbers) for d in drawn}
        assert {d.template for d in drawn} == {t.name for t in TEMPLATES}
        assert all(split_of(*key) == split for key in seen[split])
    assert len(seen["train"]) > 2500 and len(seen["heldout"]) > 800
    assert not seen["train"] & seen["heldout"]


def test_every_template_has_held_out_numbers_and_more_for_training() -> None:
    rng = random.Random(0)
    for t in TEMPLATES:
        found: dict[str, set[tuple[int, ...]]] = {"train": set(), "heldout": set()}
        for _ in range(6000):
            numbers = {letter: rng.randint(*RANGES[kind]) for letter, kind in t.numbers.items()}
            if worked(t, numbers) is not None:
                key = tuple(numbers.values())
                found[split_of(t.name, key)].add(key)
        assert len(found["heldout"]) >= 3 and len(found["train"]) >= 30, t.name
        assert len(found["train"]) > 3 * len(found["heldout"]), t.name


def test_bad_template_input_is_refused() -> None:
    with pytest.raises(UserError, match="count -1"):
        template_pairs(-1, seed=0)
    with pytest.raises(UserError, match="'test'.*train or heldout"):
        template_pairs(1, seed=0, split="test")


# Hygiene

STORY = "the grey cat of the miller ate seven small fish before the bell rang twice"
CODE = "def pick(rows, cut):\n    return [row for row in rows if row.weight > cut * 2]\n"


@pytest.fixture
def small() -> References:
    reference = Reference(
        name="made-test", sha256="0" * 64, code=True, problems={"p/0": (STORY,), "p/1": (CODE,)}
    )
    return References(found=(reference,), not_checked={"elsewhere": "no such file"})


def test_a_shared_run_removes_and_is_counted(small: References) -> None:
    pairs = [
        pair("How many fish?", id="made/0"),
        pair("So: The grey CAT, of the\nmiller ate seven small fish!", id="made/1"),
        pair("Write it.", response=CODE.replace("    ", "\t"), id="other/0", source="other"),
        pair("the grey cat of the miller ate seven small", id="made/2"),  # nine words
    ]
    kept, report = filter_pairs(pairs, small)
    assert [p.id for p in kept] == ["made/0", "made/2"]
    told = json.loads(json.dumps(report.as_json()))
    assert told["sources"] == {
        "made": {"kept": 2, "removed": 1, "reasons": {"words: made-test": 1}},
        "other": {"kept": 0, "removed": 1, "reasons": {"words: made-test": 1}},
    }
    assert told["removed"][0] == {
        "id": "made/1", "kind": "words", "reference": "made-test", "problem": "p/0"
    }  # fmt: skip
    assert told["checked"] == {"made-test": {"sha256": "0" * 64, "problems": 2}}
    assert told["not_checked"] == {"elsewhere": "no such file"}
    json.dumps(dataclasses.asdict(report))


def test_code_tokens_find_what_words_do_not(small: References) -> None:
    text = "f(row for row in rows if row.weight > cut)"  # nine words in common, eleven tokens
    assert Filter(small).repeated(text) == ("code", "made-test", "p/1")
    assert Filter(small, code_run=30).repeated(text) is None
    with pytest.raises(UserError, match="code_run 1"):
        Filter(small, code_run=1)


def test_documents_go_as_a_whole(small: References) -> None:
    texts = {"a": "import os\n", "b": f"import os\n\n\n{CODE}"}
    documents = [Document(source="s 1", id=i, text=t, licence="MIT") for i, t in texts.items()]
    kept, report = Filter(small).documents(documents)
    assert kept == documents[:1] and report.kept == {"s 1": 1}
    assert [removal.id for removal in report.removed] == ["b"]


@pytest.fixture(scope="module")
def known(shared_data: Path) -> References:
    return hygiene.references(shared_data)


def test_planted_test_problems_never_pass(shared_data: Path, known: References) -> None:
    assert not known.not_checked
    sizes = {reference.name: len(reference.problems) for reference in known.found}
    assert sizes == {
        "own_code": 24, "own_math": 48, "humaneval": 164, "gsm8k-test": 1319, "mbpp 1-510": 510,
        "mbpp_plus": 378,
    }  # fmt: skip
    pins = {r.name: r.sha256 for r in known.found}
    assert pins["humaneval"] == data.PINNED["humaneval/HumanEval.jsonl.gz"]
    assert pins["gsm8k-test"] == data.PINNED["gsm8k/test.jsonl"]
    innocent = template_pairs(100, seed=0)
    planted = planted_pairs(shared_data)
    kept, report = filter_pairs([*planted, *innocent], known)
    assert kept == innocent
    told = report.as_json()["sources"]
    assert {source: entry["removed"] for source, entry in told.items()} == {
        "humaneval": 328, "gsm8k": 1319, "mbpp": 510, "plus": 378, "own-templates": 0
    }  # fmt: skip
    assert all(told[name]["kept"] == 0 for name in ("humaneval", "gsm8k", "mbpp", "plus"))


def planted_pairs(folder: Path) -> list[Pair]:
    """Every test problem as training text that somebody might have collected."""
    planted = []
    for row in data.read_jsonl(folder / "humaneval/HumanEval.jsonl.gz"):
        asked, solved = row["prompt"], row["canonical_solution"]
        planted.append(pair(f"Please do this:\n{asked}", "?", row["task_id"], "humaneval"))
        planted.append(pair(asked.upper(), solved, row["task_id"] + "'", "humaneval"))
    for i, row in enumerate(data.read_jsonl(folder / "gsm8k/test.jsonl")):
        text = re.sub(r"[^\w\s']", " ,", row["question"])
        planted.append(pair(f"Question. {text}", "#### 1", f"g/{i}", "gsm8k"))
    for row in data.read_jsonl(folder / "mbpp/mbpp.jsonl"):
        if row["task_id"] <= 510:
            code = row["code"].replace("\r\n", "\n")
            planted.append(pair(f"{row['text']}\n{row['test_list'][0]}", code,
                                f"m/{row['task_id']}", "mbpp"))  # fmt: skip
    for row in data.read_jsonl(folder / "mbpp_plus/MbppPlus-v0.2.0.jsonl.gz"):
        planted.append(pair(row["prompt"], row["canonical_solution"], row["task_id"], "plus"))
    return planted


def test_hardly_any_gsm8k_training_row_repeats_a_test_question(
    shared_data: Path, known: References
) -> None:
    pairs = gsm8k_chains(shared_data / "gsm8k" / "train.jsonl")
    kept, report = filter_pairs(pairs, known)
    assert len(kept) + len(report.removed) == len(pairs)
    assert {removal.reference for removal in report.removed} == {"gsm8k-test"}
    assert 1 <= len(report.removed) <= 20


def test_missing_references_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TIDAR_BENCH_DATA", raising=False)
    monkeypatch.setattr(data, "_hub_unreachable", lambda repo: "no network in tests")
    monkeypatch.setattr(data, "_from_package", lambda: None)
    known = hygiene.references(tmp_path)
    assert set(known.not_checked) == {"humaneval", "gsm8k-test", "mbpp 1-510", "mbpp_plus"}
    assert [reference.name for reference in known.found] == ["own_code", "own_math"]
    assert "mbpp/mbpp.jsonl" in known.not_checked["mbpp 1-510"]
    assert "humaneval not checked" in caplog.text
    _, report = filter_pairs([pair("hello")], known)
    assert set(report.as_json()["not_checked"]) == set(known.not_checked)
    with pytest.raises(UserError, match="MbppPlus"):
        hygiene.mbpp_clean_ids(tmp_path)


# Instructions


def test_clean_mbpp_ids_are_317_and_outside_mbpp_plus(shared_data: Path) -> None:
    ids = hygiene.mbpp_clean_ids(shared_data)
    assert len(ids) == 317 == len(set(ids)) and min(ids) > 510 and max(ids) <= 974
    plus = data.read_jsonl(shared_data / "mbpp_plus/MbppPlus-v0.2.0.jsonl.gz")
    assert not {f"Mbpp/{id}" for id in ids} & {row["task_id"] for row in plus}


def test_mbpp_pairs_have_the_item_of_the_three_shot_prompt(shared_data: Path) -> None:
    spec = importlib.util.find_spec("lm_eval")  # read, not imported: that takes seconds
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lm-eval is not installed")
    stock = Path(spec.submodule_search_locations[0]) / "tasks" / "mbpp" / "mbpp.yaml"
    asked = re.search(r'^doc_to_text: "(.*)"$', stock.read_text("utf-8"), re.MULTILINE).group(1)
    shown = "\n".join(f"{{{{test_list[{i}]}}}}" for i in range(3))
    ours = instructions.MBPP_ITEM.format(text="{{text}}", tests=shown)
    assert asked.replace(r"\n", "\n") == ours
    pairs = instructions.mbpp_pairs(shared_data)
    assert [int(p.id.split("/")[1]) for p in pairs] == list(hygiene.mbpp_clean_ids(shared_data))
    for p in pairs:
        assert p.prompt.endswith("\n[BEGIN]\n") and p.response.endswith("\n[DONE]")
        assert instructions.is_program(p.response.removesuffix("\n[DONE]")), p.id
        assert "\r" not in p.response


def test_gpteacher_rows_are_python_and_filtered(
    shared_data: Path, known: References
) -> None:
    if not (shared_data / instructions.GPTEACHER_FILE).is_file():
        pytest.skip("GPTeacher is not in the data folder")
    pairs = instructions.gpteacher_pairs(shared_data)
    assert 900 < len(pairs) < 1200 and len({p.id for p in pairs}) == len(pairs)
    kept, report = filter_pairs(pairs, known)
    assert len(kept) + len(report.removed) == len(pairs)
    assert {r.reference for r in report.removed} >= {"humaneval", "mbpp 1-510"}


def test_what_counts_as_a_program() -> None:
    for text in ("x = 1", "import os", "def f():\n    pass", "for i in x:\n    i"):
        assert instructions.is_program(text), text
    for text in ("", "hello", "42", "<p>hi</p>", "const x = 1;", "int main() {}", "x = \0"):
        assert not instructions.is_program(text), text


def test_a_changed_gpteacher_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not in a data folder"):
        instructions.gpteacher_pairs(tmp_path)
    path = tmp_path / instructions.GPTEACHER_FILE
    path.parent.mkdir()
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="has sha256"):
        instructions.gpteacher_pairs(tmp_path)


# Python sources


@pytest.mark.parametrize(
    ("expression", "classifiers", "field", "licence"),
    [
        ("MIT", [], None, "MIT"),
        ("Apache-2.0 OR BSD-2-Clause", [], None, "Apache-2.0 OR BSD-2-Clause"),
        ("MIT AND MPL-2.0", [], None, None),
        ("GPL-3.0-only", ["License :: OSI Approved :: MIT License"], None, None),
        (None, ["License :: OSI Approved :: BSD License"], "see LICENSE", "BSD"),
        (None, ["License :: OSI Approved :: MIT License"], "GPLv2", None),
        (None, ["License :: OSI Approved :: MIT License",
                "License :: OSI Approved :: GNU General Public License (GPL)"], None, None),
        (None, [], "Apache License, Version 2.0", "Apache-2.0"),
        (None, [], "The MIT License", "MIT"),
        (None, [], "BSD 3-Clause License\n\nCopyright (c) 2015", "BSD-3-Clause"),
        (None, [], "MIT-like, see file", None),
        (None, [], None, None),
        (None, [], "  \n", None),
    ],
)  # fmt: skip
def test_licences(
    expression: str | None, classifiers: list[str], field: str | None, licence: str | None
) -> None:
    assert python_sources.licence_of(expression, classifiers, field) == licence


def test_installed_packages_are_taken_or_told() -> None:
    there = {package.name: package for package in python_sources.installed_packages()}
    assert list(there) == sorted(there)
    assert there["pytest"].licence == "MIT"
    assert all(package.said for package in there.values())
    for name in python_sources.CARRIES_BENCHMARKS & there.keys():
        assert there[name].licence is None
    with pytest.raises(UserError, match="'no-such-package' is not installed"):
        next(python_sources.python_documents(byte_budget=1, packages=["no-such-package"]))


def test_documents_of_the_standard_library() -> None:
    budget = 300_000
    got = list(python_sources.python_documents(byte_budget=budget, packages=["stdlib", "pytest"]))
    assert got == list(
        python_sources.python_documents(byte_budget=budget, packages=["stdlib", "pytest"])
    )
    total = sum(len(document.text.encode()) for document in got)
    assert budget / 2 < total <= budget
    assert {document.source.split()[0] for document in got} <= {"stdlib", "pytest"}
    assert {document.licence for document in got} <= {"PSF-2.0", "MIT"}
    digests = [hashlib.sha256(document.text.encode()).hexdigest() for document in got]
    assert len(set(digests)) == len(got) == len({document.id for document in got})
    for document in got:
        assert not re.search(r"(^|[/ ])(tests?|_vendor|idle_test)/", document.id), document.id
    fewer = list(python_sources.python_documents(byte_budget=100_000, packages=["stdlib"]))
    assert 0 < sum(len(d.text.encode()) for d in fewer) <= 100_000
    with pytest.raises(UserError, match="budget 0"):
        next(python_sources.python_documents(byte_budget=0))


def test_which_files_are_left_out(tmp_path: Path) -> None:
    wanted = python_sources._wanted
    for name in ("a/tests/x.py", "a/test_x.py", "a/x_test.py", "a/conftest.py", "_vendor/x.py",
                 "a/third_party/x.py", "a/x_pb2.py", "a/_version.py"):  # fmt: skip
        assert not wanted(Path(name)), name
    for name in ("a/x.py", "a/contest.py", "a/attest/x.py", "a/latest.py"):
        assert wanted(Path(name)), name
    plain = "def double(x):\n    return x * 2\n\n" * 30
    cases = {
        "plain": (plain, True),
        "generated": ("# Automatically generated, do not edit\n" + plain, False),
        "table": (plain + f"DATA = {list(range(200))}\n", False),
        "tiny": ("x = 1\n", False),
        "large": (plain * 200, False),
    }
    for name, (text, kept) in cases.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        assert (python_sources._readable(path) is not None) == kept, name
    (tmp_path / "latin.py").write_bytes(plain.encode() + b"# \xe9\n")
    assert python_sources._readable(tmp_path / "latin.py") is None
    assert python_sources._readable(tmp_path / "gone.py") is None


def test_the_digest_of_pairs_sees_order_and_content() -> None:
    a, b = pair("a"), pair("b", id="made/1")
    assert len({pairs_sha256(p) for p in ([a, b], [b, a], [a], [a, pair("b", "y", "made/1")])}) == 4
