"""The history of finished experiments: one SQLite file, one row each, safe against two writers.

A changed environment is a break: nights before it and after it are never one series.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from analysis.numbers.estimate import Estimate
from harness.records.streams import StorageFull, StoreError

SCHEMA_VERSION = 1
WAIT_S = 60.0
"""Another writer is waited for so long: it holds the file for one row."""
LEVEL = 0.95
"""Of the intervals of both rates."""
POOL_TOLERANCE = 0.005
"""An engine that profiles its memory comes to a few blocks more or fewer at each start."""
FINGERPRINT = ("config_digest", "engine", "engine_version", "driver", "device", "pool_tokens")
"""What makes a break when it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One finished experiment. None: it was not measured, or there is nothing of the kind."""

    experiment: str
    """SHA-256 of environment.json, which holds the instant at which it began: no two have the same."""
    began: str
    """UTC, ISO 8601."""
    name: str
    config_digest: str
    engine: str
    engine_version: str | None
    driver: str | None
    device: str
    """GPUs that the engine uses, or the processor where it uses none."""
    host: str
    critrate: str
    predicted: float
    predicted_low: float
    predicted_high: float
    measured: float | None
    measured_low: float | None
    measured_high: float | None
    b0_s: float
    b1_s_per_token: float
    b2_s_per_kv_token: float
    b3_s_per_request: float
    step_s: float | None
    """Mean engine step of the run with the greatest load."""
    sm_clock_mhz: float | None
    """Median over the samples of all runs."""
    pool_tokens: int
    binding: str
    binding_observed: str | None
    limits: str
    """JSON of the limits that the prediction used, admission rule included."""
    outcome: str
    folder: str

    @property
    def rate(self) -> Estimate | None:
        """The measured critical rate, None where it was not measured."""
        if self.measured is None or self.measured_low is None or self.measured_high is None:
            return None
        return Estimate(
            self.measured, self.measured_low, self.measured_high, LEVEL, "req/s", "measured"
        )

    @property
    def claim(self) -> Estimate:
        """The predicted critical rate."""
        low, high = self.predicted_low, self.predicted_high
        return Estimate(self.predicted, low, high, LEVEL, "req/s", "predicted")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


COLUMNS = {field.name: str(field.type) for field in fields(Entry)}
SQL_TYPES = {"str": "TEXT", "float": "REAL", "int": "INTEGER"}


class History:
    """A history file. Made by the first entry; reading one that is not there is an error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entries: Sequence[Entry]) -> int:
        """Add entries in one transaction: all or none. Those already there are left as they are.

        Returns how many were new. Raises StorageFull, StoreError; what was there before stays.
        """
        with self._open(make=True) as connection:
            connection.execute("BEGIN IMMEDIATE")
            self._make_or_check(connection)
            before = connection.total_changes
            names = ", ".join(COLUMNS)
            marks = ", ".join("?" * len(COLUMNS))
            connection.executemany(
                f"INSERT INTO experiments ({names}) VALUES ({marks}) "
                "ON CONFLICT (experiment) DO NOTHING",
                (tuple(asdict(entry).values()) for entry in entries),
            )
            added = connection.total_changes - before
            connection.execute("COMMIT")
        return added

    def entries(self) -> list[Entry]:
        """All entries in the order in which the experiments began. Raises StoreError."""
        with self._open(make=False) as connection:
            self._make_or_check(connection, make=False)
            rows = connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM experiments ORDER BY began, experiment"
            ).fetchall()
        return [Entry(**dict(zip(COLUMNS, row, strict=True))) for row in rows]

    @contextlib.contextmanager
    def _open(self, make: bool) -> Iterator[sqlite3.Connection]:
        if not make and not self.path.exists():
            raise StoreError(
                f"{self.path} does not exist: `critrate history {self.path} --add FOLDER` begins it"
            )
        try:
            with contextlib.closing(
                sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
            ) as connection:
                # A row is on the disk itself when it is said to be; whatever ends this process before
                # leaves the file as it was.
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
        except sqlite3.Error as error:
            raise _said(error, self.path) from error

    def _make_or_check(self, connection: sqlite3.Connection, make: bool = True) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and make:
            columns = ", ".join(f"{name} {_sql_type(kind)}" for name, kind in COLUMNS.items())
            connection.execute(f"CREATE TABLE experiments ({columns}, PRIMARY KEY (experiment))")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} is no history of version {SCHEMA_VERSION}: name another file, or use "
                "the critrate that wrote it"
            )


def _sql_type(kind: str) -> str:
    name, _, rest = kind.partition(" | ")
    return SQL_TYPES[name] + ("" if rest else " NOT NULL")


def _said(error: sqlite3.Error, path: Path) -> StoreError:
    code = getattr(error, "sqlite_errorcode", None)
    kept = "what it held before is kept, and nothing of this was added"
    # The low byte is the kind; the others say which call it was.
    if code is not None and code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return StorageFull(f"no room to write {path} ({error}): {kept}; make room and add it again")
    if code is not None and code & 0xFF == sqlite3.SQLITE_BUSY:
        return StoreError(
            f"another process has held {path} for {WAIT_S:g} s: {kept}; add it again when that ended"
        )
    if code is not None and code & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreError(f"{path} is no history, or damaged ({error}): restore it from a copy")
    return StoreError(f"cannot use {path} ({error}): {kept}")


# -- breaks --------------------------------------------------------------------------------------


def environment_change(before: Entry, after: Entry) -> dict[str, tuple[Any, Any]]:
    """What of the fingerprint differs, each with its value before and after; empty: no break."""
    changed = {}
    for name in FINGERPRINT:
        old, new = getattr(before, name), getattr(after, name)
        if name == "pool_tokens" and abs(new - old) <= POOL_TOLERANCE * old:
            continue
        if old != new:
            changed[name] = (old, new)
    return changed


def segments(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries of one name, in their order, cut at each break.

    Each is compared with the first of its segment, so that a pool cannot creep away unseen.
    """
    found: list[list[Entry]] = []
    for entry in entries:
        if found and not environment_change(found[-1][0], entry):
            found[-1].append(entry)
        else:
            found.append([entry])
    return found


def limits_change(before: Entry, after: Entry) -> dict[str, tuple[Any, Any]]:
    """Limits that differ, such as the watermark of admission, with their values before and after."""
    old, new = json.loads(before.limits), json.loads(after.limits)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


# -- Parquet -------------------------------------------------------------------------------------


def write_parquet(entries: Sequence[Entry], path: Path) -> None:
    """All entries as one Parquet file, whole or not at all. Raises StorageFull, StoreError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from harness.records.streams import storage_error

    table = pa.Table.from_pylist([entry.to_dict() for entry in entries], schema=_arrow_schema())
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(error, path, "nothing of it is kept") from error


def read_parquet(path: Path) -> list[Entry]:
    """Entries of a file that `write_parquet` wrote, whose columns may stand in any order.

    Raises StoreError for another file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _arrow_schema()
    try:
        table = pq.read_table(path).select(schema.names).cast(schema)
        return [Entry(**row) for row in table.to_pylist()]
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"{path} is no Parquet file of a history: {error}") from error


def _arrow_schema() -> Any:
    import pyarrow as pa

    kinds = {"str": pa.string(), "float": pa.float64(), "int": pa.int64()}
    return pa.schema(
        [
            pa.field(name, kinds[kind.partition(" | ")[0]], nullable=" | " in kind)
            for name, kind in COLUMNS.items()
        ]
    )
