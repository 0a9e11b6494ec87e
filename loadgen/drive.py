"""Open-loop load on one event loop: the whole schedule at once, or as it is decided."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import SECOND_NS, schedule_ns
from loadgen.client import SessionClient
from loadgen.exchange import Client
from loadgen.lean_client import LeanClient
from loadgen.load import Load, Progress
from loadgen.open_files import (
    SPARE_FILE_DESCRIPTORS,
    TooFewFileDescriptors,
    require_file_descriptors,
)
from loadgen.pacing import Alarm
from loadgen.request_record import RequestRecord

__all__ = [
    "SPARE_FILE_DESCRIPTORS",
    "Load",
    "TooFewFileDescriptors",
    "drive",
    "drive_on",
    "extend",
    "require_file_descriptors",
]


async def drive(
    session: aiohttp.ClientSession,
    urls: Sequence[str],
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
    ids: Sequence[int] | None = None,
) -> None:
    """Offer the schedule on [0, horizon_s) and hand over one record per arrival, as each one ends.

    ``arrival_s``: shape (n,), increasing seconds after ``start_ns`` (of time.monotonic_ns, in the
    near future). ``bodies``: n encoded requests; ``lengths``: shape (n, 3), prompt, output and
    declared max_tokens. Request i goes to urls[i % len(urls)]; ``ids`` are those of the records, the
    indices of the arrivals if not given. URLs of plain HTTP are driven by the lean client, others by
    ``session``; its headers go with every request.

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
    require_schedule(arrival_s, bodies, lengths, horizon_s)
    require_file_descriptors(len(arrival_s) if expected_in_flight is None else expected_in_flight)
    alarm = Alarm()
    load = Load(
        client=client_for(session, urls, alarm, len(arrival_s) / horizon_s),
        alarm=alarm,
        urls=urls,
        scheduled_ns=schedule_ns(arrival_s, start_ns).tolist(),
        bodies=list(bodies),
        lengths=lengths.ravel().tolist(),
        start_ns=start_ns,
        end_ns=start_ns + round(horizon_s * SECOND_NS),
        on_record=on_record,
        ids=ids,
        timeout_s=timeout_s,
        send_delay_s=send_delay_s,
    )
    async with load.under_way():
        await load.offer(drain_s, progress)


async def drive_on(
    session: aiohttp.ClientSession,
    urls: Sequence[str],
    start_ns: int,
    on_record: Callable[[RequestRecord], None],
    decide: Callable[[Load], Awaitable[None]],
    send_delay_s: float = 0.0,
) -> None:
    """An open loop whose schedule is decided as it goes: ``decide`` extends the load, then returns.

    Request i goes to urls[i % len(urls)]. Each part must be there before it begins: `extend`. A
    request whose instant has passed by then is sent late, as any other. When ``decide`` returns,
    whatever is still in flight is stopped and recorded ``unfinished``; the same when cancelled.
    Raises what ``decide`` or ``on_record`` raised.
    """
    alarm = Alarm()
    load = Load(
        client=client_for(session, urls, alarm),
        alarm=alarm,
        urls=urls,
        scheduled_ns=[],
        bodies=[],
        lengths=[],
        start_ns=start_ns,
        end_ns=start_ns,
        on_record=on_record,
        send_delay_s=send_delay_s,
    )
    async with load.under_way():
        work = [asyncio.ensure_future(decide(load)), asyncio.ensure_future(load.broken())]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)


def extend(
    load: Load,
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    end_s: float,
) -> None:
    """More arrivals until ``end_s``, increasing and later than all before; arguments as of `drive`.

    Raises ValueError for inputs that do not fit together, and TooFewFileDescriptors.
    """
    begin_s = (load.end_ns - load.start_ns) / SECOND_NS
    require_schedule(arrival_s - begin_s, bodies, lengths, end_s - begin_s)
    require_file_descriptors(len(load.flying) + len(arrival_s))
    load.bodies.extend(bodies)
    load.lengths.extend(lengths.ravel().tolist())
    load.scheduled_ns.extend(schedule_ns(arrival_s, load.start_ns).tolist())
    load.end_ns = load.start_ns + round(end_s * SECOND_NS)
    load.set_alarm()


def client_for(
    session: aiohttp.ClientSession, urls: Sequence[str], alarm: Alarm, rate: float = 0.0
) -> Client:
    """The lean client where all is plain HTTP, else the session's."""
    if is_plain(urls):
        return LeanClient(session.headers, alarm, urls, rate)
    return SessionClient(session)


def is_plain(urls: Sequence[str]) -> bool:
    """Is all of it HTTP without TLS?"""
    return all(url.startswith("http://") for url in urls)


def require_schedule(
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
) -> None:
    """Raise ValueError unless these fit together; arguments as of `drive`."""
    count = len(arrival_s)
    if len(bodies) != count or lengths.shape != (count, 3):
        raise ValueError(
            f"{count} arrivals need {count} bodies and lengths of shape ({count}, 3), "
            f"not {len(bodies)} bodies and lengths of shape {lengths.shape}"
        )
    inside = not count or (arrival_s[0] >= 0.0 and arrival_s[-1] < horizon_s)
    if not inside or bool((np.diff(arrival_s) < 0).any()):
        raise ValueError(f"arrivals must be increasing and lie in [0, {horizon_s}) s")
