"""The paper's numbers: every printed average recomputes from its cells, so a typing slip shows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from bench.claims import (
    CERTAINTIES,
    COLUMNS,
    FILES,
    KINDS,
    PAPER_DIR,
    UNITS,
    load_claims,
    load_file,
    load_findings,
    load_properties,
)
from bench.paper import TIDAR_1P5B, TIDAR_8B, paper_value, systems
from tidar_ref.errors import UserError

FIVE = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "gsm8k_cot")
SIX = (*FIVE, "minerva_math")
LIKELIHOOD = ("mmlu", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
GROUPS = ("humaneval_average", "mbpp_average", "gsm8k_cot")
# Problems a score is a whole count of: then a typed percentage can be checked digit by digit.
PROBLEMS = {"humaneval": 164, "humaneval_plus": 164, "mbpp": 500, "mbpp_plus": 378}


def by_system(name: str, metric: str) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for claim in load_file(PAPER_DIR / name):
        if claim.metric == metric:
            table[claim.system][claim.task] = claim.value
    return dict(table)


def mean(values: dict[str, float], tasks: tuple[str, ...]) -> float:
    return sum(values[task] for task in tasks) / len(tasks)


def test_row_counts() -> None:
    """Table 2: 14 systems x 7 scores and 3 x 7 T/NFE; Table 3: 13 x 7; Table 4: 11 x 4; Table 5:
    4 x 4 scores and T/NFE; Figure 1: 27 totals, 5 MLP, 12 attention, 2 regions; Figure 4: 60
    scores at most, ...; Figure 5: 119 points of two coordinates; Figure 6: 3 x 6."""
    counts = {name: len(load_file(PAPER_DIR / name)) for name in FILES}
    assert counts == {
        "table2.csv": 14 * 7 + 3 * 7,
        "table3.csv": 13 * 7,
        "table4.csv": 11 * 4,
        "table5.csv": 4 * 4 * 2,
        "table6.csv": 12 + 6,
        "figure1.csv": 27 + 5 + 12 + 2,
        "figure4.csv": 6 * (5 * 2 + 4) + 6 * (3 + 3 + 3) + 4,
        "figure5.csv": (6 * 20 - 1) * 2,
        "figure6.csv": 3 * 6,
        "text.csv": 4,
        "site_bars.csv": 4 * 7,
        "site_traces.csv": 4 * 7 + 16,
        "published_eagle3.csv": 265,
        "published_diffusion.csv": 218,
    }
    others = {"findings.csv", "properties.csv"}
    assert {path.name for path in PAPER_DIR.glob("*.csv")} == set(FILES) | others


def test_no_id_is_given_twice() -> None:
    ids = [claim.id for claim in load_claims()]
    assert len(ids) == len(set(ids))


# Cells are rounded to 0.01, so their mean is known to 0.005 and its print to another 0.005.
@pytest.mark.parametrize(
    ("name", "tasks", "average", "metrics"),
    [
        ("table2.csv", SIX, "average_6_tasks", ("score", "t_per_nfe")),
        ("table3.csv", LIKELIHOOD, "average_6_likelihood", ("score",)),
        ("table5.csv", GROUPS, "average_3_groups", ("score", "t_per_nfe")),
    ],
)
def test_printed_averages_recompute(
    name: str, tasks: tuple[str, ...], average: str, metrics: tuple[str, ...]
) -> None:
    for metric in metrics:
        table = by_system(name, metric)
        assert table
        for system, cells in table.items():
            assert mean(cells, tasks) == pytest.approx(cells[average], abs=0.0101), (name, system)


def test_figure4_averages_recompute() -> None:
    for metric, slack in (("score", 0.11), ("speedup", 0.021), ("t_per_nfe", 0.011)):
        table = by_system("figure4.csv", metric)
        assert table
        for system, cells in table.items():
            assert mean(cells, FIVE) == pytest.approx(cells["average_5_tasks"], abs=slack), system


def test_figure4_has_one_step_cost_per_system() -> None:
    """Speedup over tokens per forward is a constant of each system, so one wrong digit shows."""
    speeds, tokens, costs = (
        by_system("figure4.csv", metric) for metric in ("speedup", "t_per_nfe", "step_ratio")
    )
    assert len(tokens) == 7
    expected = {
        TIDAR_1P5B: 0.641, TIDAR_8B: 0.707, "TiDAR 1.5B K=4 (Figure 4)": 0.603,
        "TiDAR 1.5B K=8 (Figure 4)": 0.597, "EAGLE-3 AngelSlim 8B": 0.634,
        "EAGLE-3 Tengyunw 8B": 0.634, "Block Diff 1.5B threshold 0.8": 0.88,
    }  # fmt: skip
    assert set(expected) == set(tokens)
    for system, cells in tokens.items():
        for task, value in cells.items():
            assert speeds[system][task] / value == pytest.approx(expected[system], abs=0.004)
    assert set(costs) == {system for system in expected if system.startswith("TiDAR")}
    for system, cells in costs.items():
        assert cells[""] == pytest.approx(1 / expected[system], abs=0.006)


def test_figure5_averages_recompute() -> None:
    """Each point's five tasks average to the drawn mean; the hidden MBPP point spoils one run."""
    runs: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for claim in load_file(PAPER_DIR / "figure5.csv"):
        runs[claim.system, claim.setting, claim.metric][claim.task] = claim.value
    assert len(runs) == 2 * 20
    hidden = 0
    for (system, setting, metric), cells in runs.items():
        if "mbpp" not in cells:
            hidden += 1
            continue
        slack = 0.13 if metric == "score" else 0.013
        where = (system, setting, metric)
        assert mean(cells, FIVE) == pytest.approx(cells["average_5_tasks"], abs=slack), where
    assert hidden == 2


