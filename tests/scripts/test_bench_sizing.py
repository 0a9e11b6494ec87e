"""The bench of sizing, small: one demand, and that the answer is within a replica of the truth."""

from __future__ import annotations

import sys

import pytest

from tests.scripts.program import script


def test_a_demand_is_sized_within_a_replica(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numba", reason="the runs take a minute without the compiled engine")
    bench = script("bench/sizing")
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr("harness.rehearsals.sizing.REQUESTS", 6000)
    monkeypatch.setattr(bench, "SPARE", 1)
    small = ("--n", "1", "--first-seed", "24", "--requests", "20000", "--markdown")
    monkeypatch.setattr(sys, "argv", ["sizing", *small])
    bench.main()
    table, below = capsys.readouterr().out.split("\n\n")
    row = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    needed, said = int(row[5]), int(row[6])
    assert bench.FEWEST <= needed <= bench.MOST
    assert abs(said - needed) <= 1
    assert f"under-provisioned: {int(said < needed)} of 1" in below
