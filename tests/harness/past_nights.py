"""Entries of a history, and folders of finished experiments, for tests."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from harness.evidence.history import Entry
from harness.evidence.history_entry import entry_of
from harness.records.store import Store

KEPT = Path(__file__).resolve().parents[2] / "results" / "reference" / "vllm_fixed_64_64"
FILES = ("schema.json", "config.yaml", "environment.json", "limits.json", "calibration.json")


def finished(
    folder: Path, began: str = "2026-11-22T02:00:00+00:00", factor: float = 1.0, **changes: object
) -> Path:
    """A folder like the kept one, measured at ``factor`` times its rate; changes go to the verdict."""
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(KEPT / name, folder)
    where = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**where, "wall_time": began}))
    verdict = json.loads((KEPT / "verdict.json").read_text())
    for key in ("value", "low", "high"):
        verdict["measured"][key] *= factor
    (folder / "verdict.json").write_text(json.dumps({**verdict, **changes}))
    return folder


def kept_entry() -> Entry:
    return entry_of(Store.open(KEPT))


def past(factors: list[float], **changes: object) -> list[Entry]:
    """A night each of November 2026, at these multiples of the kept rate, with half widths of 1 %."""
    kept = kept_entry()
    found = []
    for day, factor in enumerate(factors, start=1):
        rate = factor * 28.0
        night = replace(
            kept,
            experiment=f"{day:064d}",
            began=f"2026-11-{day:02d}T02:00:00+00:00",
            measured=rate,
            measured_low=0.99 * rate,
            measured_high=1.01 * rate,
        )
        found.append(replace(night, **changes))  # type: ignore[arg-type]
    return found
