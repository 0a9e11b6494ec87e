"""Streams as Parquet: the same records in a tenth of their bytes, for evidence that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LEVEL = 19
"""Of zstd: written once, read often."""


def write_columns(path: Path, records: Sequence[dict[str, Any]]) -> int:
    """Write records that share their keys, in their order; the bytes of the file come back.

    Integers, which are instants and counters for the most part, are kept as differences.
    """
    table = pa.Table.from_pylist(list(records))
    integers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=LEVEL,
        use_dictionary=[name for name in table.column_names if name not in integers],
        column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED"),
        write_statistics=False,
    )
    return path.stat().st_size


def read_columns(path: Path) -> list[dict[str, Any]]:
    """The records of `write_columns`, unchanged."""
    records: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return records
