"""The lean client: plain HTTP/1.1 on sockets of its own, without a task per request.

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
from loadgen.kernel_time import receive, receive_now, stamped
from loadgen.late_reading import LateReading
from loadgen.lean_connection import Connection, Exchange, Opening, Origin
from loadgen.pacing import SECOND_NS, Alarm
from loadgen.ready_sockets import ReadySockets
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
    one leaves late. At each read the clock is compared with ``alarm``: however many reads one turn of
    the loop brings, the next request leaves between two of them.
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
        self._targets: dict[str, tuple[Origin, bytes]] = {}
        self._origins: dict[tuple[str, int], Origin] = {}
        self._openings: set[Opening] = set()
        self._made: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self.sockets = ReadySockets(alarm)
        self.late = LateReading(alarm)
        self.receive = receive if self.late.possible else receive_now
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
            if connection.idle_since_ns > stale_ns:
                connection.begin(exchange)
                break
            connection.close()
        else:
            origin.waiting.append(exchange)
        self._open(origin)
        return exchange

    async def close(self) -> None:
        """Close every connection, also those that are being made."""
        self._sweep.cancel()
        lookups = [origin.lookup for origin in self._origins.values() if origin.lookup is not None]
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        for opening in self._openings:
            opening.give_up()
        for connection in list(self._made):
            connection.close()
        self.late.close()
        self.sockets.close()

    def catch_up(self) -> None:
        """See `loadgen.exchange.Client`."""
        self.late.catch_up()

    def new_socket(self, family: socket.AddressFamily) -> socket.socket:
        """See `loadgen.lean_connection.Owner`."""
        own = socket.socket(family, socket.SOCK_STREAM)
        try:
            own.setblocking(False)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.late.possible:
                stamped(own)
        except OSError:
            own.close()
            raise
        return own

    def made(self, opening: Opening, own: socket.socket) -> None:
        """See `loadgen.lean_connection.Owner`."""
        self._openings.discard(opening)
        opening.origin.connecting -= 1
        connection = Connection(self, opening.origin, own)
        self._made.add(connection)
        connection.rest()

    def not_made(self, opening: Opening, problem: OSError) -> None:
        """See `loadgen.lean_connection.Owner`."""
        self._openings.discard(opening)
        opening.origin.connecting -= 1
        # Soon, not now: whoever sends may not have heard of its request yet.
        self._loop.call_soon(self._refuse, opening.origin, problem)

    def lost(self, connection: Connection) -> None:
        """See `loadgen.lean_connection.Owner`."""
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
        if not origin.addresses:
            if origin.lookup is None:
                origin.lookup = self._loop.create_task(self._look_up(origin))
            return
        wanted = len(origin.waiting) + origin.ready - len(origin.idle)
        for _ in range(wanted - origin.connecting):
            origin.connecting += 1
            opening = Opening(self, origin)
            self._openings.add(opening)
            opening.try_next(OSError("no address"))

    async def _look_up(self, origin: Origin) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                found = await self._loop.getaddrinfo(
                    origin.host, origin.port, type=socket.SOCK_STREAM
                )
        except OSError as problem:
            while origin.waiting:
                self._refuse(origin, problem)
        else:
            origin.addresses = [(family, address) for family, _, _, _, address in found]
            self._open(origin)
        finally:
            origin.lookup = None

    def _refuse(self, origin: Origin, problem: OSError) -> None:
        """No connection for the request that has waited longest."""
        # None ahead any more: whoever needs one will hear of it.
        origin.ready = 0
        if (exchange := origin.next_waiting()) is not None:
            where = f"{origin.host}:{origin.port}"
            exchange.end("failed", f"Cannot connect to host {where}: {in_short(problem)}")

    def _close_stale(self) -> None:
        stale_ns = time.monotonic_ns() - round(KEEPALIVE_S * SECOND_NS)
        for origin in self._origins.values():
            for connection in list(origin.idle):
                if connection.idle_since_ns >= stale_ns:
                    break
                del origin.idle[connection]
                connection.close()
        late_ns = time.monotonic_ns() - round(CONNECT_TIMEOUT_S * SECOND_NS)
        for opening in [opening for opening in self._openings if opening.since_ns < late_ns]:
            opening.give_up()
            self.not_made(opening, TimeoutError())
        self._sweep = self._loop.call_later(SWEEP_INTERVAL_S, self._close_stale)
