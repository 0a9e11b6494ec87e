"""The program as a person runs it: real processes, real sockets, kills and interrupts included."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.store import Store

CONFIG = {
    "name": "small",
    "claim": "engine",
    "theta": 0.2,
    "server": {
        "mock": {
            "num_blocks": 128,
            "block_size": 16,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 1024,
            "max_model_len": 512,
            "step_time": {"b0_ms": 20, "b1_us_per_token": 20, "b2_ns_per_kv_token": 1000},
        }
    },
    "workload": {"uniform": {"prompt": [16, 80], "output": [16, 80]}},
    "load": {"rates": [0.8, 1.3], "horizon_s": 16, "extend": False, "seed": 3},
}


def critrate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def config_file(folder: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def started(folder: Path, config: Path) -> subprocess.Popen[str]:
    """A running experiment whose second run has begun to record."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", "run", config, "--out", folder / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        streams = sorted((folder / "out").glob("runs/01-*/requests.jsonl"))
        if streams and streams[0].stat().st_size > 20_000:
            return process
        time.sleep(0.2)
    raise AssertionError(f"no second run: {process.communicate()[0]}")


def mock_pids(folder: Path) -> list[int]:
    """Processes that were started on the experiment's mock.yaml."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(folder / "out" / "mock.yaml") in command:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("experiment")
    done = critrate("run", config_file(folder), "--out", folder / "out")
    assert done.returncode in (0, 11), done.stdout + done.stderr
    yield folder / "out", done.stdout
    assert mock_pids(folder) == []


def test_a_whole_experiment_measures_what_it_predicted(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["outcome"] in ("confirmed", "inconclusive")
    assert verdict["ratio"]["value"] == pytest.approx(1.0, abs=0.1)
    assert verdict["binding_observed"] == "kv_cache"
    assert all(check["holds"] for check in verdict["audit"]), verdict["audit"]
    assert "predicted" in printed
    assert (folder / "report.html").stat().st_size > 50_000
    assert (folder / "report.md").exists()


def test_the_prediction_is_older_than_the_first_request(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    written = (folder / "prediction.json").stat().st_mtime
    assert all(written < p.stat().st_mtime for p in folder.glob("runs/*/requests.jsonl"))
    store = Store.open(folder)
    assert {store.read_run(r).prediction_digest for r in store.run_ids()} == {
        store.digest("prediction.json")
    }


def test_nothing_of_the_mock_stands_in_what_the_prediction_saw(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    limits = json.loads((folder / "limits.json").read_text())
    assert "max_num_seqs" in limits["shown"]["not_shown"]
    assert limits["shown"]["max_num_batched_tokens"] is None
    assert "b2_ns_per_kv_token" not in (folder / "prediction.json").read_text()


def test_analyse_and_report_work_again_from_the_folder_alone(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    before = json.loads((copy / "verdict.json").read_text())
    for name in ("verdict.json", "report.html", "report.md"):
        (copy / name).unlink()
    done = critrate("analyse", copy)
    assert done.returncode == before["exit_code"], done.stdout + done.stderr
    assert json.loads((copy / "verdict.json").read_text()) == before
    assert critrate("report", copy).returncode == 0
    # A prediction that was changed after the fact decides nothing.
    text = (copy / "prediction.json").read_text()
    (copy / "prediction.json").write_text(text.replace('"claim"', '"claim" ', 1))
    refused = critrate("analyse", copy)
    assert refused.returncode == 2
    assert "prediction.json" in refused.stderr


def test_a_finished_folder_is_not_overwritten(finished: tuple[Path, str], tmp_path: Path) -> None:
    done = critrate("run", config_file(tmp_path), "--out", finished[0])
    assert done.returncode == 2
    assert "choose another name" in done.stderr


def test_kill_9_keeps_what_was_flushed_and_analyse_says_what_is_missing(tmp_path: Path) -> None:
    process = started(tmp_path, config_file(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    for pid in mock_pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    store = Store.open(tmp_path / "out")
    cut = store.read_run(store.run_ids()[1])
    assert cut.end is None
    assert len(cut.records) > 50
    assert len(cut.samples) > 5
    done = critrate("analyse", tmp_path / "out")
    assert done.returncode == 11, done.stdout + done.stderr
    assert "has no end" in done.stdout


def test_an_interrupt_gives_the_best_verdict_so_far(tmp_path: Path) -> None:
    faster = {"mock": CONFIG["server"]["mock"] | {"step_time": {"b0_ms": 10}}}
    process = started(tmp_path, config_file(tmp_path, server=faster))
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "best verdict so far" in printed
    assert "Traceback" not in printed
    assert (tmp_path / "out" / "verdict.json").exists()
    assert mock_pids(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clame": "engine"}, "clame: unknown key"),
        ({"server": {"url": "http://127.0.0.1:9", "ready_timeout_s": 2}}, "was not healthy"),
        ({"workload": {"fixed": {"prompt": 900, "output": 900}}}, "shorten the lengths"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    done = critrate("run", config_file(tmp_path, **changes), "--out", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = {**CONFIG["server"], "port": port}
        done = critrate("run", config_file(tmp_path, server=server), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert str(port) in done.stderr


def test_predict_reproduces_the_paper() -> None:
    root = Path(__file__).resolve().parents[2]
    for name, rate, demand in (
        ("pd_1_1", 3.263, 1_079_151),
        ("pd_2_1", 3.956, 770_034),
        ("pd_1_2", 2.902, 1_339_675),
    ):
        done = critrate("predict", root / "configs" / "paper" / f"{name}.yaml", "--json")
        found = json.loads(done.stdout)["paper"]
        assert round(found["critical_rate"]["value"], 3) == rate
        assert round(found["kv_demand"]["value"]) == demand
