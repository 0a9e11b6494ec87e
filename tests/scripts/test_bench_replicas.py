"""The bench of replicas, small: two that are not alike serve twice what the slower one does."""

from __future__ import annotations

import sys

import pytest

from tests.scripts.program import script


def test_all_serve_as_many_times_what_the_slowest_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = script("bench/replicas")
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr("harness.rehearsals.error_rates.TRUTH_SEEDS", 2)
    unlike = "two, one 15 % slower"
    small = ["--experiments", "2", "--truth", "1500", "--servers", unlike]
    monkeypatch.setattr(sys, "argv", ["replicas", *small, "--markdown"])
    bench.main()
    _, _, *lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    (cells,) = (line.strip("| ").split(" | ") for line in lines)
    assert cells[0] == unlike
    assert float(cells[2].split()[0]) == pytest.approx(1.0, abs=0.015)
    assert cells[6] == "2 of 2"
