"""Environments made once: cut-off installations are made again, and two at once make one."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "scripts" / "engines" / "environments.py"
_spec = importlib.util.spec_from_file_location("environments", SOURCE)
assert _spec is not None and _spec.loader is not None
environments = importlib.util.module_from_spec(_spec)
sys.modules["environments"] = environments
_spec.loader.exec_module(environments)

MAKE = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("environments", sys.argv[1])
environments = sys.modules["environments"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environments)
folder, pins = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
def install(package, folder, pins, lock):
    with (folder.parent / "made").open("a") as file:
        file.write("x")
    time.sleep(float(sys.argv[4]))
    folder.mkdir(exist_ok=True)
    (folder / ".complete").write_text(pins.read_text())
environments.install = install
print(environments.in_folder(environments.Package("p", "1"), folder, pins))
"""


def maker(folder: Path, pins: Path, takes_s: float) -> subprocess.Popen[str]:
    """A process that makes the folder by an installation of so many seconds."""
    command = [sys.executable, "-c", MAKE, str(SOURCE), str(folder), str(pins), str(takes_s)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def until(path: Path) -> None:
    end = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    path = tmp_path / "pins.txt"
    path.write_text("nothing==1\n")
    return path


def test_two_at_once_make_one(tmp_path: Path, pins: Path) -> None:
    folder = tmp_path / "engines" / "e"
    first = maker(folder, pins, 1.0)
    until(folder.parent / "made")
    second = maker(folder, pins, 0.0)
    for process in (first, second):
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out.strip()) == (0, str(folder / "bin")), err
        assert ("another process is making" in err) == (process is second)
    assert (folder.parent / "made").read_text() == "x"


def test_an_installation_that_was_killed_is_made_again(tmp_path: Path, pins: Path) -> None:
    folder = tmp_path / "engines" / "e"
    killed = maker(folder, pins, 30.0)
    until(folder.parent / "made")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = maker(folder, pins, 0.0)
    _, err = again.communicate(timeout=20)
    assert again.returncode == 0, err
    assert "another process" not in err, "a dead process holds no lock"
    assert (folder.parent / "made").read_text() == "xx"
    assert environments.is_complete(folder, pins)
    pins.write_text("nothing==2\n")
    assert not environments.is_complete(folder, pins)


def test_the_mark_goes_before_the_folder_does(
    tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off while the old folder is removed, it must not be taken for a whole one afterwards."""
    folder = tmp_path / "e"
    (folder / "bin").mkdir(parents=True)
    (folder / ".complete").write_text("nothing==0\n")

    def cut_off(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environments.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        environments.in_folder(environments.Package("p", "1"), folder, pins)
    assert not (folder / ".complete").exists()
    # Nobody holds the lock any more.
    with (tmp_path / "e.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_only_a_finished_installation_is_marked(
    tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines, fails = tmp_path / "e", [], [True]

    def run(line: list[str], *, pass_fds: tuple[int, ...], check: bool = False) -> object:
        assert len(pass_fds) == 1, "what still runs when this process is killed holds the lock"
        folder.mkdir(exist_ok=True)
        lines.append(" ".join(map(str, line)))
        return subprocess.CompletedProcess(line, int("pip" in line and fails[0]))

    monkeypatch.setattr(environments.subprocess, "run", run)
    package = environments.Package("p", "1")
    with pytest.raises(environments.CannotRun, match="pip could not install"):
        environments.in_folder(package, folder, pins)
    assert not environments.is_complete(folder, pins)
    fails[0] = False
    assert environments.in_folder(package, folder, pins) == folder / "bin"
    assert environments.is_complete(folder, pins)
    assert len(lines) == 4
    assert "--no-deps --no-compile" in lines[3]
    environments.in_folder(package, folder, pins)
    assert len(lines) == 4, "it is made once"


def test_a_python_that_is_not_there_is_said(pins: Path, tmp_path: Path) -> None:
    package = environments.Package("p", "1", python="python9.99", pins=pins)
    with pytest.raises(environments.CannotRun, match=r"p wants python9\.99"):
        environments.in_folder(package, tmp_path / "p-1", pins)
