"""The report: what stands on it and what must not, the player's data, and the page in a browser."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_records import header, row
from report_browser import Page, find_chromium

from bench import figures
from bench.claims_ours import committed_records
from bench.cli import main
from bench.records import Measurement, ScoreRecord, StepRecord, ids_sha
from bench.report import markup, plots
from bench.report.build import build, twin, write_report
from bench.report.miniature import miniature, system_name
from bench.report.paper import paper_figure
from bench.report.player import (
    embedded,
    examples,
    first_shown,
    player_data,
    spell,
    story,
)
from bench.report.source import Source
from bench.store import RunStore, read_record, read_steps, read_vocabulary
from bench.training_cost import LAUNCH
from tidar_ref.errors import UserError

DENSE = "tidar:block_len=4,beta=1"

DECODERS = {
    "ar": {"name": "ar", "params": {}, "lossless": True},
    DENSE: {"name": "tidar", "params": {"block_len": 4, "beta": 1.0}, "lossless": True},
}
# A hostile text: what would end a script element, or be markup, must reach the page as text.
WORDS = (
    "def add ( a , b ) : \n return a + b </script> <b> & the sum of two numbers is what we want "
    "`back` | bar ✓ so we return it and then we are done"
).split(" ")
PIECES = {token: (" " + word if token else word) for token, word in enumerate(WORDS)}


def ledger(key: tuple[str, str, str, int], *, drafting: bool, seed: int) -> list[StepRecord]:
    """A made-up decode of WORDS: drafts of three tokens, each right with probability 0.6."""
    draw = random.Random(seed)
    steps: list[StepRecord] = []
    place = 0
    while place < len(WORDS):
        accepted = 0
        if steps and drafting:
            while accepted < 3 and place + accepted + 1 < len(WORDS) and draw.random() < 0.6:
                accepted += 1
        committed = tuple(range(place, place + accepted + 1))
        wrong = tuple(draw.randrange(len(WORDS)) for _ in range(3 - accepted))
        on = bool(steps) and drafting
        steps.append(
            StepRecord(
                decoder=key[0],
                task=key[1],
                problem=key[2],
                repeat=key[3],
                index=len(steps),
                committed=committed,
                target_forwards=1,
                draft_forwards=0,
                query_width=20 if on else 1,
                kv_len=7 + place,
                drafted=3 if on else 0,
                accepted=accepted,
                step_s=None,
                forward_s=None,
                draft_tokens=(*committed[:-1], *wrong) if on else None,
            )
        )
        place += accepted + 1
    return steps


def summary(key: tuple[str, str, str, int], steps: list[StepRecord], step_s: float) -> Measurement:
    """The measurement of a made-up decode."""
    counts = [len(step.committed) for step in steps[1:]]
    drafted = [step.drafted for step in steps[1:]]
    width = max(drafted, default=0)
    return row(
        decoder=key[0],
        task=key[1],
        problem=key[2],
        repeat=key[3],
        output_tokens=len(WORDS),
        tokens_generated=len(WORDS),
        decode_forwards=len(counts),
        drafted=sum(drafted),
        accepted=sum(step.accepted for step in steps[1:]),
        acceptance_histogram=tuple(counts.count(r) for r in range(max(counts) + 1)),
        drafted_at=tuple(len(counts) for _ in range(width)),
        accepted_at=tuple(sum(s.accepted > i for s in steps[1:]) for i in range(width)),
        decode_s=step_s * len(counts),
        text=" ".join(WORDS),
        token_ids_sha=ids_sha(range(len(WORDS))),
        finish="eos",
    )


def made(folder: Path, *, tier: str = "embedded", vocabulary: bool = True, **changes: Any) -> Path:
    """A finished record of made-up decodes on disk."""
    weights = {"tier": tier, "name": f"{tier}-weights", "sha256": "s", "parameters": 10}
    head = header(decoders=DECODERS, weights=weights, **changes)
    store = RunStore.create(folder, head)
    for label, facts in head.decoders.items():
        for number, problem in enumerate(head.problems["t"]):
            key = (label, "t", problem, 0)
            steps = ledger(key, drafting=facts["name"] != "ar", seed=number)
            store.append(summary(key, steps, 0.02 if facts["name"] == "ar" else 0.03), steps)
    store.write_scores(
        ScoreRecord(
            decoder=label,
            task="t",
            repeat=0,
            metric="pass@1",
            variant="raw",
            harness="ours",
            headline=True,
            per_problem={"1": 1.0, "2": 0.0},
        )
        for label in head.decoders
        if tier != "random"
    )
    if vocabulary:
        store.write_vocabulary(PIECES)
    store.close()
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("records") / "made_record")


def lean(folder: Path) -> list[markup.Section]:
    """The sections of one record, without the seconds that the paper's figures take."""
    return build([Source(folder=folder, record=read_record(folder))], paper_figures=False)


