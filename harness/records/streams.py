"""Append-only files of one JSON object per line, written beside the load, safe against a kill."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from loadgen.mendable import Mendable

T = TypeVar("T")
KEPT = ".parquet"
"""Suffix of the file that evidence keeps of a stream."""


class StoreError(Mendable):
    """The results folder cannot be used as asked; the message says what to do."""


class StorageFull(StoreError):
    """The disk took no more; the message says what is safely on it."""


class DamagedRecord(StoreError):
    """A line inside a stream is not a record."""


def of_replica(name: str, index: int, count: int) -> str:
    """The file of one of ``count`` servers: engine.log is engine-1.log of the second of several."""
    stem, dot, suffix = name.partition(".")
    return name if count == 1 else f"{stem}-{index}{dot}{suffix}"


def as_json(data: Any, **options: Any) -> str:
    """JSON of plain data, dataclasses, paths and numpy scalars and arrays."""
    return json.dumps(data, default=_plain, **options)


def finite(data: Any) -> Any:
    """The same plain data with null for what JSON has no number for: NaN and the infinities."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


class JsonLines:
    """An append-only file of one JSON object per line.

    ``write`` only puts a line into memory; a thread of the stream's own hands what has gathered to
    the operating system every ``flush_s`` seconds, written to or not. A process that is killed thus
    loses at most the last ``flush_s`` seconds, and a slow disk never holds up the caller.
    """

    def __init__(self, path: Path, flush_s: float = 1.0) -> None:
        self.path = path
        self.lines_kept = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size
        self._pending: list[str] = []
        self._lock = threading.Lock()
        self._error: StoreError | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_flushing, args=(flush_s,), name=f"flush {path.name}", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, record: Any) -> None:
        """Append a record (a dataclass or a mapping). Raises StorageFull once the disk was full."""
        if self._error is not None:
            raise self._error
        if self._closing.is_set():
            raise ValueError(f"{self.path} is closed")
        line = as_json(record, separators=(",", ":"), allow_nan=False)
        with self._lock:
            self._pending.append(line)

    def close(self) -> None:
        """Put everything on the disk itself. Raises StorageFull; a second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        self._flush()
        try:
            if self._error is None:
                os.fsync(self._file)
        except OSError as error:
            self._error = self._failure(error, 0)
        finally:
            os.close(self._file)
        if self._error is not None:
            raise self._error

    def _keep_flushing(self, flush_s: float) -> None:
        while not self._closing.wait(flush_s):
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._pending = self._pending, []
        if not lines or self._error is not None:
            return
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            # Keep the whole lines that went through and cut the torn one off.
            whole = bytes(data[:written]).rfind(b"\n") + 1
            kept = bytes(data[:whole]).count(b"\n")
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size + whole)
            self.lines_kept += kept
            self._error = self._failure(error, len(lines) - kept)
            return
        self._size += len(data)
        self.lines_kept += len(lines)

    def _failure(self, error: OSError, lost: int) -> StoreError:
        return storage_error(
            error, self.path, f"{self.lines_kept} records of it are kept, {lost} are lost"
        )


def storage_error(error: OSError, path: Path, kept: str) -> StoreError:
    """The error to raise for a failed write; ``kept`` says what is safe."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(f"no space left for {path}: {kept}; make room and run again")
    return StoreError(f"cannot write {path} ({error.strerror}): {kept}")


def holds_records(path: Path) -> bool:
    """Is there a record in a stream, or in the Parquet that is kept of it?"""
    return path.stat().st_size > 0 if path.exists() else path.with_suffix(KEPT).exists()


def read_lines(path: Path, make: Callable[[dict[str, Any]], T]) -> tuple[list[T], str | None]:
    """The records of a stream, and a warning if its last line is torn and was dropped.

    Where Parquet is kept in its place, that is read; a stream that does not exist has no records.
    Raises DamagedRecord for any other bad line.
    """
    if not path.exists():
        if not path.with_suffix(KEPT).exists():
            return [], None
        # Only kept evidence needs it: other commands start without.
        from harness.records.columns import read_columns

        return [make(record) for record in read_columns(path.with_suffix(KEPT))], None
    *lines, rest = path.read_bytes().split(b"\n")
    warning = None
    if rest:
        warning = (
            f"{path}: its last line is torn ({len(rest)} bytes) and was left out; the writer was "
            "stopped in the middle of it"
        )
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(make(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DamagedRecord(
                f"{path}, line {number} is no record ({error}): restore the file or repeat the run"
            ) from error
    return records, warning
