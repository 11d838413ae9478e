"""Notebooks: stripped in git, and each runs from top to bottom against the committed records."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
LIMIT_S = 300  # of one cell, on a busy machine; a whole notebook takes seconds on a quiet one


def test_the_notebooks_are_these() -> None:
    assert NAMES == [
        "01_acceptance",
        "02_token_slots",
        "03_efficiency_vs_quality",
        "04_utilisation_and_energy",
        "05_convert_your_own_model",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_stripped_in_git(path: Path) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    assert set(book["metadata"]) <= {"kernelspec", "language_info"}
    for cell in book["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_thin(path: Path) -> None:
    """They load, call and explain: no matplotlib, no file format, no more text than code allows."""
    book = json.loads(path.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not re.search(r"matplotlib|json\.load|\bopen\(", "\n".join(code))
    assert all(block.count("\n") < 20 for block in code)
    assert [cell for cell in book["cells"] if cell["cell_type"] == "markdown"]


@pytest.mark.slow  # CI runs these after `make test`
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed from another folder, with whatever records are committed."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    monkeypatch.delenv("TIDAR_BENCH_RECORD", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    client = nbclient.NotebookClient(
        book, timeout=LIMIT_S, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert outputs and not [o for o in outputs if o.output_type == "error"]
    errors = [o.text for o in outputs if o.get("name") == "stderr"]
    assert not [text for text in errors if "Warning" in text], errors
    images = sum("image/png" in output.get("data", {}) for output in outputs)
    drawn = sum("figures.png" in cell.source for cell in book.cells)
    assert images == drawn
    if path.stem.startswith("05"):
        _check_conversion(outputs)


def _check_conversion(outputs: list) -> None:
    """Training made drafts right: exact before and after, more tokens a forward after."""
    texts = [output.get("text", "") for output in outputs]
    assert sum("tidar gives the tokens of ar: True" in text for text in texts) == 2
    tables = [
        output["data"]["text/plain"]
        for output in outputs
        if "T/NFE" in output.get("data", {}).get("text/plain", "")
    ]
    before, after = (float(re.search(r"tidar\s+([\d.]+)", table)[1]) for table in tables)
    assert before < 1.3 and after > 1.6
