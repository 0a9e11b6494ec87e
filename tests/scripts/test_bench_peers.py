"""The bench of other tools' rules, small: what it prints must tell a good rule from a bad one."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return script("bench/peers")


def number(cell: str) -> float:
    """The value before its error."""
    text = cell.split("+-")[0].strip()
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


def test_the_tables(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "sweep", lambda function, jobs, cluster: map(function, jobs))
    small = "--seeds 4 --requests 2000 --truth 3000 --rho 0.8 --rho 1.2 --setting wide --markdown"
    monkeypatch.setattr(sys, "argv", ["peers", *small.split()])
    peers.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    loads = {row[1]: dict(zip(peers.RULES, row[2:], strict=True)) for row in rows[2:4]}
    rates = dict(zip(("setting", *peers.RATES), rows[7], strict=False))
    assert list(loads) == ["0.80", "1.20"]
    for rule in ("critrate: grows", "above burst", "line, t > 1.645"):
        assert number(loads["1.20"][rule]) == 1.0, f"{rule}: misses a load 20 % too high"
    assert number(loads["0.80"]["critrate: grows"]) == 0.0
    assert number(loads["0.80"]["critrate: stable"]) > 0.5
    assert number(rates["critrate / true"]) == pytest.approx(1.0, abs=0.01)
    assert number(rates["burst / true"]) < 1.0, "a burst has a ramp and a drain"
    assert number(rates["burn-down / true"]) > 1.1, "the best half seconds are not sustained"
