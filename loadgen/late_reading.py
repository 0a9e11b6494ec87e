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
"""How long bytes wait in the kernel, which has room for 370 events of 300 bytes: more than come in this
time."""
LATE_NS = round(LATE_S * SECOND_NS)
MOST_EVENTS_PER_S = 300.0
MOST_BYTES_PER_S = 32_768 / LATE_S
"""Of a stream. From 500 events a second on some ends come 10 to 20 ms late where nobody reads, as nobody
acknowledges then and a server may send but ten packets ahead."""
ROUND_S = 0.002
"""Between two rounds of reading."""
MOST_IN_A_ROUND = 64
"""Then the event loop has its turn: what is not read late must not wait for all that is."""
LOOKS = 16
WITHIN_S = 0.05
LOOK_S = 0.002
AT_ONCE_NS = 500_000
PACES = 16
PACES_KEPT = 256


@dataclass(slots=True)
class Streams:
    """What is known of one server's streams: may they be read late?

    Not those of a server that holds small writes back until those before are acknowledged (no
    TCP_NODELAY): a kernel whose bytes nobody reads acknowledges them up to 40 ms late. A read
    acknowledges at once, and what was held back arrives right after it: of `LOOKS` reads, each
    `WITHIN_S` after a first token and at no particular time (tokens may come in step with the
    reads), it is noted how many had something arrive within `AT_ONCE_NS`. Of tokens 5 ms apart that
    are not held back one in ten does, of those that are some two in three.

    Nor those that come so fast that they would fill the kernel's room, or wait for acknowledgements:
    where one in three of all, at least `PACES`, did so.
    """

    looks: int = 0
    at_once: int = 0
    paces: int = 0
    fast: int = 0

    @property
    def open(self) -> bool:
        """Is another look wanted?"""
        return self.looks < LOOKS

    @property
    def late(self) -> bool:
        """May they be read late?"""
        held_back = not self.open and 3 * self.at_once >= self.looks
        too_fast = self.paces >= PACES and 3 * self.fast >= self.paces
        return not (held_back or too_fast)

    def note(self, read_ns: int, next_ns: int) -> None:
        """When a read was, and the last token known `LOOK_S` after it arrived."""
        self.looks += 1
        self.at_once += read_ns < next_ns < read_ns + AT_ONCE_NS

    def note_pace(self, events: int, size_bytes: int, seconds: float) -> None:
        """So much of a stream came in so many seconds after its first token."""
        if seconds > WITHIN_S:
            self.paces += 1
            by_events, by_bytes = events / MOST_EVENTS_PER_S, size_bytes / MOST_BYTES_PER_S
            self.fast += max(by_events, by_bytes) > seconds
        if self.paces > PACES_KEPT:
            self.paces, self.fast = self.paces // 2, self.fast // 2


class Readable(Protocol):
    """What is read late."""

    def read_late(self, to_end: bool) -> bool:
        """Take in what has come, with ``to_end`` also that nothing will. Is it to be read late again?"""


class LateReading:
    """Reads each of what it has `LATE_S` after it was read last, and sends what is due meanwhile.

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

    def add(self, readable: Readable, now_ns: int) -> None:
        """Read it `LATE_S` from now, and again until it wants no more."""
        self._unread.append((now_ns + LATE_NS, readable))
        if self._round is None:
            self._round = self._loop.call_later(LATE_S, self._read_round)

    def catch_up(self) -> None:
        """Read all of them now."""
        now_ns = time.monotonic_ns()
        for _ in range(len(self._unread)):
            now_ns = self._read_next(now_ns, to_end=True)

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

    def _read_next(self, now_ns: int, to_end: bool = False) -> int:
        """Read the one whose turn it is, and send what is due; returns the time after that."""
        _, readable = self._unread.popleft()
        if readable.read_late(to_end):
            self._unread.append((now_ns + LATE_NS, readable))
        now_ns = time.monotonic_ns()
        if now_ns >= self._alarm.at_ns:
            self._alarm.go(now_ns)
        return now_ns
