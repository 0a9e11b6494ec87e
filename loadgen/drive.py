"""Open-loop load: every request at its own instant, whatever became of the ones before."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import SECOND_NS, schedule_ns
from loadgen.client import TokenStream, complete
from loadgen.records import RequestRecord

SPARE_FILE_DESCRIPTORS = 128
"""For everything but the requests: files, the event loop, the sampler's connections."""
PROGRESS_INTERVAL_S = 1.0
TIMER_GRID_NS = 1_500_000
"""The event loop's timers fire on a 1 ms grid: sleep to just before the instant, then poll."""

Progress = Callable[[float, int, int], None]
"""Called about once per second with seconds since the start, requests sent and in flight."""


class TooFewFileDescriptors(RuntimeError):
    """The load would need more open files than the system allows; the message says how to raise it."""


async def drive(
    session: aiohttp.ClientSession,
    url: str,
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
    start_ns: int,
    on_record: Callable[[RequestRecord], None],
    *,
    drain_s: float = 0.0,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    send_delay_s: float = 0.0,
    expected_in_flight: int | None = None,
) -> None:
    """Offer the schedule on [0, horizon_s) and hand over one record per arrival, as each one ends.

    ``arrival_s``: shape (n,), increasing seconds after ``start_ns`` (of time.monotonic_ns, in the
    near future). ``bodies``: n encoded requests; ``lengths``: shape (n, 3), prompt, output and
    declared max_tokens. The ``id`` of a record is the index of its arrival.

    No request waits for another and none is skipped: one that is due late is sent late, and the
    next keeps its own instant. At ``horizon_s`` the arrivals end; after ``drain_s`` more seconds
    (less if nothing is in flight any more) whatever is still in flight is stopped and recorded
    ``unfinished``: those requests are the queue. An arrival whose turn to be sent had not come by
    the horizon is ``unfinished`` with ``sent_ns`` None. When cancelled, the same is done at once,
    and arrivals that were not yet due get no record.

    ``send_delay_s`` blocks the generator that long before each send: a proof that the lag is
    noticed. ``expected_in_flight`` is how many requests may be open at once, all of them if None.

    Raises ValueError for inputs that do not fit together, TooFewFileDescriptors from
    `require_file_descriptors`, and what ``on_record`` or ``progress`` raised.
    """
    _require_schedule(arrival_s, bodies, lengths, horizon_s)
    require_file_descriptors(len(arrival_s) if expected_in_flight is None else expected_in_flight)
    load = Load(
        session=session,
        url=url,
        scheduled_ns=schedule_ns(arrival_s, start_ns).tolist(),
        bodies=list(bodies),
        lengths=lengths.tolist(),
        start_ns=start_ns,
        end_ns=start_ns + round(horizon_s * SECOND_NS),
        on_record=on_record,
        timeout_s=timeout_s,
        send_delay_s=send_delay_s,
    )
    with _without_collection_pauses():
        try:
            async with asyncio.TaskGroup() as group:
                reporting = group.create_task(load.report(progress)) if progress else None
                await load.send(group)
                await load.finish(drain_s)
                if reporting:
                    reporting.cancel()
        except BaseExceptionGroup as problems:
            raise problems.exceptions[0] from None
        except asyncio.CancelledError:
            load.record_unsent()
            raise
    load.record_unsent()


async def drive_on(
    session: aiohttp.ClientSession,
    url: str,
    start_ns: int,
    on_record: Callable[[RequestRecord], None],
    decide: Callable[[Load], Awaitable[None]],
    send_delay_s: float = 0.0,
) -> None:
    """An open loop whose schedule is decided as it goes: ``decide`` extends the load, then returns.

    Each part must be there before it begins: `Load.extend`. A request whose instant has passed by
    then is sent late, as any other. When ``decide`` returns, whatever is still in flight is stopped and
    recorded ``unfinished``; the same when cancelled. Raises what ``decide`` or ``on_record`` raised.
    """
    load = Load(
        session=session,
        url=url,
        scheduled_ns=[],
        bodies=[],
        lengths=[],
        start_ns=start_ns,
        end_ns=start_ns,
        on_record=on_record,
        timeout_s=None,
        send_delay_s=send_delay_s,
        extended=asyncio.Event(),
    )
    with _without_collection_pauses():
        try:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(load.send(group))
                await decide(load)
                sending.cancel()
                for task in list(load.flying.values()):
                    task.cancel()
        except BaseExceptionGroup as problems:
            raise problems.exceptions[0] from None
        finally:
            load.record_unsent()


def require_file_descriptors(expected_in_flight: int) -> None:
    """Make sure that so many requests fit at once; raise the soft limit of open files if need be.

    Each request in flight holds a connection. Raises TooFewFileDescriptors when the hard limit is too
    low: a limit met during the run would end the open loop exactly when the queue grows.
    """
    needed = expected_in_flight + SPARE_FILE_DESCRIPTORS
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


