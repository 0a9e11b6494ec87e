from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.schedulers.engine import EngineSample
from analysis.schedulers.frames import run_frames
from harness.machine.gpu_reader import GpuSample
from harness.records.store import (
    DamagedRecord,
    JsonLines,
    Store,
    StoreError,
    missing,
)
from harness.records.streams import read_lines
from loadgen.records import RequestRecord, Run

ROOT = Path(__file__).resolve().parents[2]
RUN = Run(id="0.90-1", arrival_rate=3.0, horizon_s=60.0, warmup_s=10.0, seed=7)
RECORD = RequestRecord(
    id=0,
    scheduled_ns=1_000,
    sent_ns=1_100,
    first_token_ns=2_000_000_000,
    last_token_ns=3_000_000_000,
    prompt_tokens=16,
    output_tokens_designed=4,
    max_tokens=4,
    output_tokens=4,
    prompt_tokens_reported=16,
    outcome="completed",
    status=200,
)
SAMPLE = EngineSample(
    read_ns=5_000_000_000,
    t_ns=5_500_000_000,
    waiting=1,
    running=2,
    kv_usage=0.25,
    preemptions=0,
    prompt_tokens=16,
    generation_tokens=4,
    steps=4,
    step_tokens=20,
    finished=1,
    rejected=0,
    prefix_hit_tokens=0,
)
GPU = GpuSample(
    t_ns=6,
    gpu=0,
    utilization=0.5,
    memory_bytes=1,
    power_w=None,
    sm_clock_mhz=1,
    memory_clock_mhz=1,
    temperature_c=1,
    throttle_reasons=0,
    ecc_corrected=0,
    ecc_uncorrected=None,
)


