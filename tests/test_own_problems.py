"""Our own problems: solvable as asked, graded as meant, arithmetic right, nothing copied."""

from __future__ import annotations

import ast
import gzip
import json
import operator
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from bench.sandbox import run_many
from bench.tasks import load_task
from bench.tasks.own_problems import CODE_STOPS, FOLDER, MATH_STOPS, SHOTS

CODE = [json.loads(line) for line in (FOLDER / "code.jsonl").read_text("utf-8").splitlines()]
MATH = [json.loads(line) for line in (FOLDER / "math.jsonl").read_text("utf-8").splitlines()]
SHARED_WORDS = 10  # a run of this many equal words counts as copied

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value(expression: str) -> Fraction:
    """Exact value of sums, products and quotients of numbers."""

    def of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        assert isinstance(node, ast.Constant), ast.dump(node)
        return Fraction(str(node.value))

    return of(ast.parse(expression, mode="eval").body)


def program(row: dict[str, str], body: str) -> str:
    return f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})"


def test_sizes_ids_and_fields() -> None:
    assert len(CODE) >= 20 and len(MATH) >= 40
    for kind, rows in (("own_code", CODE), ("own_math", MATH)):
        assert [row["id"] for row in rows] == [f"{kind}/{i}" for i in range(len(rows))]
    assert len({row["entry_point"] for row in CODE}) == len(CODE)
    assert len({row["question"] for row in MATH}) == len(MATH)


def test_reference_bodies_pass_and_empty_bodies_fail() -> None:
    good = run_many([program(row, row["canonical_solution"]) for row in CODE], timeout_s=10.0)
    assert not {row["id"]: v.detail for row, v in zip(CODE, good, strict=True) if not v.passed}
    empty = run_many([program(row, "    pass\n") for row in CODE], timeout_s=10.0)
    assert not [row["id"] for row, v in zip(CODE, empty, strict=True) if v.passed]
    assert {v.status for v in empty} == {"failed"}


def test_checks_have_several_asserts_and_the_example_of_the_docstring() -> None:
    for row in CODE:
        assert row["test"].startswith("def check(candidate):\n")
        assert row["test"].count("assert ") >= 5, row["id"]
        asked, answer = re.search(r">>> (.+)\n    (.+)\n", row["prompt"]).groups()
        call = asked.replace(row["entry_point"], "candidate")
        wanted = f"assert {call} == {ast.literal_eval(answer)!r}"
        found = [ast.unparse(node) for node in ast.walk(ast.parse(row["test"]))
                 if isinstance(node, ast.Assert)]
        normal = ast.unparse(ast.parse(wanted).body[0])
        assert normal in found or normal.replace("==", "is") in found, row["id"]


def test_prompts_end_where_the_body_begins() -> None:
    for row in CODE:
        assert row["prompt"].endswith('"""\n') and row["canonical_solution"].startswith("    ")
        assert not any(stop in row["canonical_solution"] for stop in CODE_STOPS), row["id"]
        function = ast.parse(row["prompt"] + row["canonical_solution"]).body[-1]
        assert isinstance(function, ast.FunctionDef) and function.name == row["entry_point"]


def test_marked_arithmetic_is_right_and_ends_in_the_answer() -> None:
    for row in MATH:
        marks = re.findall(r"<<([^<>]+)=([^<>=]+)>>(-?[0-9.]*[0-9])", row["solution"])
        assert marks and len(marks) == row["solution"].count("<<"), row["id"]
        for expression, result, repeated in marks:
            assert value(expression) == value(result) == value(repeated), (row["id"], expression)
        end = re.search(r"The answer is (-?[0-9]+(?:\.[0-9]+)?)\.$", row["solution"])
        assert end and end.group(1) == row["answer"], row["id"]
        assert value(marks[-1][1]) == value(row["answer"]), row["id"]
        # Every plain "a * b = " in the prose is the marked one.
        for said, marked in re.findall(r"([-0-9.+*/ ]+) = <<([^<>]+)=", row["solution"]):
            assert said.replace(" ", "") == marked, (row["id"], said)


WORDS = {
    word: Fraction(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
} | {"half": Fraction(2), "third": Fraction(3), "quarter": Fraction(4), "twice": Fraction(2)}
FACTORS = {Fraction(n) for n in (1, 100, 1000)}  # ends of fences, percent, metric units


def named(text: str) -> set[Fraction]:
    """All numbers a text names, in digits or in words."""
    digits = {Fraction(n) for n in re.findall(r"[0-9]+(?:\.[0-9]+)?", text)}
    return digits | {WORDS[word] for word in re.findall("[a-z]+", text.lower()) if word in WORDS}


def test_steps_only_use_numbers_that_are_known() -> None:
    """Operands come from the question, an earlier result or the prose between the steps."""
    for row in MATH:
        prose = re.sub(r"[-0-9.+*/ ]+= <<[^<>]+>>[0-9.]*", " ", row["solution"])
        prose = prose.removesuffix(f"The answer is {row['answer']}.")
        known = FACTORS | named(row["question"]) | named(prose)
        for expression, result in re.findall(r"<<([^<>]+)=([^<>=]+)>>", row["solution"]):
            unknown = named(expression) - known
            assert not unknown, (row["id"], expression, unknown)
            known.add(abs(Fraction(result)))


def test_tasks_grade_the_references_right_and_others_wrong() -> None:
    code, math = load_task("own_code"), load_task("own_math")
    assert len(code.problems()) == len(CODE) and len(math.problems()) == len(MATH)
    texts = {row["id"]: row["canonical_solution"] + "\nprint('run on')" for row in CODE[:3]}
    assert all(score.value == 1.0 for score in code.score(texts))
    assert not any(stop in row["solution"] for row in MATH for stop in MATH_STOPS)
    texts = {row["id"]: " " + row["solution"] + "\n\nQ: next 5?" for row in MATH}
    assert [score.value for score in math.score(texts)] == [1.0, 1.0]
    wrong = {row["id"]: f" The answer is {value(row['answer']) + 1}." for row in MATH[:5]}
    assert all(score.value == 0.0 for score in math.score(wrong))
    shots = " ".join(question for question, _ in SHOTS)
    assert not [row["id"] for row in MATH if row["question"] in shots]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def grams(text: str) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return zip(*(found[start:] for start in range(SHARED_WORDS)), strict=False)


def test_no_run_of_ten_words_comes_from_the_public_sets(shared_data: Path) -> None:
    ours: dict[tuple[str, ...], str] = {}
    for row in (*CODE, *MATH):
        for field in ("prompt", "canonical_solution", "test", "question", "solution"):
            ours |= dict.fromkeys(grams(row.get(field, "")), row["id"])
    public: list[str] = []
    for file in ("humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl",
                 "gsm8k/test.jsonl", "gsm8k/train.jsonl"):
        opener = gzip.open if file.endswith("gz") else open
        with opener(shared_data / file, "rt", encoding="utf-8") as lines:
            for line in lines:
                public.extend(str(text) for text in json.loads(line).values())
    assert len(public) > 9000
    shared = {ours[gram]: " ".join(gram) for text in public for gram in grams(text) if gram in ours}
    assert not shared
    # The check can find something: a sentence of theirs with words around it.
    longest = max(public, key=len)
    assert set(grams(longest)) & set(grams(f"so, {longest} and on"))
