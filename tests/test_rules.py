"""The house's rules that a machine can check."""

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"loadgen": (), "analysis": ("loadgen",), "harness": ("loadgen", "analysis")}
ROOMS = {
    "analysis": (
        "numbers",
        "schedulers",
        "slot_models",
        "theory",
        "calibration",
        "inference",
        "verdicts",
        "operation",
        "reports",
    ),
    "harness": (
        "records",
        "machine",
        "servers",
        "mock",
        "configs",
        "live",
        "experiments",
        "rehearsals",
        "evidence",
        "hypotheses",
        "commands",
    ),
}
"""In the order in which data goes through them. What stands beside the rooms enters none."""
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
    own = path.relative_to(ROOT).parts[0]
    allowed = {own, *PACKAGES[own]}
    assert imported(path) & set(PACKAGES) <= allowed
    assert not imported(path) & {"vllm", "sglang", "torch"}, "engines are processes"
    if path.name != "gpu.py":
        assert "pynvml" not in imported(path)


def below(package: str, path: Path) -> set[str]:
    """What a module imports, by the first name below the package."""
    whole: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            whole += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in whole if name.startswith(f"{package}.")}


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_passed_in_order(package: str) -> None:
    rooms = ROOMS[package]
    folders = {p.name for p in (ROOT / package).iterdir() if p.is_dir()}
    assert folders - {"__pycache__"} == {*rooms}
    for path in (ROOT / package).rglob("*.py"):
        room = path.relative_to(ROOT / package).parts[0]
        later = rooms[rooms.index(room) + 1 :] if room in rooms else rooms
        assert not below(package, path) & set(later), f"{path}: turns back from a later room"


PLAYED = ("second_opinion.py", "room_walk.py", "wave_walk.py")
"""They play a model from a seed that is given: the same comes of the same."""


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if ROOT / "analysis" in p.parents or p.name == "arrivals.py"],
    ids=lambda p: p.stem,
)
def test_analysis_has_no_clock_and_no_randomness(path: Path) -> None:
    assert not imported(path) & {"time", "random", "datetime", "asyncio", "aiohttp"}
    text = path.read_text()
    if ROOT / "analysis" in path.parents and path.name not in PLAYED:
        assert "default_rng" not in text
    assert "default_rng()" not in text and "np.random.seed" not in text


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
