"""A schedule on its way out: every request at its own instant, whatever became of the ones before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loadgen.exchange import Client, Flight, Request, TokenStream, record_of
from loadgen.pacing import NEVER_NS, SECOND_NS, Alarm, without_collection_pauses
from loadgen.request_record import RequestRecord

PROGRESS_INTERVAL_S = 1.0
MOST_AT_ONCE = 16
"""Requests of a burst, or of a generator that is behind, between two turns of the event loop: the
answers to those before are read meanwhile."""

Progress = Callable[[float, int, int], None]
"""Called about once per second with seconds since the start, requests sent and in flight."""


@dataclass(slots=True, kw_only=True)
class Load:
    """One schedule, or a slice of one, and what is in flight of it.

    Arrival number k has the ``id`` ids[k], by default k; request i goes to urls[i % len(urls)].
    """

    client: Client
    alarm: Alarm
    urls: Sequence[str]
    scheduled_ns: list[int]
    bodies: list[bytes]
    lengths: list[int]
    """Prompt, output and declared max_tokens of the first arrival, then of the second, and so on: a list
    for each would take a second to make for a million of them."""
    start_ns: int
    end_ns: int
    on_record: Callable[[RequestRecord], None]
    ids: Sequence[int] | None = None
    timeout_s: float | None = None
    send_delay_s: float = 0.0
    sent: int = 0
    flying: dict[int, Flight] = field(default_factory=dict)
    """By the id."""
    turn: int = 0
    """The arrival that is sent next."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing is in flight any more, or when something went wrong."""
    problem: BaseException | None = None

    def __post_init__(self) -> None:
        self.alarm.ring = self.send_due

    @property
    def streams(self) -> dict[int, TokenStream]:
        """What each request in flight has brought so far, by its id."""
        return {id: flight.stream for id, flight in self.flying.items()}

    def catch_up(self) -> None:
        """Take in all that has come: a client may be behind with its reading."""
        self.client.catch_up()

    def set_alarm(self) -> None:
        """To be called when the schedule begins or has grown."""
        last = self.turn >= len(self.scheduled_ns)
        self.alarm.set(NEVER_NS if last else self.scheduled_ns[self.turn])

    def send_due(self, now_ns: int) -> None:
        """Send what is due, and set the alarm for what is not."""
        # The event loop, which calls this, would only log an exception and let the load stand still.
        try:
            self._send_due(now_ns)
        except Exception as problem:
            self.problem = problem
            self.changed.set()

    def _send_due(self, now_ns: int) -> None:
        for _ in range(MOST_AT_ONCE):
            if self.turn >= len(self.scheduled_ns) or self.scheduled_ns[self.turn] > now_ns:
                break
            if self.send_delay_s:
                time.sleep(self.send_delay_s)
            now_ns = time.monotonic_ns()
            if now_ns >= self.end_ns:
                # Not sent any more, unless the schedule grows.
                return
            request = self._request(self.turn)
            self.turn += 1
            self.sent += 1
            self.flying[request.id] = self.client.send(request, self._landed, self.timeout_s)
            if self.send_delay_s:
                break
        self.set_alarm()
        if self.alarm.at_ns <= now_ns:
            # Behind: connections that are being made need turns of the loop.
            self.alarm.set_next_turn()

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """Whatever happens inside: at the end nothing is in flight and all that was due is recorded.

        Raises what the receiver of the records raised.
        """
        with without_collection_pauses():
            try:
                yield
            finally:
                await self.stop()
                if self.problem is None:
                    self.record_unsent()
                await self.client.close()
                self.alarm.close()
        if self.problem is not None:
            raise self.problem

    async def offer(self, drain_s: float = 0.0, progress: Progress | None = None) -> None:
        """Send until the time is over, then wait for what is in flight, at most ``drain_s``.

        Raises what the receiver of the records or ``progress`` raised.
        """
        self.set_alarm()
        await self._pass_time(lambda: self.end_ns, progress)
        drained_ns = self.end_ns + round(drain_s * SECOND_NS)
        await self._pass_time(lambda: drained_ns if self.flying else 0, progress)

    async def stop(self) -> None:
        """Stop what is in flight; each request has its record when this returns."""
        self.alarm.set(NEVER_NS)
        # The last sent first: one that waits for a connection must not get that of another.
        for flight in reversed(list(self.flying.values())):
            flight.stop()
        while self.flying and self.problem is None:
            self.changed.clear()
            await self.changed.wait()

    def record_unsent(self) -> None:
        """Records of the arrivals that were due and never sent."""
        due_ns = min(time.monotonic_ns(), self.end_ns)
        for index in range(self.turn, len(self.scheduled_ns)):
            if self.scheduled_ns[index] < due_ns:
                self.on_record(record_of(self._request(index), TokenStream(), "unfinished"))

    async def broken(self) -> None:
        """Wait until the receiver of the records raises, and raise that."""
        while self.problem is None:
            self.changed.clear()
            await self.changed.wait()
        raise self.problem

    async def _pass_time(self, until_ns: Callable[[], int], progress: Progress | None) -> None:
        while (left_s := (until_ns() - time.monotonic_ns()) / SECOND_NS) > 0:
            if progress is not None:
                elapsed_s = (time.monotonic_ns() - self.start_ns) / SECOND_NS
                progress(elapsed_s, self.sent, len(self.flying))
                left_s = min(left_s, PROGRESS_INTERVAL_S)
            self.changed.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self.changed.wait()
            except TimeoutError:
                continue
            if self.problem is not None:
                raise self.problem

    def _request(self, index: int) -> Request:
        id = index if self.ids is None else self.ids[index]
        prompt_tokens, output_tokens, max_tokens = self.lengths[3 * index : 3 * index + 3]
        return Request(
            id=id,
            url=self.urls[id % len(self.urls)],
            body=self.bodies[index],
            scheduled_ns=self.scheduled_ns[index],
            prompt_tokens=prompt_tokens,
            output_tokens_designed=output_tokens,
            max_tokens=max_tokens,
        )

    def _landed(self, record: RequestRecord) -> None:
        del self.flying[record.id]
        if self.problem is None:
            # This is called by the event loop, which would only log an exception.
            try:
                self.on_record(record)
            except BaseException as problem:
                self.problem = problem
        if not self.flying or self.problem is not None:
            self.changed.set()
