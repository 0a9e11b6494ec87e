"""Evidence that is kept: the same verdict from less than 300 kB, and nothing of the machine in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.evidence import reference
from harness.evidence.reference import export
from harness.experiments.analyse import load_evidence
from harness.records.store import Store, StoreError
from tests.harness.judged import judged_folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return judged_folder(tmp_path_factory.mktemp("kept") / "row")


def test_what_is_kept_is_small_and_says_the_same(judged: Store, tmp_path: Path) -> None:
    size = export(judged.path, tmp_path / "row")
    kept = Store.open(tmp_path / "row")
    files = sorted(str(p.relative_to(kept.path)) for p in kept.path.rglob("*") if p.is_file())
    assert not [name for name in files if name.endswith((".html", ".log", "requests.jsonl"))]
    assert size == sum(p.stat().st_size for p in kept.path.rglob("*.parquet"))
    whole = sum(p.stat().st_size for p in judged.path.glob("runs/*/*.jsonl"))
    assert size < 0.12 * whole
    said, says = (s.read_json("verdict.json") for s in (judged, kept))
    for key in ("outcome", "headline", "reasons", "advice", "warnings"):
        assert says[key] == said[key]
    for key in ("predicted", "measured", "ratio"):
        ends = ({end: one[key][end] for end in ("low", "value", "high")} for one in (says, said))
        assert next(ends) == pytest.approx(next(ends), rel=1e-4)
    for run_id in judged.whole_runs():
        one, other = judged.read_run(run_id), kept.read_run(run_id)
        for kinds in ("records", "samples"):
            to_the_microsecond(getattr(other, kinds), getattr(one, kinds))
    before, after = ((s.path / "pace.jsonl").read_text().splitlines() for s in (judged, kept))
    # Two lines of each run are of the time around it.
    assert len(after) == len(before) - 2 * len(judged.whole_runs())
    assert kept.read_json("simulated.json")["value"] == pytest.approx(
        load_evidence(kept).engine.critical_rate.value, rel=0.05
    )


def to_the_microsecond(kept: Sequence[Any], measured: Sequence[Any]) -> None:
    """Instants are the nearest microsecond, everything else is unchanged."""
    assert len(kept) == len(measured) > 0
    for one, other in zip(map(asdict, kept), map(asdict, measured), strict=True):
        for name, value in other.items():
            whole = name.endswith("_ns") and value is not None
            assert one[name] == ((value + 500) // 1000 * 1000 if whole else value), name


def test_keeping_again_replaces_and_failing_keeps_what_was_there(
    judged: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "simulate_set_law", lambda store: None)
    target = tmp_path / "row"
    export(judged.path, target)
    (target / "old.txt").write_text("")
    monkeypatch.setattr(reference, "MOST_BYTES", 1000)
    with pytest.raises(StoreError, match="1 kB are allowed: sample less often"):
        export(judged.path, target)
    assert (target / "old.txt").exists()
    monkeypatch.setattr(reference, "MOST_BYTES", 300_000)
    export(judged.path, target)
    assert not (target / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["row"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"file": "/home/me/a.csv"}', r"a path \(/home/...\)"),
        ('{"host": "THE-MACHINE"}', "its name"),
    ],
)
def test_nothing_of_the_machine_is_kept(
    judged: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.setattr(reference, "simulate_set_law", lambda store: None)
    monkeypatch.setattr(reference.platform, "node", lambda: "THE-MACHINE")
    before = (judged.path / "environment.json").read_text()
    try:
        (judged.path / "environment.json").write_text(text)
        with pytest.raises(StoreError, match=f"environment.json holds {what} of this machine"):
            export(judged.path, tmp_path / "row")
        (judged.path / "environment.json").write_text(
            '{"url": "http://a.b/home/x", "c": "a/tmp/b"}'
        )
        export(judged.path, tmp_path / "row")
    finally:
        (judged.path / "environment.json").write_text(before)


def test_a_prediction_changed_after_the_fact_is_refused_here_too(
    judged: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "simulate_set_law", lambda store: None)
    export(judged.path, tmp_path / "row")
    kept = Store.open(tmp_path / "row")
    text = (kept.path / "prediction.json").read_text()
    (kept.path / "prediction.json").write_text(text.replace('"claim"', '"claim" ', 1))
    with pytest.raises(StoreError, match=r"under another prediction\.json"):
        load_evidence(kept)
