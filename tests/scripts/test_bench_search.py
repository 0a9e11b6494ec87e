"""The bench of searches, small: the truth is held where there is one, and nothing is found elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/search")


def rows(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *names: str,
) -> tuple[list[dict[str, str]], str]:
    """The printed table as one dict per row, and what stands below it."""
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr(bench, "TRUTH_SEEDS", 2)
    settings = [word for name in names for word in ("--setting", name)]
    small = ["--searches", "6", "--truth", "4000", "--markdown"]
    monkeypatch.setattr(sys, "argv", ["search", *small, *settings])
    bench.main()
    _, table, reasons = capsys.readouterr().out.split("\n\n")
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [dict(zip(head, line, strict=False)) for line in lines], reasons


def test_the_truth_is_held_where_there_is_one_and_nothing_is_found_elsewhere(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numba", reason="these searches take a minute without the compiled engine")
    (found, never), reasons = rows(
        bench, monkeypatch, capsys, "a quarter of the pool", "no more than 16 req/s"
    )
    assert int(found["found"]) >= 5
    assert float(found["holds it"].split("%")[0]) >= 60
    assert abs(float(found["mean error"].split("%")[0])) < 1.0
    assert never["true req/s"] == "none" and never["found"] == "0"
    assert "6 cannot say: no queue stays at 16 req/s" in reasons


def test_a_run_that_was_not_saturated_is_no_truth(bench: ModuleType) -> None:
    job = bench.Job("wide", 1, 0.02, 0.10, rate=10.0, requests=300)
    with pytest.raises(ValueError, match="queue was empty"):
        bench.saturated(job)
