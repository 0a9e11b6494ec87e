"""Environments of other people's packages in the user's cache, made on first use from pinned lists."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SPARE_BYTES = 10**9


class CannotRun(Exception):
    """A package cannot be installed or started; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A package and the list that pins it and all it needs. ``download_mb``, ``disk_mb`` and ``minutes``
    are what its environment took on two cores; without them it is in the project's own environment."""

    name: str
    version: str
    download_mb: int = 0
    disk_mb: int = 0
    minutes: int = 0
    pins: Path | None = None
    python_path: Path | None = None


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
    complete = folder / ".complete"
    if not complete.exists() or complete.read_text() != pins.read_text():
        install(package, folder, pins)
        complete.write_text(pins.read_text())
    return folder / "bin"


def install(package: Package, folder: Path, pins: Path) -> None:
    print(
        f"{package.name} {package.version}: making {folder}, once: "
        f"{package.download_mb} MB to download, {package.disk_mb} MB on disk, {package.minutes} minutes",
        file=sys.stderr,
        flush=True,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < package.disk_mb * 10**6 + SPARE_BYTES:
        raise CannotRun(
            f"only {free_bytes / 1e9:.1f} GB are free there: set XDG_CACHE_HOME to another disk"
        )
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    if subprocess.run([*pip, "--disable-pip-version-check", "-r", pins]).returncode:
        raise CannotRun(
            f"pip could not install {pins}. If it does not find torch: set PIP_EXTRA_INDEX_URL to "
            "PyTorch's index of CPU builds"
        )


def version_in(commands: Path, name: str) -> str:
    """The version of a package. Raises CannotRun where it is not installed."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    done = subprocess.run(
        [commands / "python", "-c", code, name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotRun(f"{commands / 'python'} has no package called {name}: install it there")
    return done.stdout.strip()
