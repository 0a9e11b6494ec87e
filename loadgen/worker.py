"""One process of a load, started by `loadgen.workers`. It imports only what it needs.

From its standard input it reads a `Slice`, then the start of the clock. To its standard output it
writes frames: first an empty one when it is ready, then records as they end, with the numbers of
requests sent and in flight; last `Over`. When its input ends, as it also does when the process that
started it dies, it stops what is in flight, records it and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import uvloop

from loadgen.lean_client import LeanClient
from loadgen.load import Load, Progress
from loadgen.open_files import require_file_descriptors
from loadgen.pacing import Alarm
from loadgen.request_record import RequestRecord

LENGTH = struct.Struct("<I")
START = struct.Struct("<q")
FIELDS = tuple(field.name for field in fields(RequestRecord))
VALUES = attrgetter(*FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one worker sends; times are nanoseconds after the start."""

    urls: Sequence[str]
    headers: Mapping[str, str]
    ids: Sequence[int]
    due_ns: Sequence[int]
    bodies: list[bytes]
    lengths: list[int]
    end_ns: int
    expected_in_flight: int
    drain_s: float
    timeout_s: float | None
    send_delay_s: float


@dataclass(frozen=True, slots=True)
class Frame:
    """``rows``: records as tuples in the order of `FIELDS`."""

    rows: list[tuple[Any, ...]]
    sent: int
    in_flight: int
    over: bool = False


def main() -> None:
    """Run one slice."""
    # An interrupt at the terminal reaches every process; the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    source = sys.stdin.buffer
    work: Slice = pickle.load(source)
    require_file_descriptors(work.expected_in_flight)
    sys.stdout.buffer.write(_packed(Frame([], 0, 0)))
    sys.stdout.buffer.flush()
    start = source.read(START.size)
    if len(start) == START.size:
        uvloop.run(_run(work, START.unpack(start)[0], source.fileno()))


async def _run(work: Slice, start_ns: int, input_fd: int) -> None:
    loop = asyncio.get_running_loop()
    gone = loop.create_future()
    output, _ = await loop.connect_write_pipe(lambda: _Output(gone), sys.stdout.buffer)
    rows: list[tuple[Any, ...]] = []

    def write(over: bool = False) -> None:
        output.write(_packed(Frame(rows, load.sent, len(load.flying), over)))
        rows.clear()

    def on_record(record: RequestRecord) -> None:
        if not rows:
            loop.call_soon(write)
        rows.append(VALUES(record))

    alarm = Alarm()
    load = Load(
        client=LeanClient(work.headers, alarm, work.urls, 1e9 * len(work.due_ns) / work.end_ns),
        alarm=alarm,
        urls=work.urls,
        scheduled_ns=[start_ns + due_ns for due_ns in work.due_ns],
        bodies=work.bodies,
        lengths=work.lengths,
        start_ns=start_ns,
        end_ns=start_ns + work.end_ns,
        on_record=on_record,
        ids=work.ids,
        timeout_s=work.timeout_s,
        send_delay_s=work.send_delay_s,
    )
    offering = asyncio.ensure_future(_offer(load, work.drain_s, lambda *_: write()))
    loop.add_reader(input_fd, _end_with_input, input_fd, offering)
    with contextlib.suppress(asyncio.CancelledError):
        await offering
    loop.remove_reader(input_fd)
    write(over=True)
    output.close()
    await gone


def _packed(frame: Frame) -> bytes:
    data = pickle.dumps(frame)
    return LENGTH.pack(len(data)) + data


async def _offer(load: Load, drain_s: float, progress: Progress) -> None:
    async with load.under_way():
        await load.offer(drain_s, progress)


def _end_with_input(fd: int, offering: asyncio.Future[None]) -> None:
    if not os.read(fd, 1):
        offering.cancel()


class _Output(asyncio.BaseProtocol):
    """Everything was written, or nobody reads any more."""

    def __init__(self, gone: asyncio.Future[None]) -> None:
        self._gone = gone

    def connection_lost(self, error: Exception | None) -> None:
        if not self._gone.done():
            self._gone.set_result(None)
