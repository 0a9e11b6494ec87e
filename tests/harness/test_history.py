"""The history file: nothing is lost, nothing is there twice, and breaks are breaks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from harness.configs.config import load_config
from harness.evidence.history import (
    History,
    environment_change,
    limits_change,
    read_parquet,
    segments,
    write_parquet,
)
from harness.evidence.history_entry import config_digest, entry_of
from harness.evidence.history_series import change_text, series
from harness.records.store import Store
from harness.records.streams import StoreError
from tests.harness.past_nights import finished, kept_entry, past
from tests.harness.program import exit_status

ROOT = Path(__file__).resolve().parents[2]
STEADY = [1.0, 1.002, 0.998, 1.004, 0.997, 1.001, 0.999, 1.003]


def test_a_folder_becomes_a_row_that_is_read_back_as_it_was(tmp_path: Path) -> None:
    folder = finished(tmp_path / "night")
    entry = entry_of(Store.open(folder))
    verdict = json.loads((folder / "verdict.json").read_text())
    assert entry.measured == verdict["measured"]["value"]
    assert (entry.engine, entry.engine_version) == ("vllm", "0.32.0")
    assert entry.pool_tokens == 128 * 32
    assert entry.driver is None and "cores" in entry.device
    history = History(tmp_path / "h.sqlite")
    assert history.append([entry]) == 1
    assert history.append([entry]) == 0
    assert history.entries() == [entry]


def test_an_unmeasured_rate_is_nothing_and_no_number(tmp_path: Path) -> None:
    entry = entry_of(Store.open(finished(tmp_path / "n", measured=None, outcome="inconclusive")))
    history = History(tmp_path / "h.sqlite")
    history.append([entry])
    assert history.entries()[0].rate is None


def test_gpus_of_the_engine_stand_with_their_driver(tmp_path: Path) -> None:
    folder = finished(tmp_path / "night")
    where = json.loads((folder / "environment.json").read_text())
    gpus = [{"index": 0, "name": "NVIDIA A"}, {"index": 1, "name": "NVIDIA B"}]
    where["gpu"] = {"driver": "575.1", "gpus": gpus, "unsupported": {}}
    where["engine_gpus"] = {"sampled": ["GPU 1"], "why": "server.gpus"}
    (folder / "environment.json").write_text(json.dumps(where))
    entry = entry_of(Store.open(folder))
    assert (entry.device, entry.driver) == ("NVIDIA B", "575.1")


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    nights = past([1.0] * 24)
    path = tmp_path / "h.sqlite"

    def write(own: slice) -> None:
        for night in nights[own]:
            History(path).append([night])

    threads = [threading.Thread(target=write, args=(slice(i, None, 2),)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert History(path).entries() == nights


BEGIN = """
import json, os, resource, sys
from pathlib import Path
from harness.evidence.history import Entry, History
path, nights = Path(sys.argv[1]), [Entry(**row) for row in json.load(sys.stdin)]
"""
CUT_OFF = """
class Stops(list):
    def __iter__(self):
        yield from list.__iter__(self)
        os.kill(os.getpid(), 9)
