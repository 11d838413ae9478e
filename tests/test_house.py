"""The house rules as tests: import arrows, light reading half, no drawers, no machine paths."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tidar_ref", "baselines", "bench")
MAY_IMPORT = {
    "tidar_ref": {"tidar_ref"},
    "baselines": {"tidar_ref", "baselines"},
    "bench": {"tidar_ref", "baselines", "bench"},
}
# What reads results must start fast and run where torch is not installed.
READING_HALF = (
    "records", "store", "metrics", "tables", "paper", "claims", "claims_ours", "claims_verdict",
    "frames", "figures", "figures.style",
)  # fmt: skip
HEAVY = {"torch", "pandas", "matplotlib", "transformers", "lm_eval", "evalplus"}
DRAWERS = {"utils", "util", "common", "helpers", "misc"}
TEXT = {".py", ".md", ".toml", ".txt", ".csv", ".json", ".jsonl", ".ipynb", ""}
# Built from pieces, so that this file does not contain what it forbids.
MACHINE_ROOTS = "|".join(("work", "tmp", "root", "home"))
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}/\-])/({MACHINE_ROOTS})/[\w.]")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(nodes: Iterator[ast.AST], module: str, is_package: bool) -> set[str]:
    """Dotted names of the modules the import statements among `nodes` name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def all_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imported(ast.walk(tree), module_name(path), path.name == "__init__.py")


def import_time_imports(path: Path) -> set[str]:
    """Imports that run when the module is imported: not in functions, not under TYPE_CHECKING."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from walk(child)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imported(walk(tree), module_name(path), path.name == "__init__.py")


def wrong_arrows(path: Path, package: str) -> list[str]:
    ours = {name for name in all_imports(path) if name.split(".")[0] in (*PACKAGES, "tests")}
    return sorted(name for name in ours if name.split(".")[0] not in MAY_IMPORT[package])


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are tracked is not known")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    wrong = {str(path.relative_to(ROOT)): wrong_arrows(path, package) for path in sources(package)}
    assert not {path: names for path, names in wrong.items() if names}


def test_a_wrong_arrow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "tidar_ref").mkdir()
    path = tmp_path / "tidar_ref" / "x.py"
    for line in ("import bench.run", "from baselines import ar"):
        path.write_text(f"def f():\n    {line}\n")
        assert wrong_arrows(path, "tidar_ref"), line
    path.write_text("import torch\nfrom . import masks\nfrom tidar_ref.errors import UserError\n")
    assert not wrong_arrows(path, "tidar_ref")
    assert all_imports(path) >= {"tidar_ref.masks", "tidar_ref.errors"}


def test_baselines_do_not_import_each_other() -> None:
    for path in sources("baselines"):
        others = {n for n in all_imports(path) if re.match(r"baselines\.(?!_)", n)}
        assert not others, f"{path.name} imports {sorted(others)}"


def reached(module: str) -> tuple[set[str], set[str]]:
    """(our modules, foreign top-level names) that importing `module` imports, transitively."""
    seen: set[str] = set()
    foreign: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        base = ROOT / Path(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
        found = import_time_imports(path)
        todo += [n for n in (*found, *parents) if n.split(".")[0] in PACKAGES]
        foreign |= {n for n in tops(found) if n not in PACKAGES}
    return seen, foreign


@pytest.mark.parametrize("name", READING_HALF)
def test_the_reading_half_needs_no_torch(name: str) -> None:
    path = ROOT / "bench" / Path(*name.split("."))
    if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
        pytest.skip(f"bench/{name}.py does not exist yet")
    modules, foreign = reached(f"bench.{name}")
    assert not foreign & HEAVY, f"bench.{name} reaches {foreign & HEAVY} through {sorted(modules)}"


@pytest.mark.parametrize("name", ["bench", "bench.__main__"])
def test_the_command_line_starts_light(name: str) -> None:
    _, foreign = reached(name)
    assert not foreign & (HEAVY | {"numpy"})


def test_only_figures_imports_matplotlib() -> None:
    users = [p for package in PACKAGES for p in sources(package)
             if "matplotlib" in tops(all_imports(p))]  # fmt: skip
    assert not [path for path in users if path.parent != ROOT / "bench" / "figures"]


def test_no_drawers_and_no_empty_rooms() -> None:
    files = [path for package in (*PACKAGES, "tests") for path in sources(package)]
    assert not [path for path in files if path.stem in DRAWERS]
    assert not [path for path in files if path.parent.name in DRAWERS]
    for package in PACKAGES:
        for folder in {path.parent for path in sources(package)}:
            assert [p for p in folder.glob("*.py") if p.name != "__init__.py"], f"{folder} is empty"
    for room in ("docs", "notebooks", "results"):
        assert [path for path in tracked() if path.is_relative_to(ROOT / room)], f"{room} is empty"


def test_every_module_says_what_it_is() -> None:
    files = [path for package in (*PACKAGES, "tests") for path in sources(package)]
    silent = [p for p in files if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert not [str(path.relative_to(ROOT)) for path in silent]


def test_no_path_of_one_machine_is_committed() -> None:
    found = []
    for path in tracked():
        if path.suffix not in TEXT and path.name != "run":
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if MACHINE_PATH.search(line) and "tmp_path" not in line:
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert not found


def test_the_machine_path_pattern() -> None:
    bad = ["/" + "work/main", 'open("/' + 'tmp/x")', "cd /" + "root/a", "file:/" + "home/me/x"]
    good = ["../shared/data", "a/tmp/b", "$HOME/work/x", "/path", "https://x.org/tmp/y", "/tmp"]
    assert all(MACHINE_PATH.search(text) for text in bad)
    assert not any(MACHINE_PATH.search(text) for text in good)


def test_a_makefile_recipe_is_three_lines_at_most() -> None:
    length = 0
    for line in (ROOT / "Makefile").read_text().splitlines():
        length = length + 1 if line.startswith("\t") and "$$p" not in line else 0
        assert length <= 3, line
