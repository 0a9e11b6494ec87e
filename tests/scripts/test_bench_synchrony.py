"""The bench of the detector of waves, small: what theory says of a setting must come out of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from harness.rehearsals.congestion_truth import Grown, closed_forms
from tests.scripts.program import script


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def printed(
        path: str, arguments: str, change: Callable[[ModuleType], None] = lambda module: None
    ) -> tuple[list[dict[str, str]], str]:
        module = script(path)
        change(module)
        monkeypatch.setattr(module, "sweep", lambda function, jobs, cluster: map(function, jobs))
        monkeypatch.setattr(sys, "argv", [path, *arguments.split()])
        module.main()
        out = capsys.readouterr().out
        rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line[:1] == "|"]
        return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]], out

    return printed


def test_each_side_gets_its_word(run) -> None:
    small = "--n 2 --requests 800 --load 1.3 --markdown"
    rows, out = run("bench/synchrony", f"--setting SGLang --setting fixed {small}")
    wide, alike = rows
    assert wide["synchronised, %"] == "0.0 +- 0.0" and float(wide["root"]) < 1
    assert alike["synchronised, %"] == "100.0 +- 0.0" and float(alike["root"]) > 1
    assert "wide: synchronised in 0.0" in out and "alike: synchronised in 100.0" in out


def test_losses_are_told_apart(run) -> None:
    def few(module: ModuleType) -> None:
        names = ("fixed", "slots 64/64: restart", "slots 64/64: restart, cap 0.98 x*")
        chosen = [case for case in module.cases(900) if case.name in names]
        module.cases = lambda requests: chosen
        module.run_slots = functools.partial(module.run_slots, compiled=False)

    rows, _ = run("bench/losses", "--seeds 2 --markdown", few)
    assert len(rows) == 3
    cells = [{name: text.split(" +- ")[0] for name, text in row.items()} for row in rows]
    by_case = {row["case"]: row for row in cells}
    restart, capped = by_case["slots 64/64: restart"], by_case["slots 64/64: restart, cap 0.98 x*"]
    assert float(restart["kept"]) < 0.8 < float(restart["filled"])
    assert float(capped["kept"]) == 1.0 and float(capped["evictions"]) == 0
    engine = by_case["fixed"]
    assert float(engine["kept"]) > 0.98 and float(engine["computed again"]) > 10
    for row in cells:
        shares = [float(row[name]) for name in ("filled", "kept", "first time", "other")]
        product = shares[0] * shares[1] * shares[2] * shares[3]
        assert float(row["left"]) == pytest.approx(product, abs=3e-3)


@pytest.mark.parametrize(("root", "simulated", "status"), [(0.9, 0.9, 0), (1.1, 0.9, 1)])
def test_known_truth_fails_where_a_spectrum_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    root: float,
    simulated: float,
    status: int,
) -> None:
    module = script("known_truth")
    monkeypatch.setattr(module, "closed_forms", lambda: closed_forms(((20, 32),)))
    monkeypatch.setattr(module, "spectra", lambda: [Grown("a law", root, simulated)])
    assert module.congestion(markdown=True) == status
    out = capsys.readouterr().out
    assert f"{1 - status} of 1 right" in out
    assert "| theta_1 | 20/32 |" in out and "| 97 | 0.199 |" in out
