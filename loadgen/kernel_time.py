"""When bytes arrived, by the kernel's own note of it: whoever knows that may read them later."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time

SO_TIMESTAMPNS = 35
"""Of Linux, on all machines with its generic numbers (x86-64 and ARM); `socket` has no name for it."""
STAMP = struct.Struct("@ll")
"""Seconds and nanoseconds of the clock of the day."""
ROOM = socket.CMSG_SPACE(STAMP.size)
SECOND_NS = 1_000_000_000
READ_BYTES = 32_768
PROBE_S = 0.1
PROBES = 50


def stamped(connection: socket.socket) -> None:
    """Have the kernel note when what comes here arrives. Raises OSError where it cannot."""
    connection.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


def receive(connection: socket.socket) -> tuple[bytes, int | None]:
    """What has come, and when the last of it arrived, in nanoseconds of `time.monotonic_ns`.

    The kernel stamps the packet with the clock of the day; how long ago that was, is read here, so
    that a clock that is set matters only if it is set in between. An instant after now is now.
    None where the kernel did not note it: under pressure of memory it copies what it holds together,
    without the notes. Raises BlockingIOError where nothing has come, and OSError as the connection
    has it.
    """
    data, notes, _, _ = connection.recvmsg(READ_BYTES, ROOM)
    # Whatever stops the process between the two makes the instant later, as being late always does.
    day_ns, now_ns = time.time_ns(), time.monotonic_ns()
    if not data:
        return data, now_ns
    for level, kind, note in notes:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            s, ns = STAMP.unpack(note)
            return data, now_ns - max(day_ns - (s * SECOND_NS + ns), 0)
    return data, None


def receive_now(connection: socket.socket) -> tuple[bytes, int | None]:
    """What has come, and the time: for a kernel that notes none."""
    return connection.recv(READ_BYTES), time.monotonic_ns()


class KernelTime:
    """Keeps the kernel noting when bytes arrive, until it is closed; ``works`` only if it does.

    Linux begins with that some time after the first connection asks for it, and ends when the last
    that asked is closed: this holds one of its own, and has waited for its first stamp.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self.works = sys.platform.startswith("linux") and self._begin()

    def close(self) -> None:
        """Nothing is noted for this one any more."""
        self._held.close()

    def _begin(self) -> bool:
        try:
            with contextlib.ExitStack() as held:
                server = held.enter_context(socket.create_server(("127.0.0.1", 0)))
                here = held.enter_context(
                    socket.create_connection(server.getsockname(), timeout=PROBE_S)
                )
                there = held.enter_context(server.accept()[0])
                stamped(here)
                for _ in range(PROBES):
                    there.sendall(b"?")
                    if receive(here)[1] is not None:
                        self._held = held.pop_all()
                        return True
                    time.sleep(PROBE_S / PROBES)
        except OSError:
            # No such option, or no loopback to try it on.
            return False
        return False
