"""Prompts and grades through lm-eval: published prompt hashes, gold scores, equality with lm-eval.

The whole gold rows (minutes) are marked slow; the fast half runs the first problems of each set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.tasks import _lm_eval, chat, data, load_task
from bench.tasks import plus as plus_module
from bench.tasks.library_task import PROMPTS_SHA, LibraryTask
from bench.tasks.task import Score, all_prompts_sha
from tidar_ref.errors import UserError

pytest.importorskip("lm_eval")
needs_sandbox = pytest.mark.skipif(
    not (Path(data.__file__).parents[1] / "sandbox.py").exists(), reason="bench/sandbox.py missing"
)


def gold(task: LibraryTask, limit: int | None) -> dict[str, str]:
    """Reference answers as a model would have to write them, by problem id."""
    texts = {}
    for problem in task.problems(limit):
        row = task.rows()[problem.id]
        if task.name == "humaneval":
            texts[problem.id] = row["canonical_solution"]
        elif task.name == "gsm8k_cot":
            reasoning, answer = row["answer"].split("####")
            texts[problem.id] = f" {reasoning.strip()} The answer is {answer.strip()}."
        else:
            texts[problem.id] = row["code"] + "\n[DONE]"
    return texts


def values(scores: list[Score]) -> dict[tuple[str, str], float]:
    return {(score.metric, score.variant): score.value for score in scores}


@pytest.fixture
def no_evalplus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without evalplus' files; its sanitiser is left out too."""
    monkeypatch.setattr(data, "evalplus_file", lambda dataset, data_dir=None: None)
    monkeypatch.setattr(plus_module, "sanitised", lambda prompt, code, entry: prompt + code)


# Prompts


@needs_sandbox
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "mbpp_plus"])
def test_prompts_are_the_published_ones(shared_data: Path, name: str) -> None:
    task = load_task(name, data_dir=shared_data)
    problems = task.problems()
    assert all_prompts_sha(problems) == PROMPTS_SHA[name]
    assert len({problem.id for problem in problems}) == len(problems)
    assert {problem.max_new_tokens for problem in problems} == {512}
    stops = ("\nclass", "\ndef", "\n#", "\nif", "\nprint") if name == "humaneval" else ("[DONE]",)
    assert {problem.stop for problem in problems} == {stops}


@pytest.mark.slow
def test_gsm8k_prompts_are_the_published_ones(shared_data: Path) -> None:
    problems = load_task("gsm8k_cot", data_dir=shared_data).problems()
    assert (len(problems), all_prompts_sha(problems)) == (1319, PROMPTS_SHA["gsm8k_cot"])


def test_gsm8k_first_prompts(shared_data: Path) -> None:
    task = load_task("gsm8k_cot", data_dir=shared_data)
    first = task.problems(3)
    assert first == task.problems(5)[:3]
    assert first[0].stop == ("Q:", "</s>", "<|im_end|>") and first[0].max_new_tokens == 256
    assert first[0].prompt.count("Q: ") == 9 and first[0].prompt.endswith("\nA:")
    assert [problem.id for problem in first] == ["gsm8k/0", "gsm8k/1", "gsm8k/2"]


@needs_sandbox
def test_other_prompts_are_refused(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMPTS_SHA, "humaneval", "0" * 16)
    task = load_task("humaneval", data_dir=shared_data)
    task.problems(2)  # a part has no published hash
    with pytest.raises(UserError, match="expected sha256 0000.*got 6a712466e64fa7d2"):
        task.problems()


# Grades


FORMS = {  # text ending: (strict, flexible)
    " The answer is 18.": (1.0, 1.0),
    " The answer is 18": (0.0, 1.0),
    " The answer is 18\n": (0.0, 1.0),
    " The answer is $18.": (0.0, 1.0),
    " #### 18": (0.0, 1.0),
    " The answer is 18. Human: 5 apples": (1.0, 0.0),
}


def test_gsm8k_forms(shared_data: Path) -> None:
    task = load_task("gsm8k_cot", data_dir=shared_data)
    row, prompt = task.rows()["gsm8k/0"], task.problems(1)[0].prompt  # its answer is 18
    texts = ["16 - 7 = 9, 9 * 2 = 18." + ending for ending in FORMS]
    graded = _lm_eval.score("gsm8k_cot", [row] * len(FORMS), [prompt] * len(FORMS), texts)
    assert graded == {
        "exact_match,strict-match": [strict for strict, _ in FORMS.values()],
        "exact_match,flexible-extract": [flexible for _, flexible in FORMS.values()],
    }


