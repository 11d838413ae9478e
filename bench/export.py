"""A record in the result files of lm-eval and evalplus, so that other people's tools read it.

lm-eval: per decoder a folder named after weights and decoder, with `results_<date>.json` and
`samples_<task>_<date>.jsonl`. evalplus: per decoder and data set `samples.jsonl` and, where the
record holds evalplus' verdicts, `samples_eval_results.json`. Nothing is graded again: values are
the record's, prompts and filters the library's. Only the first repeat, only base-style prompts,
only complete generations; the data must be here, since the files repeat prompts and answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.records import ScoreRecord
from bench.store import RunRecord, read_record, write_whole
from tidar_ref.errors import UserError

FORMATS = ("lm-eval", "evalplus")
# Our task -> evalplus' data set and the prefix of its metrics in our scores.
EVALPLUS = {"humaneval": ("humaneval", "evalplus"), "mbpp_plus": ("mbpp", "evalplus_mbpp")}


def export(
    folder: Path, form: str, out: Path, *, data_dir: Path | None = None
) -> list[Path]:
    """Write a record's files in `form` under `out`; gives them in order.

    UserError: unknown format, no record, chat prompts, no task the library knows, data missing or
    with other prompts than the record's, `out` not writable or already holding one of the files.
    """
    if form not in FORMATS:
        raise UserError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
    record = read_record(folder)
    if record.header.profile.get("style", "base") != "base":
        raise UserError(f"{record.name} was asked in chat style, which {form} has no prompts for")
    if record.header.profile["stopping"] == "fixed":
        raise UserError(f"{record.name} ran past the answers' ends (fixed length): not gradable")
    write = _lm_eval_files if form == "lm-eval" else _evalplus_files
    files = write(record, data_dir)
    taken = [out / name for name in files if (out / name).exists()]
    if taken:
        raise UserError(f"{taken[0]} already exists; name another folder with --out")
    for name, text in files.items():
        try:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}; change --out") from error
        write_whole(out / name, text)
    return [out / name for name in files]


def model_name(record: RunRecord, decoder: str) -> str:
    """Weights and decoder as one name that is safe in a path (lm-eval's own replacement rule)."""
    name = f"{record.header.weights['name']}-{decoder}"
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name)


def _texts(record: RunRecord, task: str, decoder: str) -> dict[str, str]:
    return {
        row.problem: row.text
        for row in record.measurements
        if (row.task, row.decoder, row.repeat) == (task, decoder, 0)
    }


def _task(record: RunRecord, name: str, data_dir: Path | None) -> Any:
    """The task with its prompts asked for, checked against the record's."""
    from bench.tasks import load_task

    task = load_task(name, data_dir=data_dir)
    prompts = {problem.id: problem.prompt_sha for problem in task.problems(_reach(record, name))}
    for row in record.measurements:
        if row.task == name and prompts.get(row.problem) != row.prompt_sha:
            raise UserError(
                f"{row.problem} was asked with another prompt in {record.name} than the data "
                "here gives; use the data and versions named in its header"
            )
    return task


def _reach(record: RunRecord, name: str) -> int:
    """A record holds the first problems of a task: as many as it names."""
    return len(record.header.problems[name])


def _score(
    record: RunRecord, task: str, decoder: str, metric: str, variant: str
) -> ScoreRecord | None:
    for score in record.scores:
        key = (score.task, score.decoder, score.repeat, score.metric, score.variant)
        if key == (task, decoder, 0, metric, variant):
            return score
    return None


# --- lm-eval -----------------------------------------------------------------------------------


