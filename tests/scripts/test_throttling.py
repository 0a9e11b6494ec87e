"""The bench of servers that slow down, with few experiments, in this process."""

import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.machine import sweep

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "throttling"


def one_by_one(
    function: Callable[[Any], Any], jobs: Iterable[Any], *, cluster: str | None
) -> Iterator[Any]:
    return map(function, jobs)


def test_every_drift_of_theta_is_named_and_no_steady_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "sweep", one_by_one)
    options = ["--n", "2", "--server", "SGLang", "--size", "0.1", "--truth", "500", "--markdown"]
    monkeypatch.setattr(sys, "argv", [str(BENCH), *options])
    runpy.run_path(str(BENCH), run_name="__main__")
    shown = capsys.readouterr().out
    _, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in shown.splitlines()
        if line.startswith("|")
    ]
    assert [row[2] for row in rows] == ["0", "5", "10", "10", "10", "10"]
    for _, drift, _, confirmed, *_, named, _ in rows:
        steady = drift.startswith("no drift")
        assert confirmed == f"{100 * steady}.0 +- 0.0", drift
        assert named == f"{100 * (not steady)}.0 +- 0.0", drift
    assert "seeds 1 to 2" in shown
