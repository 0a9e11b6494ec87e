"""The results folder: names, append-only streams, atomic files, what is there and what is missing.

results/README.md states the schema.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from analysis.schedulers.engine import EngineSample
from harness import __version__
from harness.records.streams import (
    KEPT,
    DamagedRecord,
    JsonLines,
    StorageFull,
    StoreError,
    as_json,
    finite,
    holds_records,
    of_replica,
    read_lines,
    storage_error,
)
from loadgen.records import RequestRecord, Run

__all__ = [
    "DamagedRecord",
    "JsonLines",
    "StorageFull",
    "Store",
    "StoreError",
    "StoredRun",
    "missing",
]

SCHEMA_VERSION = 1
EndReason = Literal["horizon", "interrupted", "server gone"]
STAGES = {
    "config.yaml": "the configuration",
    "environment.json": "where it ran",
    "limits.json": "the server's limits",
    "calibration.json": "the calibration",
    "prediction.json": "the prediction",
    "plan.json": "the planned runs",
    "verdict.json": "the verdict",
}
"""Files of a finished experiment, in the order in which they come to be."""


RETIRED = ("truncated",)
"""Columns of engine samples in older folders that nothing reads any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """One run as it lies on disk; its fields are what `analysis.schedulers.frames.run_frames` wants.

    ``end`` is end.json, or None for a run that was cut off; then ``end_ns`` is the last instant
    that any stream mentions.
    """

    run: Run
    start_ns: int
    end_ns: int
    prediction_digest: str
    end: dict[str, Any] | None
    records: list[RequestRecord]
    samples: list[EngineSample]
    gpu: list[dict[str, Any]]
    warnings: tuple[str, ...]
    by_replica: tuple[list[EngineSample], ...] = ()
    """The samples of each of several servers; empty where there is one."""


STREAMS = ("requests", "engine", "gpu")
"""What a run records while it lasts; in kept evidence as Parquet. Of several servers each has its
engine-<i>."""
INPUTS = ("config.yaml", "limits.json")
"""Files that a prediction and the thresholds of its verdict are made from: their digests stand in it."""


