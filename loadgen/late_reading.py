"""Reading late, many tokens at a time: the kernel holds them, and says when the last of them arrived."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from loadgen.kernel_time import KernelTime
from loadgen.pacing import SECOND_NS, Alarm

LATE_S = 0.4
"""How long bytes wait in the kernel, which has room for some 450 tokens of a stream: more than come in
this time. A stream that is faster is read as it comes, from its first late read on."""
LATE_NS = round(LATE_S * SECOND_NS)
ROUND_S = 0.002
"""Between two rounds of reading."""
MOST_IN_A_ROUND = 64
"""Then the event loop has its turn: what is not read late must not wait for all that is."""
LOOKS = 16
WITHIN_S = 0.05
LOOK_S = 0.002
AT_ONCE_NS = 500_000


@dataclass(slots=True)
class HeldBack:
    """Does a server hold small writes back until those before are acknowledged (no TCP_NODELAY)?

    Then nothing of it may be read late: a kernel whose bytes nobody reads acknowledges them up to
    40 ms late. A read acknowledges at once, and what was held back arrives right after it: of `LOOKS`
    reads, each `WITHIN_S` after a late one and at no particular time (tokens may come in step with the
    late reads), it is noted how many had something arrive within `AT_ONCE_NS`. Of tokens 5 ms apart that
    are not held back one in ten does, of those that are some two in three.
    """

    looks: int = 0
    at_once: int = 0

    @property
    def open(self) -> bool:
        """Is another look wanted?"""
        return self.looks < LOOKS

    @property
    def so(self) -> bool:
        """Is that what this server does?"""
        return self.looks >= LOOKS and 3 * self.at_once >= self.looks

    def note(self, read_ns: int, next_ns: int) -> None:
        """When a read was, and the last token known `LOOK_S` after it arrived."""
        self.looks += 1
        self.at_once += read_ns < next_ns < read_ns + AT_ONCE_NS


class Readable(Protocol):
    """What is read late."""

    def read_late(self) -> bool:
        """Take in what has come. Is there more to come, to be read as late?"""


class LateReading:
    """Reads each of its connections `LATE_S` after it was read last, and sends what is due meanwhile.

    ``possible``: only where the kernel notes when bytes arrive.
    """

    def __init__(self, alarm: Alarm) -> None:
        self._kernel_time = KernelTime()
        self.possible = self._kernel_time.works
        self._alarm = alarm
        self._loop = asyncio.get_running_loop()
        self._unread: deque[tuple[int, Readable]] = deque()
        """When each has its turn, in the order of time."""
        self._round: asyncio.TimerHandle | None = None

    def add(self, connection: Readable, now_ns: int) -> None:
        """Read it `LATE_S` from now, and again until there is no more to come."""
        self._unread.append((now_ns + LATE_NS, connection))
        if self._round is None:
            self._round = self._loop.call_later(LATE_S, self._read_round)

    def catch_up(self) -> None:
        """Read all of them now."""
        now_ns = time.monotonic_ns()
        for _ in range(len(self._unread)):
            now_ns = self._read_next(now_ns)

    def close(self) -> None:
        """Nothing is read any more."""
        if self._round is not None:
            self._round.cancel()
        self._kernel_time.close()

    def _read_round(self) -> None:
        unread = self._unread
        now_ns = time.monotonic_ns()
        try:
            for _ in range(MOST_IN_A_ROUND):
                if not unread or unread[0][0] > now_ns:
                    break
                now_ns = self._read_next(now_ns)
        finally:
            # Whatever one of them raises, the others have their turn.
            self._round = None
            if unread:
                wait_s = (unread[0][0] - now_ns) / SECOND_NS
                wait_s = max(wait_s, ROUND_S) if wait_s > 0 else 0.0
                self._round = self._loop.call_later(wait_s, self._read_round)

    def _read_next(self, now_ns: int) -> int:
        """Read the one whose turn it is, and send what is due; returns the time after that."""
        _, connection = self._unread.popleft()
        if connection.read_late():
            self._unread.append((now_ns + LATE_NS, connection))
        now_ns = time.monotonic_ns()
        if now_ns >= self._alarm.at_ns:
            self._alarm.go(now_ns)
        return now_ns
