"""The bench of answers at nearly the critical rate, small: each side of it must get its own answer."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/settling")


def test_each_side_gets_its_answer(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    small = "--seeds 1 --truth 2000 --setting wide --rho 0.95 --rho 1.0 --rho 1.05 --markdown"
    monkeypatch.setattr(sys, "argv", ["settling", *small.split()])
    bench.main()
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    said = {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    for rho, answer in (("0.95", "bounded"), ("1.00", "sqrt(t)"), ("1.05", "linear")):
        assert said[rho][answer].startswith("100.0%"), said[rho]
        assert said[rho]["wrong"].startswith("0.0%")
    assert "wide: true rate" in out


@pytest.mark.parametrize(
    ("rho", "growth", "wrong"),
    [
        (0.98, "bounded", False),
        (1.0, "bounded", True),
        (1.0, "linear", True),
        (1.02, "linear", False),
        (1.02, "sqrt(t)", False),
        (0.95, "sqrt(t)", True),
        (1.05, "sqrt(t)", True),
        (1.05, "cannot say", False),
    ],
)
def test_what_counts_as_wrong(bench: ModuleType, rho: float, growth: str, wrong: bool) -> None:
    assert bench.wrong(rho, growth) is wrong