def test_gsm8k_text_is_cut_before_the_next_question(shared_data: Path) -> None:
    task = load_task("gsm8k_cot", data_dir=shared_data)
    text = " The answer is 18.\n\nQ: Tom has 5 apples.\nA: The answer is 5."
    assert set(values(task.score({"gsm8k/0": text})).values()) == {1.0}


def test_subset_is_paired_by_id_not_by_place(shared_data: Path) -> None:
    task = load_task("gsm8k_cot", data_dir=shared_data)
    texts = gold(task, 8)
    picked = {id: texts[id] for id in ("gsm8k/6", "gsm8k/2")}
    picked["gsm8k/4"] = texts["gsm8k/5"]
    fresh = load_task("gsm8k_cot", data_dir=shared_data)
    strict = next(score for score in fresh.score(picked) if score.headline)
    assert strict.per_problem == {"gsm8k/2": 1.0, "gsm8k/4": 0.0, "gsm8k/6": 1.0}
    assert strict.metric == "exact_match,strict-match"
    with pytest.raises(UserError, match="no problem 'gsm8k/1319'"):
        task.score({"gsm8k/1319": ""})


@needs_sandbox
@pytest.mark.usefixtures("no_evalplus")
@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("humaneval", "pass@1,create_test"),
        ("mbpp", "pass_at_1,none"),
        ("mbpp_plus", "pass_at_1,none"),
    ],
)
def test_gold_code_passes_and_wrong_code_fails(
    shared_data: Path, name: str, metric: str
) -> None:
    task = load_task(name, data_dir=shared_data)
    texts = gold(task, 5)
    wrong = list(texts)[2]
    texts[wrong] = "    return None\n"
    scores = task.score(texts)
    headline = next(score for score in scores if score.headline)
    assert (headline.metric, headline.variant) == (metric, "raw")
    assert headline.per_problem == {id: float(id != wrong) for id in texts}
    expected = {(metric, "raw"): 0.8}
    if name == "humaneval":
        expected[(metric, "sanitised")] = 0.8
    assert values(scores) == expected


@needs_sandbox
@pytest.mark.usefixtures("no_evalplus")
def test_run_on_text_is_cut_before_grading(shared_data: Path) -> None:
    task = load_task("humaneval", data_dir=shared_data)
    text = gold(task, 1)["HumanEval/0"] + "\nprint(undefined_name)\n"
    assert set(values(task.score({"HumanEval/0": text})).values()) == {1.0}


@needs_sandbox
@pytest.mark.usefixtures("no_evalplus")
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "gsm8k_cot"])
def test_equal_to_lm_eval_by_itself(shared_data: Path, name: str) -> None:
    """The same texts through lm-eval's own call, on data files of its own reading."""
    task = load_task(name, data_dir=shared_data)
    texts = gold(task, 4)
    ids = list(texts)
    texts[ids[1]] = " no idea"
    texts[ids[3]] = texts[ids[3]].rstrip(".")
    theirs = _stock_lm_eval(name, shared_data, texts)
    ours = {
        score.metric: score.value for score in task.score(texts) if score.variant == "raw"
    }
    assert ours == theirs


