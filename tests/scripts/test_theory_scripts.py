"""scripts/theory and scripts/hypotheses, small, end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import program

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "theory"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = program.script(name)
    monkeypatch.setattr(module, "sweep", lambda function, jobs, cluster: map(function, jobs))
    return module


def test_a_table_of_unknown_lengths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Drawn budgets evict less and complete more than greedy admission; nobody uses more than M."""
    pytest.importorskip("numba")
    module, kept = script("theory", monkeypatch), tmp_path / "found.json"
    config = CONFIGS / "pc_unknown_lengths.yaml"
    options = f"{config} --shrink 10 --seeds 2 --markdown --json {kept}"
    monkeypatch.setattr(sys, "argv", ["theory", *options.split()])
    module.main()
    found = {row["name"]: row for row in json.loads(kept.read_text())["pc_unknown_lengths"]}
    drawn, greedy = found["B from 0..6"], found["greedy"]
    name = "evictions per completion"
    assert drawn["quantities"][name]["value"] < greedy["quantities"][name]["value"]
    assert drawn["completed"]["value"] > greedy["completed"]["value"]
    assert all(row["quantities"]["most used"]["value"] <= 120 for row in found.values())
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(found)


def test_a_broken_config_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nabout: y\nslot_cases: []\n")
    module = script("theory", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["theory", str(tmp_path / "x.yaml")])
    with pytest.raises(SystemExit, match="give slot_cases or batch_cases"):
        module.main()


def test_hypotheses_are_kept_and_the_page_is_derived_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("numba")
    module, page = script("hypotheses", monkeypatch), tmp_path / "page.md"
    there = f"--reference {tmp_path} --page {page}"

    def run(options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["hypotheses", *f"{options} {there}".split()])
        module.main()

    run("--run H10 --requests 80")
    assert json.loads((tmp_path / "hypotheses" / "h10.json").read_text())["hypothesis"] == "H10"
    text = page.read_text()
    assert "| H10 | Outputs" in text and text.count("not run") == 9 + 5
    with pytest.raises(SystemExit) as same:
        run("--check")
    page.write_text("another")
    with pytest.raises(SystemExit) as other:
        run("--check")
    assert (same.value.code, other.value.code) == (False, True)