@pytest.fixture(scope="module")
def report(record: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """(page, twin, HTML path) of a made-up embedded record and a random one."""
    other = made(tmp_path_factory.mktemp("more") / "random_record", tier="random")
    html, markdown = write_report([record, other], tmp_path_factory.mktemp("report"))
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8"), html


class Seen(HTMLParser):
    """Ids, link targets, headings, loaded things and table parts of a page."""

    VOID = {"meta", "link", "input", "br", "img", "wbr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.levels: list[int] = []
        self.tags: list[str] = []
        self.tables: list[dict[str, int]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        elif "href" in values or "src" in values:
            self.loads.append(values.get("href") or values["src"])
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "table":
            self.tables.append({"caption": 0, "th": 0, "scoped": 0})
        elif tag in ("caption", "th") and self.tables:
            self.tables[-1][tag] += 1
            self.tables[-1]["scoped"] += "scope" in values
        if tag == "img":
            assert values.get("alt")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"stray </{tag}>"


# --- the ledger ---------------------------------------------------------------------------------


def test_tidar_tells_its_drafts() -> None:
    """The drafts told are those verified: as many as counted, the accepted first, then no match."""
    import tiny
    import torch

    from tidar_ref import tidar
    from tidar_ref.decoding import generate

    torch.set_num_threads(1)
    model = tiny.random_tiny("qwen2")
    seen = set()
    for params in ({}, {"outcomes": "1-3"}):
        decoder = tidar.build(model.model, mask_token_id=tiny.MASK, block_len=4, **params)
        for prompt in tiny.prompts(6, seed=3):
            [trace] = generate(decoder, [prompt], max_new_tokens=24)
            for step in trace.steps:
                [drafts], accepted = step.draft_tokens, step.accepted[0]
                assert len(drafts) == step.drafted[0]
                assert drafts[:accepted] == step.committed[0][:accepted]
                if accepted < len(drafts):
                    assert drafts[accepted] != step.committed[0][accepted]
                seen.add((accepted, len(drafts)))
    assert {(0, 3), (3, 3)} <= seen, f"hollow proof: {seen}"


def test_old_step_lines_still_load(record: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("header.json", "measurements.jsonl", "scores.jsonl"):
        (folder / name).write_text((record / name).read_text())
    lines = [json.loads(line) for line in (record / "steps.jsonl").read_text().splitlines()]
    for line in lines:
        del line["draft_tokens"]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert all(step.draft_tokens is None for step in read_steps(folder))
    assert read_vocabulary(folder) == {}
    example = first_shown(examples(folder, read_record(folder)))
    assert example is not None and "ids not recorded" in story(example)
    assert f"#{example.steps[0].committed[0]}" in story(example)


def test_vocabulary_comes_back_and_a_broken_one_is_refused(record: Path, tmp_path: Path) -> None:
    assert read_vocabulary(record) == PIECES
    (tmp_path / "vocabulary.json").write_text('["a"]')
    with pytest.raises(UserError, match="vocabulary.json"):
        read_vocabulary(tmp_path)


def test_committed_records_have_a_report(tmp_path: Path) -> None:
    """A record from before drafts and vocabulary: the page is made, and says what it lacks."""
    folder = Path(__file__).resolve().parents[1] / "results/records/2026-11-22_cpu2_hostshare"
    made_sections = lean(folder)
    text = twin(made_sections, "x")
    assert "ids not recorded" in text and "Not measured: no telemetry" in text


# --- what stands on the page --------------------------------------------------------------------


def test_the_page_is_whole_and_loads_nothing(report: tuple[str, str, Path]) -> None:
    html, _, _ = report
    seen = Seen(html)
    assert len(seen.ids) == len(set(seen.ids))
    assert all(link[1:] in seen.ids for link in seen.links if link.startswith("#"))
    assert all(link.startswith(("#", "https://arxiv.org/")) for link in seen.links)
    assert all(load.startswith("data:") for load in seen.loads)
    assert "@import" not in html and "url(" not in html


def test_the_page_can_be_read_without_eyes(report: tuple[str, str, Path]) -> None:
    html, _, _ = report
    seen = Seen(html)
    assert {"main", "nav", "header", "footer"} <= set(seen.tags)
    assert seen.levels[0] == 1 and seen.levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(seen.levels, seen.levels[1:], strict=False))
    assert seen.tables and all(t["caption"] == 1 and t["th"] == t["scoped"] for t in seen.tables)
    assert 'lang="en"' in html and "prefers-reduced-motion" in html and 'role="img"' in html


def test_random_step_times_stand_apart_from_scores(report: tuple[str, str, Path]) -> None:
    """No table of the random record has a score, T/NFE or speedup; no table holds both records."""
    html, markdown, _ = report
    in_short = markdown.split("## Watch it decode")[0]
    random_part = in_short.split("### random_record")[1]
    assert "| decoder | generations | ms per step |" in random_part
    assert "speedup over ar |" not in random_part
    results = markdown.split("\n## Results")[1].split("\n## ")[0]
    assert "### made_record" in results
    assert "random_record" not in results
    costs = markdown.split("\n## Step costs on random weights")[1].split("\n## Quality")[0]
    rows = [line for line in costs.splitlines() if line.startswith("| t (0-shot)")]
    assert len(rows) == 2
    for line in rows:
        cells = markup.cells(line)
        assert cells[7] and not any(cells[i] for i in (3, 4, 5, 6, 8))
    assert '"tier":"random"' not in html
    figures = markdown.split("\n## Quality against speed")[1].split("\n## ")[0]
    assert "random_record" not in figures


def test_numbers_are_the_records(report: tuple[str, str, Path], record: Path) -> None:
    """Headline numbers against sums taken here from the measurements."""
    _, markdown, _ = report
    rows = [r for r in read_record(record).measurements if r.decoder == DENSE]
    tokens = sum(r.output_tokens - 1 for r in rows)
    forwards = sum(r.decode_forwards for r in rows)
    accepted = 100 * sum(r.accepted for r in rows) / sum(r.drafted for r in rows)
    [line] = [x for x in markdown.splitlines() if re.match(rf"\| {DENSE} \| 2 \| \d", x)][:1]
    assert f"| {tokens / forwards:.2f} | {accepted:.1f} % | 30.0 |" in line
    assert line.endswith("| 2 of 2 |")
    assert "git checkout abcdef0123" in markdown and "python -m bench run\n" in markdown


def test_a_flagged_speedup_gets_no_verdict(tmp_path: Path) -> None:
    """Every output cut by the limit: counts are spoiled, so nothing is called faster or slower."""
    folder = made(tmp_path / "cut")
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    cut = [json.dumps({**json.loads(line), "finish": "length"}) for line in lines]
    (folder / "measurements.jsonl").write_text("\n".join(cut) + "\n")
    before = twin(lean(made(tmp_path / "whole")), "x").split("## Watch")[0]
    after = twin(lean(folder), "x").split("## Watch")[0]
    assert "faster than ar" in before and "not compared" not in before
    assert "faster than ar" not in after and "not compared (eos_never_reached" in after
    assert "(a)" in after and "(a)" not in before


def test_flagged_points_are_drawn_as_such(tmp_path: Path) -> None:
    """Cut outputs spoil scores and speedups, not step times; a resumed record also those."""
    folder = made(tmp_path / "cut")
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    cut = [json.dumps({**json.loads(line), "finish": "length"}) for line in lines]
    (folder / "measurements.jsonl").write_text("\n".join(cut) + "\n")

    def figure_of(name: str) -> markup.Figure:
        [section] = [section for section in lean(folder) if section.id == name]
        [found] = [part for part in section.parts if isinstance(part, markup.Figure)]
        return found

    quality, widths = figure_of("quality"), figure_of("widths")
    assert quality.svg.count(">flagged<") == 2 and ">flagged<" not in widths.svg
    ar, tidar = (line for line in quality.numbers.splitlines() if line.startswith(("| ar", "| ti")))
    assert ar.count("(a)") == 1 and tidar.count("(a)") == 2  # ar stands at 1x by definition
    assert "eos_never_reached" in quality.numbers and "(a)" not in widths.numbers
    (folder / "sessions.jsonl").write_text('{"already_done": 0}\n{"already_done": 1}\n')
    again = figure_of("widths")
    assert again.svg.count(">flagged<") == 1 and "resumed" in again.numbers
    ar, tidar = (line for line in again.numbers.splitlines() if line.startswith(("| ar", "| ti")))
    assert ar.endswith("(a) |  |") and tidar.count("(a)") == 1  # its step in AR steps


def test_the_twin_says_the_same(report: tuple[str, str, Path]) -> None:
    html, markdown, _ = report
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert titles == re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    for word in ("Claims against measurements", "reproduced", "not run"):
        assert word in markdown and word in html


def test_what_records_share_is_said_once(report: tuple[str, str, Path], record: Path) -> None:
    """Environment: shared facts in one table, the rest by record, nothing lost; one record alone
    has no shared table. Records that nobody watched share one sentence."""
    _, markdown, _ = report
    text = markdown.split("\n## Environment")[1].split("\n## ")[0]
    titles = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert titles == ["The same in all records", "made_record", "random_record"]
    shared, mine, other = text.split("### ")[1:]
    assert "| version of torch | 2.13 |" in shared and "weights tier" not in shared
    assert "| weights tier | embedded |" in mine and "| weights tier | random |" in other
    alone = next(section for section in lean(record) if section.id == "environment")
    [whole] = alone.parts
    assert set(re.findall(r"^\| ([\w ]+) \|", whole, re.MULTILINE)) == set(
        re.findall(r"^\| ([\w ]+) \|", shared + mine, re.MULTILINE)
    )
    assert "### made_record, random_record\n\nNot measured: no telemetry" in markdown


def test_claims_are_judged_against_these_records_only(record: Path) -> None:
    from bench.claims import load_claims

    [section] = [s for s in lean(record) if s.id == "claims"]
    assert f"All {len(load_claims())} numbers" in section.parts[0]
    assert "0 have a number of ours beside" in section.parts[0]  # task "t" is nobody's claim


def test_bad_input_is_one_sentence(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = made(tmp_path / "empty")
    (empty / "measurements.jsonl").write_text("")
    file = tmp_path / "file"
    file.write_text("")
    for words in (
        [str(tmp_path)],
        [str(record), str(record)],
        [str(record), str(record), "--out", str(tmp_path / "o")],
        [str(empty)],
        [str(record), "--out", str(file / "below")],
    ):
        assert main(["report", *words]) == 2, words
        assert capsys.readouterr().err.startswith("error: ")


def test_reproduce_ends_with_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["--profile", "smoke", "--tasks", "own_math", "--limit", "1", "--max-new-tokens", "6"]
    assert main(["reproduce", *words, "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"report: {folder / 'report.html'}" in said and f"{folder / 'report.md'}" in said
    assert "Random weights: the text is noise" in (folder / "report.html").read_text()
    steps = list(read_steps(folder))
    told = {token for step in steps for token in (*step.committed, *(step.draft_tokens or ()))}
    assert set(read_vocabulary(folder)) == told
    assert any(step.draft_tokens for step in steps)


def test_the_report_needs_no_torch_and_no_matplotlib_to_start() -> None:
    code = (
        "import sys, bench.report.build as b; "
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the player's data --------------------------------------------------------------------------


def test_player_data_replays_the_ledger(record: Path) -> None:
    shown = examples(record, read_record(record))
    data = json.loads(embedded(player_data(shown)))
    assert len(data["runs"]) == 4
    for run in data["runs"]:
        assert [t for step in run["steps"] for t in step["c"]] == list(range(len(WORDS)))
        for step in run["steps"]:
            assert step["d"] is None or len(step["d"]) == step["n"]
    assert data["runs"][data["first"]]["decoder"] == DENSE
    pieces = data["records"][0]["pieces"]
    assert {int(token): text for token, text in pieces.items()} == PIECES


def test_text_of_a_record_cannot_leave_the_script(report: tuple[str, str, Path]) -> None:
    html, _, _ = report
    assert "</script>" in "".join(PIECES.values())
    block = html.split('id="player-data">')[1].split("</script>")[0]
    assert json.loads(block)["records"][0]["pieces"] and "<" not in block


def test_a_width_record_joins_the_page(record: Path, tmp_path: Path) -> None:
    """Its curve and its tables; alone it is refused, for the page is about runs."""
    slots = pytest.importorskip("bench.slots.commands")
    pytest.importorskip("torch")
    assert slots
    folder = tmp_path / "curve"
    words = ["--weights", "random:tiny", "--widths", "1,4", "--kv", "16", "--rounds", "2"]
    words += ["--samples", "1", "--dtype", "float32", "--no-split", "--decoders", "ar"]
    assert main(["slots", *words, "--out", str(folder)]) == 0
    run = Source(folder=record, record=read_record(record))
    [widths] = [s for s in build([run], curves=[folder], paper_figures=False) if s.id == "widths"]
    text = "\n".join(map(markup.part_markdown, widths.parts))
    measured = [json.loads(line) for line in (folder / "slots.jsonl").read_text().splitlines()]
    assert [point["width"] for point in measured] == [1, 4]
    for point in measured:
        assert f"| 16 | {point['width']} | {1000 * point['median_s']:.2f} |" in text
    assert "Table: steps of decoders" in text and "Tables of curve" in text
    figure = paper_figure("figure1", figures.gather([record, folder]))
    assert "Ours beside it: 1 series, 2 points" in figure.caption
    for point in measured:
        ours = f"(curve) | past KV 16 | {point['width']} | {1000 * point['median_s']:.4g} |"
        assert ours in figure.numbers
    [again] = [s for s in build([run], curves=[folder], paper_figures=False) if s.id == "reproduce"]
    assert any("bench slots --weights random:tiny" in str(part) for part in again.parts)
    with pytest.raises(UserError, match="only width records"):
        write_report([folder], tmp_path)


def test_the_papers_figures_stand_on_the_page(report: tuple[str, str, Path]) -> None:
    """All four, in both forms, and where nothing is ours the page says so in words."""
    html, markdown, _ = report
    for number, lacking in (
        ("1", "holds a width curve"),
        ("4", "holds both a score and a speedup"),
        ("5", "holds both a score and T/NFE"),
        ("6", "holds all five tasks"),
    ):
        said = f"no record of this page {lacking}"
        assert f"**Not measured here:** {said}" in markdown
        assert f"<strong>Not measured here:</strong> {said}" in html
        assert f"The paper's Figure {number}: " in markdown
        assert f'aria-label="Figure {number}"' in html
    assert html.count('<img class="paper"') == 4
    point = "| average_5_tasks | K 16 beta 1 alpha 1.2 masking=full run=3 | 47.5 % | 7.36"
    assert point in markdown.split("The paper's Figure 5")[1].split("The paper's Figure 6")[0]


def test_ours_are_listed_beside_the_papers_points() -> None:
    """The committed record with three decoders on four of the paper's tasks."""
    [folder] = [path for path in committed_records() if "embedded" in path.name]
    ours = figures.gather([folder])
    seen = {(o.task, o.metric, o.label): o.value for o in ours.observed}
    figure = paper_figure("figure5", ours)
    assert "Not measured here" not in figure.caption and "12 points" in figure.caption
    label = "tidar:block_len=4,beta=1"
    x, y = (seen["gsm8k_cot", metric, label] for metric in ("t_per_nfe", "score"))
    assert f"| gsm8k_cot | {x:.4g} | {y:.4g} |" in figure.numbers
    assert "Not measured here" in paper_figure("figure6", ours).caption


def test_random_weights_are_played_without_a_rate(tmp_path: Path) -> None:
    text = twin(lean(made(tmp_path / "noise", tier="random")), "x")
    [player_section] = [s for s in lean(tmp_path / "noise") if s.id == "player"]
    assert "Random weights: the text is noise" in player_section.parts[1].html
    assert "speedup over ar |" not in text and "steps that committed" not in text


def test_subset_steps_name_the_block_that_serves(tmp_path: Path) -> None:
    """Outcome 2 of blocks 1 and 4 is served by block 1; the next draft is then two guesses long."""
    record = read_record(made(tmp_path / "r"))
    label = {"name": "tidar", "params": {"block_len": 4, "outcomes": "1-4"}, "lossless": True}
    head = replace(record.header, decoders={**record.header.decoders, DENSE: label})
    shown = examples(tmp_path / "r", replace(record, header=head))
    runs = [run for run in player_data(shown)["runs"] if run["decoder"] == DENSE]
    served = {len(step["c"]): step["o"] for run in runs for step in run["steps"][1:]}
    assert served[1] == [[1, 4], 0] and served[2] == [[1, 4], 0] and served[4] == [[1, 4], 1]


def test_spelling() -> None:
    assert spell({1: " a\n", 2: "\ufffd", 3: ""}, 1) == "␣a↵"
    assert [spell({2: "\ufffd", 3: ""}, token) for token in (2, 3, 4)] == ["#2", "#3", "#4"]


def test_many_problems_are_cut_and_the_best_is_kept(tmp_path: Path) -> None:
    names = tuple(map(str, range(1, 8)))
    folder = made(tmp_path / "many", problems={"t": names})
    record = read_record(folder)
    drafting = [r for r in record.measurements if r.decoder == DENSE]
    best = max(drafting, key=lambda r: r.accepted / r.drafted).problem
    shown = {example.measurement.problem for example in examples(folder, record)}
    assert len(shown) == 4 and best in shown and {"1", "2", "3"} <= shown


# --- Markdown and drawings ----------------------------------------------------------------------


def test_markdown_becomes_html() -> None:
    text = "# a\n\ntwo\nlines & **b** `x<y` [l](#q)\n\n- i\n- j\n\nTable: c\n\n"
    text += "| h | k |\n| --- | --- |\n| x\\|y | 1.5 |\n\n```\n| no table |\n```"
    html = markup.to_html(text, title="t", level=2)
    assert "<h3>a</h3>" in html and "two lines &amp; <strong>b</strong>" in html
    assert "<code>x&lt;y</code>" in html and '<a href="#q">l</a>' in html
    assert "<ul><li>i</li><li>j</li></ul>" in html and "<caption>c</caption>" in html
    assert '<th scope="row">x|y</th><td class="number">1.5</td>' in html
    assert "| no table |</code></pre>" in html
    assert markup.cells(markup.table(("a",), [("x|y",)]).splitlines()[2]) == ["x|y"]


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (0, 97), (0, 0.003), (3, 3), (-2, 5)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    marks = plots.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 12
    steps = {round(b - a, 9) for a, b in zip(marks, marks[1:], strict=False)}
    assert len(steps) == 1


def test_drawings_stay_inside_and_are_to_scale() -> None:
    one = plots.Point(x=4, y=10, y_range=(5, 20))
    series = [plots.Series(name="a<b", points=[plots.Point(x=1, y=5), one], joined=True)]
    svg = plots.points(series, x="x", y="y", alt="alt", x_log2=True)
    assert "a&lt;b" in svg and 'aria-label="alt"' in svg
    left, right = (float(x) for x in re.findall(r'cx="([\d.]+)"', svg)[1:])
    assert left == pytest.approx(plots.LEFT) and right == pytest.approx(plots.WIDTH - plots.RIGHT)
    svg = plots.bars(["1", "2"], [("a", [25.0, 100.0])], x="x", y="y", alt="alt")
    heights = [float(h) for h in re.findall(r'class="s0 round0 bar".*?height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium found: install one (docs/report.md) or name it in CHROMIUM")
    with Page(program) as opened:
        yield opened


VIEWS = {
    "light": {"width": 1200, "height": 900},
    "dark": {"width": 1200, "height": 900, "dark": True},
    "phone": {"width": 390, "height": 844},
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_in_a_browser(
    tab: Page, report: tuple[str, str, Path], view: str, tmp_path: Path
) -> None:
    from PIL import Image, ImageStat

    tab.look(**VIEWS[view])
    tab.open(report[2])
    assert tab.console == []
    assert not [url for url in tab.requests if not url.startswith(("file:", "data:"))]
    assert len([url for url in tab.requests if url.startswith("file:")]) == 1
    dead = "[...document.links].filter(a => a.hash && !document.querySelector(a.hash)).length"
    assert tab.run("document.links.length") >= 10 and tab.run(dead) == 0
    assert tab.run("document.documentElement.scrollWidth") <= VIEWS[view]["width"]
    for anchor in ("main", "player", "acceptance"):
        tab.run(f"document.documentElement.style.scrollBehavior = 'auto', "
                f"document.getElementById('{anchor}').scrollIntoView()")  # fmt: skip
        with Image.open(tab.picture(tmp_path / f"{view}-{anchor}.png")) as image:
            grey = ImageStat.Stat(image.convert("L"))
        assert grey.stddev[0] > 8, f"{view} {anchor} looks blank"
        assert (grey.mean[0] < 110) == (view == "dark")


def test_the_keyboard_steps_the_player(tab: Page, report: tuple[str, str, Path]) -> None:
    tab.look(width=1200, height=900)
    tab.open(report[2])
    place = "Number(document.getElementById('slider').value)"
    last = tab.run("Number(document.getElementById('slider').max)")
    for _ in range(40):  # by the keyboard alone, as somebody without a mouse would
        tab.press("Tab")
        if tab.run("document.activeElement.id") == "stepper":
            break
    assert tab.run("document.activeElement.id") == "stepper"
    focus = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.run(focus) == "solid"
    assert tab.run(place) == 1
    for key, wanted in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", last),
                        ("ArrowRight", last), ("Home", 0), ("ArrowLeft", 0)):  # fmt: skip
        tab.press(key)
        assert tab.run(place) == wanted, key
    playing = "document.getElementById('play').getAttribute('aria-pressed')"
    tab.press(" ")
    assert tab.run(playing) == "true"
    tab.press(" ")
    assert tab.run(playing) == "false"
    assert tab.console == []


def test_the_player_shows_what_the_ledger_says(
    tab: Page, report: tuple[str, str, Path], record: Path
) -> None:
    """Every step of the opening generation: chips, their marks and the text against the record."""
    tab.look(width=1200, height=900, calm=True)
    tab.open(report[2])
    example = first_shown(examples(record, read_record(record)))
    assert example is not None
    tab.run("document.getElementById('to-start').click()")
    text = ""
    for step in example.steps:
        marks = tab.run("[...document.querySelectorAll('#draft small')].map(n => n.textContent)")
        text += "".join(PIECES[token] for token in step.committed)
        assert tab.run("document.getElementById('text').textContent") == text
        assert sum("accepted" in mark for mark in marks) == step.accepted
        assert sum("rejected" in m for m in marks) == (step.drafted > step.accepted)
        assert sum("dropped" in m for m in marks) == max(0, step.drafted - step.accepted - 1)
        if step.index:
            blocks = "[...document.querySelectorAll('.block')]"
            chosen = f"{blocks}.findIndex(block => block.matches('.chosen'))"
            assert tab.run(chosen) == len(step.committed) - 1
        tab.run("document.getElementById('step-on').click()")
    assert tab.run("document.getElementById('where').textContent") == (
        f"{len(example.steps) - 1} / {len(example.steps) - 1}"
    )
    tab.run("pick = document.getElementById('pick-decoder'), pick.value = 'ar', "
            "pick.dispatchEvent(new Event('change'))")  # fmt: skip
    assert tab.run("document.querySelectorAll('#draft .accepted').length") == 0
    assert tab.run("document.getElementById('slider').max") == str(len(WORDS) - 1)
    assert tab.console == []


# --- the paper's systems in miniature ----------------------------------------------------------

MINIATURE = Path(__file__).parents[1] / "results" / "records" / "2026-11-23_cpu2_miniature"


def test_systems_are_named_and_their_numbers_are_the_records() -> None:
    """Counted again from the record's lines; a stack of adapters sums what it was trained on."""
    found = miniature([Source(folder=MINIATURE, record=read_record(MINIATURE))])
    assert found is not None
    text = "\n\n".join(map(markup.part_markdown, found.parts))
    label = "tidar:weights=smollm2-tidar+smollm2-tidar-more,block_len=4,beta=1"
    rows = [json.loads(line) for line in (MINIATURE / "measurements.jsonl").open()]
    mine = [r for r in rows if r["decoder"] == label and r["task"] == "gsm8k_chain"]
    prefill = [len(mine), sum(r["output_tokens"] for r in mine)]
    ratio = (prefill[1] - prefill[0]) / sum(r["decode_forwards"] for r in mine)
    [line] = [x for x in text.splitlines() if "K=4, trust AR" in x and "smollm2-tidar-more" in x]
    assert line.startswith("| TiDAR, K=4, trust AR, full masks | 300,165 tokens, 585 steps, seed 0")
    assert f"| {ratio:.2f} [" in line
    assert "| AR, untrained | nothing of ours |" in text and "| AR, fine-tuned |" in text
    assert "| Block diffusion, K=4, threshold 0.9 |" in text
    missing = text[text.index("Systems that are missing") :]
    assert "smollm2-tidar-random-mask" in missing and "| smollm2-ar |" not in missing
    assert "| 1.5B, each of K = 4, 8, 16 |" in missing and LAUNCH in missing


def test_systems_of_other_training_have_other_names() -> None:
    notes = {
        "joint": {"recipe": {"objective": {"kind": "tidar", "masking": "random"}}},
        "gate": {"recipe": {"objective": {"kind": "tidar"}}, "placement": "mask"},
    }
    tidar = {"name": "tidar", "params": {"block_len": 8, "beta": 0.0}}
    assert system_name("t", tidar, ["joint"], notes) == "TiDAR, K=8, trust diffusion, random masks"
    tidar["params"]["beta"] = 0.5
    assert system_name("t", tidar, ["gate"], notes) == "TiDAR, K=8, beta 0.5, full masks, gated"
    notes["aligned"] = {"recipe": {"objective": {"kind": "tidar", "random_offset": False}}}
    assert system_name("t", tidar, ["aligned"], notes).endswith("full masks, aligned grid")
    assert system_name("a", {"name": "ar"}, ["joint"], notes) == "AR, the AR half of TiDAR"
    assert system_name("eagle3:depth=3", {"name": "eagle3"}, [], notes) == "eagle3:depth=3"


def test_eighteen_series_are_told_apart() -> None:
    assert len({plots.style(i) + plots.marker(i, 0, 0) for i in range(18)}) == 18


def test_a_record_of_one_system_has_no_miniature(record: Path) -> None:
    assert miniature([Source(folder=record, record=read_record(record))]) is None
