"""The bench of burstiness, small: the threshold stays where it is, and the queue follows the bursts."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/burstiness")


def value(cell: str) -> float:
    return float(cell.partition(" +- ")[0].rstrip("%"))


def test_bursts_move_the_queue_and_not_the_threshold(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ("Poisson", "gamma, CV 0.5", "gamma, CV 3")
    monkeypatch.setattr(bench, "LAWS", {name: bench.LAWS[name] for name in kept})
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr(bench, "QUEUES", (0.8, 0.95))
    arguments = ["burstiness", "--seeds", "2", "--requests", "6000", "--markdown"]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    lines = [line.strip("| ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = [line.split(" | ") for line in lines if not line.startswith("---")]
    threshold, queue = rows[1:4], rows[5:]
    assert [row[0] for row in threshold] == list(kept) and len(queue) == 6
    for row in threshold[1:]:
        assert abs(value(row[3])) < 0.5, "the critical rate moved by more than half a per cent"
    assert value(threshold[0][4]) < 1.0 < value(threshold[0][5])
    for load in ("0.8", "0.95"):
        poisson, even, bursty = (value(row[3]) for row in queue if row[2] == load)
        assert even < poisson < bursty / 2
    # While any wait, bursts make the queue that the diffusion says, within what few runs tell.
    assert 0.5 < value(next(row for row in queue if row[0] == kept[2] and row[2] == "0.8")[7]) < 1.5