def _lm_eval_files(record: RunRecord, data_dir: Path | None) -> dict[str, str]:
    from bench.tasks import _lm_eval

    known = [name for name in record.header.problems if name in _lm_eval.FOLDERS]
    if not known:
        raise UserError(
            f"lm-eval has no task of {record.name} ({', '.join(record.header.problems)}); "
            f"its tasks here are {', '.join(_lm_eval.FOLDERS)}"
        )
    tasks = {name: _task(record, name, data_dir) for name in known}
    date = record.header.created.replace(":", "-")
    files: dict[str, str] = {}
    for decoder in record.header.decoders:
        folder = model_name(record, decoder)
        samples = {
            name: found
            for name, task in tasks.items()
            if (found := _samples(record, task, decoder))
        }
        if not samples:
            continue
        whole = _results(record, decoder, tasks, samples)
        files[f"{folder}/results_{date}.json"] = _dump(whole, indent=2) + "\n"
        for name, rows in samples.items():
            text = "".join(_dump(_plain(row)) + "\n" for row in rows)
            files[f"{folder}/samples_{name}_{date}.jsonl"] = text
    return files


def _samples(record: RunRecord, task: Any, decoder: str) -> list[dict[str, Any]]:
    """lm-eval's sample dicts with the record's values in them, in the data set's order."""
    from bench.tasks import _lm_eval

    texts = _texts(record, task.name, decoder)
    order = [id for id in task.rows() if id in texts]
    place = {id: index for index, id in enumerate(task.rows())}
    rows = [task.rows()[id] for id in order]
    if not rows:
        return []
    made = _lm_eval.samples(task.name, rows, [task.completion(id, texts[id]) for id in order])
    for sample in made:
        id = order[sample["doc_id"]]
        sample["doc_id"] = place[id]
        sample.pop("bypass", None)
        sample["metrics"] = []
        for score in _library_scores(record, task.name, decoder):
            metric, _, chosen = score.metric.partition(",")
            if chosen == sample["filter"] and id in score.per_problem:
                sample["metrics"].append(metric)
                sample[metric] = score.per_problem[id]
    return sorted(made, key=lambda sample: (sample["filter"], sample["doc_id"]))


def _library_scores(record: RunRecord, task: str, decoder: str) -> list[ScoreRecord]:
    """lm-eval's own metrics of the raw texts: their names carry a filter behind a comma."""
    return [
        score
        for score in record.scores
        if (score.task, score.decoder, score.repeat, score.variant) == (task, decoder, 0, "raw")
        and "," in score.metric
        and score.harness.startswith("lm-eval")
    ]


