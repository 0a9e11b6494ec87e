"""One schedule from several machines: dealt out to actors of a Ray cluster, one clock in the end.

Each machine has its own monotonic clock. Its offset from the driver's is estimated by exchanges as in
NTP: of many, that of the shortest round trip t has an error of at most t / 2. It is done before the load
and after it; what lies between is interpolated, and both estimates are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

from harness.machine.sweep import cluster_arguments, join_cluster, ray_module
from loadgen.arrivals import schedule_ns
from loadgen.client import open_session
from loadgen.drive import drive, require_schedule
from loadgen.load import PROGRESS_INTERVAL_S, Progress
from loadgen.mendable import Mendable
from loadgen.open_files import require_file_descriptors
from loadgen.pacing import SECOND_NS
from loadgen.request_record import RequestRecord
from loadgen.workers import part_in_flight

EXCHANGES = 40
EXCHANGING_NS = SECOND_NS // 5
"""At most so many, and no longer: the start does not wait."""
CALLS_AT_ONCE = 4
"""Of an actor: its load, and beside that its clock, its state and the word to stop."""
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class ClusterFailed(Mendable):
    """No load can come from the cluster; the message says why."""


@dataclass(frozen=True, slots=True)
class Offset:
    """A node's clock less the driver's, ns, within ``error_ns``, at ``at_ns`` of the driver's clock."""

    at_ns: int
    offset_ns: int
    error_ns: int


@dataclass(frozen=True, slots=True)
class NodeClock:
    """What ties an actor's clock to the driver's; ``after`` is None where the actor was lost."""

    node: str
    before: Offset
    after: Offset | None

    @property
    def error_ns(self) -> int:
        """How far off a mapped instant may be."""
        after = self.after or self.before
        return max(self.before.error_ns, after.error_ns)

    def to_driver(self, t_ns: int) -> int:
        """An instant of the node's clock on the driver's; the offset drifts evenly in between."""
        before, after = self.before, self.after
        if after is None or after.at_ns == before.at_ns:
            return t_ns - before.offset_ns
        elapsed_ns = t_ns - before.offset_ns - before.at_ns
        drift = (after.offset_ns - before.offset_ns) / (after.at_ns - before.at_ns)
        return t_ns - before.offset_ns - round(drift * elapsed_ns)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one actor sends; the arguments are those of `loadgen.drive.drive`."""

    ids: range
    urls: tuple[str, ...]
    headers: dict[str, str]
    arrival_s: NDArray[np.float64]
    bodies: list[bytes]
    lengths: NDArray[np.int64]
    horizon_s: float
    drain_s: float
    send_delay_s: float
    expected_in_flight: int | None


class Sender:
    """Lives in an actor. Nothing of it is async: Ray would then run it on an event loop of its own."""

    part: Slice

    def __init__(self) -> None:
        self.at = 0, 0
        self.stopped = False
        self.end: Callable[[], object] = lambda: None

    def node(self) -> str:
        """The machine's name, as Ray has it."""
        name: str = ray_module().get_runtime_context().get_node_id()[:12]
        return name

    def clock_ns(self) -> int:
        """This machine's monotonic clock."""
        return time.monotonic_ns()

    def take(self, part: Slice) -> None:
        """Keep the slice until the start. Raises TooFewFileDescriptors."""
        require_file_descriptors(part.expected_in_flight or len(part.ids))
        self.part = part

    def offer(self, start_ns: int) -> list[RequestRecord]:
        """Records of the slice on this machine's clock, which starts it."""
        return uvloop.run(_offered(self, start_ns))

    def state(self) -> tuple[int, int]:
        """Requests sent and in flight, while `offer` lasts."""
        return self.at

    def stop(self) -> None:
        """End the load now: `offer` returns with what there is, requests in flight ``unfinished``."""
        self.stopped = True
        self.end()


