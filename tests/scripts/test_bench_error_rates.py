"""The bench of error rates, small: rows are kept, and not computed twice."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts.program import script

SMALL = "experiments --n 4 --setting wide --cell 1 --truth 2000 --markdown"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench/error_rates")


def test_rows_are_kept_and_other_code_does_not_mix_with_them(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    done: list[object] = []

    def here(function, jobs, cluster=None, progress=None):  # type: ignore[no-untyped-def]
        for job in jobs:
            done.append(job)
            yield function(job)

    monkeypatch.setattr(bench, "sweep", here)
    monkeypatch.setattr(sys, "argv", ["error_rates", *SMALL.split(), "--out", str(tmp_path)])
    bench.main()
    first = capsys.readouterr().out
    cells = first.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:3] == ["wide", "1", "4"]
    assert float(cells[3].split(" +-")[0]) >= 50.0
    assert len((tmp_path / "experiments" / "wide.jsonl").read_text().splitlines()) == 4
    jobs = len(done)
    bench.main()
    # Only the truth was looked for again.
    assert len(done) == jobs + 1
    assert capsys.readouterr().out == first
    (tmp_path / "experiments" / "code").write_text("another\n")
    with pytest.raises(SystemExit, match="made by other code"):
        bench.main()
