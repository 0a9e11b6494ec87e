"""One schedule offered by several processes: dealt out, started at one instant, its records merged."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pickle
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import schedule_ns
from loadgen.drive import drive, is_plain, require_schedule
from loadgen.load import PROGRESS_INTERVAL_S, Progress
from loadgen.mendable import Mendable
from loadgen.pacing import SECOND_NS
from loadgen.request_record import RequestRecord
from loadgen.worker import FIELDS, LENGTH, START, Frame, Slice

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
"""A worker that has not ended by itself so long after its load is killed."""
ROOT = str(Path(__file__).resolve().parents[1])
IN_PROCESS_TOKENS_PER_S = 10_000.0
WORKER_TOKENS_PER_S = 40_000.0
"""About half of what one worker reads on one core (scripts/bench/loadgen)."""


class WorkerFailed(Mendable):
    """A worker did not become ready; the message has its last words."""


def workers_for(tokens_per_s: float, cores: int) -> int:
    """How many processes a load of so many streamed tokens per second takes on so many cores.

    1 is the process that asks: below `IN_PROCESS_TOKENS_PER_S` its own loop is enough.
    """
    if tokens_per_s <= IN_PROCESS_TOKENS_PER_S:
        return 1
    return max(1, min(cores, max(2, math.ceil(tokens_per_s / WORKER_TOKENS_PER_S))))


def usable_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(eq=False)
class Workers:
    """Processes that have their slices and wait for the start."""

    horizon_s: float
    drain_s: float
    processes: list[_Worker]

    async def offer(
        self,
        start_ns: int,
        on_record: Callable[[RequestRecord], None],
        progress: Progress | None = None,
    ) -> tuple[str, ...]:
        """As `loadgen.drive.drive` from ``start_ns``, the records of all as they end.

        Returns one sentence for each worker that was lost: its requests have no record from then on,
        so that no check of the load finds it whole. Raises what ``on_record`` or ``progress`` raised.
        """
        for worker in self.processes:
            worker.begin(start_ns)
        reading = [asyncio.create_task(worker.read(on_record)) for worker in self.processes]
        everything = asyncio.gather(*reading)
        end_ns = start_ns + round((self.horizon_s + self.drain_s + STOP_TIMEOUT_S) * SECOND_NS)
        try:
            while not everything.done() and (left_ns := end_ns - time.monotonic_ns()) > 0:
                if progress is not None:
                    elapsed_s = (time.monotonic_ns() - start_ns) / SECOND_NS
                    sent = sum(worker.sent for worker in self.processes)
                    progress(elapsed_s, sent, sum(worker.in_flight for worker in self.processes))
                await asyncio.wait(
                    {everything}, timeout=min(left_ns / SECOND_NS, PROGRESS_INTERVAL_S)
                )
            if everything.done():
                everything.result()
        finally:
            for worker in self.processes:
                worker.stop()
            await asyncio.wait(reading, timeout=STOP_TIMEOUT_S)
            everything.cancel()
            await asyncio.gather(everything, return_exceptions=True)
        return tuple(worker.loss for worker in self.processes if worker.loss)


@asynccontextmanager
async def ready_workers(
    count: int,
    headers: Mapping[str, str],
    urls: Sequence[str],
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
    *,
    drain_s: float = 0.0,
    timeout_s: float | None = None,
    send_delay_s: float = 0.0,
    expected_in_flight: int | None = None,
) -> AsyncIterator[Workers]:
    """``count`` processes with their slices of one schedule: request i is sent by worker i mod count.

    All slices together are the schedule itself, one for one. Arguments as of `loadgen.drive.drive`; the
    clock starts with `Workers.offer`, on the one monotonic clock of the machine. The processes end with
    this block, and with this process however it ends. Raises ValueError for inputs that do not fit
    together or a URL that is not plain HTTP, and WorkerFailed.
    """
    require_schedule(arrival_s, bodies, lengths, horizon_s)
    if not is_plain(urls):
        raise ValueError("several workers speak plain HTTP alone: use one for TLS")
    due_ns = schedule_ns(arrival_s, 0)
    each = len(arrival_s) if expected_in_flight is None else expected_in_flight
    slices = (
        Slice(
            urls=tuple(urls),
            headers=dict(headers),
            ids=range(index, len(arrival_s), count),
            due_ns=due_ns[index::count].tolist(),
            bodies=list(bodies[index::count]),
            lengths=lengths[index::count].ravel().tolist(),
            end_ns=round(horizon_s * SECOND_NS),
            expected_in_flight=part_in_flight(each, count, len(arrival_s)),
            drain_s=drain_s,
            timeout_s=timeout_s,
            send_delay_s=send_delay_s,
        )
        for index in range(count)
    )
    async with contextlib.AsyncExitStack() as stack:
        processes = [await _started(f"worker {index + 1} of {count}") for index in range(count)]
        for worker in processes:
            stack.push_async_callback(worker.end)
        for worker, work in zip(processes, slices, strict=True):
            await worker.give(work)
        for worker in processes:
            await worker.ready()
        yield Workers(horizon_s, drain_s, processes)


def part_in_flight(in_flight: int, parts: int, arrivals: int) -> int:
    """How many of the requests in flight one part of the schedule may have at once: somewhat more than
    its share."""
    return min(-(-in_flight // parts) + round(4 * math.sqrt(in_flight)), arrivals)


Offer = Callable[
    [int, Callable[[RequestRecord], None], Progress | None], Awaitable[tuple[str, ...]]
]
"""Offers a load that is ready: `Workers.offer`."""


@asynccontextmanager
async def ready_load(
    workers: int,
    session: aiohttp.ClientSession,
    urls: Sequence[str],
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
    *,
    send_delay_s: float = 0.0,
    expected_in_flight: int | None = None,
) -> AsyncIterator[Offer]:
    """A load that waits for its start, in this process if ``workers`` is 1, else in so many others.

    Arguments as of `loadgen.drive.drive`, errors as of `ready_workers`.
    """
    if workers > 1:
        async with ready_workers(
            workers,
            session.headers,
            urls,
            arrival_s,
            bodies,
            lengths,
            horizon_s,
            send_delay_s=send_delay_s,
            expected_in_flight=expected_in_flight,
        ) as several:
            yield several.offer
        return

    async def alone(
        start_ns: int, on_record: Callable[[RequestRecord], None], progress: Progress | None
    ) -> tuple[str, ...]:
        await drive(
            session,
            urls,
            arrival_s,
            bodies,
            lengths,
            horizon_s,
            start_ns,
            on_record,
            progress=progress,
            send_delay_s=send_delay_s,
            expected_in_flight=expected_in_flight,
        )
        return ()

    yield alone


async def _started(name: str) -> _Worker:
    path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from loadgen.worker import main; main()",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stderr is not None
    return _Worker(name, process, asyncio.create_task(process.stderr.read()))


@dataclass(eq=False)
class _Worker:
    name: str
    process: asyncio.subprocess.Process
    words: asyncio.Task[bytes]
    """What it writes to its standard error."""
    sent: int = 0
    in_flight: int = 0
    loss: str = field(init=False)
    """What is to be said of it while it has not come to its end, empty when it has."""

    def __post_init__(self) -> None:
        self.loss = f"{self.name} of the load does not answer any more"

    async def give(self, work: Slice) -> None:
        assert self.process.stdin is not None
        # One that has died already is found out by `ready`.
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(pickle.dumps(work))
            await self.process.stdin.drain()

    async def ready(self) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                frame = await self._frame()
        except TimeoutError:
            frame = None
        if frame is None:
            raise WorkerFailed(f"{self.name} of the load did not start: {await self._last_words()}")

    def begin(self, start_ns: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(START.pack(start_ns))

    async def read(self, on_record: Callable[[RequestRecord], None]) -> None:
        while (frame := await self._frame()) is not None:
            self.sent, self.in_flight = frame.sent, frame.in_flight
            for row in frame.rows:
                values: dict[str, Any] = dict(zip(FIELDS, row, strict=True))
                on_record(RequestRecord(**values))
            if frame.over:
                self.loss = ""
        if self.loss:
            self.loss = (
                f"{self.name} of the load was lost after {self.sent} requests: "
                f"{await self._last_words()}"
            )

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def end(self) -> None:
        self.stop()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        await self.words

    async def _frame(self) -> Frame | None:
        """The next one; None when the worker has closed its output."""
        assert self.process.stdout is not None
        try:
            (size,) = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))
            frame: Frame = pickle.loads(await self.process.stdout.readexactly(size))
        except asyncio.IncompleteReadError:
            return None
        return frame

    async def _last_words(self) -> str:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                status = await self.process.wait()
                said = (await asyncio.shield(self.words)).decode(errors="replace").strip()
        except TimeoutError:
            return "it does not answer"
        return f"exit status {status}, {said.splitlines()[-1] if said else 'nothing was said'}"