def _results(
    record: RunRecord,
    decoder: str,
    tasks: Mapping[str, Any],
    samples: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    from bench.tasks import _lm_eval

    header = record.header
    results: dict[str, dict[str, Any]] = {}
    better: dict[str, dict[str, bool]] = {}
    configs: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name in samples:
        first = next(iter(tasks[name].rows().values()))  # lm-eval wants a document to look at
        configs[name], versions[name] = _lm_eval.describe(name, first)
        results[name], better[name] = {"alias": name}, {}
        ids = _texts(record, name, decoder)
        sizes[name] = {"original": len(tasks[name].rows()), "effective": len(ids)}
        for score in _library_scores(record, name, decoder):
            metric, _, chosen = score.metric.partition(",")
            values = list(score.per_problem.values())
            results[name][score.metric] = fmean(values)
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
            results[name][f"{metric}_stderr,{chosen}"] = error
            better[name][metric] = True
    hashes = {
        name: _sha("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in rows))
        for name, rows in samples.items()
    }
    versions_used = header.environment.get("versions", {})
    return {
        "results": results,
        "group_subtasks": {name: [] for name in samples},
        "configs": configs,
        "versions": versions,
        "n-shot": {name: header.data[name]["shots"] for name in samples},
        "higher_is_better": better,
        "n-samples": sizes,
        "config": {
            "model": "tidar-bench",
            "model_args": f"pretrained={header.weights['name']},decoder={decoder}",
            "model_num_parameters": header.weights.get("parameters"),
            "model_dtype": header.dtype,
            "batch_size": 1,
            "device": header.device,
            "limit": None,
            "bootstrap_iters": 0,
            "gen_kwargs": {"max_gen_toks": header.profile["max_new_tokens"]},
            "random_seed": header.seed,
        },
        "git_hash": header.commit,
        "date": datetime.fromisoformat(header.created).timestamp(),
        "transformers_version": versions_used.get("transformers"),
        "lm_eval_version": versions_used.get("lm-eval"),
        "task_hashes": hashes,
        "model_source": "tidar-bench",
        "model_name": f"{header.weights['name']}-{decoder}",
        "model_name_sanitized": model_name(record, decoder),
        "tidar_bench": {
            "record": record.name,
            "left_out": [name for name in header.problems if name not in samples],
        },
    }


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as lm-eval writes it: arguments by name, texts as strings."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
        for i, argument in enumerate(sample["arguments"])
    }
    return {
        **sample,
        "resps": _strings(sample["resps"]),
        "filtered_resps": _strings(sample["filtered_resps"]),
        "arguments": arguments,
        "target": str(sample["target"]),
    }


def _strings(value: Any) -> Any:
    return [_strings(part) for part in value] if isinstance(value, list | tuple) else str(value)


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- evalplus ----------------------------------------------------------------------------------


def _evalplus_files(record: RunRecord, data_dir: Path | None) -> dict[str, str]:
    known = [name for name in record.header.problems if name in EVALPLUS]
    if not known:
        raise UserError(
            f"evalplus has no data set of {record.name} ({', '.join(record.header.problems)}); "
            f"it grades {', '.join(EVALPLUS)}"
        )
    files: dict[str, str] = {}
    for name in known:
        task = _task(record, name, data_dir)
        entry_points = _entry_points(task, name, data_dir)
        for decoder in record.header.decoders:
            texts = _texts(record, name, decoder)
            if not texts:
                continue
            programs = {
                id: _program(task, name, id, text, entry_points[id]) for id, text in texts.items()
            }
            stem = f"{model_name(record, decoder)}/{EVALPLUS[name][0]}/samples"
            files[f"{stem}.jsonl"] = "".join(
                _dump({"task_id": id, "solution": program}) + "\n"
                for id, program in programs.items()
            )
            verdicts = _evalplus_results(record, name, decoder, programs)
            if verdicts:
                files[f"{stem}_eval_results.json"] = _dump(verdicts) + "\n"
    return files


def _entry_points(task: Any, name: str, data_dir: Path | None) -> dict[str, str]:
    from bench.tasks import data, plus

    if name == "humaneval":
        return {id: row["entry_point"] for id, row in task.rows().items()}
    file = data.evalplus_file("mbpp", data_dir)
    if file is None:
        raise UserError(
            f"MBPP+ programs need {data.EVALPLUS_FILES['mbpp']}; name its folder with --data-dir"
        )
    return plus.entry_points(file)


def _program(task: Any, name: str, id: str, text: str, entry_point: str) -> str:
    """The sanitised program that was graded."""
    from bench.tasks import plus

    prompt = task.rows()[id]["prompt"] if name == "humaneval" else ""
    return plus.sanitised(prompt, task.completion(id, text), entry_point)


def _evalplus_results(
    record: RunRecord, name: str, decoder: str, programs: Mapping[str, str]
) -> dict[str, Any] | None:
    """evalplus' result object from the record's verdicts; None if it holds none.

    A program that fails the base tests is written as failing plus too, as evalplus counts it.
    """
    prefix = EVALPLUS[name][1]
    base, extra = (
        _score(record, name, decoder, f"{prefix}_{part}", "sanitised") for part in ("base", "plus")
    )
    if base is None or extra is None:
        return None

    def status(score: ScoreRecord, id: str) -> str:
        return "pass" if score.per_problem[id] == 1 else "fail"

    made = {
        id: [
            {
                "task_id": id,
                "solution": program,
                "base_status": status(base, id),
                "plus_status": status(extra, id),
                "base_fail_tests": [],
                "plus_fail_tests": [],
            }
        ]
        for id, program in programs.items()
    }
    created = datetime.fromisoformat(record.header.created)
    return {"date": created.strftime("%Y-%m-%d %H:%M"), "hash": None, "eval": made}