def test_figure5_runs_are_the_tables_and_figure_6() -> None:
    points = {
        (claim.block_len, claim.alpha, claim.task, claim.metric): claim.value
        for claim in load_file(PAPER_DIR / "figure5.csv")
        if claim.settings.get("masking") == "full"
    }
    for claim in load_file(PAPER_DIR / "figure6.csv"):
        if claim.beta == 1:
            drawn = points[16, claim.alpha, "average_5_tasks", "score"]
            assert drawn == pytest.approx(claim.value, abs=0.1)
    for claim in load_file(PAPER_DIR / "table5.csv"):
        if claim.setting == "masking=full" and claim.task == "gsm8k_cot":
            drawn = points[claim.block_len, 1.0, "gsm8k_cot", claim.metric]
            assert drawn == pytest.approx(claim.value, abs=0.11 if claim.unit == "%" else 0.011)


def test_figure1_totals_rise_and_hold_their_parts() -> None:
    cells = {
        (claim.settings.get("part"), claim.kv_len, claim.width): claim.value
        for claim in load_file(PAPER_DIR / "figure1.csv")
    }
    for kv_len in (1024, 2048, 4096):
        row = [cells["total", kv_len, width] for width in (1, 4, 8, 16, 32, 64, 128, 256, 512)]
        assert all(later >= sooner - 0.15 for sooner, later in zip(row, row[1:], strict=False))
        for width in (1, 64, 256, 512):
            parts = cells["mlp", None, width] + cells["attention", kv_len, width]
            assert parts == pytest.approx(cells["total", kv_len, width], rel=0.03)


def test_site_bars_and_traces_agree_with_themselves() -> None:
    bars = load_file(PAPER_DIR / "site_bars.csv")
    speed = {(c.system, c.task): c.value for c in bars if c.metric == "tokens_per_s"}
    for claim in bars:
        if claim.metric == "speedup":
            ratio = speed[claim.system, claim.task] / speed["Qwen3 8B instruct", claim.task]
            assert ratio == pytest.approx(claim.value, rel=0.02), claim.id
    traces = load_file(PAPER_DIR / "site_traces.csv")
    counts = {int(c.settings["committed"]): c.value for c in traces if c.metric == "count"}
    assert sorted(counts) == list(range(1, 17))
    assert sum(counts.values()) == sum(c.value for c in traces if c.metric == "steps") - 4
    for task in {c.task for c in traces if c.metric == "speedup"}:
        cell = {(c.system, c.metric): c.value for c in traces if c.task == task}
        ratio = cell["Qwen3 8B instruct", "time"] / cell[TIDAR_8B, "time"]
        assert ratio == pytest.approx(cell[TIDAR_8B, "speedup"], abs=0.06)
        assert 512 / cell[TIDAR_8B, "steps"] == pytest.approx(cell[TIDAR_8B, "t_per_nfe"], rel=0.01)


def test_fast_dllm_rows_hold_what_the_paper_prints() -> None:
    """Spot values of the published files, typed again from the reference by hand."""
    value = {(c.system, c.task, c.setting, c.metric): c.value for c in load_claims()}
    fast = "gen_len=256;block=32;device=A100-80GB;batch=1"
    assert value["LLaDA 8B Instruct Fast-dLLM both", "gsm8k", fast, "tokens_per_s"] == 54.4
    assert value["Dream 7B Base Fast-dLLM base", "mbpp", fast, "score"] == 56.6
    eagle = "engine=hf;temperature=0"
    assert value["Llama-3.1-8B EAGLE-3", "humaneval", eagle, "acceptance_length"] == 6.74
    assert value["Vicuna-13B EAGLE", "cnn_dm", eagle, "speedup"] == 2.49
    bundle = "engine=sglang;device=H200;batch=1;draft=chain 7"
    assert value["Llama-3.1-8B EAGLE-3 SpecBundle", "math_500", bundle, "tokens_per_s"] == 638


