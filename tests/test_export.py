"""Exports: read back by the libraries' own code, values and programs those of the record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_records import header, row

from bench import cli, export
from bench.claims_ours import committed_records
from bench.store import RunStore, read_record
from tidar_ref.errors import UserError

Cut = Callable[[str, int], Path]


@pytest.fixture
def cut(tmp_path: Path) -> Cut:
    """A committed record cut down to one task, its first problems and two decoders."""
    source = next(path for path in committed_records() if "embedded_0457ba4" in path.name)

    def make(task: str, problems: int) -> Path:
        folder = tmp_path / "record"
        shutil.copytree(source, folder)
        whole = json.loads((folder / "header.json").read_text())
        ids = whole["problems"][task][:problems]
        decoders = list(whole["decoders"])[:2]
        whole["problems"] = {task: ids}
        whole["decoders"] = {name: whole["decoders"][name] for name in decoders}
        (folder / "header.json").write_text(json.dumps(whole))
        for name in ("measurements.jsonl", "scores.jsonl"):
            lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            kept = [
                line for line in lines
                if line["task"] == task and line["decoder"] in decoders
                and line.get("problem", ids[0]) in ids
            ]  # fmt: skip
            for line in kept:
                if "per_problem" in line:
                    line["per_problem"] = {id: line["per_problem"][id] for id in ids}
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in kept))
        return folder

    return make


def set_scores(folder: Path, metric: str, values: dict[str, float]) -> None:
    """Other values for one metric, so that an export that invents zeros is caught."""
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for line in lines:
        if line["metric"] == metric:
            line["per_problem"] = values
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def by_suffix(files: list[Path], ending: str) -> list[Path]:
    return [path for path in files if path.name.endswith(ending)]


def test_lm_eval_reads_what_we_write(cut: Cut, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import utils
    from lm_eval.loggers import EvaluationTracker

    folder = cut("gsm8k_cot", 3)
    ids = read_record(folder).header.problems["gsm8k_cot"]
    set_scores(folder, "exact_match,strict-match", dict(zip(ids, (1.0, 0.0, 1.0), strict=True)))
    files = export.export(folder, "lm-eval", tmp_path / "out", data_dir=shared_data)
    names = [str(path) for path in files]
    assert len(utils.get_results_filenames(names)) == 2
    assert len(utils.get_sample_results_filenames(names)) == 2
    results = json.loads(files[0].read_text())
    assert utils.sanitize_model_name(results["model_name"]) == files[0].parent.name
    table = utils.make_table(results)
    assert "|gsm8k_cot|" in table and "strict-match" in table and "0.6667" in table
    samples = [json.loads(line) for line in by_suffix(files, ".jsonl")[0].read_text().splitlines()]
    assert utils.get_file_task_name(by_suffix(files, ".jsonl")[0].name) == "gsm8k_cot"
    strict = [sample for sample in samples if sample["filter"] == "strict-match"]
    assert [sample["exact_match"] for sample in strict] == [1.0, 0.0, 1.0]
    assert [sample["doc_id"] for sample in strict] == [0, 1, 2] and len(samples) == 6
    texts = {m.problem: m.text for m in read_record(folder).measurements if m.decoder == "ar"}
    for sample, id in zip(strict, ids, strict=True):
        assert texts[id].startswith(sample["resps"][0][0])
        assert sample["doc"]["question"] in sample["arguments"]["gen_args_0"]["arg_0"]
    _same_as_the_library_writes(EvaluationTracker, samples, tmp_path)


def _same_as_the_library_writes(tracker_class: Any, samples: list[dict], tmp_path: Path) -> None:
    """lm-eval's own writer, given our samples in its inner form, writes the same lines."""
    tracker = tracker_class(output_path=str(tmp_path / "library"))
    tracker.general_config_tracker.model_name_sanitized = "m"
    tracker.date_id = "d"
    inner = [
        {**sample, "arguments": [tuple(sample["arguments"]["gen_args_0"].values())]}
        for sample in samples
    ]
    tracker.save_results_samples("gsm8k_cot", inner)
    (written,) = (tmp_path / "library").rglob("samples_gsm8k_cot_d.jsonl")
    assert [json.loads(line) for line in written.read_text().splitlines()] == samples


def test_evalplus_reads_what_we_write(
    cut: Cut, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("evalplus")
    from evalplus.data import load_solutions
    from evalplus.evaluate import evaluate

    folder = cut("humaneval", 2)
    ids = read_record(folder).header.problems["humaneval"]
    set_scores(folder, "evalplus_base", {ids[0]: 1.0, ids[1]: 1.0})
    set_scores(folder, "evalplus_plus", {ids[0]: 1.0, ids[1]: 0.0})
    lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    for line in lines:
        line["text"] = "    return 7 > 6\n\nprint(has_close_elements)\n"
    (folder / "measurements.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    files = export.export(folder, "evalplus", tmp_path / "out", data_dir=shared_data)
    assert [path.name for path in files] == ["samples.jsonl", "samples_eval_results.json"] * 2
    solutions = list(load_solutions(str(files[0])))
    assert [solution["task_id"] for solution in solutions] == list(ids)
    for solution in solutions:  # a whole program, cut at the stop string "print"
        assert "def " in solution["solution"] and "return 7 > 6" in solution["solution"]
        assert "print(" not in solution["solution"]
    capsys.readouterr()
    evaluate(dataset="humaneval", samples=str(files[0]))  # finds our results and only sums them up
    page = capsys.readouterr().out
    assert "Load from previous results" in page and "1.000" in page and "0.500" in page


def test_without_verdicts_only_samples_are_written(
    cut: Cut, shared_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("evalplus")
    folder = cut("humaneval", 1)
    (folder / "scores.jsonl").write_text("")
    files = export.export(folder, "evalplus", tmp_path / "out", data_dir=shared_data)
    assert {path.name for path in files} == {"samples.jsonl"}


def test_other_prompts_are_refused(cut: Cut, shared_data: Path, tmp_path: Path) -> None:
    folder = cut("humaneval", 1)
    file = folder / "measurements.jsonl"
    file.write_text(file.read_text().replace('"prompt_sha": "', '"prompt_sha": "x'))
    with pytest.raises(UserError, match="another prompt"):
        export.export(folder, "evalplus", tmp_path / "out", data_dir=shared_data)
    assert not (tmp_path / "out").exists()


def made(folder: Path, **changes: Any) -> Path:
    profile = {**header().profile, **changes}
    run = RunStore.create(folder, header(profile=profile))
    run.append(row(), [])
    run.close()
    return folder


def test_what_cannot_be_exported_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = made(tmp_path / "own")
    for form, message in (("lm-eval", "lm-eval has no task"), ("evalplus", "no data set")):
        words = ["export", str(own), "--format", form, "--out", str(tmp_path / "o")]
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="chat"):
        export.export(made(tmp_path / "chat", style="chat"), "lm-eval", tmp_path / "o")
    with pytest.raises(UserError, match="fixed length"):
        export.export(made(tmp_path / "fixed", stopping="fixed"), "lm-eval", tmp_path / "o")
    with pytest.raises(UserError, match="unknown format"):
        export.export(own, "csv", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_an_export_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_lm_eval_files", lambda record, data_dir: {"a/b.json": "1\n"})
    own = made(tmp_path / "own")
    assert export.export(own, "lm-eval", tmp_path / "o") == [tmp_path / "o" / "a" / "b.json"]
    with pytest.raises(UserError, match="already exists"):
        export.export(own, "lm-eval", tmp_path / "o")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="change --out"):
        export.export(own, "lm-eval", tmp_path / "file")
