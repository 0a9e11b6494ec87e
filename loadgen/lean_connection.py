"""One connection of the lean client, and the request that has it.

Up to its first token an answer is read as it comes, the rest late, where that is possible.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

from loadgen.exchange import (
    ERROR_CHARACTERS,
    Request,
    TokenStream,
    in_short,
    record_of,
    refusal,
    wants_key,
)
from loadgen.http_answer import Answer, BadAnswer
from loadgen.kernel_time import READ_BYTES, NoStamp, receive
from loadgen.late_reading import LateReading
from loadgen.pacing import Alarm
from loadgen.request_record import Outcome, RequestRecord


@dataclass(slots=True)
class Origin:
    """One server: its address, looked up once, connections that wait for a request, and requests that
    wait for a connection."""

    host: str
    port: int
    addresses: list[tuple[socket.AddressFamily, tuple[object, ...]]] = field(default_factory=list)
    idle: dict[Connection, None] = field(default_factory=dict)
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


class Owner(Protocol):
    """The client whose connection it is."""

    alarm: Alarm
    late: LateReading

    def opened(self, connection: Connection) -> None:
        """It was made."""

    def lost(self, connection: Connection) -> None:
        """It is closed."""


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
        self.connection: Connection | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.over = False

    def stop(self) -> None:
        """See `loadgen.exchange.Flight`."""
        self.close("unfinished")

    def close(self, outcome: Outcome) -> None:
        """End it so, unless what has come by now has its end."""
        if self.connection is not None and self.connection.paused:
            self.connection.read()
        self.end(outcome)

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


class Connection(asyncio.Protocol):
    """A connection and the request that has it, if any."""

    __slots__ = (
        "answer",
        "client",
        "complaint",
        "exchange",
        "idle_since_ns",
        "origin",
        "paused",
        "socket",
        "transport",
        "used",
    )

    transport: asyncio.Transport

    def __init__(self, client: Owner, origin: Origin, own: socket.socket) -> None:
        self.client = client
        self.origin = origin
        self.socket = own
        self.paused = False
        """Is it the client's turn to read, not the loop's?"""
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
        if self.paused:
            self.paused = False
            self.transport.resume_reading()
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
        self._take(exchange, data, now_ns)
        late = self.client.late
        if late.possible and exchange.stream.first_token_ns is not None and not exchange.over:
            self.paused = True
            self.transport.pause_reading()
            late.add(self, now_ns)

    def read(self) -> bool:
        """See `loadgen.late_reading.Readable`."""
        exchange = self.exchange
        while exchange is not None and not exchange.over:
            try:
                data, at_ns = receive(self.socket)
            except BlockingIOError:
                return True
            except NoStamp as problem:
                exchange.end("failed", in_short(problem))
            except OSError as problem:
                self._closed(problem)
            else:
                if data:
                    self._take(exchange, data, max(at_ns, exchange.stream.last_token_ns or 0))
                    if len(data) < READ_BYTES:
                        return not exchange.over
                else:
                    self._closed(None)
        return False

    def _take(self, exchange: Exchange, data: bytes, now_ns: int) -> None:
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
        self._closed(error)

    def _closed(self, error: Exception | None) -> None:
        """The server closed it, or it broke."""
        if (exchange := self.exchange) is None:
            return
        if error is None and self.answer.closed():
            self._look(exchange, b"", time.monotonic_ns())
            return
        where = "before its answer" if self.answer.status is None else "before the answer's end"
        what = "" if error is None else f": {in_short(error)}"
        exchange.end("failed", f"Server disconnected {where}{what}")
