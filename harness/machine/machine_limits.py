"""What this machine's load generator reached in its self-test, and what a run asks of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import __version__
from harness.machine.environment import cpu_facts
from loadgen.mendable import Mendable
from loadgen.records import Run


class BeyondThisMachine(Mendable):
    """A plan asks for more than this machine's generator can offer; the message has both figures."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What one process of the generator reached here. Rates are measured ones, not extrapolated.

    ``sink_late_ms``: of the sink's writes at the highest rate reached, 99th percentile. ``sink_bound``:
    the sink itself was late where the raising ended, so that the generator may be able to do more.
    """

    date: str
    machine: dict[str, Any]
    send_lag_p50_ms: float
    send_lag_p99_ms: float
    requests_per_s: float
    tokens_per_s: float
    sink_late_ms: float
    sink_bound: bool
    streams: int
    streams_tried: int
    open_files: int | None
    """The hard limit of the system, None: no limit."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run asks of the generator."""

    requests_per_s: float
    tokens_per_s: float
    streams: int
    workers: int = 1
    """Processes that the load is dealt to."""


def needs_of(
    run: Run,
    mean_output_tokens: float,
    critical_rate: float,
    most_in_flight: int,
    workers: int = 1,
) -> Needs:
    """Of one run: a server streams no faster than its critical rate, whatever is offered."""
    served = min(run.arrival_rate, critical_rate)
    return Needs(run.arrival_rate, served * mean_output_tokens, most_in_flight, workers)


# ---- what was measured before


def machine() -> dict[str, Any]:
    """What the limits depend on: those of another machine, or of another version, say nothing here."""
    cpu = cpu_facts()
    return {
        "cpu": cpu["model"],
        "cores": cpu["usable"] or cpu["count"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "critrate": __version__,
    }


def file() -> Path:
    """Where the limits of this machine are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "critrate" / "selftest.json"


def save(limits: MachineLimits) -> Path:
    """Keep the limits, in place of any before; the path."""
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(limits.to_dict(), indent=2) + "\n")
    fresh.replace(path)
    return path


def saved() -> MachineLimits | None:
    """The limits measured on this machine; None where there are none, or those of another one."""
    try:
        limits = MachineLimits(**json.loads(file().read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return limits if limits.machine == machine() else None


# ---- the gate


def gate(needs: Sequence[Needs], limits: MachineLimits | None) -> str:
    """One line that says by what the runs were held to be within reach of this machine.

    A load that is dealt to several processes is held to that many times what one reached, as far as
    there are cores for them. Raises BeyondThisMachine when a run asks for more.
    """
    if limits is None:
        return (
            "nobody has measured what this machine can send: `critrate selftest`, half a minute; "
            "until then only the send lag of each run tells"
        )
    for need in needs:
        workers = min(need.workers, limits.machine["cores"])
        for what, wanted, most in (
            ("requests/s", need.requests_per_s, workers * limits.requests_per_s),
            ("streamed tokens/s", need.tokens_per_s, workers * limits.tokens_per_s),
            ("open streams", need.streams, workers * limits.streams),
        ):
            if what == "open streams" and limits.streams == limits.streams_tried:
                # No limit was met.
                continue
            if wanted > most:
                raise BeyondThisMachine(
                    f"the plan asks for {wanted:.0f} {what} and this machine reached {most:.0f} "
                    f"({limits.date[:10]}): {_mend(what)}, or repeat `critrate selftest` if the "
                    "machine has changed"
                )
    return (
        f"this machine reached {limits.requests_per_s:.0f} requests/s and "
        f"{limits.tokens_per_s:.0f} streamed tokens/s a process, {limits.streams} streams at once "
        f"(`critrate selftest`, {limits.date[:10]})"
    )


def _mend(what: str) -> str:
    if what == "open streams":
        return "lower the rate or the horizon, or raise the limit of open files (`ulimit -n`)"
    return "lower the rate, shorten the outputs, or send from a machine with faster cores"