class Store:
    """One experiment's folder. Use `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path) -> Store:
        """A new folder, or an unfinished one to go on with. Raises StoreError if it is neither."""
        if (path / "schema.json").exists():
            store = Store.open(path)
            if store.has("verdict.json"):
                raise StoreError(
                    f"{path} holds a finished experiment: choose another name, such as "
                    f"{_free_name(path)}"
                )
            return store
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(
                f"{path} exists and is no result of critrate: choose another name, such as "
                f"{_free_name(path)}"
            )
        path.mkdir(parents=True, exist_ok=True)
        store = Store(path)
        store.write_json("schema.json", {"schema_version": SCHEMA_VERSION, "critrate": __version__})
        return store

    @staticmethod
    def open(path: Path) -> Store:
        """An existing folder. Raises StoreError if it is none of ours or of another schema."""
        store = Store(path)
        if not store.has("schema.json"):
            raise StoreError(f"{path} is no results folder: it has no schema.json")
        version = store.read_json("schema.json").get("schema_version")
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema version {version}, this critrate reads {SCHEMA_VERSION}: use "
                "the version that wrote it"
            )
        return store

    # -- files -----------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all. Raises StorageFull; what was there before stays."""
        target = self.path / name
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            kept = "the file as it was before is kept" if target.exists() else "nothing is kept"
            raise storage_error(error, target, kept) from error

    def write_json(self, name: str, data: Any) -> None:
        plain = finite(json.loads(as_json(data)))
        self.write_text(name, json.dumps(plain, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Raises StoreError when the file is not there or no JSON object."""
        path = self.path / name
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError as error:
            what = STAGES.get(name, name)
            raise StoreError(f"{self.path} has no {name}: {what} was not written yet") from error
        except ValueError as error:
            raise StoreError(f"{path} is no JSON ({error}): restore it") from error
        if not isinstance(data, dict):
            raise StoreError(f"{path} holds no JSON object: restore it")
        return data

    def digest(self, name: str) -> str:
        """SHA-256 of a file's bytes, in hexadecimal."""
        try:
            return hashlib.sha256((self.path / name).read_bytes()).hexdigest()
        except FileNotFoundError as error:
            raise StoreError(f"{self.path} has no {name} to take the digest of") from error

    # -- runs ------------------------------------------------------------------------------------

    def run_ids(self) -> list[str]:
        """Identifiers of the runs that were begun, sorted."""
        return sorted(p.parent.name for p in self.path.glob("runs/*/run.json"))

    def whole_runs(self) -> list[str]:
        """Identifiers of the runs that came to an end and recorded something."""
        return [
            run_id
            for run_id in self.run_ids()
            if (self.path / "runs" / run_id / "end.json").exists()
            and holds_records(self.path / "runs" / run_id / "requests.jsonl")
        ]

    def begin_run(self, run: Run, start_ns: int, start_wall: str, prediction_digest: str) -> None:
        """Make the run's folder. A cut-off attempt at it is moved to superseded/.

        Raises StoreError when the run has already ended.
        """
        folder = self._run_folder(run.id)
        if (folder / "end.json").exists():
            raise StoreError(f"run {run.id} in {self.path} has ended already: it is not repeated")
        if folder.exists():
            aside = self.path / "superseded"
            aside.mkdir(exist_ok=True)
            attempt = 1 + sum(1 for _ in aside.glob(f"{run.id}.*"))
            folder.rename(aside / f"{run.id}.{attempt}")
        folder.mkdir(parents=True)
        self.write_json(
            f"runs/{run.id}/run.json",
            {
                "run": asdict(run),
                "start_ns": start_ns,
                "start_wall": start_wall,
                "prediction_digest": prediction_digest,
            },
        )

    def stream(
        self,
        run_id: str,
        name: Literal["requests", "engine", "gpu"],
        flush_s: float = 1.0,
        replica: tuple[int, int] = (0, 1),
    ) -> JsonLines:
        """A writer for one of the run's streams, or that of one replica: its index, and how many."""
        return JsonLines(self._run_folder(run_id) / of_replica(f"{name}.jsonl", *replica), flush_s)

    def end_run(
        self,
        run_id: str,
        end_ns: int,
        reason: EndReason,
        sampler: Any = None,
        samplers: Sequence[Any] = (),
    ) -> None:
        """Close the run; its streams count as whole from then on.

        ``sampler``: its statistics; ``samplers``: those of each where several servers were sampled.
        """
        end: dict[str, Any] = {"end_ns": end_ns, "reason": reason, "sampler": sampler}
        if samplers:
            end["samplers"] = list(samplers)
        self.write_json(f"runs/{run_id}/end.json", end)

    def streams_of(self, run_id: str) -> list[str]:
        """Names of the streams that the run has, sorted, such as "engine" or "engine-1"."""
        folder = self._run_folder(run_id)
        found = {p.stem for suffix in (".jsonl", KEPT) for p in folder.glob(f"*{suffix}")}
        known = [name for name in found if name.partition("-")[0] in STREAMS]
        return sorted(
            known, key=lambda name: (STREAMS.index(name.partition("-")[0]), _number(name))
        )

    def read_run(self, run_id: str) -> StoredRun:
        """A run with all its records, cut off or not. Raises StoreError, DamagedRecord."""
        folder = self._run_folder(run_id)
        head = self.read_json(f"runs/{run_id}/run.json")
        records, torn_1 = read_lines(folder / "requests.jsonl", lambda d: RequestRecord(**d))
        engines = [s for s in self.streams_of(run_id) if s.startswith("engine-")] or ["engine"]
        seen = [read_lines(folder / f"{name}.jsonl", _engine_sample) for name in engines]
        samples = [sample for own, _ in seen for sample in own]
        gpu, torn_3 = read_lines(folder / "gpu.jsonl", dict)
        warnings = [w for w in (torn_1, *(torn for _, torn in seen), torn_3) if w is not None]
        end = self.read_json(f"runs/{run_id}/end.json") if (folder / "end.json").exists() else None
        if end is None:
            warnings.append(
                f"run {run_id} was cut off: requests that were in the system then left no record, "
                "so that N(t) by the client is too low; use the engine's samples"
            )
            times = (*_request_times(records), *(s.t_ns for s in samples), head["start_ns"])
            end_ns = max(times)
        else:
            end_ns = end["end_ns"]
        return StoredRun(
            run=Run.from_dict(head["run"]),
            start_ns=head["start_ns"],
            end_ns=end_ns,
            prediction_digest=head["prediction_digest"],
            end=end,
            records=records,
            samples=samples,
            gpu=gpu,
            warnings=tuple(warnings),
            by_replica=() if engines == ["engine"] else tuple(own for own, _ in seen),
        )

    def _run_folder(self, run_id: str) -> Path:
        if not run_id or Path(run_id).name != run_id or run_id.startswith("."):
            raise StoreError(f"{run_id!r} cannot name a run: it is used as a folder's name")
        return self.path / "runs" / run_id


def missing(path: Path) -> list[str]:
    """What a results folder lacks, one sentence each; empty for a finished experiment."""
    store = Store.open(path)
    lacks = [f"{name} ({what}) is missing" for name, what in STAGES.items() if not store.has(name)]
    begun = store.run_ids()
    if not begun:
        lacks.append("no run was begun")
    planned = store.read_json("plan.json").get("runs", []) if store.has("plan.json") else []
    lacks += [f"run {r['id']} was not begun" for r in planned if r["id"] not in begun]
    for run_id in begun:
        try:
            stored = store.read_run(run_id)
        except StoreError as error:
            lacks.append(f"run {run_id} cannot be read: {error}")
            continue
        if stored.end is None:
            got_s = (stored.end_ns - stored.start_ns) / 1e9
            lacks.append(
                f"run {run_id} has no end: it got to {got_s:.1f} of {stored.run.horizon_s:g} s, "
                f"{len(stored.records)} requests and {len(stored.samples)} samples are kept"
            )
    return lacks


def _engine_sample(line: dict[str, Any]) -> EngineSample:
    return EngineSample(**{key: line[key] for key in line if key not in RETIRED})


def _number(name: str) -> int:
    _, _, number = name.partition("-")
    return int(number) if number.isdigit() else -1


def _request_times(records: list[RequestRecord]) -> Iterator[int]:
    for r in records:
        yield from (t for t in (r.sent_ns, r.last_token_ns) if t is not None)


def _free_name(path: Path) -> Path:
    number = 2
    while (free := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return free


def _sync_folder(folder: Path) -> None:
    """A rename is only on the disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
