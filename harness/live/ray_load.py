"""One schedule from several machines: dealt out to actors of a Ray cluster, one clock in the end.

Each machine has its own monotonic clock. Its offset from the driver's is estimated by exchanges as in
NTP: of many, that of the shortest round trip t has an error of at most t / 2. It is done before the load
and after it; what lies between is interpolated, and both estimates are kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

from harness.machine.sweep import cluster_arguments, join_cluster, ray_module
from loadgen.arrivals import schedule_ns
from loadgen.client import open_session
from loadgen.drive import drive, require_schedule
from loadgen.pacing import SECOND_NS
from loadgen.request_record import RequestRecord

EXCHANGES = 100
START_DELAY_S = 0.5
"""From handing out the slices to the start: by then each actor waits for it."""


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
class ClusterLoad:
    """``lost``: one sentence for each actor that was; its requests have no record, so that no check of
    the load finds it whole: the run is invalid."""

    clocks: tuple[NodeClock, ...]
    lost: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    expected_in_flight: int | None = None


class Sender:
    """Lives in an actor. Nothing of it is async: Ray would then run it on an event loop of its own."""

    def node(self) -> str:
        """The machine's name, as Ray has it."""
        name: str = ray_module().get_runtime_context().get_node_id()[:12]
        return name

    def clock_ns(self) -> int:
        """This machine's monotonic clock."""
        return time.monotonic_ns()

    def take(self, part: Slice) -> None:
        """Keep the slice until the start."""
        self.part = part

    def offer(self, start_ns: int) -> list[RequestRecord]:
        """Records of the slice on this machine's clock, which starts it."""
        return uvloop.run(offer_slice(self.part, start_ns))


async def offer_slice(part: Slice, start_ns: int) -> list[RequestRecord]:
    """Drive a slice; its records, on this machine's clock."""
    records: list[RequestRecord] = []
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
            expected_in_flight=part.expected_in_flight,
            ids=part.ids,
        )
    return records


async def offer_on_cluster(
    cluster: str,
    actors: int,
    headers: Mapping[str, str],
    urls: Sequence[str],
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
    on_record: Callable[[RequestRecord], None],
    *,
    drain_s: float = 0.0,
    expected_in_flight: int | None = None,
) -> ClusterLoad:
    """Offer the schedule from ``actors`` actors, spread over the nodes: i mod actors sends request i.

    ``cluster`` as of `harness.machine.sweep.sweep`; the others as of `loadgen.drive.drive`
    (``expected_in_flight`` may all be one actor's). The records
    come when all is over, in the order of their ids, on this process's clock: ``scheduled_ns`` is the
    schedule's own, the others are mapped. Raises ValueError for inputs that do not fit together,
    ModuleNotFoundError without Ray, and what ``on_record`` raised.
    """
    require_schedule(arrival_s, bodies, lengths, horizon_s)
    if actors < 1:
        raise ValueError(f"{actors} actors: at least one must send")
    ray, arguments = ray_module(), cluster_arguments(cluster)
    try:
        await asyncio.to_thread(join_cluster, ray, arguments)
        kind = ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(Sender)
        senders = [kind.remote() for _ in range(actors)]
        parts = slices(actors, headers, urls, arrival_s, bodies, lengths, horizon_s, drain_s)
        for sender, part in zip(senders, parts, strict=True):
            part = replace(part, expected_in_flight=expected_in_flight)
            await answer(sender.take.remote(part))
        before = [await offset(sender) for sender in senders]
        nodes = [await answer(sender.node.remote()) for sender in senders]
        start_ns = time.monotonic_ns() + round(START_DELAY_S * SECOND_NS)
        offered = [
            answer(sender.offer.remote(start_ns + known.offset_ns))
            for sender, known in zip(senders, before, strict=True)
        ]
        found = await asyncio.gather(*offered, return_exceptions=True)
        clocks, lost, records = [], [], []
        for index, came in enumerate(found):
            if isinstance(came, ray.exceptions.RayActorError):
                clocks.append(NodeClock(nodes[index], before[index], None))
                lost.append(f"sender {index + 1} of {actors} was lost, with all of its records")
                continue
            if isinstance(came, BaseException):
                raise came
            clock = NodeClock(nodes[index], before[index], await offset(senders[index]))
            clocks.append(clock)
            records += [on_driver_clock(record, clock) for record in came]
    finally:
        await asyncio.to_thread(ray.shutdown)
    due_ns = schedule_ns(arrival_s, start_ns)
    for record in sorted(records, key=lambda record: record.id):
        on_record(replace(record, scheduled_ns=int(due_ns[record.id])))
    return ClusterLoad(tuple(clocks), tuple(lost))


def slices(
    actors: int,
    headers: Mapping[str, str],
    urls: Sequence[str],
    arrival_s: NDArray[np.float64],
    bodies: Sequence[bytes],
    lengths: NDArray[np.int64],
    horizon_s: float,
    drain_s: float,
) -> list[Slice]:
    """The schedule dealt out: together the slices are it, one for one."""
    return [
        Slice(
            ids=range(index, len(arrival_s), actors),
            urls=tuple(urls),
            headers=dict(headers),
            arrival_s=arrival_s[index::actors],
            bodies=list(bodies[index::actors]),
            lengths=lengths[index::actors],
            horizon_s=horizon_s,
            drain_s=drain_s,
        )
        for index in range(actors)
    ]


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
    return best([await exchange(sender) for _ in range(EXCHANGES)])


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
