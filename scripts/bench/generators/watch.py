"""CPU time and memory of a process and everything it started, read while it runs."""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PROCESS_CLOCK = 2
CPU_INTERVAL_S = 0.1
MEMORY_EVERY = 20
"""Reading the memory stops a process for a moment: every two seconds is enough."""
TREE_EVERY = 5
LESS_URGENT = 10
"""Niceness: whoever is watched shares the cores with who watches. None that would never run on a machine
with other work: then nothing is seen."""


@dataclass
class Watch:
    """What was seen of one tree of processes. ``t_ns`` and ``cpu_s`` have the same length."""

    pid: int
    t_ns: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    memory_ns: list[int] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    _seen: dict[int, float] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def end(self) -> None:
        self._stop.set()

    def between(self, from_ns: int, to_ns: int) -> float:
        """CPU seconds in this time, interpolated between readings 0.1 s apart."""
        low, high = np.interp([from_ns, to_ns], self.t_ns, self.cpu_s)
        return float(high - low)

    def levels_mb(self, from_ns: int, to_ns: int) -> tuple[float, float]:
        """Mean memory in the first and in the last quarter of this time, MB; NaN where none was read."""
        at, read = np.array(self.memory_ns), np.array(self.memory_bytes) / 1e6
        quarter_ns = (to_ns - from_ns) / 4
        early = read[(at >= from_ns) & (at < from_ns + quarter_ns)]
        late = read[(at > to_ns - quarter_ns) & (at <= to_ns)]
        return (
            float(early.mean()) if len(early) else math.nan,
            float(late.mean()) if len(late) else math.nan,
        )

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LESS_URGENT)
        turn, pids = 0, [self.pid]
        while not self._stop.wait(CPU_INTERVAL_S):
            if turn % TREE_EVERY == 0:
                pids = tree(self.pid)
            for pid in pids:
                seconds = cpu_of(pid)
                if seconds is not None:
                    self._seen[pid] = seconds
            self.t_ns.append(time.monotonic_ns())
            # A process that has ended keeps what it had used when last seen.
            self.cpu_s.append(sum(self._seen.values()))
            if turn % MEMORY_EVERY == 0:
                self.memory_ns.append(time.monotonic_ns())
                self.memory_bytes.append(sum(map(memory_of, pids)))
            turn += 1


def tree(pid: int) -> list[int]:
    """The process and its living descendants."""
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        fields = stat(int(name))
        if fields is not None:
            parents.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def cpu_of(pid: int) -> float | None:
    """User and system time of a process, s, without its children's; None where it is gone.

    By the kernel's clock of that process (clock_getcpuclockid), not by ticks of 10 ms.
    """
    try:
        return time.clock_gettime((~pid << 3) | PROCESS_CLOCK)
    except OSError:
        return None


def memory_of(pid: int) -> int:
    """Proportional set size, bytes: shared pages count by their share; 0 where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