@dataclass(slots=True, kw_only=True)
class Load:
    """One schedule on its way out. ``ended`` tells which arrivals have their record.

    `drive` knows the whole schedule before it begins; `drive_on` extends it on the way.
    """

    session: aiohttp.ClientSession
    url: str
    scheduled_ns: list[int]
    bodies: list[bytes]
    lengths: list[list[int]]
    start_ns: int
    end_ns: int
    on_record: Callable[[RequestRecord], None]
    timeout_s: float | None
    send_delay_s: float
    sent: int = 0
    flying: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    streams: dict[int, TokenStream] = field(default_factory=dict)
    """What each request in flight has brought so far."""
    extended: asyncio.Event | None = None
    """Set after the schedule grew; None: it does not grow."""

    def extend(
        self,
        arrival_s: NDArray[np.float64],
        bodies: Sequence[bytes],
        lengths: NDArray[np.int64],
        end_s: float,
    ) -> None:
        """Arrivals until ``end_s``, increasing and later than all before; arguments as of `drive`.

        Raises ValueError for inputs that do not fit together, and TooFewFileDescriptors.
        """
        begin_s = (self.end_ns - self.start_ns) / SECOND_NS
        _require_schedule(arrival_s - begin_s, bodies, lengths, end_s - begin_s)
        require_file_descriptors(len(self.flying) + len(arrival_s))
        self.bodies.extend(bodies)
        self.lengths.extend(lengths.tolist())
        self.scheduled_ns.extend(schedule_ns(arrival_s, self.start_ns).tolist())
        self.end_ns = self.start_ns + round(end_s * SECOND_NS)
        if self.extended is not None:
            self.extended.set()

    async def more(self, index: int) -> bool:
        """Is there an arrival of this index? Waits for it where the schedule still grows."""
        while index >= len(self.scheduled_ns) and self.extended is not None:
            self.extended.clear()
            await self.extended.wait()
        return index < len(self.scheduled_ns)

    async def send(self, group: asyncio.TaskGroup) -> None:
        """Start every request at its instant, until the schedule or the time is over."""
        index = -1
        while await self.more(index := index + 1):
            due_ns = self.scheduled_ns[index]
            while (wait_ns := due_ns - time.monotonic_ns()) > 0:
                await asyncio.sleep(max(wait_ns - TIMER_GRID_NS, 0) / SECOND_NS)
            if self.send_delay_s:
                time.sleep(self.send_delay_s)
            if time.monotonic_ns() >= self.end_ns:
                return
            self.flying[index] = group.create_task(self.follow(index))
            self.sent += 1
            # A generator that is behind never sleeps: without this its requests would not start.
            await asyncio.sleep(0)

    async def follow(self, index: int) -> None:
        prompt_tokens, output_tokens, max_tokens = self.lengths[index]
        stream = self.streams[index] = TokenStream()
        record = await complete(
            self.session,
            self.url,
            self.bodies[index],
            id=index,
            scheduled_ns=self.scheduled_ns[index],
            prompt_tokens=prompt_tokens,
            output_tokens_designed=output_tokens,
            max_tokens=max_tokens,
            timeout_s=self.timeout_s,
            stream=stream,
        )
        del self.flying[index], self.streams[index]
        self.ended.add(index)
        self.on_record(record)

    async def finish(self, drain_s: float) -> None:
        """Wait for the horizon, then for requests in flight as long as allowed; stop the rest."""
        await asyncio.sleep(max(self.end_ns - time.monotonic_ns(), 0) / SECOND_NS)
        if drain_s and self.flying:
            await asyncio.wait(list(self.flying.values()), timeout=drain_s)
        for task in list(self.flying.values()):
            task.cancel()

    async def report(self, progress: Progress) -> None:
        while True:
            elapsed_s = (time.monotonic_ns() - self.start_ns) / SECOND_NS
            progress(elapsed_s, self.sent, len(self.flying))
            await asyncio.sleep(PROGRESS_INTERVAL_S)

    def record_unsent(self) -> None:
        """Records of the arrivals that were due and never sent."""
        due_ns = min(time.monotonic_ns(), self.end_ns)
        for index, scheduled_ns in enumerate(self.scheduled_ns):
            if scheduled_ns < due_ns and index not in self.ended:
                prompt_tokens, output_tokens, max_tokens = self.lengths[index]
                record = RequestRecord(
                    id=index,
                    scheduled_ns=scheduled_ns,
                    sent_ns=None,
                    first_token_ns=None,
                    last_token_ns=None,
                    prompt_tokens=prompt_tokens,
                    output_tokens_designed=output_tokens,
                    max_tokens=max_tokens,
                    output_tokens=0,
                    prompt_tokens_reported=None,
                    outcome="unfinished",
                )
                self.on_record(record)


def _require_schedule(
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
) -> None:
    count = len(arrival_s)
    if len(bodies) != count or lengths.shape != (count, 3):
        raise ValueError(
            f"{count} arrivals need {count} bodies and lengths of shape ({count}, 3), "
            f"not {len(bodies)} bodies and lengths of shape {lengths.shape}"
        )
    inside = not count or (arrival_s[0] >= 0.0 and arrival_s[-1] < horizon_s)
    if not inside or bool((np.diff(arrival_s) < 0).any()):
        raise ValueError(f"arrivals must be increasing and lie in [0, {horizon_s}) s")


@contextmanager
def _without_collection_pauses() -> Iterator[None]:
    """No cycle collection during the run: a full one would stop the generator for a while.

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