def _stock_lm_eval(name: str, folder: Path, texts: dict[str, str]) -> dict[str, float]:
    """lm-eval as its users run it (simple_evaluate, json files, limit), model that knows all."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    answers = list(texts.values())

    class Oracle(LM):
        def generate_until(self, requests: list[Any], **_: object) -> list[str]:
            cut = []
            for request, text in zip(requests, answers, strict=True):
                for stop in request.args[1]["until"]:
                    text = text.split(stop)[0]
                cut.append(text)
            return cut

        def loglikelihood(self, requests: list[Any], **_: object) -> list[Any]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any], **_: object) -> list[Any]:
            raise NotImplementedError

    file = folder / data.FILES[name][0]
    spec = {"task": name, "dataset_path": "json", "dataset_name": None}
    spec["dataset_kwargs"] = {"data_files": {"test": str(file)}}
    if name == "mbpp":  # the published file has all splits
        spec["process_docs"] = lambda docs: docs.filter(lambda row: 11 <= row["task_id"] <= 510)
    with _lm_eval.our_code_eval():
        manager: TaskManager = _lm_eval.task_manager(name)
        results = lm_eval.simple_evaluate(
            Oracle(),
            tasks=[{"group": "suite", "task": [spec]}],
            task_manager=manager,
            limit=len(answers),
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )
    row = results["results"][name]
    return {
        key: value for key, value in row.items()
        if "," in key and "_stderr" not in key and isinstance(value, float)
    }


# evalplus beside lm-eval (its own behaviour is tested with its adapter)


@needs_sandbox
def test_evalplus_columns_have_names_of_their_own(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    asked = {}

    def verdicts(dataset: str, programs: dict[str, str], file: Path, progress: object) -> dict:
        asked[dataset] = (programs, file.name)
        verdict = SimpleNamespace(base=True, plus=False, base_repaired=True, plus_repaired=True)
        return dict.fromkeys(programs, verdict)

    monkeypatch.setattr(plus_module, "verdicts", verdicts)
    monkeypatch.setattr(plus_module, "sanitised", lambda prompt, code, entry: prompt + code)
    task = load_task("humaneval", data_dir=shared_data)
    texts = gold(task, 2)
    assert values(task.score(texts)) == {
        ("pass@1,create_test", "raw"): 1.0,
        ("pass@1,create_test", "sanitised"): 1.0,
        ("evalplus_base", "sanitised"): 1.0,
        ("evalplus_plus", "sanitised"): 0.0,
        ("evalplus_base", "repaired"): 1.0,
        ("evalplus_plus", "repaired"): 1.0,
    }
    programs, file = asked["humaneval"]
    assert set(programs) == set(texts) and file == "HumanEvalPlus-v0.1.10.jsonl.gz"
    assert programs["HumanEval/0"].startswith("from typing import List")

    task = load_task("mbpp_plus", data_dir=shared_data)
    texts = gold(task, 2)
    assert values(task.score(texts)) == {
        ("pass_at_1,none", "raw"): 1.0,
        ("evalplus_mbpp_base", "sanitised"): 1.0,
        ("evalplus_mbpp_plus", "sanitised"): 0.0,
    }
    assert set(asked["mbpp"][0]) == {"Mbpp/2", "Mbpp/3"}


# Chat


class FakeChat:
    """A template that can be recognised."""

    has_chat_template = True

    def chat(self, messages: list[dict[str, str]]) -> str:
        return f"<user>{messages[-1]['content']}<assistant>"


@needs_sandbox
@pytest.mark.usefixtures("no_evalplus")
def test_chat_scores_never_share_a_name_with_base_scores(shared_data: Path) -> None:
    for name in ("humaneval", "mbpp", "gsm8k_cot"):
        task = load_task(name, data_dir=shared_data, style="chat", tokenizer=FakeChat())
        problem = task.problems(1)[0]
        assert (task.shots, problem.stop) == (0, ())
        assert problem.prompt.startswith("<user>") and problem.prompt.endswith("<assistant>")
        base = load_task(name, data_dir=shared_data)
        text = gold(base, 1)[problem.id].replace("[DONE]", "")
        if name == "humaneval":
            text = base.problems(1)[0].prompt + text
        if name != "gsm8k_cot":
            text = f"Here it is.\n```python\n{text}```\nIt works because ..."
        for score in task.score({problem.id: text}):
            assert score.value == 1.0, score
            assert score.metric.endswith(chat.METRIC_SUFFIX)
            assert score.harness.endswith(chat.HARNESS_SUFFIX)


# Whole gold rows


@needs_sandbox
@pytest.mark.slow
@pytest.mark.usefixtures("no_evalplus")
@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("gsm8k_cot", set()),
        ("humaneval", set()),
        # lm-eval ignores MBPP's test_setup_code (367) and test_imports (the others).
        ("mbpp", {"Mbpp/367"}),
        ("mbpp_plus", {"Mbpp/98", "Mbpp/124", "Mbpp/137", "Mbpp/300"}),
    ],
)
def test_gold_rows(
    shared_data: Path, name: str, failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With time enough: MBPP's own answer to 123 takes 3 to 8 s on a slow core, the limit is 3."""
    monkeypatch.setattr(_lm_eval, "PROGRAM_TIMEOUT_S", 30.0)
    task = load_task(name, data_dir=shared_data)
    for score in task.score(gold(task, None)):
        wrong = {id for id, value in score.per_problem.items() if value != 1}
        assert wrong == failing, score.metric
