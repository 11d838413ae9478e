"""Tasks answered with equation chains: oracle, wrong and malformed rows, held-out numbers."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from bench.corpora.chains import chain_answer, chain_of
from bench.corpora.templates import draw, template_pairs
from bench.tasks import load_task, templates
from bench.tasks.task import Task
from tidar_ref.errors import UserError
from tidar_ref.tokenizer import ByteTokenizer


class Chatty(ByteTokenizer):
    """A tokenizer with a chat template."""

    has_chat_template = True


METRIC = "exact_match,chain"
MALFORMED = (
    "", "72", "#### ", "####", "#### seventy-two", "<<48/2=24>> 72", "#### 72 clips",
    "#### 72\nAnd another question", "#### 72#### 72", "### 72", "#### 7 2", "#### --72",
)  # fmt: skip


def own_answers() -> dict[str, str]:
    """Chains of the task's problems, found again by their prompts."""
    chains = {pair.prompt: pair.response for pair in
              template_pairs(400, seed=templates.SEED, split="heldout")}  # fmt: skip
    return {problem.id: chains[problem.prompt] for problem in load_task("own_templates").problems()}


def scored(task: Task, texts: dict[str, str]) -> float:
    (score,) = task.score(texts)
    assert score.metric == METRIC and score.headline and score.harness == "tidar-bench"
    assert set(score.per_problem) == set(texts)
    return score.value


def test_own_templates_gives_200_different_problems_without_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TIDAR_BENCH_DATA", raising=False)
    task = load_task("own_templates")
    problems = task.problems()
    assert len(problems) == 200 == len({problem.prompt for problem in problems})
    assert [problem.id for problem in problems] == [f"own_templates/{i}" for i in range(200)]
    assert task.problems(3) == problems[:3]
    assert {problem.stop for problem in problems} == {()}
    assert task.ours and task.shots == 0 and task.source.kind == "own"
    # What is asked is part of the benchmark: a change here is a new benchmark.
    assert task.source.sha256.startswith("a8dceec87c77ee65")


def test_no_problem_of_the_task_is_in_the_training_examples() -> None:
    asked = {problem.prompt for problem in load_task("own_templates").problems()}
    trained = {pair.prompt for seed in (0, 1) for pair in template_pairs(5000, seed=seed)}
    assert len(trained) > 9000 and not asked & trained


def test_own_templates_scores() -> None:
    task, right = load_task("own_templates"), own_answers()
    assert scored(task, right) == 1.0
    bare = {id: " #### " + text.rpartition("#### ")[2] + "\n" for id, text in right.items()}
    assert scored(task, bare) == 1.0
    wrong = {id: re.sub(r"#### (\d+)", lambda m: f"#### {int(m[1]) + 1}", text)
             for id, text in right.items()}  # fmt: skip
    assert scored(task, wrong) == 0.0
    half = right | {f"own_templates/{i}": "" for i in range(100)}
    assert scored(task, half) == 0.5


def test_malformed_answers_score_nothing() -> None:
    task = load_task("own_templates")
    index = next(i for i in range(500) if draw(i, seed=templates.SEED, split="heldout").answer > 1)
    drawn = draw(index, seed=templates.SEED, split="heldout")
    id = next(p.id for p in task.problems() if p.prompt == drawn.prompt)
    assert scored(task, {id: f"#### {drawn.answer}"}) == 1.0
    for text in MALFORMED:
        assert chain_answer(text) is None, text
        assert scored(task, {id: text.replace("72", str(drawn.answer))}) == 0.0, text


def test_the_number_may_have_commas_signs_and_decimals() -> None:
    for text, number in (("#### 1,200", "1200"), ("x #### -3", "-3"), ("####2.50 ", "2.5")):
        assert chain_answer(text) == Decimal(number)


def test_gsm8k_chain_scores_the_references(shared_data: Path) -> None:
    task = load_task("gsm8k_chain", data_dir=shared_data)
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    problems = task.problems()
    assert len(problems) == len(rows) == 1319 and task.ours and task.shots == 0
    for problem, row in zip(problems, rows, strict=True):
        assert problem.prompt == row["question"] + "\n"
        assert problem.stop == () and problem.max_new_tokens == 96
    chains = {f"gsm8k/{i}": chain_of(row["answer"]) for i, row in enumerate(rows)}
    assert scored(task, {id: chain for id, chain in chains.items() if chain}) == 1.0
    # lm-eval's reading of the same answers: the number after ####, commas out.
    gold = {f"gsm8k/{i}": row["answer"].split("#### ")[1] for i, row in enumerate(rows)}
    assert scored(task, {id: f"#### {n}" for id, n in gold.items()}) == 1.0
    plus = {id: f"#### {Decimal(n.replace(',', '')) + 1}" for id, n in gold.items()}
    assert scored(task, plus) == 0.0


@pytest.mark.parametrize("name", ["gsm8k_chain", "own_templates"])
def test_bad_input_is_refused(name: str, shared_data: Path) -> None:
    task = load_task(name, data_dir=shared_data)
    with pytest.raises(UserError, match="limit 0"):
        task.problems(0)
    with pytest.raises(UserError, match="no problem 'nowhere/1'"):
        task.score({"nowhere/1": "#### 1"})
    with pytest.raises(UserError, match="no texts"):
        task.score({})
    with pytest.raises(UserError, match="no prompt in style 'chat'.*'base'"):
        load_task(name, data_dir=shared_data, style="chat", tokenizer=Chatty())
