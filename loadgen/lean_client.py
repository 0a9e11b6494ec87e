"""The lean client: plain HTTP/1.1 on the event loop's own protocols, without a task per request.

It reads answers as `loadgen.client` does, and its records are the same. It follows no redirection,
keeps no cookies and uses no proxy, and a header of the server concerns it only where it frames the
answer.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from loadgen.exchange import (
    CONNECT_TIMEOUT_S,
    ERROR_CHARACTERS,
    KEEPALIVE_S,
    Request,
    TokenStream,
    in_short,
    record_of,
    refusal,
    wants_key,
)
from loadgen.http_answer import Answer, BadAnswer
from loadgen.pacing import SECOND_NS, Alarm
from loadgen.request_record import Outcome, RequestRecord

SWEEP_INTERVAL_S = 1.0
READY_CONNECTIONS = 2
READY_S = 0.004
"""Open ahead of requests are so many, and as many as arrive in this time: to be connected takes 0.7 ms
on a loopback, ten times what a send takes. Few, since a server may have a thread for each connection,
or a limit."""


@dataclass(slots=True)
class _Origin:
    """One server: its address, looked up once, connections that wait for a request, and requests that
    wait for a connection."""

    host: str
    port: int
    addresses: list[str] = field(default_factory=list)
    idle: dict[_Connection, None] = field(default_factory=dict)
    """The one used last is the last, and is the next."""
    waiting: deque[Exchange] = field(default_factory=deque)
    ready: int = 0
    """How many connections are to be open before they are needed."""
    connecting: int = 0

    def next_waiting(self) -> Exchange | None:
        """The request that has waited longest, and waits no more."""
        while self.waiting:
            if not (exchange := self.waiting.popleft()).over:
                return exchange
        return None


class LeanClient:
    """Connections without a cap, kept for `KEEPALIVE_S` when idle, the freshest used first.

    ``headers`` go with every request. To the servers of ``urls``, which get ``rate`` requests per
    second together, some connections are open before they are needed: a request that has to wait for
    one leaves late. At each read the clock is compared
    with ``alarm``: however many reads one turn of the loop brings, the next request leaves between two
    of them.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        alarm: Alarm,
        urls: Sequence[str] = (),
        rate: float = 0.0,
    ) -> None:
        fields = {"Accept": "*/*", "User-Agent": "critrate", **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
        self.alarm = alarm
        self._targets: dict[str, tuple[_Origin, bytes]] = {}
        self._origins: dict[tuple[str, int], _Origin] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._made: set[_Connection] = set()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._sweep = self._loop.call_later(SWEEP_INTERVAL_S, self._close_stale)
        for url in urls:
            origin, _ = self._target(url)
            origin.ready = READY_CONNECTIONS + round(READY_S * rate / len(urls))
            self._open(origin)

    def send(
        self, request: Request, ended: Callable[[RequestRecord], None], timeout_s: float | None
    ) -> Exchange:
        """See `loadgen.exchange.Client`."""
        origin, head = self._target(request.url)
        exchange = Exchange(request, head, ended)
        if timeout_s is not None:
            deadline_s = request.scheduled_ns / SECOND_NS + timeout_s
            exchange.deadline = self._loop.call_at(deadline_s, exchange.end, "timed_out")
        stale_ns = time.monotonic_ns() - round(KEEPALIVE_S * SECOND_NS)
        while origin.idle:
            connection, _ = origin.idle.popitem()
            if connection.idle_since_ns > stale_ns and not connection.transport.is_closing():
                connection.begin(exchange)
                break
            connection.transport.abort()
        else:
            origin.waiting.append(exchange)
        self._open(origin)
        return exchange

    async def close(self) -> None:
        """Close every connection, also those that are being made."""
        self._sweep.cancel()
        self._closing = True
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        # Not all of them will say that they are lost: uvloop keeps silent of those whose task was
        # cancelled.
        for connection in self._made:
            connection.transport.abort()
        await asyncio.sleep(0)

    def opened(self, connection: _Connection) -> None:
        """A connection was made."""
        self._made.add(connection)
        if self._closing:
            # Its task was cancelled too late to keep it from being made.
            connection.transport.abort()

    def lost(self, connection: _Connection) -> None:
        """A connection is closed."""
        self._made.discard(connection)
        if connection.origin.idle.pop(connection, connection) is None and not connection.used:
            # The server does not want connections that say nothing.
            connection.origin.ready = 0

    def _target(self, url: str) -> tuple[_Origin, bytes]:
        """Where a URL leads, and the head of its requests up to the number of the body's bytes."""
        if url not in self._targets:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 80
            origin = self._origins.setdefault((host, port), _Origin(host, port))
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n".encode()
            self._targets[url] = origin, head + self._fields + b"Content-Length: "
        return self._targets[url]

    def _open(self, origin: _Origin) -> None:
        """Make the connections that are missing: for the requests that wait, and those to be ready."""
        wanted = len(origin.waiting) + origin.ready - len(origin.idle)
        for _ in range(wanted - origin.connecting):
            origin.connecting += 1
            task = self._loop.create_task(self._connect(origin))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, origin: _Origin) -> None:
        try:
            connection = await self._connection(origin)
        except OSError as problem:
            # None ahead any more: whoever needs one will hear of it.
            origin.ready = 0
            if (exchange := origin.next_waiting()) is not None:
                where = f"{origin.host}:{origin.port}"
                exchange.end("failed", f"Cannot connect to host {where}: {in_short(problem)}")
        else:
            connection.rest()
        finally:
            origin.connecting -= 1

    async def _connection(self, origin: _Origin) -> _Connection:
        """A new one. Raises OSError."""
        problem = OSError("no address")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                for address in await self._addresses(origin):
                    try:
                        _, connection = await self._loop.create_connection(
                            lambda: _Connection(self, origin), address, origin.port
                        )
                    except OSError as error:
                        problem = error
                        continue
                    return connection
            raise problem
        finally:
            # Its traceback has this frame: nobody collects cycles while a load lasts.
            del problem

    async def _addresses(self, origin: _Origin) -> list[str]:
        if not origin.addresses:
            found = await self._loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            origin.addresses = [str(address[0]) for *_, address in found]
        return origin.addresses

    def _close_stale(self) -> None:
        stale_ns = time.monotonic_ns() - round(KEEPALIVE_S * SECOND_NS)
        for origin in self._origins.values():
            for connection in list(origin.idle):
                if connection.idle_since_ns >= stale_ns:
                    break
                del origin.idle[connection]
                connection.transport.abort()
        self._sweep = self._loop.call_later(SWEEP_INTERVAL_S, self._close_stale)


