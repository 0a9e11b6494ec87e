"""The benches of preloads and of two branches, small: they must tell servers apart."""

from __future__ import annotations

import sys

import pytest

from tests.scripts.program import script


def rows(
    name: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[list[str]]:
    """The table's rows, heading and rule left out, in this process."""
    module = script(f"bench/{name}")
    monkeypatch.setattr(module, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--markdown"])
    module.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def percent(cell: str) -> float:
    return float(cell.split("%")[0])


def test_preloads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--setting", "wide", "--setting", "SGLang, fixed"]
    small = ["--seeds", "4", "--requests", "600", *settings]
    agrees, waves = rows("preload", small, monkeypatch, capsys)
    assert abs(percent(agrees[3])) < 2
    assert agrees[-1] == "agrees"
    assert percent(waves[3]) > 10
    assert waves[-1].startswith("differs")


def test_branches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--setting", "wide", "--setting", "SGLang, looks ahead, few"]
    small = ["--pairs", "2", "--truth", "300", "--load", "0.9", *settings]
    one, two = rows("branches", small, monkeypatch, capsys)
    assert [percent(cell) for cell in one[2:4]] == [100, 0]
    assert [percent(cell) for cell in two[2:4]] == [0, 100]
    assert percent(two[5]) == pytest.approx(100 * (0.9 - 0.76), abs=3)
