"""Where an experiment ran: versions, machine, GPUs, clocks, command line. The one wall time."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import __version__
from harness.machine.gpu import NoGpu, open_gpus

PACKAGES = ("numpy", "scipy", "pandas", "aiohttp", "pydantic", "nvidia-ml-py")
HIDDEN = "***"

_SECRET_NAME = (
    r"(?:[\w.-]*[-_])?(?:api-?_?key|token|secret|password|passwd|authorization|auth|credentials?)"
)
_SECRET_OPTION = re.compile(rf"^--?{_SECRET_NAME}$", re.IGNORECASE)
_SECRET_ASSIGNMENT = re.compile(rf"^((?:--?)?{_SECRET_NAME}=).*$", re.IGNORECASE | re.DOTALL)
_SECRET_HEADER = re.compile(
    r"\b((?:authorization|x-api-key|api-key|cookie)\s*[:=]\s*).*$", re.IGNORECASE | re.DOTALL
)
_BEARER = re.compile(r"\b(bearer\s+)\S+", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://)[^/@\s]+@")
_KNOWN_KEY = re.compile(r"\b(?:sk-|hf_|ghp_|nvapi-)[\w-]{8,}")

_FOLDERS = re.compile(r"^(--?[\w-]+=)?/(?:[^/]+/)+")


def environment(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What a reader needs to repeat the experiment or to doubt it; no secrets.

    ``argv`` is the command line, this process's own by default. GPUs are named with their driver,
    or their absence with its reason.
    """
    return {
        "critrate": {"version": __version__, **_checkout()},
        "command": redacted(sys.argv if argv is None else argv),
        "wall_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "monotonic_ns": time.monotonic_ns(),
        "clock": _clock(),
        "python": platform.python_version(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_facts(),
        "gpu": _gpus(),
    }


def redacted(argv: Sequence[str]) -> list[str]:
    """A command line without secrets and without the machine's folders.

    The values of keys, tokens and passwords become ``***``; an absolute path keeps its last part.
    """
    shown: list[str] = []
    hide_next = False
    for argument in argv:
        if hide_next:
            shown.append(HIDDEN)
            hide_next = False
            continue
        hide_next = bool(_SECRET_OPTION.match(argument))
        for pattern in (_SECRET_ASSIGNMENT, _SECRET_HEADER, _BEARER):
            argument = pattern.sub(rf"\g<1>{HIDDEN}", argument)
        argument = _URL_PASSWORD.sub(rf"\g<1>{HIDDEN}@", argument)
        argument = _FOLDERS.sub(r"\g<1>", argument)
        shown.append(_KNOWN_KEY.sub(HIDDEN, argument))
    return shown


def _checkout() -> dict[str, Any]:
    """Commit of the source tree, or nothing when it is installed rather than checked out."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command; None where git is missing or declines."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10.0
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _clock() -> dict[str, Any]:
    info = time.get_clock_info("monotonic")
    return {"implementation": info.implementation, "resolution_s": info.resolution}


def cpu_facts() -> dict[str, Any]:
    """Model, cores, cores that this process may use, load, and memory of this machine."""
    return {
        "model": _cpu_model(),
        "count": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": list(os.getloadavg()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_model() -> str | None:
    """The processor's name as the kernel gives it; not every architecture has one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or None
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or None


def _gpus() -> dict[str, Any]:
    reader = open_gpus()
    if isinstance(reader, NoGpu):
        return {"none": reader.reason}
    try:
        return reader.describe()
    finally:
        reader.close()
