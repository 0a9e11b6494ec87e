"""To be woken at an instant, finer than the event loop's own timers can."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NEVER_NS = 1 << 62
SECOND_NS = 1_000_000_000
TIMER_GRID_NS = 1_500_000
"""The event loop's timers fire on a 1 ms grid: without a finer one, sleep to just before the instant,
then poll."""
TFD_TIMER_ABSTIME = 1


class Alarm:
    """One instant of time.monotonic_ns at a time; when it has come, ``ring(now_ns)`` is called once.

    ``ring`` is set by whoever is to be woken.

    On Linux a timerfd wakes the event loop; elsewhere its own timer, and polling at the end.
    A loop that has much to read is late in noticing it: whoever looks at the clock anyway, as for
    each read, should compare it with ``at_ns`` and call `go`.
    """

    ring: Callable[[int], None]

    def __init__(self) -> None:
        self.at_ns = NEVER_NS
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.Handle | None = None
        self._fd = _timerfd()
        if self._fd is not None:
            self._loop.add_reader(self._fd, self._expired)

    def set(self, at_ns: int) -> None:
        """The next instant, in place of any before; `NEVER_NS` for none."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self.at_ns = at_ns
        if self._fd is not None:
            _set_timerfd(self._fd, 0 if at_ns == NEVER_NS else at_ns)
        elif at_ns != NEVER_NS:
            self._poll()

    def set_next_turn(self) -> None:
        """Ring in the next turn of the loop and not before: what has come meanwhile is read first."""
        self.set(NEVER_NS)
        self._handle = self._loop.call_soon(lambda: self.go(time.monotonic_ns()))

    def go(self, now_ns: int) -> None:
        """The instant has come."""
        self.at_ns = NEVER_NS
        self.ring(now_ns)

    def close(self) -> None:
        """No instant any more."""
        self.set(NEVER_NS)
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _expired(self) -> None:
        # Reading it takes the expiry away. One that was set anew meanwhile has nothing to read.
        try:
            os.read(self._fd or 0, 8)
        except BlockingIOError:
            return
        self._look()

    def _poll(self) -> None:
        wait_ns = self.at_ns - time.monotonic_ns()
        if wait_ns <= 0:
            self._handle = self._loop.call_soon(self._look)
        elif wait_ns <= TIMER_GRID_NS:
            self._handle = self._loop.call_soon(self._poll)
        else:
            self._handle = self._loop.call_later((wait_ns - TIMER_GRID_NS) / SECOND_NS, self._poll)

    def _look(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self.at_ns:
            self.go(now_ns)


@contextmanager
def without_collection_pauses() -> Iterator[None]:
    """No cycle collection meanwhile: a full one would stop the generator for a while.

    Nor one before it: in a large process it takes longer than the time to the first arrival.
    """
    was_enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


_TIMER = struct.Struct("@4l")
"""Interval and value, each in seconds and nanoseconds."""
# From Python 3.13 on, os has these calls itself.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _timerfd() -> int | None:
    if _libc is None:
        return None
    fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create failed")
    return fd


def _set_timerfd(fd: int, at_ns: int) -> None:
    """Fire once at this instant, at once if it has passed; 0: not at all."""
    assert _libc is not None
    timer = _TIMER.pack(0, 0, *divmod(at_ns, SECOND_NS))
    if _libc.timerfd_settime(fd, TFD_TIMER_ABSTIME, timer, None):
        raise OSError(ctypes.get_errno(), "timerfd_settime failed")
