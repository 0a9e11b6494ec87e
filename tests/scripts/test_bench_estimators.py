"""The bench of estimators, small: what it prints must tell a stable run from a growing one."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/estimators")


def tables(out: str) -> list[list[dict[str, str]]]:
    """Each Markdown table as one dict per row."""
    found = []
    for part in out.split("\n\n"):
        rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        if rows:
            found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


def share(cell: str) -> float:
    return float(cell.split("%")[0])


def test_the_tables_tell_stable_from_growing_and_work_from_counting(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr(bench, "MAX_HORIZON_S", 60.0)
    small = "--seeds 4 --truth 4000 --setting sequence-bound --rho 0.8 --rho 1.2 --markdown"
    monkeypatch.setattr(sys, "argv", ["estimators", *small.split()])
    bench.main()
    drifts, rates = tables(capsys.readouterr().out)
    below, above = drifts
    assert (below["rho"], above["rho"]) == ("0.80", "1.20")
    for name in bench.DRIFTS:
        assert share(below[f"grows: {name}"]) == 0.0
        assert share(above[f"grows: {name}"]) == 100.0
        assert share(below[f"covers: {name}"]) >= 50.0
    assert share(below["MSER-5, planned"]) < share(below["MSER-5, half"])
    scatter = {row["estimator"]: share(row["sd"]) for row in rates}
    assert list(scatter) == list(bench.RATES)
    assert scatter["work, what is short"] < scatter["work, KV demand"]
    assert scatter["work, what is short"] < scatter["count"] / 3


def test_no_row_of_rates_without_a_backlog(bench: ModuleType) -> None:
    calm = bench.Found(drifts=(), grows=(), warned=False, warned_early=False, rates=())
    truth = bench.Estimate.exact(10.0, "req/s", "known")
    assert bench.rate_rows("wide", 0.8, truth, [calm, calm]) == []


def test_a_standard_error_is_that_of_a_share(bench: ModuleType) -> None:
    assert bench.share([True] * 5 + [False] * 20) == "20.0% +- 8.0%"
