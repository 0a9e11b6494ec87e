"""How the program ends before its verdict: killed, interrupted, or refused in a sentence."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.records.store import Store
from tests.harness.program import CONFIG, config_file, critrate, exit_status, mock_pids

pytestmark = pytest.mark.waits

SIGNALS = (signal.SIGKILL, signal.SIGINT)


def started(folder: Path) -> subprocess.Popen[str]:
    """An experiment that has just begun, with half the requests: two load the machine as one does."""
    half = {"mock": CONFIG["server"]["mock"] | {"num_blocks": 64}}
    config = config_file(folder, server=half)
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", "run", config, "--out", folder / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def in_second_run(folder: Path) -> bool:
    """Has the experiment's second run begun to record?"""
    streams = sorted((folder / "out").glob("runs/01-*/requests.jsonl"))
    return bool(streams) and streams[0].stat().st_size > 20_000


@dataclass(frozen=True)
class CutOff:
    """An experiment that got a signal in its second run."""

    folder: Path
    returncode: int
    printed: str


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> dict[signal.Signals, CutOff]:
    """One experiment killed and one interrupted, side by side."""
    folders = {number: tmp_path_factory.mktemp(number.name) for number in SIGNALS}
    processes = {number: started(folder) for number, folder in folders.items()}
    waiting = set(processes)
    deadline = time.monotonic() + 240
    while waiting and time.monotonic() < deadline:
        for number in list(waiting):
            if in_second_run(folders[number]) or processes[number].poll() is not None:
                processes[number].send_signal(number)
                waiting.remove(number)
        time.sleep(0.2)
    found = {}
    for number, process in processes.items():
        if number in waiting:
            process.terminate()
        printed = process.communicate(timeout=60)[0]
        found[number] = CutOff(folders[number], process.returncode, printed)
    # A killed program cannot stop its server.
    for pid in mock_pids(folders[signal.SIGKILL]):
        os.kill(pid, signal.SIGKILL)
    assert not waiting, f"no second run: {[found[number].printed for number in waiting]}"
    return found


def test_kill_9_keeps_what_was_flushed_and_analyse_says_what_is_missing(
    cut_off: dict[signal.Signals, CutOff],
) -> None:
    killed = cut_off[signal.SIGKILL]
    assert killed.returncode == -signal.SIGKILL, killed.printed
    store = Store.open(killed.folder / "out")
    cut = store.read_run(store.run_ids()[1])
    assert cut.end is None
    assert len(cut.records) > 50
    assert len(cut.samples) > 5
    done = critrate("analyse", killed.folder / "out")
    assert done.returncode == 11, done.stdout + done.stderr
    assert "has no end" in done.stdout


def test_an_interrupt_gives_the_best_verdict_so_far(
    cut_off: dict[signal.Signals, CutOff],
) -> None:
    interrupted = cut_off[signal.SIGINT]
    assert interrupted.returncode == 130, interrupted.printed
    assert "best verdict so far" in interrupted.printed
    assert "Traceback" not in interrupted.printed
    assert (interrupted.folder / "out" / "verdict.json").exists()
    assert mock_pids(interrupted.folder) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clame": "engine"}, "clame: unknown key"),
        ({"server": {"url": "http://127.0.0.1:9", "ready_timeout_s": 2}}, "was not healthy"),
        ({"workload": {"fixed": {"prompt": 900, "output": 900}}}, "shorten the lengths"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    words: str,
) -> None:
    config = config_file(tmp_path, **changes)
    assert exit_status(monkeypatch, "run", config, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split())
    assert "Traceback" not in said


def test_a_port_in_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = config_file(tmp_path, server={**CONFIG["server"], "port": port})
        assert exit_status(monkeypatch, "run", config, "--out", tmp_path / "out") == 2
    assert str(port) in capsys.readouterr().err