async def _offered(sender: Sender, start_ns: int) -> list[RequestRecord]:
    """Drive the slice of a sender until its end, or until it is told to stop."""
    loop, task, part = asyncio.get_running_loop(), asyncio.current_task(), sender.part
    assert task is not None
    sender.end = lambda: loop.call_soon_threadsafe(task.cancel)
    records: list[RequestRecord] = []
    if sender.stopped:
        return records

    def note(_: float, sent: int, in_flight: int) -> None:
        sender.at = sent, in_flight

    with contextlib.suppress(asyncio.CancelledError):
        async with open_session(part.headers) as session:
            await drive(
                session,
                list(part.urls),
                part.arrival_s,
                part.bodies,
                part.lengths,
                part.horizon_s,
                start_ns,
                records.append,
                drain_s=part.drain_s,
                progress=note,
                send_delay_s=part.send_delay_s,
                expected_in_flight=part.expected_in_flight,
                ids=part.ids,
            )
    return records


@dataclass(eq=False)
class Senders:
    """Actors that hold their slices and wait for the start.

    ``clocks``: what ties each one's clock to this one's, there when `offer` has ended.
    """

    ray: Any
    actors: list[Any]
    nodes: list[str]
    arrival_s: NDArray[np.float64]
    stopped_ns: int | None = None
    """When `offer` was cancelled: nothing that is due later has a record."""
    clocks: tuple[NodeClock, ...] = ()

    async def offer(
        self,
        start_ns: int,
        on_record: Callable[[RequestRecord], None],
        progress: Progress | None = None,
    ) -> tuple[str, ...]:
        """Offer the schedule from ``start_ns`` of this process's clock on.

        The records come when all is over, in the order of their ids, on this clock: ``scheduled_ns`` is
        the schedule's own, the others are mapped. Returns a sentence for each actor that was lost; its
        requests have no record, so that no check of the load finds it whole: the run is invalid. When
        cancelled, the actors stop, and what they have recorded is handed over first.
        """
        try:
            before = await asyncio.gather(*map(offset, self.actors))
        except self.ray.exceptions.RayActorError as error:
            raise ClusterFailed(f"a sender was lost before the load began: {error}") from error
        offered = asyncio.gather(
            *(
                answer(actor.offer.remote(start_ns + known.offset_ns))
                for actor, known in zip(self.actors, before, strict=True)
            ),
            return_exceptions=True,
        )
        watching = asyncio.create_task(self._watch(start_ns, progress))
        try:
            found = await asyncio.shield(offered)
        except asyncio.CancelledError:
            self.stopped_ns = time.monotonic_ns()
            for actor in self.actors:
                actor.stop.remote()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._take_in(await offered, before, start_ns, on_record)
            raise
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return await self._take_in(found, before, start_ns, on_record)

    async def _take_in(
        self,
        found: Sequence[Any],
        before: Sequence[Offset],
        start_ns: int,
        on_record: Callable[[RequestRecord], None],
    ) -> tuple[str, ...]:
        clocks, lost, records = [], [], []
        for index, came in enumerate(found):
            if isinstance(came, self.ray.exceptions.RayActorError):
                clocks.append(NodeClock(self.nodes[index], before[index], None))
                name = f"sender {index + 1} of {len(self.actors)}"
                lost.append(f"{name} was lost, with all of its records")
                continue
            if isinstance(came, BaseException):
                raise came
            try:
                after = await offset(self.actors[index])
            except self.ray.exceptions.RayActorError:
                # Its records are here.
                after = None
            clocks.append(NodeClock(self.nodes[index], before[index], after))
            records += [on_driver_clock(record, clocks[-1]) for record in came]
        self.clocks = tuple(clocks)
        due_ns = schedule_ns(self.arrival_s, start_ns)
        for record in sorted(records, key=lambda record: record.id):
            if self.stopped_ns is None or due_ns[record.id] < self.stopped_ns:
                on_record(replace(record, scheduled_ns=int(due_ns[record.id])))
        return tuple(lost)

    async def _watch(self, start_ns: int, progress: Progress | None) -> None:
        """Say about once a second how far the actors are."""
        while progress is not None:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            asked = (answer(actor.state.remote()) for actor in self.actors)
            states = await asyncio.gather(*asked, return_exceptions=True)
            sent, flying = np.sum([s for s in states if isinstance(s, tuple)] or [(0, 0)], axis=0)
            elapsed_s = (time.monotonic_ns() - start_ns) / SECOND_NS
            progress(max(elapsed_s, 0.0), int(sent), int(flying))


