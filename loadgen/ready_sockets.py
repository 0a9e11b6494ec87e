"""Which sockets may be read or written, many in one turn of the event loop."""

from __future__ import annotations

import asyncio
import select
import time
from typing import Protocol

from loadgen.pacing import Alarm

READ, WRITE = 1, 4
"""As epoll names them; what is wrong with a socket is told by reading it."""
MOST_IN_A_TURN = 64
"""Then the event loop has its turn."""


class Watched(Protocol):
    """Who waits for a socket."""

    def ready(self, events: int, now_ns: int) -> None:
        """It may be read or written, or has ended, perhaps. Whoever wants to hear more waits anew."""


class ReadySockets:
    """Tells of each socket once, whenever somebody waits for it, and sends what is due in between.

    An event loop's own watch is lasting: a socket that nobody reads for a while must be taken from it
    and given back. However many sockets are ready, before each the clock is compared with ``alarm``,
    so that the next request leaves between two of them.
    """

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._loop = asyncio.get_running_loop()
        self._watched: dict[int, Watched] = {}
        # Systems without epoll have the loop's own watch.
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            self._loop.add_reader(self._epoll.fileno(), self._tell)

    def add(self, fd: int, watched: Watched, events: int) -> None:
        """Wait for a socket, for ``events`` the first time."""
        self._watched[fd] = watched
        if self._epoll is not None:
            self._epoll.register(fd, events | select.EPOLLONESHOT)
        else:
            self.wait(fd, events)

    def pass_on(self, fd: int, watched: Watched) -> None:
        """Somebody else waits for it from now on."""
        self._watched[fd] = watched

    def wait(self, fd: int, events: int) -> None:
        """Wait for it anew."""
        if self._epoll is not None:
            self._epoll.modify(fd, events | select.EPOLLONESHOT)
            return
        if events & READ:
            self._loop.add_reader(fd, self._tell_one, fd)
        if events & WRITE:
            self._loop.add_writer(fd, self._tell_one, fd)

    def remove(self, fd: int) -> None:
        """To be called before the socket is closed."""
        del self._watched[fd]
        if self._epoll is not None:
            self._epoll.unregister(fd)
        else:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)

    def close(self) -> None:
        """Nothing is told any more."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _tell(self) -> None:
        epoll, alarm, watched = self._epoll, self._alarm, self._watched
        assert epoll is not None
        for fd, events in epoll.poll(0, MOST_IN_A_TURN):
            now_ns = time.monotonic_ns()
            if now_ns >= alarm.at_ns:
                alarm.go(now_ns)
            # What was told before may have closed it, or have opened another of its number.
            if (owner := watched.get(fd)) is not None:
                owner.ready(events, now_ns)

    def _tell_one(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        now_ns = time.monotonic_ns()
        if now_ns >= self._alarm.at_ns:
            self._alarm.go(now_ns)
        if (owner := self._watched.get(fd)) is not None:
            owner.ready(READ | WRITE, now_ns)
