"""The only importer of lm-eval: it builds our prompts and grades our texts, it never generates.

Two passes over lm-eval's own model seam. A collector answers nothing and records every prompt with
its stop strings; after our harness has generated, a replayer hands the texts back and lm-eval
filters and scores them. Rows are given in memory, so no task file, download or cache is involved,
and a subset of a data set is simply fewer rows.

The metric `code_eval`, which lm-eval's code tasks load from the hub, is replaced by our sandbox in
every mode, so that a score never depends on whether the hub could be reached.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Folder of each task inside lm_eval/tasks: indexing one folder takes 10 ms, all of them seconds.
FOLDERS = {"humaneval": "humaneval", "mbpp": "mbpp", "mbpp_plus": "mbpp", "gsm8k_cot": "gsm8k"}
FEWSHOT_SEED = 1234  # simple_evaluate's default; none of our tasks draws shots
PROGRAM_TIMEOUT_S = 3.0  # lm-eval's own limit for one program


class CodeEval:
    """Stands in for the hub's `code_eval`: same call, programs run in our sandbox one by one."""

    def __init__(self) -> None:
        self.programs_run = 0
        self.on_program: Callable[[], None] | None = None

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1,),
        **_: object,
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """({"pass@1": fraction}, verdicts per reference); one candidate per reference, k = [1]."""
        if list(k) != [1] or any(len(candidates) != 1 for candidates in predictions):
            raise ValueError(f"only pass@1 with one candidate is supported, got k={list(k)}")
        verdicts = [
            self.passes(candidates[0], test)
            for candidates, test in zip(predictions, references, strict=True)
        ]
        details = {index: [verdict] for index, verdict in enumerate(verdicts)}
        return {"pass@1": sum(verdicts) / len(verdicts)}, details

    def passes(self, program: str, test: str) -> bool:
        """Whether `program` followed by `test` runs to its end within lm-eval's time limit."""
        from bench.sandbox import run_program

        self.programs_run += 1
        verdict = run_program(f"{program}\n{test}", timeout_s=PROGRAM_TIMEOUT_S)
        if self.on_program is not None:
            self.on_program()
        return verdict.passed


# One for the process: lm-eval keeps the metric it was given at a task's first load.
CODE_EVAL = CodeEval()


def version() -> str:
    """As records name it: "lm-eval 0.4.13"."""
    return f"lm-eval {importlib.metadata.version('lm-eval')}"


def collect(task: str, rows: Sequence[Row]) -> list[tuple[str, tuple[str, ...]]]:
    """lm-eval's prompt and stop strings for each row, in the order of the rows."""
    requests: list[tuple[str, tuple[str, ...]]] = []

    def answer(request: Any) -> str:
        prompt, settings = request.args
        until = settings["until"]
        requests.append((prompt, (until,) if isinstance(until, str) else tuple(until)))
        return ""

    _evaluate(task, rows, answer, predict_only=True)
    return requests


def score(
    task: str, rows: Sequence[Row], prompts: Sequence[str], texts: Sequence[str]
) -> dict[str, list[float]]:
    """lm-eval's verdicts on `texts`, one per row: {"metric,filter": values in row order}."""
    queue = iter(zip(prompts, texts, strict=True))

    def answer(request: Any) -> str:
        prompt, text = next(queue)
        if request.args[0] != prompt:  # rows and texts would be paired wrongly from here on
            raise RuntimeError(f"{task}: lm-eval asked for another prompt than the one generated")
        return text

    before = CODE_EVAL.programs_run
    samples = _evaluate(task, rows, answer, predict_only=False)
    if FOLDERS[task] != "gsm8k" and CODE_EVAL.programs_run - before < len(rows):
        raise RuntimeError(f"{task}: lm-eval graded programs without our sandbox")
    values: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(float(sample[metric]))
    return values


def samples(task: str, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, Any]]:
    """lm-eval's own sample dicts of `texts`, filtered but not graded: one per row and filter."""
    queue = iter(texts)
    return _evaluate(task, rows, lambda _: next(queue), predict_only=True)


def describe(task: str, row: Row) -> tuple[dict[str, Any], Any]:
    """lm-eval's configuration of a task and its version; `row` is any document of it."""
    with our_code_eval(), _quiet():
        loaded = task_manager(task).load(specs(task, [row]))["tasks"][task]
    config = loaded.dump_config()
    config.pop("custom_dataset", None)
    # The rest of lm-eval's path says which file it was; the folder before it is this machine's.
    source = str(config.get("metadata", {}).pop("config_source", ""))
    return {**config, "config_source": source.rpartition("lm_eval/tasks/")[2]}, loaded.VERSION


@contextlib.contextmanager
def our_code_eval() -> Iterator[None]:
    """Answers `evaluate.load("code_eval")` with our scorer; other names go to the library."""
    import evaluate

    original = evaluate.load

    def load(path: str, *args: object, **kwargs: object) -> object:
        return CODE_EVAL if path == "code_eval" else original(path, *args, **kwargs)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original


def specs(task: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """lm-eval's registered task with its data replaced by `rows` (test split) and nothing else.

    The keys override the registered task only inside a group; alone they would be a new task.
    """
    import datasets

    def from_memory(**_: object) -> Any:
        return datasets.DatasetDict(test=datasets.Dataset.from_list([dict(row) for row in rows]))

    return [{"group": "suite", "task": [{"task": task, "custom_dataset": from_memory}]}]


def task_manager(task: str) -> Any:
    """lm-eval's TaskManager over the one folder of its own tasks that is needed."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / FOLDERS[task]
    return TaskManager(include_path=str(folder), include_defaults=False)


def _evaluate(
    task: str, rows: Sequence[Row], answer: Callable[[Any], str], *, predict_only: bool
) -> list[dict[str, Any]]:
    import lm_eval
    from lm_eval.api.model import LM

    class Answers(LM):
        def generate_until(self, requests: list[Any], **_: object) -> list[str]:
            return [answer(request) for request in requests]

        def loglikelihood(self, requests: list[Any], **_: object) -> list[tuple[float, bool]]:
            raise NotImplementedError("the tasks of this suite only generate")

        def loglikelihood_rolling(self, requests: list[Any], **_: object) -> list[float]:
            raise NotImplementedError("the tasks of this suite only generate")

    # `evaluate`, not `simple_evaluate`: that one seeds the global generators, runs pip to describe
    # the machine (seconds) and answers None on every torchrun rank but the first.
    with our_code_eval(), _templates_compiled_once(), _quiet():
        loaded = task_manager(task).load(specs(task, rows))
        loaded["tasks"][task].set_fewshot_seed(FEWSHOT_SEED)
        if predict_only:
            loaded["tasks"][task].override_metric("bypass")
        results = lm_eval.evaluate(
            Answers(),
            loaded,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=True,  # they run in our sandbox
        )
    return results["samples"][task]


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles each template again for every document and shot: most of its time.

    The same templates give the same text; the prompt hashes in library_task.py watch over it.
    """
    from lm_eval import utils

    utils.env.from_string = functools.lru_cache(maxsize=None)(utils.env.from_string)
    try:
        yield
    finally:
        del utils.env.from_string  # the class's own method again


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's progress bars and notices off the terminal; errors are still raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
