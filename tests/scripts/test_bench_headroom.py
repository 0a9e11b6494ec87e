"""The benches of headroom and of what to change, small: what is printed, and that it holds."""

from __future__ import annotations

import sys

import pytest

from tests.scripts.program import script


def printed(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
) -> tuple[list[list[str]], list[str]]:
    """The rows of the table, and the lines below it."""
    pytest.importorskip("numba", reason="the runs take a minute without the compiled engine")
    bench = script(f"bench/{name}")
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr(sys, "argv", [name, "--markdown", *arguments])
    bench.main()
    _, table, below = capsys.readouterr().out.split("\n\n")
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return lines[2:], below.splitlines()


def test_headroom_is_right_on_hidden_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--settings", "2", "--first-seed", "10", "--minutes", "2", "--requests", "600")
    rows, below = printed("headroom", monkeypatch, capsys, *small)
    assert [row[0] for row in rows] == ["10", "11"]
    assert {row[1] for row in rows} == {"vLLM", "SGLang"}
    for row in rows:
        assert float(row[3]) == pytest.approx(float(row[2]), abs=0.07)
        assert row[7] == row[8]
    assert below[0].startswith("interval holds the truth: ")


def test_the_change_gives_what_was_said_on_hidden_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--settings", "1", "--first-seed", "11", "--requests", "800")
    rows, below = printed("what_to_change", monkeypatch, capsys, *small)
    assert [row[3] for row in rows] == ["yes"]
    assert below[0].startswith("within a quarter of what was said: 1 of 1")