def child(code: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def written_run(store: Store, end: bool = True) -> None:
    store.begin_run(RUN, 1_000, "2026-01-01T00:00:00+00:00", "abc")
    with store.stream(RUN.id, "requests") as stream:
        stream.write(RECORD)
        stream.write(replace(RECORD, id=1, last_token_ns=None, outcome="unfinished"))
    with store.stream(RUN.id, "engine") as stream:
        stream.write(SAMPLE)
    with store.stream(RUN.id, "gpu") as stream:
        stream.write(GPU)
    if end:
        store.end_run(RUN.id, 60_000_001_000, "horizon", {"ticks": 600})


def test_a_sample_of_an_older_folder_can_be_read(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "out")
    written_run(store)
    stream = store.path / "runs" / RUN.id / "engine.jsonl"
    stream.write_text(stream.read_text().replace("{", '{"truncated": 3, ', 1))
    assert store.read_run(RUN.id).samples == [SAMPLE]
    stream.write_text(stream.read_text().replace("{", '{"unheard_of": 3, ', 1))
    with pytest.raises(DamagedRecord, match="unheard_of"):
        store.read_run(RUN.id)


# -- streams -------------------------------------------------------------------------------------


def test_killed_writer_loses_at_most_the_flush_interval(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    writer = child(
        """
import pathlib, sys, time
from harness.records.streams import JsonLines
stream = JsonLines(pathlib.Path(sys.argv[1]), flush_s=0.2)
while True:
    stream.write({"t_ns": time.monotonic_ns()})
    time.sleep(0.0005)
""",
        str(path),
    )
    while not path.exists():
        time.sleep(0.01)
    time.sleep(1.0)
    killed_ns = time.monotonic_ns()
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    rows, warning = read_lines(path, dict)
    assert warning is None
    assert len(rows) > 100
    assert killed_ns - rows[-1]["t_ns"] < 0.6e9
    gaps_ns = np.diff([row["t_ns"] for row in rows])
    assert gaps_ns.max() < 0.2e9, "records in the middle are missing"


def test_the_last_records_before_a_pause_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    writer = child(
        """
import pathlib, sys, time
from harness.records.streams import JsonLines
stream = JsonLines(pathlib.Path(sys.argv[1]), flush_s=0.1)
stream.write({"a": 1})
print("written", flush=True)
time.sleep(60)
""",
        str(path),
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.5)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert read_lines(path, dict) == ([{"a": 1}], None)


def test_a_full_disk_says_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    writer = child(
        """
import json, pathlib, resource, sys
from harness.records.streams import JsonLines, StorageFull
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
stream = JsonLines(pathlib.Path(sys.argv[1]), flush_s=60)
for i in range(100):
    stream.write({"i": i, "text": "x" * 20})
try:
    stream.close()
except StorageFull as error:
    print(error)
try:
    stream.write({})
except StorageFull:
    print("again")
""",
        str(path),
    )
    out, err = writer.communicate(timeout=20)
    rows, warning = read_lines(path, dict)
    assert warning is None
    assert [row["i"] for row in rows] == list(range(len(rows)))
    assert 10 < len(rows) < 100, err
    assert f"{len(rows)} records of it are kept, {100 - len(rows)} are lost" in out
    assert out.endswith("again\n")


def test_a_stream_appends_and_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for i in range(2):
        with JsonLines(path) as stream:
            stream.write({"i": np.int64(i), "text": "ü\n"})
            with pytest.raises(ValueError, match="JSON compliant"):
                stream.write({"i": float("nan")})
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.write({})
    assert [json.loads(line)["i"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("torn", ['{"a":', '{"a":1}', "\0\0"])
def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a":1}\n' + torn)
    rows, warning = read_lines(path, dict)
    assert rows == [{"a": 1}]
    assert warning is not None
    assert "torn" in warning
    assert str(path) in warning


@pytest.mark.parametrize("bad", ['{"a":', "", "[1]", '{"a":1}{"b":2}', '{"strange":1}'])
def test_a_damaged_line_is_named(tmp_path: Path, bad: str) -> None:
    @dataclass(frozen=True)
    class Row:
        a: int

    path = tmp_path / "x.jsonl"
    path.write_text('{"a":1}\n' + bad + '\n{"a":2}\n')
    with pytest.raises(DamagedRecord, match=r"x\.jsonl, line 2 is no record"):
        read_lines(path, lambda d: Row(**d))


# -- the folder ----------------------------------------------------------------------------------


def test_create_takes_what_is_new_or_unfinished_only(tmp_path: Path) -> None:
    path = tmp_path / "x"
    Store.create(path)
    Store.create(path).write_json("verdict.json", {})
    (tmp_path / "x-2").mkdir()
    with pytest.raises(StoreError, match=r"finished experiment.*x-3"):
        Store.create(path)
    Store.create(tmp_path / "x-2")
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("")
    with pytest.raises(StoreError, match=r"no result of critrate.*home-2"):
        Store.create(foreign)
    with pytest.raises(StoreError, match="no result of critrate"):
        Store.create(foreign / "diary.txt")


def test_open_knows_its_schema(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no schema\.json"):
        Store.open(tmp_path)
    Store.create(tmp_path).write_json("schema.json", {"schema_version": 99})
    with pytest.raises(StoreError, match="version 99, this critrate reads 1"):
        Store.open(tmp_path)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "x")
    data = {"a": np.float64(0.5), "b": np.arange(2), "run": RUN, "path": Path("p")}
    store.write_json("limits.json", data)
    assert store.read_json("limits.json") == {
        "a": 0.5,
        "b": [0, 1],
        "run": asdict(RUN),
        "path": "p",
    }
    digest = store.digest("limits.json")
    writer = child(
        """
import pathlib, resource, sys
from harness.records.store import Store, StorageFull
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Store.open(pathlib.Path(sys.argv[1])).write_json("limits.json", list(range(5000)))
except StorageFull as error:
    print(error)
""",
        str(store.path),
    )
    out, err = writer.communicate(timeout=20)
    assert "the file as it was before is kept" in out, err
    assert store.digest("limits.json") == digest
    assert sorted(p.name for p in store.path.iterdir()) == ["limits.json", "schema.json"]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    store = Store.create(tmp_path / "x")
    store.write_text("plan.json", text)
    with pytest.raises(StoreError, match=r"plan\.json (is|holds) no JSON"):
        store.read_json("plan.json")
    with pytest.raises(StoreError, match=r"has no prediction\.json: the prediction was not"):
        store.read_json("prediction.json")
    with pytest.raises(StoreError, match="to take the digest of"):
        store.digest("prediction.json")


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "x")
    written_run(store)
    stored = store.read_run(RUN.id)
    assert stored.run == RUN
    assert stored.prediction_digest == "abc"
    assert [r.id for r in stored.records] == [0, 1]
    assert stored.records[0] == RECORD
    assert stored.samples == [SAMPLE]
    assert stored.gpu == [asdict(GPU)]
    assert stored.end == {"end_ns": 60_000_001_000, "reason": "horizon", "sampler": {"ticks": 600}}
    assert stored.warnings == ()
    frames = run_frames(
        stored.run, stored.start_ns, stored.end_ns, stored.records, stored.samples, stored.gpu
    )
    assert frames.end_s == 60.0
    assert len(frames.requests) == 2
    assert len(frames.gpu) == 1
    assert store.run_ids() == [RUN.id]


def test_a_run_of_an_older_folder_started_empty(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "x")
    full = replace(RUN, id="full", preload=50)
    for run in (RUN, full):
        store.begin_run(run, 1_000, "2026-01-01T00:00:00+00:00", "abc")
        for name in ("requests", "engine"):
            with store.stream(run.id, name):
                pass
        store.end_run(run.id, 2_000, "horizon")
    head = store.path / "runs" / RUN.id / "run.json"
    data = json.loads(head.read_text())
    del data["run"]["preload"]
    head.write_text(json.dumps(data))
    assert store.read_run(RUN.id).run == RUN
    assert store.read_run(RUN.id).run.start == "empty"
    assert store.read_run("full").run == full


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "x")
    written_run(store, end=False)
    with (store.path / "runs" / RUN.id / "engine.jsonl").open("a") as file:
        file.write('{"read_ns":12')
    stored = store.read_run(RUN.id)
    assert stored.end is None
    assert stored.end_ns == SAMPLE.t_ns
    assert len(stored.warnings) == 2
    assert "torn" in stored.warnings[0]
    assert "was cut off" in stored.warnings[1]
    # Beginning it again sets the attempt aside; an ended run is not repeated.
    for _ in range(2):
        store.begin_run(RUN, 2_000, "2026-01-01T00:00:00+00:00", "abc")
    assert store.read_run(RUN.id).records == []
    assert sorted(p.name for p in (store.path / "superseded").iterdir()) == ["0.90-1.1", "0.90-1.2"]
    store.end_run(RUN.id, 3_000, "interrupted")
    with pytest.raises(StoreError, match="has ended already"):
        store.begin_run(RUN, 2_000, "2026-01-01T00:00:00+00:00", "abc")


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "/etc", ".hidden"])
def test_run_ids_stay_inside_the_folder(tmp_path: Path, run_id: str) -> None:
    store = Store.create(tmp_path / "x")
    with pytest.raises(StoreError, match="cannot name a run"):
        store.begin_run(replace(RUN, id=run_id), 0, "", "")


def test_missing_names_everything_that_is_not_there(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "x")
    assert len(missing(store.path)) == 8
    written_run(store, end=False)
    plan: dict[str, Any] = {"runs": [{"id": RUN.id}, {"id": "1.10-1"}]}
    for name in ("environment.json", "limits.json", "calibration.json", "prediction.json"):
        store.write_json(name, {})
    store.write_text("config.yaml", "")
    store.write_json("plan.json", plan)
    assert missing(store.path) == [
        "verdict.json (the verdict) is missing",
        "run 1.10-1 was not begun",
        "run 0.90-1 has no end: it got to 5.5 of 60 s, 2 requests and 1 samples are kept",
    ]
    store.end_run(RUN.id, 3_000, "horizon")
    store.write_json("verdict.json", {})
    store.write_json("plan.json", {"runs": plan["runs"][:1]})
    assert missing(store.path) == []
    damaged = store.path / "runs" / RUN.id / "engine.jsonl"
    damaged.write_text("x\n" + damaged.read_text())
    assert "engine.jsonl, line 1 is no record" in missing(store.path)[0]
