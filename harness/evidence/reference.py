"""Evidence that is small enough to keep: a judged results folder, its streams as Parquet."""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from analysis.verdicts.replica_verdict import verdict_of
from analysis.verdicts.verdict import Verdict
from harness.configs.launch import PACE_LOG
from harness.evidence.evidence_rows import SIMULATED, simulate_set_law
from harness.experiments.analyse import load_evidence
from harness.records.columns import write_columns
from harness.records.store import STAGES, Store, StoreError

MOST_BYTES = 300_000
"""Of the Parquet of one row."""
INSTANT_NS = 1000
"""Instants are kept to the microsecond: measured rates move by a hundred-millionth of themselves."""
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|root|tmp|usr|opt|var|mnt|data|work|Users)/")


def export(source: Path, target: Path) -> int:
    """Write the evidence of a judged folder to ``target``, in place of what is there.

    The streams of its runs become Parquet; the JSON files stay byte by byte, since the prediction has
    digests of them; reports and the engine's log are left out. Beside them goes the verdict on what is
    kept, and what the scheduler model makes of the law that the engine was set to. The bytes of Parquet
    come back. Raises StoreError when they are too many, when a file names this machine or a path on it,
    or when what is kept says otherwise than ``source``.
    """
    judged = Store.open(source)
    if not judged.has("verdict.json"):
        raise StoreError(f"{source} has no verdict: judge it first, with critrate analyse")
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for name in ("schema.json", *STAGES):
            shutil.copyfile(source / name, new / name)
        size = sum(_keep_run(judged, run_id, new) for run_id in judged.whole_runs())
        if size > MOST_BYTES:
            raise StoreError(
                f"{source}: its records take {size / 1000:.0f} kB, {MOST_BYTES / 1000:.0f} kB are "
                "allowed: sample less often (sample_interval_s) or shorten the runs"
            )
        _keep_pace(judged, new)
        _require_nameless(new)
        kept = Store.open(new)
        verdict = verdict_of(load_evidence(kept))
        if not _agree(verdict, verdict_of(load_evidence(judged))):
            raise StoreError(f"{source}: another verdict would come of what is kept")
        kept.write_json("verdict.json", verdict.to_dict())
        if (simulated := simulate_set_law(kept)) is not None:
            kept.write_json(SIMULATED, simulated.to_dict())
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return size


def _keep_run(judged: Store, run_id: str, new: Path) -> int:
    """Copy a run with its streams as Parquet; their bytes come back."""
    source, target = judged.path / "runs" / run_id, new / "runs" / run_id
    target.mkdir(parents=True)
    for name in ("run.json", "end.json"):
        shutil.copyfile(source / name, target / name)
    size = 0
    for name in judged.streams_of(run_id):
        lines = (source / f"{name}.jsonl").read_text().splitlines()
        records = [_to_the_microsecond(json.loads(line)) for line in lines]
        size += write_columns(target / f"{name}.parquet", records)
    return size


def _to_the_microsecond(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: (value + INSTANT_NS // 2) // INSTANT_NS * INSTANT_NS
        if key.endswith("_ns") and value is not None
        else value
        for key, value in record.items()
    }


def _agree(kept: Verdict, judged: Verdict) -> bool:
    """Do they say the same of the experiment and of each run, and measure the same to a 1000th part?"""

    def words(verdict: Verdict) -> tuple[object, ...]:
        return (
            verdict.outcome,
            verdict.headline,
            [(run.id, run.verdict) for run in verdict.runs],
            [(check.name, check.holds) for check in (*verdict.premises, *verdict.audit)],
            verdict.measured is None,
        )

    if words(kept) != words(judged):
        return False
    if kept.measured is None or judged.measured is None:
        return True
    pairs = ((getattr(x.measured, end) for x in (kept, judged)) for end in ("low", "value", "high"))
    return all(math.isclose(*pair, rel_tol=1e-3) for pair in pairs)


def _keep_pace(judged: Store, new: Path) -> None:
    """The lines of a paced engine's record that fall into a run: the others are of the probes."""
    spans = [(run.start_ns, run.end_ns) for run in map(judged.read_run, judged.whole_runs())]
    for log in sorted(judged.path.glob(PACE_LOG.replace(".", "*."))):
        lines = log.read_text().splitlines(keepends=True)
        instants = [json.loads(line)["t_ns"] for line in lines]
        inside = [
            line
            for line, t_ns in zip(lines, instants, strict=True)
            if any(start_ns < t_ns <= end_ns for start_ns, end_ns in spans)
        ]
        (new / log.name).write_text("".join(inside))


def _require_nameless(folder: Path) -> None:
    """Raise StoreError where a text file holds a path of a machine, or this machine's name."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".yaml", ".jsonl"):
            continue
        text = path.read_text()
        found = MACHINE_PATH.search(text)
        name = platform.node()
        if found is not None or (len(name) > 3 and name in text):
            what = f"a path ({found.group()}...)" if found else "its name"
            raise StoreError(
                f"{path.name} holds {what} of this machine: use a relative path in the config, and "
                "lengths that ship with the package"
            )
