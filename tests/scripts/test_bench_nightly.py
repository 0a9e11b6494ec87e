"""The bench of the nightly rule, small: what it prints, and that a larger drop is found more often."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/nightly")


def found(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    drop: str,
) -> list[dict[str, str]]:
    """The printed rows."""
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr(bench, "ROWS", [row for row in bench.ROWS if row.scatter == 0.015])
    small = ["--n", "12", "--pool", "0", "--drop", drop, "--markdown"]
    monkeypatch.setattr(sys, "argv", ["nightly", *small])
    bench.main()
    _, table = capsys.readouterr().out.split("\n\n")
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_a_large_drop_is_found_and_a_small_one_is_not(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (large,) = found(bench, monkeypatch, capsys, "0.20")
    (small,) = found(bench, monkeypatch, capsys, "0.005")
    assert float(large["found on its night"].split("%")[0]) == 100.0
    assert float(small["found on its night"].split("%")[0]) < 30.0
    assert float(small["false alarms a month"].split(" ")[0]) < 0.6


def test_a_late_find_is_no_false_alarm_and_a_repeated_one_is(bench: ModuleType) -> None:
    def month(at: int, alarms: set[int]) -> object:
        steady = bench.judge_nights([])
        assert steady == ()
        said = [
            bench.NightAnswer(
                answer="regression" if i in alarms else "steady",
                text="",
                change=None,
                nights=0,
                level_since=0,
                scatter=0.0,
                findable=0.0,
            )
            for i in range(30)
        ]
        return bench.Month(at, tuple(said))

    counted = [
        (m.found, m.found_later, m.false_alarms)
        for m in (  # type: ignore[attr-defined]
            month(12, {12}),
            month(12, {14}),
            month(12, {8, 14, 15}),
            month(12, {12, 13}),
        )
    ]
    assert counted == [(True, False, 0), (False, True, 0), (False, True, 2), (True, False, 1)]
