"""The bench of flow control, small: no overflow under its condition, the normal tail without one."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts.program import script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/flow_control")


def test_overflow_follows_the_normal_tail(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(bench, "sweep", lambda function, jobs, cluster: map(function, jobs))
    monkeypatch.setattr(bench, "SLACKS", (0.0, 1.0, 4.0))
    figure = tmp_path / "overflow.svg"
    monkeypatch.setattr(
        sys, "argv", ["flow_control", "--slots", "20000", "--markdown", "--figure", str(figure)]
    )
    bench.main()
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")][2:]
    alone = [float(row[2].split(" ")[0]) for row in rows]
    normal, bound = ([float(row[k]) for row in rows] for k in (5, 6))
    assert alone[0] == pytest.approx(normal[0], abs=0.05)
    assert alone[1] == pytest.approx(normal[1], abs=0.03)
    assert all(seen <= most for seen, most in zip(alone, bound, strict=True))
    assert float(rows[2][3].split(" ")[0]) < 0.01
    assert re.search(r"known lengths: 0 of 20000 slots overflow", out)
    assert figure.read_text().startswith("<svg")