@asynccontextmanager
async def ready_senders(
    cluster: str,
    actors: int,
    headers: Mapping[str, str],
    urls: Sequence[str],
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
    *,
    drain_s: float = 0.0,
    send_delay_s: float = 0.0,
    expected_in_flight: int | None = None,
) -> AsyncIterator[Senders]:
    """``actors`` actors of a Ray cluster with their slices of one schedule, spread over its nodes.

    Request i is sent by actor i mod ``actors``. ``cluster`` as of `harness.machine.sweep.sweep`; the
    others as of `loadgen.drive.drive`. Raises ValueError for inputs that do not fit together,
    ClusterFailed, and TooFewFileDescriptors of a node.
    """
    require_schedule(arrival_s, bodies, lengths, horizon_s)
    if actors < 1:
        raise ValueError(f"{actors} actors: at least one must send")
    each = len(arrival_s) if expected_in_flight is None else expected_in_flight
    parts = [
        Slice(
            ids=range(index, len(arrival_s), actors),
            urls=tuple(urls),
            headers=dict(headers),
            arrival_s=arrival_s[index::actors],
            bodies=list(bodies[index::actors]),
            lengths=lengths[index::actors],
            horizon_s=horizon_s,
            drain_s=drain_s,
            send_delay_s=send_delay_s,
            expected_in_flight=part_in_flight(each, actors, len(arrival_s)),
        )
        for index in range(actors)
    ]
    try:
        ray = ray_module()
        await asyncio.to_thread(join_cluster, ray, cluster_arguments(cluster))
    except (ModuleNotFoundError, ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterFailed(f"load.cluster {cluster}: {error}") from error
    # Ray puts a handler of its own beneath Python's, which aborts the process three seconds later.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        options = {"num_cpus": 1, "max_restarts": 0, "max_concurrency": CALLS_AT_ONCE}
        kind = ray.remote(**options, scheduling_strategy="SPREAD")(Sender)
        senders = [kind.remote() for _ in range(actors)]
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                for sender, part in zip(senders, parts, strict=True):
                    await answer(sender.take.remote(part))
                nodes = [await answer(sender.node.remote()) for sender in senders]
        except TimeoutError as error:
            raise ClusterFailed(
                f"load.cluster {cluster}: {actors} senders were not ready within "
                f"{READY_TIMEOUT_S:.0f} s: each needs a free CPU of the cluster"
            ) from error
        except ray.exceptions.RayActorError as error:
            raise ClusterFailed(f"load.cluster {cluster}: {error}") from error
        yield Senders(ray, senders, nodes, arrival_s)
    finally:
        await asyncio.to_thread(ray.shutdown)


def on_driver_clock(record: RequestRecord, clock: NodeClock) -> RequestRecord:
    """The record with its instants, but for ``scheduled_ns``, on the driver's clock."""

    def mapped(t_ns: int | None) -> int | None:
        return None if t_ns is None else clock.to_driver(t_ns)

    return replace(
        record,
        sent_ns=mapped(record.sent_ns),
        first_token_ns=mapped(record.first_token_ns),
        last_token_ns=mapped(record.last_token_ns),
    )


async def offset(sender: Any) -> Offset:
    """An actor's clock against this one's."""
    until_ns = time.monotonic_ns() + EXCHANGING_NS
    found = [await exchange(sender)]
    while len(found) < EXCHANGES and time.monotonic_ns() < until_ns:
        found.append(await exchange(sender))
    return best(found)


async def exchange(sender: Any) -> tuple[int, int, int]:
    """This clock before, the actor's, this clock after."""
    before_ns = time.monotonic_ns()
    theirs_ns = await answer(sender.clock_ns.remote())
    return before_ns, theirs_ns, time.monotonic_ns()


def best(exchanges: Sequence[tuple[int, int, int]]) -> Offset:
    """The offset from the exchange of the shortest round trip, whose half is its error (RFC 5905, 8)."""
    before_ns, theirs_ns, after_ns = min(exchanges, key=lambda one: one[2] - one[0])
    middle_ns = (before_ns + after_ns) // 2
    return Offset(middle_ns, theirs_ns - middle_ns, (after_ns - before_ns + 1) // 2)


async def answer(reference: Any) -> Any:
    """Of a call to an actor, without standing still meanwhile. Raises what it raised."""
    return await asyncio.wrap_future(reference.future())