def test_scores_are_whole_counts_of_problems() -> None:
    misses = []
    for cell in load_file(PAPER_DIR / "table2.csv"):
        if cell.task in PROBLEMS and cell.metric == "score":
            n = PROBLEMS[cell.task]
            nearest = 100 * round(cell.value / 100 * n) / n
            if abs(nearest - cell.value) > 0.00501:
                misses.append((cell.system, cell.task))
    # The paper's own rounding: 59.23 is printed where 224 of 378 is 59.26.
    assert misses == [("Qwen2.5 1.5B", "mbpp_plus")]


def test_table4_group_means_agree_with_table2_and_table5() -> None:
    two, four = (by_system(f, "score") for f in ("table2.csv", "table4.csv"))
    five = by_system("table5.csv", "score")
    run = two[TIDAR_1P5B]
    assert mean(run, ("humaneval", "humaneval_plus")) == pytest.approx(
        four[TIDAR_1P5B]["humaneval_average"], abs=0.0101
    )
    assert mean(run, ("mbpp", "mbpp_plus")) == pytest.approx(
        four[TIDAR_1P5B]["mbpp_average"], abs=0.0101
    )
    shared = set(four) & set(five)
    assert len(shared) == 2
    for system in shared:
        assert all(four[system][task] == five[system][task] for task in GROUPS)


def test_table2_and_figure4_agree_where_both_show_a_run() -> None:
    printed, drawn = (by_system(f, "score") for f in ("table2.csv", "figure4.csv"))
    for system in (TIDAR_1P5B, TIDAR_8B, "Qwen3 8B", "Block Diff 1.5B"):
        for task in FIVE:
            assert printed[system][task] == pytest.approx(drawn[system][task], abs=0.11), system


def test_paper_value_prefers_the_printed_cell_and_knows_what_it_lacks() -> None:
    cell = paper_value("humaneval", "score", TIDAR_1P5B)
    assert cell is not None and (cell.source, cell.certainty) == ("Table 2", "text")
    speedup = paper_value("humaneval", "speedup", TIDAR_1P5B)
    assert speedup is not None and (speedup.source, speedup.unit) == ("Figure 4", "x")
    tokens = paper_value("humaneval", "t_per_nfe", TIDAR_1P5B)
    assert tokens is not None and tokens.value == 6.5 and tokens.unit == "tokens/forward"
    assert paper_value("own_code", "score", TIDAR_1P5B) is None
    assert paper_value("humaneval", "speedup", "LLaDA 8B") is None
    assert TIDAR_1P5B in systems() and TIDAR_8B in systems()


def test_every_claim_says_what_it_is() -> None:
    for claim in load_claims():
        assert claim.kind in KINDS and claim.certainty in CERTAINTIES, claim.id
        exact = claim.source == "Table 6"  # a protocol is met or not
        assert claim.unit == UNITS[claim.metric], claim.id
        assert (claim.tolerance == 0) == exact and claim.tolerance >= 0, claim.id
        assert claim.system and claim.size and claim.source and claim.mark, claim.id
        may_be_zero = claim.metric in ("share", "shots")
        assert claim.value > 0 or (may_be_zero and claim.value == 0), claim.id
        assert claim.unit != "%" or claim.value < 100, claim.id
        if claim.decoder == "tidar" and claim.source != "Table 3":
            assert claim.block_len in (4, 8, 16), claim.id
        assert ("derived" in claim.mark) == (claim.certainty == "derived"), claim.id


def test_findings_and_properties_are_complete() -> None:
    """Section 8 of our reading lists six inconsistencies; the seventh is the mixed runs."""
    assert len(load_findings()) == 7 and all(finding.what for finding in load_findings())
    for item in load_properties():
        file, _, name = item.test.partition("::")
        assert f"def {name}(" in (PAPER_DIR.parents[1] / file).read_text(encoding="utf-8"), item.id


def test_errors_name_the_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clone"):
        load_file(tmp_path / "table2.csv")
    bad = tmp_path / "bad.csv"
    cells = {"id": "a", "value": "4o.1", "tolerance": "1"}
    line = ",".join(cells.get(name, "") for name in COLUMNS)
    bad.write_text(",".join(COLUMNS) + f"\n{line}\n")
    with pytest.raises(UserError, match="bad.csv line 2"):
        load_file(bad)
    bad.write_text(",".join(COLUMNS) + "\nTable 2,,X\n")
    with pytest.raises(UserError, match=f"line 2: expected {len(COLUMNS)} columns"):
        load_file(bad)
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="restore it"):
        load_file(bad)
