"""Figures: the paper's points are the claims', ours stand beside, bytes repeat, absence is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import cli, figures
from bench.claims import PAPER_DIR, load_file
from bench.claims_ours import committed_records

pytest.importorskip("matplotlib")

NOTHING = figures.Ours(records=(), observed=(), slots={})


@pytest.fixture(scope="module")
def record() -> Path:
    """A committed record with scores and speeds."""
    return next(path for path in committed_records() if "embedded" in path.name)


@pytest.fixture(scope="module")
def ours(record: Path) -> figures.Ours:
    return figures.gather([record])


def texts(figure: object) -> str:
    """All text of a figure: titles, notes, legend."""
    from matplotlib.text import Text

    return "\n".join(item.get_text() for item in figure.findobj(Text))  # type: ignore[attr-defined]


def points(figure: object, label: str) -> set[tuple[float, float]]:
    """Every point drawn under a legend label, over all panels."""
    lines = [line for axis in figure.axes for line in axis.get_lines()]  # type: ignore[attr-defined]
    mine = [line for line in lines if line.get_label() == label]
    return {(float(x), float(y)) for line in mine for x, y in line.get_xydata()}


@pytest.mark.parametrize("name", ["figure1", "figure4", "figure5", "figure6", "acceptance"])
def test_without_records_the_figure_says_so(name: str) -> None:
    assert name in figures.figure_names()
    page = texts(figures.draw(name, NOTHING))
    assert "only: no record given" in page and "ours" not in page


def test_figure1_holds_every_total() -> None:
    drawn = points(figures.draw("figure1", NOTHING), "total")
    cells = [c for c in load_file(PAPER_DIR / "figure1.csv") if c.settings.get("part") == "total"]
    assert drawn == {(c.width, c.value) for c in cells}


def test_figure4_holds_every_point() -> None:
    figure = figures.draw("figure4", NOTHING)
    cells = {(c.system, c.task, c.metric): c.value for c in load_file(PAPER_DIR / "figure4.csv")}
    for system in ("TiDAR 1.5B K=16", "TiDAR 8B Trust Diff", "Block Diff 1.5B"):
        expected = {
            (value, cells[system, task, "score"])
            for (name, task, metric), value in cells.items()
            if (name, metric) == (system, "speedup")
        }
        assert len(expected) == 6 and points(figure, system) == expected
    assert "9.43" in texts(figure)


def test_figure5_and_6_hold_every_point() -> None:
    figure = figures.draw("figure5", NOTHING)
    drawn = [p for axis in figure.axes for line in axis.get_lines() for p in line.get_xydata()]
    assert len(drawn) == len(load_file(PAPER_DIR / "figure5.csv")) / 2
    assert (7.35, 47.7) in points(figure, "TiDAR K=16")
    assert (0.8, 48.6) in points(figures.draw("figure6", NOTHING), "paper: alpha 1.2")


def test_ours_stand_beside(ours: figures.Ours) -> None:
    speeds = {(o.label, o.task): o.value for o in ours.observed if o.metric == "speedup"}
    assert speeds
    figure = figures.draw("figure4", ours)
    label = next(label for label, _ in speeds if label.startswith("tidar"))
    weights = ours.records[0].header.weights["name"]
    drawn = points(figure, f"ours: {label} ({weights}, embedded)")
    assert {x for x, _ in drawn} == {v for (name, _), v in speeds.items() if name == label}
    assert "compare shapes" in texts(figure)
    page = texts(figures.draw("acceptance", ours))
    assert f"ours: {label}" in page and ours.records[0].name in page


def test_a_flagged_point_says_so(record: Path, tmp_path: Path) -> None:
    """Every output cut by the limit: the points stay, thin and grey, under a name of their own."""
    folder = tmp_path / "cut"
    shutil.copytree(record, folder)
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    cut = [json.dumps({**json.loads(line), "finish": "length"}) for line in lines]
    (folder / "measurements.jsonl").write_text("\n".join(cut) + "\n")
    clean, flagged = (
        figures.gather([path]).pairs("gsm8k_cot", "speedup", "score") for path in (record, folder)
    )
    assert [(spot.x, spot.y) for spot in clean] == [(spot.x, spot.y) for spot in flagged]
    assert len(clean) == 3 and not any("flagged" in spot.name for spot in clean)
    assert all("flagged eos_never_reached, not compared" in spot.name for spot in flagged)
    assert [s.look["marker"] for s in clean] == [s.look["marker"] for s in flagged]
    assert flagged[0].look["markeredgecolor"] != clean[0].look["markeredgecolor"]


def test_width_curves_get_their_own_row(record: Path, tmp_path: Path) -> None:
    folder = tmp_path / "curve"
    shutil.copytree(record, folder)
    rows = [{"width": w, "kv_len": 64, "part": "total", "median_s": w / 1000} for w in (1, 4, 9)]
    (folder / "slots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = figures.draw("figure1", figures.gather([folder]))
    assert "ours: curve" in texts(figure) and "no record" not in texts(figure)
    assert {(1.0, 1.0), (4.0, 4.0), (9.0, 9.0)} <= points(figure, "total")
    named = [json.dumps({**row, "weights": "random:tiny"}) + "\n" for row in rows]
    (folder / "slots.jsonl").write_text("".join(named))
    ours = figures.gather([folder])
    assert "ours: random:tiny, curve" in texts(figures.draw("figure1", ours))
    spots = figures.spots("figure1", ours)
    assert [(s.panel, s.x, s.y) for s in spots] == [("past KV 64", w, w) for w in (1, 4, 9)]


def test_every_series_differs_in_grey() -> None:
    """No two series of a figure share both marker and line style with faces of one lightness."""
    import matplotlib.colors

    for name, axis_index in (("figure4", 0), ("figure4", 6), ("figure5", 0), ("figure6", 0)):
        axis = figures.draw(name, NOTHING).axes[axis_index]
        looks = [(line.get_marker(), line.get_linestyle()) for line in axis.get_lines()]
        assert len(looks) == len(set(looks)) > 2, name
        colors = {matplotlib.colors.to_hex(line.get_color()) for line in axis.get_lines()}
        assert len(colors) == len(looks), name


def test_bytes_repeat_and_hold_no_date(ours: figures.Ours, tmp_path: Path) -> None:
    from bench.figures.style import save

    for kind in figures.FORMATS:
        first, second = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
        save(figures.draw("figure6", ours), first, kind)
        save(figures.draw("figure6", ours), second, kind)
        assert first.read_bytes() == second.read_bytes()
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag.endswith("svg") and b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()
    assert b"CreationDate" not in (tmp_path / "a.pdf").read_bytes()


def test_the_verb_writes_all_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "figure_names", lambda: ("figure6",))
    assert cli.main(["figures", "--out", str(tmp_path / "f")]) == 0
    assert {p.name for p in (tmp_path / "f").iterdir()} == {f"figure6.{k}" for k in figures.FORMATS}
    assert capsys.readouterr().out.count("written: ") == 3
    (tmp_path / "file").write_text("")
    assert cli.main(["figures", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err
    assert cli.main(["figures", str(tmp_path / "no"), "--out", str(tmp_path / "g")]) == 2
    assert not (tmp_path / "g").exists()
