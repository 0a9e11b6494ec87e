"""Room for one connection per request in flight."""

from __future__ import annotations

import fcntl
import os
import resource

from loadgen.mendable import Mendable

SPARE_FILE_DESCRIPTORS = 128
"""For everything but the requests: files, the event loop, the sampler's connections."""


class TooFewFileDescriptors(Mendable):
    """The load would need more open files than the system allows; the message says how to raise it."""


def require_file_descriptors(expected_in_flight: int) -> None:
    """Make sure that so many requests fit at once; raise the soft limit of open files if need be.

    Each request in flight holds a connection. Raises TooFewFileDescriptors when the hard limit is too
    low: a limit met during the run would end the open loop exactly when the queue grows.
    """
    needed = expected_in_flight + SPARE_FILE_DESCRIPTORS
    _raise_limit(expected_in_flight, needed)
    _make_room(needed)


def _raise_limit(expected_in_flight: int, needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise TooFewFileDescriptors(
            f"{expected_in_flight} requests in flight need {needed} open files and the hard limit "
            f"is {hard}: run `ulimit -n {needed}` as root first, or lower the rate or the horizon"
        )
    wanted = needed if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _make_room(needed: int) -> None:
    """Have the kernel's table of open files grow now.

    It doubles when it is full, and a process of several threads then stands still until every core has
    taken notice: 10 to 15 ms, in the middle of the load.
    """
    file = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, needed - 1))
    finally:
        os.close(file)
