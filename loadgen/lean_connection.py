"""One connection of the lean client, and the request that has it.

Up to its first token an answer is read as it comes, the rest late, where that is possible.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

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
from loadgen.kernel_time import READ_BYTES
from loadgen.late_reading import LOOK_S, WITHIN_S, LateReading, Streams
from loadgen.pacing import SECOND_NS
from loadgen.ready_sockets import READ, WRITE, ReadySockets
from loadgen.request_record import Outcome, RequestRecord

Address = tuple[socket.AddressFamily, tuple[object, ...]]


@dataclass(slots=True)
class Origin:
    """One server: its address, looked up once, connections that wait for a request, and requests that
    wait for a connection."""

    host: str
    port: int
    addresses: list[Address] = field(default_factory=list)
    lookup: asyncio.Task[None] | None = None
    idle: dict[Connection, None] = field(default_factory=dict)
    """The one used last is the last, and is the next."""
    waiting: deque[Exchange] = field(default_factory=deque)
    ready: int = 0
    """How many connections are to be open before they are needed."""
    connecting: int = 0
    streams: Streams = field(default_factory=Streams)

    def next_waiting(self) -> Exchange | None:
        """The request that has waited longest, and waits no more."""
        while self.waiting:
            if not (exchange := self.waiting.popleft()).over:
                return exchange
        return None


class Owner(Protocol):
    """The client whose connections they are."""

    sockets: ReadySockets
    late: LateReading

    def new_socket(self, family: socket.AddressFamily) -> socket.socket:
        """A new one, that does not block. Raises OSError."""

    def receive(self, own: socket.socket) -> tuple[bytes, int | None]:
        """See `loadgen.kernel_time.receive`."""

    def made(self, opening: Opening, own: socket.socket) -> None:
        """A connection was made."""

    def not_made(self, opening: Opening, problem: OSError) -> None:
        """None could be made."""

    def lost(self, connection: Connection) -> None:
        """One is closed."""


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
        if self.connection is not None:
            self.connection.read(to_end=True)
        self.end(outcome)

    def read_late(self, to_end: bool) -> bool:
        """See `loadgen.late_reading.Readable`."""
        return self.connection is not None and self.connection.read_late(self, to_end)

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
            if reuse and not connection.unsent:
                connection.rest()
            else:
                connection.close()
        self.ended(record_of(self.request, self.stream, outcome, self.status, error))


class Opening:
    """A connection that is being made: address after address, until one answers."""

    def __init__(self, owner: Owner, origin: Origin) -> None:
        self.origin = origin
        self.since_ns = time.monotonic_ns()
        self._owner = owner
        self._left = iter(origin.addresses)
        self._address: tuple[object, ...] = ()
        self._socket: socket.socket | None = None

    def try_next(self, problem: OSError) -> None:
        """Try the next address, ``problem`` being what is wrong with those before."""
        for family, address in self._left:
            try:
                own = self._owner.new_socket(family)
            except OSError as error:
                # Without its traceback, which has this frame: nobody collects cycles while a load lasts.
                problem = error.with_traceback(None)
                continue
            code = own.connect_ex(address)
            if code in (0, errno.EINPROGRESS):
                self._socket, self._address = own, address
                self._owner.sockets.add(own.fileno(), self, WRITE)
                return
            own.close()
            problem = OSError(code, os.strerror(code))
        self._owner.not_made(self, problem)

    def ready(self, events: int, now_ns: int) -> None:
        """See `loadgen.ready_sockets.Watched`."""
        if (own := self._socket) is None:
            return
        # The same call says what became of it.
        code = own.connect_ex(self._address)
        if code in (0, errno.EISCONN):
            self._owner.made(self, own)
        elif code == errno.EALREADY:
            self._owner.sockets.wait(own.fileno(), WRITE)
        else:
            self.give_up()
            self.try_next(OSError(code, os.strerror(code)))

    def give_up(self) -> None:
        """Close what was begun."""
        own, self._socket = self._socket, None
        if own is not None:
            self._owner.sockets.remove(own.fileno())
            own.close()


class Connection:
    """A connection and the request that has it, if any."""

    __slots__ = (
        "answer",
        "complaint",
        "exchange",
        "idle_since_ns",
        "late",
        "origin",
        "owner",
        "socket",
        "taken",
        "unsent",
        "used",
    )

    def __init__(self, owner: Owner, origin: Origin, own: socket.socket) -> None:
        self.owner = owner
        self.origin = origin
        self.socket = own
        self.late = False
        """Is it read late, and not when something comes?"""
        self.taken = 0
        """Bytes of the answer."""
        self.exchange: Exchange | None = None
        self.answer = Answer()
        self.complaint = b""
        self.unsent = memoryview(b"")
        self.idle_since_ns = 0
        self.used = False
        owner.sockets.pass_on(own.fileno(), self)

    def begin(self, exchange: Exchange) -> None:
        """Send a request."""
        self.used = True
        self.exchange = exchange
        exchange.connection = self
        self.taken = 0
        self.answer = Answer()
        self.complaint = b""
        body = exchange.request.body
        head = b"%s%d\r\n\r\n" % (exchange.head, len(body))
        exchange.stream.sent_ns = time.monotonic_ns()
        try:
            sent = self.socket.sendmsg((head, body))
        except OSError as problem:
            sent = 0
            if not isinstance(problem, BlockingIOError):
                # Soon, not now: whoever sends has not heard of this request yet.
                asyncio.get_running_loop().call_soon(self._closed, problem)
                return
        if sent < len(head) + len(body):
            self.unsent = memoryview(head + body)[sent:]
            self.owner.sockets.wait(self.socket.fileno(), READ | WRITE)

    def rest(self) -> None:
        """Take the request that waits, or wait for one."""
        self.late = False
        # Without a request too: to hear that the server closes it.
        self.owner.sockets.wait(self.socket.fileno(), READ)
        if (exchange := self.origin.next_waiting()) is not None:
            self.begin(exchange)
            return
        self.idle_since_ns = time.monotonic_ns()
        self.origin.idle[self] = None

    def ready(self, events: int, now_ns: int) -> None:
        """See `loadgen.ready_sockets.Watched`."""
        if (exchange := self.exchange) is None:
            self._look_at_idle()
            return
        if self.unsent and events & WRITE:
            self._send_on()
        if not self.read():
            return
        late, streams = self.owner.late, self.origin.streams
        begun = exchange.stream.first_token_ns is not None
        if begun and late.possible and streams.late and not self.unsent:
            self.late = True
            late.add(exchange, now_ns)
            if streams.open:
                soon_s = random.uniform(0.0, WITHIN_S)
                asyncio.get_running_loop().call_later(soon_s, self._look_at_stream, exchange)
        else:
            self.owner.sockets.wait(self.socket.fileno(), READ | WRITE if self.unsent else READ)

    def read_late(self, exchange: Exchange, to_end: bool) -> bool:
        """Read what has come of an answer that is read late. Is it to be read late again?"""
        if not self.late:
            return False
        more = self.read(to_end)
        stream, streams = exchange.stream, self.origin.streams
        until_ns = time.monotonic_ns() if more else stream.last_token_ns or 0
        took_s = (until_ns - (stream.first_token_ns or 0)) / SECOND_NS
        streams.note_pace(stream.content_events, self.taken, took_s)
        if more and not streams.late:
            self.late = False
            self.owner.sockets.wait(self.socket.fileno(), READ)
        return more and self.late

    def read(self, to_end: bool = False) -> bool:
        """Take in what has come, with ``to_end`` also that nothing will. Is there more to come?"""
        exchange = self.exchange
        while exchange is not None and not exchange.over:
            try:
                data, at_ns = self.owner.receive(self.socket)
            except BlockingIOError:
                return True
            except OSError as problem:
                self._closed(problem)
            else:
                if data:
                    if at_ns is None:
                        # The kernel has too little room to keep what it knows.
                        at_ns = time.monotonic_ns()
                        self.origin.streams.fast += 1
                    self.taken += len(data)
                    stream = exchange.stream
                    before_ns = stream.last_token_ns or stream.sent_ns or 0
                    self._take(exchange, data, max(at_ns, before_ns))
                    if len(data) < READ_BYTES and not to_end and self.answer.part != "to the end":
                        return not exchange.over
                else:
                    self._closed(None)
        return False

    def close(self) -> None:
        """Close it; what the server says from now on is lost."""
        if self.socket.fileno() >= 0:
            self.late = False
            self.owner.sockets.remove(self.socket.fileno())
            self.socket.close()
            self.owner.lost(self)

    def _look_at_stream(self, exchange: Exchange) -> None:
        """See `loadgen.late_reading.Streams`."""
        read_ns = time.monotonic_ns()
        if self.exchange is exchange and self.late and self.read():
            loop = asyncio.get_running_loop()
            loop.call_later(LOOK_S, self._note_look, exchange, read_ns)

    def _note_look(self, exchange: Exchange, read_ns: int) -> None:
        if self.exchange is exchange and self.late:
            self.read()
            self.origin.streams.note(read_ns, exchange.stream.last_token_ns or 0)

    def _look_at_idle(self) -> None:
        """The server closed it, or says what nobody asked for."""
        try:
            self.socket.recv(1)
        except BlockingIOError:
            self.owner.sockets.wait(self.socket.fileno(), READ)
            return
        except OSError:
            pass
        self.close()

    def _send_on(self) -> None:
        try:
            sent = self.socket.send(self.unsent)
        except BlockingIOError:
            return
        except OSError:
            # Reading tells what happened.
            sent = len(self.unsent)
        self.unsent = self.unsent[sent:]

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