class Exchange:
    """One request from its sending to its record."""

    __slots__ = ("connection", "deadline", "ended", "head", "over", "request", "status", "stream")

    def __init__(
        self, request: Request, head: bytes, ended: Callable[[RequestRecord], None]
    ) -> None:
        self.request = request
        self.head = head
        self.ended = ended
        self.stream = TokenStream()
        self.status: int | None = None
        self.connection: _Connection | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.over = False

    def stop(self) -> None:
        """See `loadgen.exchange.Flight`."""
        self.end("unfinished")

    def end(self, outcome: Outcome, error: str | None = None, reuse: bool = False) -> None:
        """Make the record; close the connection unless it may take another request."""
        if self.over:
            return
        self.over = True
        if self.deadline is not None:
            self.deadline.cancel()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.exchange = None
            if reuse and connection.transport.get_write_buffer_size() == 0:
                connection.rest()
            else:
                connection.transport.abort()
        self.ended(record_of(self.request, self.stream, outcome, self.status, error))


class _Connection(asyncio.Protocol):
    """A connection and the request that has it, if any."""

    __slots__ = (
        "answer",
        "client",
        "complaint",
        "exchange",
        "idle_since_ns",
        "origin",
        "transport",
        "used",
    )

    transport: asyncio.Transport

    def __init__(self, client: LeanClient, origin: _Origin) -> None:
        self.client = client
        self.origin = origin
        self.exchange: Exchange | None = None
        self.answer = Answer()
        self.complaint = b""
        self.idle_since_ns = 0
        self.used = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not of this class, but do all that it does.
        self.transport = cast(asyncio.Transport, transport)
        self.client.opened(self)

    def begin(self, exchange: Exchange) -> None:
        """Send a request."""
        self.used = True
        self.exchange = exchange
        exchange.connection = self
        self.answer = Answer()
        self.complaint = b""
        body = exchange.request.body
        exchange.stream.sent_ns = time.monotonic_ns()
        self.transport.writelines((b"%s%d\r\n\r\n" % (exchange.head, len(body)), body))

    def rest(self) -> None:
        """Take the request that waits, or wait for one."""
        if (exchange := self.origin.next_waiting()) is not None:
            self.begin(exchange)
            return
        self.idle_since_ns = time.monotonic_ns()
        self.origin.idle[self] = None

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        exchange = self.exchange
        if exchange is None:
            # Nobody asked.
            self.transport.abort()
            return
        alarm = self.client.alarm
        if now_ns >= alarm.at_ns:
            alarm.go(now_ns)
        answer = self.answer
        try:
            body = answer.feed(data)
        except BadAnswer as problem:
            exchange.status = answer.status
            exchange.end("failed", in_short(problem))
            return
        if exchange.status == 200 and body:
            exchange.stream.feed(body, now_ns)
            if answer.part != "over":
                return
        self._look(exchange, body, now_ns)

    def _look(self, exchange: Exchange, body: bytes, now_ns: int) -> None:
        """What is no common read: a head, an end, a refusal."""
        answer = self.answer
        if answer.status is None:
            return
        if exchange.status is None:
            exchange.status = answer.status
            if answer.status == 200 and body:
                exchange.stream.feed(body, now_ns)
        over = answer.part == "over"
        if answer.status == 200:
            if over:
                exchange.end(*exchange.stream.ending(), reuse=answer.keep_alive)
            return
        self.complaint += body
        if over or len(self.complaint) >= ERROR_CHARACTERS or wants_key(answer.status):
            outcome, error = refusal(answer.status, self.complaint[:ERROR_CHARACTERS])
            exchange.end(outcome, error, reuse=over and answer.keep_alive)

    def connection_lost(self, error: Exception | None) -> None:
        self.client.lost(self)
        if (exchange := self.exchange) is None:
            return
        if error is None and self.answer.closed():
            self._look(exchange, b"", time.monotonic_ns())
            return
        where = "before its answer" if self.answer.status is None else "before the answer's end"
        what = "" if error is None else f": {in_short(error)}"
        exchange.end("failed", f"Server disconnected {where}{what}")