History(path).append(Stops(nights))
"""
FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, path.stat().st_size))
try:
    History(path).append(nights)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("program, says", [(CUT_OFF, ""), (FULL, "StorageFull no room to write")])
def test_a_kill_or_a_full_disk_in_the_middle_leaves_what_was_there(
    tmp_path: Path, program: str, says: str
) -> None:
    before = [replace(night, experiment=f"a{night.began}") for night in past([1.0] * 3)]
    history = History(tmp_path / "h.sqlite")
    history.append(before)
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program, str(history.path)],
        input=json.dumps([night.to_dict() for night in past([1.0] * 60)]),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert says in done.stdout and done.stderr == ""
    assert history.entries() == before
    assert history.append(past([1.0])) == 1


def test_one_bad_row_leaves_the_others_out_too(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    good = past(STEADY)
    history.append(good[:2])
    bad = replace(good[3], name=None)  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        history.append([good[2], bad, good[4]])
    assert history.entries() == good[:2]


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be one" * 9, b""])
def test_another_file_is_no_history(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="history"):
        History(path).entries()
    assert path.read_bytes() == content


def test_a_history_that_is_not_there_is_not_made_by_reading_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        History(tmp_path / "h.sqlite").entries()
    assert not (tmp_path / "h.sqlite").exists()


def test_parquet_out_and_in(tmp_path: Path) -> None:
    nights = past(STEADY)
    nights[2] = replace(nights[2], measured=None, measured_low=None, measured_high=None)
    write_parquet(nights, tmp_path / "h.parquet")
    assert read_parquet(tmp_path / "h.parquet") == nights
    (tmp_path / "other").write_text("no")
    with pytest.raises(StoreError, match="no Parquet file of a history"):
        read_parquet(tmp_path / "other")


@pytest.mark.parametrize(
    "changes, broken",
    [
        ({}, set()),
        ({"host": "another kernel"}, set()),
        ({"pool_tokens": 4110}, set()),
        ({"pool_tokens": 4200}, {"pool_tokens"}),
        ({"engine_version": "0.33"}, {"engine_version"}),
        ({"driver": "575", "device": "H200"}, {"driver", "device"}),
        ({"config_digest": "0" * 64}, {"config_digest"}),
    ],
)
def test_what_is_a_break(changes: dict[str, object], broken: set[str]) -> None:
    (before,) = past([1.0])
    after = replace(before, **changes)  # type: ignore[arg-type]
    assert set(environment_change(before, after)) == broken
    assert len(segments([before, after])) == 1 + bool(broken)


def test_a_pool_that_creeps_is_compared_with_the_first_night() -> None:
    nights = [replace(n, pool_tokens=4096 + 10 * i) for i, n in enumerate(past([1.0] * 6))]
    assert [len(part) for part in segments(nights)] == [3, 3]


def test_nights_before_a_break_are_never_in_the_level_after_it() -> None:
    nights = past([*STEADY, *(0.9 * x for x in STEADY)])
    nights[8:] = [replace(n, engine_version="0.33") for n in nights[8:]]
    found = series(nights)[nights[0].name]
    assert change_text(found[8].broke) == "engine_version 0.32.0 to 0.33"
    # The night of the break is set against those before it, and named a regression once.
    answers = [night.answer for night in found]
    assert [i for i, a in enumerate(answers) if a and a.answer == "regression"] == [8]
    assert answers[15] is not None and answers[15].nights == 7
    assert all(e.engine_version == "0.33" for night in found[9:] for e in night.before)


def test_another_config_is_another_experiment() -> None:
    nights = past([*STEADY, 0.5])
    nights[8] = replace(nights[8], config_digest="0" * 64)
    last = series(nights)[nights[0].name][-1]
    assert last.answer is None and set(last.broke) == {"config_digest"}


def test_the_digest_of_a_config_is_of_what_it_says(tmp_path: Path) -> None:
    kept = load_config(finished(tmp_path / "n") / "config.yaml")
    seeded = kept.model_copy(update={"load": kept.load.model_copy(update={"seed": 77})})
    wider = kept.model_copy(update={"theta": 0.2})
    assert config_digest(seeded) == config_digest(kept) != config_digest(wider)


def test_limits_that_differ_are_named() -> None:
    before = kept_entry()
    after = replace(before, limits=before.limits.replace('"watermark": 0.0', '"watermark": 0.01'))
    assert limits_change(before, after) == {"watermark": (0.0, 0.01)}


def test_the_command_lists_draws_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, drawing, parquet = (tmp_path / name for name in ("h.sqlite", "h.svg", "h.parquet"))
    nights = past([*STEADY, 0.90])
    nights[3:] = [replace(n, engine_version="0.33") for n in nights[3:]]
    History(path).append(nights)
    exits = exit_status(monkeypatch, "history", path, "--plot", drawing, "--to-parquet", parquet)
    listed = capsys.readouterr().out
    assert exits == 0
    assert listed.count("-- break: engine_version 0.32.0 to 0.33 --") == 1
    assert "regression: lower than by chance" in listed.splitlines()[-1]
    assert drawing.read_text().startswith("<svg") and "0.32.0 to 0.33" in drawing.read_text()
    assert read_parquet(parquet) == nights
    assert exit_status(monkeypatch, "history", path, "--compare", 1, 9) == 0
    said = capsys.readouterr().out
    assert "break: engine_version" in said and "0.900 [0.887, 0.913]" in said
    assert exit_status(monkeypatch, "history", path, "--compare", 1, 10) == 2
    folder = finished(tmp_path / "night")
    assert exit_status(monkeypatch, "history", path, "--add", folder, "--json") == 0
    capsys_out = capsys.readouterr().out
    assert len(json.loads(capsys_out)) == 10
