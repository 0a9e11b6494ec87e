"""``critrate run`` as a process of its own, for scripts that carry out several configs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType


def run_config(config: Path, folder: Path, limit_s: float | None = None) -> int:
    """Carry a config out into ``folder`` and return the exit status; its words go to a log beside.

    After ``limit_s``, or at an interrupt, which goes on, the run is told to end: it stops its engine and
    judges what it has.
    """
    command = [sys.executable, "-m", "harness.cli", "run", str(config), "--out", str(folder)]
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        # In a session of its own, so that a terminal's interrupt comes to it once, from here.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def interrupt_when_told_to_end() -> None:
    """SIGTERM and a closed terminal end a script as an interrupt does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
