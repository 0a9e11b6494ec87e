"""Records as columns: unchanged, and in few bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.records.columns import BEYOND, read_columns, write_columns

WHOLE = st.integers(-(2**61), 2**61)
RECORD = st.fixed_dictionaries(
    {
        "id": st.integers(0, 10**6),
        "scheduled_ns": st.none() | WHOLE,
        "sent_ns": st.none() | WHOLE,
        "share": st.none() | st.floats(allow_nan=False),
        "outcome": st.sampled_from(["completed", "failed"]),
        "error": st.none() | st.text(max_size=5),
        "given": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(RECORD, min_size=1, max_size=40))
def test_what_is_read_is_what_was_written(
    records: list[dict[str, Any]], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("columns") / "x.parquet"
    assert write_columns(path, records) == path.stat().st_size
    assert read_columns(path) == records


def requests(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    due = np.cumsum(rng.exponential(5e7, count)).astype(int)
    sent = due + rng.integers(50_000, 90_000, count)
    length = rng.integers(8, 56, count)
    return [
        {
            "due_ns": int(d),
            "sent_ns": None if i == 3 else int(s),
            "length": int(n),
            "most": int(n),
            "running": int(rng.integers(0, 30)),
        }
        for i, (d, s, n) in enumerate(zip(due, sent, length, strict=True))
    ]


def test_a_column_that_another_tells_takes_little(tmp_path: Path) -> None:
    records = requests(2000)
    size = write_columns(tmp_path / "all.parquet", records)
    bare = [{k: r[k] for k in ("due_ns", "length", "running")} for r in records]
    # A send lag of 40 us at random is 15 bits; a column that is the same as another is nothing.
    assert size - write_columns(tmp_path / "bare.parquet", bare) < 2000 * 2.5 + 700
    metadata = pq.read_metadata(tmp_path / "all.parquet").metadata
    assert metadata[BEYOND] == b'{"sent_ns": "due_ns", "most": "length"}'
    assert read_columns(tmp_path / "all.parquet") == records


def test_files_that_keep_every_column_whole_are_read(tmp_path: Path) -> None:
    records = requests(20)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "old.parquet")
    assert read_columns(tmp_path / "old.parquet") == records
