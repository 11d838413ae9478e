"""The paper's numbers: every printed average recomputes from its cells, so a typing slip shows."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import pytest

from bench.paper import (
    COLUMNS,
    FILES,
    PAPER_DIR,
    TIDAR_1P5B,
    TIDAR_8B,
    PaperCell,
    load_cells,
    load_file,
    paper_value,
    systems,
)
from tidar_ref.errors import UserError

FIVE = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "gsm8k_cot")
SIX = (*FIVE, "minerva_math")
GROUPS = ("humaneval_average", "mbpp_average", "gsm8k_cot")
# Problems a score is a whole count of: then a typed percentage can be checked digit by digit.
PROBLEMS = {"humaneval": 164, "humaneval_plus": 164, "mbpp": 500, "mbpp_plus": 378}


def by_system(name: str, field: str, metric: str) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for cell in load_file(PAPER_DIR / name):
        if cell.metric == metric and getattr(cell, field) is not None:
            table[cell.system][cell.task] = getattr(cell, field)
    return dict(table)


def mean(values: dict[str, float], tasks: tuple[str, ...]) -> float:
    return sum(values[task] for task in tasks) / len(tasks)


def test_row_counts() -> None:
    counts = {name: len(load_file(PAPER_DIR / name)) for name in FILES}
    assert counts == {"table2.csv": 98, "table4.csv": 44, "table5.csv": 16, "figure4.csv": 96}
    assert {path.name for path in PAPER_DIR.glob("*.csv")} == set(FILES)


def test_no_cell_is_given_twice_in_one_file() -> None:
    for name in FILES:
        keys = [(c.system, c.task, c.metric) for c in load_file(PAPER_DIR / name)]
        assert len(keys) == len(set(keys)), name


# Cells are rounded to 0.01, so their mean is known to 0.005 and its print to another 0.005.
@pytest.mark.parametrize("field", ["value", "t_per_nfe"])
@pytest.mark.parametrize(
    ("name", "tasks", "average"),
    [("table2.csv", SIX, "average_6_tasks"), ("table5.csv", GROUPS, "average_3_groups")],
)
def test_printed_averages_recompute(
    name: str, tasks: tuple[str, ...], average: str, field: str
) -> None:
    table = by_system(name, field, "score")
    assert table
    for system, cells in table.items():
        assert mean(cells, tasks) == pytest.approx(cells[average], abs=0.0101), (name, system)


def test_figure4_averages_recompute() -> None:
    for metric, field, slack in (
        ("score", "value", 0.11), ("speedup", "value", 0.021), ("speedup", "t_per_nfe", 0.011),
    ):  # fmt: skip
        table = by_system("figure4.csv", field, metric)
        assert table
        for system, cells in table.items():
            assert mean(cells, FIVE) == pytest.approx(cells["average_5_tasks"], abs=slack), system


def test_figure4_has_one_step_cost_per_system() -> None:
    """Speedup over tokens per forward is a constant of each system, so one wrong digit shows."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for cell in load_file(PAPER_DIR / "figure4.csv"):
        if cell.metric == "speedup" and cell.t_per_nfe is not None:
            ratios[cell.system].append(cell.value / cell.t_per_nfe)
    assert len(ratios) == 7
    for system, values in ratios.items():
        assert max(values) - min(values) < 0.005, system


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
    two, four = (by_system(f, "value", "score") for f in ("table2.csv", "table4.csv"))
    five = by_system("table5.csv", "value", "score")
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
    printed, drawn = (by_system(f, "value", "score") for f in ("table2.csv", "figure4.csv"))
    for system in (TIDAR_1P5B, TIDAR_8B, "Qwen3 8B", "Block Diff 1.5B"):
        for task in FIVE:
            assert printed[system][task] == pytest.approx(drawn[system][task], abs=0.11), system


def test_paper_value_prefers_the_printed_cell_and_knows_what_it_lacks() -> None:
    cell = paper_value("humaneval", "score", TIDAR_1P5B)
    assert cell is not None and (cell.source, cell.reading) == ("Table 2", "printed")
    speedup = paper_value("humaneval", "speedup", TIDAR_1P5B)
    assert speedup is not None and (speedup.source, speedup.unit) == ("Figure 4", "x")
    tokens = paper_value("humaneval", "t_per_nfe", TIDAR_1P5B)
    assert tokens is not None and tokens.value == cell.t_per_nfe and tokens.unit == "tokens/forward"
    assert paper_value("own_code", "score", TIDAR_1P5B) is None
    assert paper_value("humaneval", "speedup", "LLaDA 8B") is None
    assert TIDAR_1P5B in systems() and TIDAR_8B in systems()


def test_every_cell_says_what_it_is() -> None:
    for cell in load_cells():
        assert cell.reading in ("printed", "figure")
        unit = {"score": "%", "speedup": "x", "t_per_nfe": "tokens/forward"}[cell.metric]
        assert cell.unit == unit and cell.value > 0 and cell.system and cell.size and cell.source
        assert cell.unit != "%" or cell.value < 100
    assert tuple(f.name for f in dataclasses.fields(PaperCell)) == COLUMNS


def test_errors_name_the_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clone"):
        load_file(tmp_path / "table2.csv")
    bad = tmp_path / "bad.csv"
    bad.write_text(",".join(COLUMNS) + "\nTable 2,,X,1B,mbpp,score,4o.1,%,,printed,\n")
    with pytest.raises(UserError, match="bad.csv line 2"):
        load_file(bad)
    bad.write_text(",".join(COLUMNS) + "\nTable 2,,X\n")
    with pytest.raises(UserError, match="line 2: expected 11 columns"):
        load_file(bad)
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="restore it"):
        load_file(bad)
