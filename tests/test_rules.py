"""The house's rules that a machine can check."""

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"loadgen": (), "analysis": ("loadgen",), "harness": ("loadgen", "analysis")}
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_imports_run_one_way(path: Path) -> None:
    own = path.parent.name
    allowed = {own, *PACKAGES[own]}
    assert imported(path) & set(PACKAGES) <= allowed
    assert not imported(path) & {"vllm", "sglang", "torch"}, "engines are processes"
    if path.name != "gpu.py":
        assert "pynvml" not in imported(path)


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.parent.name == "analysis" or p.name == "arrivals.py"],
    ids=lambda p: p.stem,
)
def test_analysis_has_no_clock_and_no_randomness(path: Path) -> None:
    assert not imported(path) & {"time", "random", "datetime", "asyncio", "aiohttp"}
    if path.parent.name == "analysis" and path.name != "second_opinion.py":
        assert "default_rng" not in path.read_text()


def test_scripts_can_be_run() -> None:
    for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]:
        if path.is_file():
            assert os.access(path, os.X_OK), f"{path.name} is not executable"
            assert path.read_text().startswith("#!"), f"{path.name} names no interpreter"


def test_no_docstring_is_missing() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
