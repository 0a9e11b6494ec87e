"""Sweeps: complete, in order, and with no process left whatever ends them."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from harness.machine import sweep as module
from harness.machine.sweep import ONE_THREAD, SweepError, cluster_option, sweep

pytestmark = pytest.mark.waits

# Functions for workers, which import them from here.


def square(job: tuple[int, float]) -> tuple[int, int]:
    number, wait_s = job
    time.sleep(wait_s)
    return number * number, os.getpid()


def threads(_: int) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ONE_THREAD}


def divide(number: int) -> float:
    if number == 1:
        time.sleep(0.5)
    return 1 / number


def kill_itself(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def not_to_be_sent(number: int) -> Callable[[], int]:
    return lambda: number


def alive(pid: int) -> bool:
    """A zombie is not alive: nobody but its parent can see it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: Iterable[int], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    pids = set(pids)
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cores", lambda: 2)


def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = [(number, 0.3 if number == 0 else 0.0) for number in range(20)]
    said: list[tuple[int, int]] = []
    results = list(sweep(square, jobs, progress=lambda *done: said.append(done)))
    assert [value for value, _ in results] == [number * number for number, _ in jobs]
    assert said == [(done, 20) for done in range(1, 21)]
    pids = {pid for _, pid in results}
    assert len(pids) == 2 and os.getpid() not in pids
    assert gone(pids)


def test_no_jobs_no_results() -> None:
    assert list(sweep(square, [])) == []


def test_workers_compute_on_one_thread_and_this_process_does_not_change() -> None:
    before = dict(os.environ)
    assert list(sweep(threads, [0])) == [ONE_THREAD]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("function", "jobs", "failed", "says", "finished"),
    [
        (divide, [1, 2, 0, 4], 0, "job 3 of 4, 0: ZeroDivisionError", ((2, 0.5),)),
        (kill_itself, [2], 2, "job 1 of 1, 2: its process ended by itself, exit code -9", ()),
        (not_to_be_sent, [7], 7, "job 1 of 1, 7: .*<lambda>", ()),
    ],
)
def test_a_failure_names_its_job_and_keeps_what_was_finished(
    function: Callable[[int], object],
    jobs: list[int],
    failed: int,
    says: str,
    finished: tuple[tuple[int, float], ...],
) -> None:
    with pytest.raises(SweepError, match=says) as caught:
        list(sweep(function, jobs))
    assert caught.value.job == failed
    assert caught.value.finished == finished


def test_the_traceback_of_the_worker_is_shown() -> None:
    with pytest.raises(SweepError) as caught:
        list(sweep(divide, [0]))
    assert "return 1 / number" in caught.value.__notes__[0]


def test_leaving_early_ends_the_workers() -> None:
    results = sweep(square, [(1, 0.0), (2, 0.0), *[(3, 60.0)] * 4])
    pids = {next(results)[1], next(results)[1]}
    begun = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert gone(pids) and time.monotonic() - begun < 5


SCRIPT = """
import os, pathlib, signal, sys, time
from harness.machine.sweep import sweep

def stay(folder):
    deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    (pathlib.Path(folder) / f"{os.getpid()}.{deaf}").touch()
    time.sleep(60)

if __name__ == "__main__":
    list(sweep(stay, [sys.argv[1]] * 8))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_leave_no_processes(number: signal.Signals, tmp_path: Path) -> None:
    script, folder = tmp_path / "script", tmp_path / "pids"
    script.write_text(SCRIPT)
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 20
    wanted = min(2, os.cpu_count() or 1)
    while len(list(folder.iterdir())) < wanted and time.monotonic() < end:
        time.sleep(0.02)
    pids = [int(path.stem) for path in folder.iterdir()]
    assert len(pids) >= wanted
    assert {path.suffix for path in folder.iterdir()} == {".True"}, "a worker hears an interrupt"
    begun = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == -number
    assert gone(pids) and time.monotonic() - begun < 5
    if number == signal.SIGINT:
        assert said.count("Traceback") == 1, "only the interrupted process may speak"


def test_a_cluster_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'critrate\[ray\]'"):
        sweep(square, [(1, 0.0)], cluster="auto")


@pytest.mark.parametrize("cluster", ["local", "local:", "local:0", "local:two"])
def test_a_local_cluster_has_a_number_of_workers(cluster: str) -> None:
    with pytest.raises(ValueError, match='such as "local:2"'):
        sweep(square, [(1, 0.0)], cluster=cluster)


def test_a_local_cluster_of_two_workers() -> None:
    """One cluster for all: results in order, two workers, a failure named, nothing left."""
    jobs: list[tuple[object, float]] = [(number, 0.2) for number in range(8)]
    jobs.append(("a word", 0.0))
    found: list[tuple[int, int]] = []
    with pytest.raises(SweepError, match=r"job 9 of 9, \('a word', 0.0\): TypeError") as caught:
        for result in sweep(square, jobs, cluster="local:2"):  # type: ignore[arg-type]
            found.append(result)
    assert caught.value.job == ("a word", 0.0)
    results = found + [result for _, result in caught.value.finished]
    assert [value for value, _ in results] == [n * n for n in range(8)][: len(results)]
    assert len(results) >= 7, "at most one other job was under way"
    pids = {pid for _, pid in results}
    assert len(pids) == 2 and os.getpid() not in pids
    children = {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }
    assert gone(pids | {p for p in children if b"ray" in _command(p)}, within_s=10)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def test_the_shared_option() -> None:
    parser = argparse.ArgumentParser()
    cluster_option(parser)
    assert parser.parse_args([]).cluster is None
    assert parser.parse_args(["--cluster", "local:2"]).cluster == "local:2"
