"""The bench of explanations, small: the rest is small beside the gap, on servers of either engine."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import numpy as np
import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/explain")


def test_the_causes_account_for_nine_tenths_of_the_gap(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    names = ("fixed", "sequence-bound", "SGLang")
    settings = " ".join(f"--setting={name}" for name in names)
    monkeypatch.setattr(sys, "argv", ["explain", *f"--seeds 2 {settings} --markdown".split()])
    bench.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    heads, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)
    found = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [row["setting"] for row in found] == list(names)
    for row in found:
        assert float(row["gap"]) < 0.95
        assert float(row["by the run"].split()[0]) > 90.0
        assert abs(float(row["unexplained"].split()[0]) - 1.0) < 0.01


def test_what_is_not_known_is_left_out_of_a_mean(bench: ModuleType) -> None:
    values = np.array([0.9, math.nan, 1.0])
    assert bench.mean(values, 1, 100.0) == "95.0 +- 5.0 %"
    assert bench.mean(np.array([math.nan] * 3), 1, 100.0) == "no gap"
