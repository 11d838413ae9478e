"""No cell of the paper is missing: our reading of it (tidar.md), taken apart here once more.

The claims were typed from that page; this parses its tables with other code and compares every
number, each as often as it stands there. Without the shared folder these tests skip; the counts
by hand in test_paper.py do not.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from bench.claims import Claim, load_claims

NUMBER = re.compile(r"-?\d*\.?\d+")
TASKS = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus", "gsm8k_cot", "average_5_tasks")


@pytest.fixture(scope="module")
def page(shared_data: Path) -> str:
    path = shared_data.parent / "reference" / "tidar.md"
    if not path.is_file():
        pytest.skip("tidar.md is not in the shared folder")
    return path.read_text(encoding="utf-8")


def rows(page: str, heading: str, table: int = 0) -> list[list[str]]:
    """The body cells of the table-th table below a heading that starts so."""
    [text] = [part for part in re.split(r"^#{2,4} ", page, flags=re.M) if part.startswith(heading)]
    tables: list[list[list[str]]] = []
    last = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not last.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip(" *") for cell in line.strip("|").split("|")])
        last = line
    return tables[table][2:]


def numbers(cells: list[str]) -> Counter[float]:
    return Counter(float(found) for cell in cells for found in NUMBER.findall(cell))


def claimed(source: str, *metrics: str, **settings: str) -> Counter[float]:
    return Counter(
        round(claim.value, 6)
        for claim in load_claims()
        if claim.source == source
        and (not metrics or claim.metric in metrics)
        and settings.items() <= claim.settings.items()
    )


@pytest.mark.parametrize(
    ("table", "first", "cells"),
    [
        ("Table 2", 2, 14 * 7 + 3 * 7),
        ("Table 3", 2, 13 * 7),
        ("Table 4", 1, 11 * 4),
        ("Table 5", 2, 4 * 4 * 2),
    ],
)
def test_printed_tables(page: str, table: str, first: int, cells: int) -> None:
    """`first` is the first column that holds results and not a name, a size or a setting."""
    expected = sum((numbers(row[first:]) for row in rows(page, table)), Counter())
    assert claimed(table) == expected and expected.total() == cells


def test_table_6_is_the_protocol(page: str) -> None:
    body = rows(page, "4. Evaluation protocol")
    assert claimed("Table 6", "shots") == numbers([row[1] for row in body])
    assert claimed("Table 6", "length_limit") == numbers([row[2] for row in body if row[2] != "-"])
    assert len(body) == 12


def test_figure_1(page: str) -> None:
    body = rows(page, "Figure 1")
    assert claimed("Figure 1", part="total") == sum((numbers(r[1:]) for r in body), Counter())
    [text] = re.findall(r"^Attention part at .*? slots: (.*?)\. Note", page, flags=re.M | re.S)
    attention = [part.partition(":")[2] for part in text.split("KV")[1:]]
    assert claimed("Figure 1", part="attention") == numbers(attention)
    assert len(body) == 3 and numbers(attention).total() == 3 * 4
    # The MLP part is told as ranges (19.2-19.3): a claim is the middle of one.
    [told] = re.findall(r"^MLP part: (.*?), the same", page, flags=re.M | re.S)
    ranges = re.findall(r"([\d.]+)(?:-([\d.]+))? at (\d+)", told)
    middles = {int(w): (float(a) + float(b or a)) / 2 for a, b, w in ranges}
    mlp = {c.width: c.value for c in of("Figure 1") if c.settings.get("part") == "mlp"}
    assert mlp == {width: pytest.approx(value, abs=0.051) for width, value in middles.items()}


def of(source: str) -> list[Claim]:
    return [claim for claim in load_claims() if claim.source == source]


def test_figure_4(page: str) -> None:
    """Both tables: speedups carry an x, T/NFE brackets, the rest are scores."""
    found: dict[str, Counter[float]] = {"speedup": Counter(), "t_per_nfe": Counter()}
    found["score"] = Counter()
    for table in (0, 1):
        for row in rows(page, "Figure 4", table):
            for cell in row[1:]:
                cell = cell.replace("*", "")
                speeds, tokens = re.findall(r"([\d.]+)x", cell), re.findall(r"\(([\d.]+)\)", cell)
                found["speedup"] += numbers(speeds)
                found["t_per_nfe"] += numbers(tokens)
                found["score"] += numbers([cell]) - numbers([*speeds, *tokens])
    for metric, expected in found.items():
        assert claimed("Figure 4", metric) == expected, metric
    ratios = re.search(r"costs about ([\d., and]+) AR steps", page.replace("\n", " "))
    assert ratios and claimed("Figure 4", "step_ratio") == numbers([ratios[1]])


def test_figure_5(page: str) -> None:
    """Points (T/NFE, score); AR's are written without brackets, scores as fractions."""
    points: Counter[tuple[float, float]] = Counter()
    for row in rows(page, "Figure 5", 0):
        points.update(tuple(map(float, NUMBER.findall(cell))) for cell in row[1:3])
        points.update(pairs(row[3]))
    for row in rows(page, "Figure 5", 1):
        points.update(pair for cell in row[1:] for pair in pairs(cell))
    assert points.total() == 6 * 20 - 1
    claims = of("Figure 5")
    tokens = {c.id.rpartition("/")[0]: c.value for c in claims if c.metric == "t_per_nfe"}
    ours = Counter(
        (tokens[c.id.rpartition("/")[0]], round(c.value / 100, 6))
        for c in claims
        if c.metric == "score"
    )
    assert ours == points


def pairs(cell: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"\(([\d.]+), ?([\d.]+)\)", cell)]


def test_figure_6(page: str) -> None:
    body = rows(page, "Figure 6")
    betas = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    expected = {
        (float(row[0]), beta): float(cell)
        for row in body
        for beta, cell in zip(betas, row[1:], strict=True)
    }
    assert {(c.alpha, c.beta): c.value for c in of("Figure 6")} == expected and len(expected) == 18


def test_the_project_page(page: str) -> None:
    bars = sum((numbers(row[1:]) for row in rows(page, "SGLang bar chart")), Counter())
    assert claimed("Site bar chart") == bars and bars.total() == 4 * 7
    traces = rows(page, "Per-step traces")
    cells = sum((numbers(row[1:]) for row in traces), Counter())
    histogram = re.search(r"without each last step\): ([\d: \n]+)\.", page)
    assert histogram
    counts = [pair.split(":")[1] for pair in histogram[1].split()]
    assert claimed("Site traces") == cells + numbers(counts) and len(counts) == 16


def test_the_abstract(page: str) -> None:
    """The two headline speedups are Figure 4's bold averages, the text's T/NFE Table 2's."""
    bold = re.findall(r"\*\*([\d.]+)x\*\*", page)
    assert claimed("Abstract") == numbers(bold) and len(bold) == 2
    averages = [row[-1] for row in rows(page, "Table 2") if "(" in row[-1]]
    tokens = numbers([re.sub(r".*\((.*)\)", r"\1", cell) for cell in averages])
    assert claimed("Text") <= tokens and claimed("Text").total() == 2
