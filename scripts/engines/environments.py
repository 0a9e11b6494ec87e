"""Environments of other people's packages in the user's cache, made on first use from pinned lists."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPARE_BYTES = 10**9


class CannotRun(Exception):
    """A package cannot be installed or started; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A package and the list that pins it and all it needs. ``download_mb``, ``disk_mb`` and ``minutes``
    are what its environment took on two cores; without them it is in the project's own environment.
    ``python`` makes the environment, a path or a command."""

    name: str
    version: str
    download_mb: int = 0
    disk_mb: int = 0
    minutes: int = 0
    pins: Path | None = None
    python_path: Path | None = None
    python: str = sys.executable


@dataclass(frozen=True)
class Environment:
    """Folder of an environment's commands, what its PYTHONPATH must hold, and the version in it."""

    commands: Path
    python_path: Path | None
    version: str


def cache_folder() -> Path:
    """The project's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "critrate"


def environment(package: Package, folder: Path, variable: str) -> Environment:
    """The package's environment in ``folder``, made now if it is not there or its list has changed.

    The environment variable, the path of a Python, is taken as it is. Raises CannotRun.
    """
    python_path = None
    if given := os.environ.get(variable):
        if not Path(given).is_file():
            raise CannotRun(f"{variable}={given} is not a file: give the path of a Python")
        commands = Path(given).absolute().parent
    elif package.pins is not None:
        commands, python_path = in_folder(package, folder, package.pins), package.python_path
    else:
        commands = Path(sys.executable).parent
    return Environment(commands, python_path, version_in(commands, package.name))


def in_folder(package: Package, folder: Path, pins: Path) -> Path:
    if not is_complete(folder, pins):
        with alone(folder) as lock:
            # Whoever held the lock before may have made it.
            if not is_complete(folder, pins):
                install(package, folder, pins, lock)
    return folder / "bin"


def is_complete(folder: Path, pins: Path) -> bool:
    """Was the folder's installation of this very list finished?"""
    mark = folder / ".complete"
    return mark.exists() and mark.read_text() == pins.read_text()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the lock beside the folder, after waiting for whoever makes the folder now.

    Gives its descriptor: a child that inherits it holds the lock too, should this process be killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"another process is making {folder}: waiting for it", file=sys.stderr, flush=True
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def install(package: Package, folder: Path, pins: Path, lock: int) -> None:
    """Make the folder anew; its mark is the last thing that is written and the first that goes."""
    print(
        f"{package.name} {package.version}: making {folder}, once: "
        f"{package.download_mb} MB to download, {package.disk_mb} MB on disk, {package.minutes} minutes",
        file=sys.stderr,
        flush=True,
    )
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < package.disk_mb * 10**6 + SPARE_BYTES:
        raise CannotRun(
            f"only {free_bytes / 1e9:.1f} GB are free there: set XDG_CACHE_HOME to another disk"
        )
    (folder / ".complete").unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    made = shutil.which(package.python) and subprocess.run(
        [package.python, "-m", "venv", folder], pass_fds=(lock,), check=False
    )
    if not made or made.returncode:
        raise CannotRun(
            f"{package.name} wants {package.python}, which does not work here: install it"
        )
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    # Compiling everything takes longer than all the rest; imports compile what they need.
    pip += ["--no-compile", "--disable-pip-version-check", "-r", pins]
    if subprocess.run(pip, pass_fds=(lock,)).returncode:
        raise CannotRun(
            f"pip could not install {pins}. If it does not find torch: set PIP_EXTRA_INDEX_URL to "
            "PyTorch's index of CPU builds"
        )
    (folder / ".complete").write_text(pins.read_text())


def version_in(commands: Path, name: str) -> str:
    """The version of a package. Raises CannotRun where it is not installed."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    done = subprocess.run(
        [commands / "python", "-c", code, name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotRun(f"{commands / 'python'} has no package called {name}: install it there")
    return done.stdout.strip()
