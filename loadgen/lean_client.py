"""The lean client: plain HTTP/1.1 on the event loop's own protocols, without a task per request.

It reads answers as `loadgen.client` does, and its records are the same. It follows no redirection,
keeps no cookies and uses no proxy, and a header of the server concerns it only where it frames the
answer.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit

from loadgen.exchange import CONNECT_TIMEOUT_S, KEEPALIVE_S, Request, in_short
from loadgen.kernel_time import stamped
from loadgen.late_reading import LateReading
from loadgen.lean_connection import Connection, Exchange, Origin
from loadgen.pacing import SECOND_NS, Alarm
from loadgen.request_record import RequestRecord

SWEEP_INTERVAL_S = 1.0
READY_CONNECTIONS = 2
READY_S = 0.004
"""Open ahead of requests are so many, and as many as arrive in this time: to be connected takes 0.7 ms
on a loopback, ten times what a send takes. Few, since a server may have a thread for each connection,
or a limit."""


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
        self._targets: dict[str, tuple[Origin, bytes]] = {}
        self._origins: dict[tuple[str, int], Origin] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._made: set[Connection] = set()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self.late = LateReading(alarm)
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
            exchange.deadline = self._loop.call_at(deadline_s, exchange.close, "timed_out")
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
        self.late.close()
        await asyncio.sleep(0)

    def catch_up(self) -> None:
        """See `loadgen.exchange.Client`."""
        self.late.catch_up()

    def opened(self, connection: Connection) -> None:
        """A connection was made."""
        self._made.add(connection)
        if self._closing:
            # Its task was cancelled too late to keep it from being made.
            connection.transport.abort()

    def lost(self, connection: Connection) -> None:
        """A connection is closed."""
        self._made.discard(connection)
        if connection.origin.idle.pop(connection, connection) is None and not connection.used:
            # The server does not want connections that say nothing.
            connection.origin.ready = 0

    def _target(self, url: str) -> tuple[Origin, bytes]:
        """Where a URL leads, and the head of its requests up to the number of the body's bytes."""
        if url not in self._targets:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 80
            origin = self._origins.setdefault((host, port), Origin(host, port))
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n".encode()
            self._targets[url] = origin, head + self._fields + b"Content-Length: "
        return self._targets[url]

    def _open(self, origin: Origin) -> None:
        """Make the connections that are missing: for the requests that wait, and those to be ready."""
        wanted = len(origin.waiting) + origin.ready - len(origin.idle)
        for _ in range(wanted - origin.connecting):
            origin.connecting += 1
            task = self._loop.create_task(self._connect(origin))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, origin: Origin) -> None:
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

    async def _connection(self, origin: Origin) -> Connection:
        """A new one. Raises OSError."""
        problem = OSError("no address")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                for family, address in await self._addresses(origin):
                    try:
                        return await self._connected(origin, family, address)
                    except OSError as error:
                        problem = error
            raise problem
        finally:
            # Its traceback has this frame: nobody collects cycles while a load lasts.
            del problem

    async def _connected(
        self, origin: Origin, family: socket.AddressFamily, address: tuple[object, ...]
    ) -> Connection:
        own = socket.socket(family, socket.SOCK_STREAM)
        try:
            own.setblocking(False)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.late.possible:
                stamped(own)
            await self._loop.sock_connect(own, address)
            _, connection = await self._loop.create_connection(
                lambda: Connection(self, origin, own), sock=own
            )
        except BaseException:
            own.close()
            raise
        return connection

    async def _addresses(
        self, origin: Origin
    ) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
        if not origin.addresses:
            found = await self._loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            origin.addresses = [(family, address) for family, _, _, _, address in found]
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
