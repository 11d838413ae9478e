"""Docs keep up with the code: every verb, decoder, task, profile and metric is mentioned."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


ALL = "\n".join(page(name) for name in PAGES)


def module(name: str) -> ModuleType:
    """The module, or a skip where its file does not exist yet; a broken import still fails."""
    if not (ROOT / Path(*name.split(".")).with_suffix(".py")).is_file() and not (
        ROOT / Path(*name.split(".")) / "__init__.py"
    ).is_file():
        pytest.skip(f"{name} does not exist yet")
    return importlib.import_module(name)


def unmentioned(names: list[str] | tuple[str, ...], text: str = ALL) -> list[str]:
    return [n for n in names if not re.search(rf"(?<![\w]){re.escape(n)}(?![\w])", text)]


def verbs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs `--help` lists."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        module("bench.cli").main(["--help"])
    assert exit_info.value.code == 0
    listed = re.search(r"\{([\w,-]+)\}", capsys.readouterr().out)
    assert listed, "the help names no verbs"
    return listed[1].split(",")


def test_every_verb_is_documented(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = verbs(capsys, monkeypatch)
    assert {"run", "reproduce", "doctor"} <= set(names)
    assert not [n for n in names if f"`{n}`" not in ALL and f"bench {n}" not in ALL]


def test_every_verb_of_the_docs_and_the_makefile_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set(verbs(capsys, monkeypatch))
    used = set(re.findall(r"-m bench ([a-z]+)", ALL + (ROOT / "Makefile").read_text()))
    assert used and used <= names


def test_every_decoder_is_documented() -> None:
    names = module("bench.registry").decoder_names()
    assert not [n for n in names if f"`{n}`" not in page("README.md")]


def test_every_task_is_documented() -> None:
    tasks = module("bench.tasks").TASKS
    assert not unmentioned(tasks, page("README.md"))
    assert not unmentioned(tasks, page("docs/metrics.md"))


def test_every_profile_is_documented() -> None:
    assert not unmentioned(list(module("bench.profiles").PROFILES), page("docs/reproduce.md"))


def test_every_ledger_field_and_sampling_mode_is_defined() -> None:
    pytest.importorskip("torch")
    decoding, sampling = module("tidar_ref.decoding"), module("tidar_ref.sampling")
    fields = [field.name for field in dataclasses.fields(decoding.StepTrace)]
    assert not unmentioned(fields, page("docs/metrics.md"))
    assert not [m for m in sampling.MODES if f"`{m}`" not in page("docs/method.md")]


def test_every_record_file_is_documented() -> None:
    store = module("bench.store")
    names = [store.HEADER, store.MEASUREMENTS, store.STEPS, store.SCORES, store.SESSIONS]
    assert not unmentioned(names, page("docs/reproduce.md"))


def test_every_data_file_is_documented() -> None:
    assert not unmentioned(list(module("bench.tasks.data").PINNED), page("docs/reproduce.md"))


@pytest.mark.parametrize("name", PAGES)
def test_links_point_at_files(name: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page(name)):
        if "://" not in target:
            path = (ROOT / name).parent / target
            assert path.exists(), f"{name}: {target}"


def test_every_make_target_of_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", ALL, re.MULTILINE))
    assert {"reproduce", "test"} <= used <= targets


def test_the_readme_holds_one_pair_of_result_markers() -> None:
    text = page("README.md")
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)
    # Claim, commands and table come first.
    assert text[: text.index(begin)].count("\n") < 40


def test_the_readme_table_is_the_cited_records_table() -> None:
    """Each table row between the markers stands, as it is, in the tables of the record it links."""
    block = page("README.md").split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    rows = [line for line in block.splitlines() if line.startswith("|")]
    cited = sorted(set(re.findall(r"results/records/([\w.-]+)", block)))
    assert bool(rows) == bool(cited), "a table needs the record it comes from, and the reverse"
    if not cited:
        pytest.skip("README cites no record yet")
    tables, store = module("bench.tables"), module("bench.store")
    made = "\n".join(
        tables.to_markdown(store.read_record(ROOT / "results" / "records" / name)) for name in cited
    ).splitlines()
    assert not [row for row in rows if row not in made]


def test_the_mentioned_check_sees_a_gap() -> None:
    assert unmentioned(["nosuchdecoder"]) == ["nosuchdecoder"]
