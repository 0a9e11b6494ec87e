"""What is read late is known as well as what is read at once: instants, ends, what has come so far."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from contextlib import asynccontextmanager, closing

import pytest
import uvloop

from loadgen import kernel_time
from loadgen.exchange import Request
from loadgen.kernel_time import READ_BYTES, KernelTime, receive, stamped
from loadgen.late_reading import LATE_S, PACES
from loadgen.lean_client import LeanClient
from loadgen.pacing import Alarm

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
MS = 1_000_000
STALL_S = 1.5 * LATE_S

pytestmark = pytest.mark.skipif(
    not KernelTime().works, reason="this kernel does not say when bytes arrive"
)


def event(tokens, finish=None, text=" a"):
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    choice = {"index": 0, "text": text, "finish_reason": finish}
    data = f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server(threading.Thread):
    """Plays pieces, each after a pause, to one connection; notes when it had written each.

    It runs beside the event loop, so that one that stands still does not stop it.
    """

    def __init__(self, pieces):
        super().__init__(daemon=True)
        self.pieces = pieces
        self.written_ns = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1/completions"
        self.done = threading.Event()
        self.ends_with_close = False

    def run(self):
        with closing(self.listener):
            there, _ = self.listener.accept()
        with closing(there):
            there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            there.recv(65536)
            for pause_s, piece in self.pieces:
                time.sleep(pause_s)
                if piece is None:
                    # A reset.
                    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                there.sendall(piece)
                self.written_ns.append(time.monotonic_ns())
            self.done.set()
            if not self.ends_with_close:
                there.recv(1)


@asynccontextmanager
async def asked(server, timeout_s=None):
    """The lean client, its flight to the server, and the future record of it."""
    server.start()
    alarm = Alarm()
    client = LeanClient({}, alarm)
    record = asyncio.get_running_loop().create_future()
    request = Request(
        id=0,
        url=server.url,
        body=b"{}",
        scheduled_ns=time.monotonic_ns(),
        prompt_tokens=1,
        output_tokens_designed=3,
        max_tokens=3,
    )
    yield client, client.send(request, record.set_result, timeout_s), record
    await client.close()
    alarm.close()
    server.join(2.0)


STREAM = [
    (0.0, HEAD + event(1)),
    (0.03, event(2)),
    (0.01, event(3, "length") + END),
]


def test_bytes_read_late_have_the_instant_of_their_arrival():
    held = KernelTime()
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            stamped(here)
            off_ns = []
            for _ in range(5):
                there.sendall(b"a")
                time.sleep(0.005)
                there.sendall(b"b")
                written_ns = time.monotonic_ns()
                time.sleep(0.03)
                data, at_ns = receive(here)
                assert data == b"ab"
                off_ns.append(at_ns - written_ns)
    held.close()
    # The host of a test may stand still now and then, not always.
    assert sorted(abs(off) for off in off_ns)[2] < 2 * MS


def test_bytes_without_an_instant_are_told_from_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            there.sendall(b"a")
            assert receive(here) == (b"a", None)


def test_where_it_cannot_be_tried_the_kernel_is_taken_to_be_silent(monkeypatch):
    def refused(address):
        raise OSError("no loopback")

    monkeypatch.setattr(kernel_time.socket, "create_server", refused)
    held = KernelTime()
    assert not held.works
    held.close()


def test_a_clock_that_runs_ahead_makes_no_instant_of_the_future(monkeypatch):
    held = KernelTime()
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            stamped(here)
            there.sendall(b"a")
            monkeypatch.setattr(kernel_time.time, "time_ns", lambda: 0)
            _, at_ns = receive(here)
    held.close()
    assert at_ns <= time.monotonic_ns()


def test_an_end_is_known_to_the_millisecond_by_a_client_that_stood_still():
    off_ms = []
    for _ in range(3):
        server = Server(STREAM)

        async def scenario(server=server):
            async with asked(server) as (_, flight, record):
                while flight.stream.first_token_ns is None:
                    await asyncio.sleep(0)
                time.sleep(STALL_S)
                return await record

        record = uvloop.run(scenario())
        assert (record.outcome, record.output_tokens) == ("completed", 3)
        off_ms.append(abs(record.last_token_ns - server.written_ns[-1]) / MS)
    assert sorted(off_ms)[1] < 2.0


def test_a_first_token_is_known_to_the_millisecond_by_a_client_that_stood_still():
    off_ms = []
    for _ in range(3):
        server = Server([(0.02, HEAD + event(1)), (2 * STALL_S, event(2, "length") + END)])

        async def scenario(server=server):
            async with asked(server) as (_, flight, record):
                while flight.stream.sent_ns is None:
                    await asyncio.sleep(0)
                time.sleep(STALL_S)
                return await record

        record = uvloop.run(scenario())
        assert (record.outcome, record.output_tokens) == ("completed", 2)
        off_ms.append(abs(record.first_token_ns - server.written_ns[0]) / MS)
    assert sorted(off_ms)[1] < 2.0


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run])
def test_a_request_that_ended_unread_is_complete_when_it_is_stopped(run):
    server = Server(STREAM)

    async def scenario():
        async with asked(server) as (_, flight, record):
            while flight.stream.first_token_ns is None:
                await asyncio.sleep(0)
            assert server.done.wait(2.0)
            flight.stop()
            return await record

    assert run(scenario()).outcome == "completed"


def test_a_deadline_reads_what_had_come_before_it():
    ended = Server(STREAM)
    late = Server([*STREAM[:2], (5 * LATE_S, STREAM[2][1])])

    async def scenario(server):
        async with asked(server, timeout_s=0.9 * LATE_S) as (_, _, record):
            return await record

    assert uvloop.run(scenario(ended)).outcome == "completed"
    record = uvloop.run(scenario(late))
    assert (record.outcome, record.output_tokens) == ("timed_out", 2)


def test_catching_up_shows_what_has_come():
    server = Server([*STREAM[:2], (5 * LATE_S, STREAM[2][1])])

    async def scenario():
        async with asked(server) as (client, flight, record):
            while flight.stream.first_token_ns is None:
                await asyncio.sleep(0)
            time.sleep(0.06)
            before = flight.stream.content_events
            client.catch_up()
            return before, flight.stream.content_events, (await record).outcome

    assert uvloop.run(scenario()) == (1, 2, "completed")


def test_more_than_one_read_takes():
    events = [event(n, text="x" * 900) for n in range(2, 3 * READ_BYTES // 1000)]
    pieces = [(0.0, HEAD + event(1)), (0.01, b"".join(events)), (0.0, event(999, "stop") + END)]
    server = Server(pieces)

    async def scenario():
        async with asked(server) as (_, _, record):
            return await record

    record = uvloop.run(scenario())
    assert (record.outcome, record.output_tokens) == ("completed", 999)


def test_a_connection_that_breaks_unread_is_a_failure_that_says_so():
    server = Server([*STREAM[:2], (0.0, None)])

    async def scenario():
        async with asked(server) as (_, _, record):
            return await record

    record = uvloop.run(scenario())
    assert (record.outcome, record.output_tokens) in (("failed", 1), ("failed", 2))
    assert record.error.startswith("Server disconnected before the answer's end: Connection")


def test_where_the_kernel_is_silent_all_is_read_as_it_comes(monkeypatch):
    monkeypatch.setattr(KernelTime, "_begin", lambda self: False)
    server = Server([*STREAM[:2], (5 * LATE_S, STREAM[2][1])])

    async def scenario():
        async with asked(server) as (client, flight, record):
            while flight.stream.content_events < 2:
                await asyncio.sleep(0)
            seen_ns = time.monotonic_ns()
            assert not client.late.possible
            return seen_ns, await record

    seen_ns, record = uvloop.run(scenario())
    assert record.outcome == "completed"
    assert seen_ns - server.written_ns[1] < 0.5 * LATE_S * 1e9


class Answering(threading.Thread):
    """Answers requests one after another on each connection; notes when it had written each end."""

    def __init__(self, tokens=150, interval_s=0.005, no_delay=1):
        super().__init__(daemon=True)
        self.tokens = tokens
        self.interval_s = interval_s
        self.no_delay = no_delay
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1/completions"
        self.written_ns = []

    def run(self):
        with closing(self.listener), contextlib.suppress(OSError):
            while True:
                there, _ = self.listener.accept()
                threading.Thread(target=self.talk, args=(there,), daemon=True).start()

    def talk(self, there):
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, self.no_delay)
        with closing(there), contextlib.suppress(OSError):
            while there.recv(65536):
                due_s = time.monotonic()
                there.sendall(HEAD)
                for n in range(1, self.tokens + 1):
                    due_s += self.interval_s
                    time.sleep(max(due_s - time.monotonic(), 0.0))
                    end = n == self.tokens
                    there.sendall(event(n, "length" if end else None) + (END if end else b""))
                self.written_ns.append(time.monotonic_ns())


def ends_after_they_were_written_ms(server, rounds):
    """Of each round of four requests at once; and what is known of the server at the end."""
    server.start()

    async def scenario():
        loop = asyncio.get_running_loop()
        alarm = Alarm()
        client = LeanClient({}, alarm)
        off_ms = []
        for _ in range(rounds):
            waited = [loop.create_future() for _ in range(4)]
            server.written_ns.clear()
            for ended in waited:
                request = Request(
                    id=0,
                    url=server.url,
                    body=b"{}",
                    scheduled_ns=time.monotonic_ns(),
                    prompt_tokens=1,
                    output_tokens_designed=server.tokens,
                    max_tokens=server.tokens,
                )
                client.send(request, ended.set_result, None)
            records = [await ended for ended in waited]
            assert {record.output_tokens for record in records} == {server.tokens}
            while len(server.written_ns) < len(waited):
                await asyncio.sleep(0.001)
            ends = zip(
                sorted(record.last_token_ns for record in records),
                sorted(server.written_ns),
                strict=True,
            )
            off_ms.append([(end_ns - written_ns) / MS for end_ns, written_ns in ends])
        await client.close()
        alarm.close()
        (origin,) = client._origins.values()
        return off_ms, origin.streams

    found = uvloop.run(scenario())
    server.listener.close()
    return found


@pytest.mark.parametrize("no_delay", [0, 1])
def test_a_server_that_holds_small_writes_back_is_found_out_and_read_as_it_comes(no_delay):
    off_ms, streams = ends_after_they_were_written_ms(Answering(no_delay=no_delay), 6)
    assert streams.late == bool(no_delay), streams
    # When it is known.
    assert sorted(off_ms[-1])[1] < 2.0
    if not no_delay:
        assert max(off_ms[0]) > 10.0


def test_streams_that_would_fill_the_kernels_room_are_read_as_they_come():
    off_ms, streams = ends_after_they_were_written_ms(
        Answering(tokens=1500, interval_s=0.0002), PACES // 4 + 2
    )
    assert not streams.late, streams
    # The kernel had no room until they were read.
    assert max(off_ms[0]) > 20.0
    assert sorted(off_ms[-1])[1] < 5.0


def test_bytes_that_lost_their_instant_have_that_of_their_reading():
    server = Server(STREAM)

    async def scenario():
        async with asked(server) as (client, flight, record):
            while flight.stream.first_token_ns is None:
                await asyncio.sleep(0)
            client.receive = lambda own: (own.recv(READ_BYTES), None)
            return await record

    record = uvloop.run(scenario())
    assert (record.outcome, record.output_tokens) == ("completed", 3)
    assert record.last_token_ns > server.written_ns[-1]


CLOSING = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
BARE = [
    (0.0, CLOSING + b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'),
    (0.03, b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'),
]


@pytest.mark.parametrize("how", ["stop", "deadline", "catch up"])
def test_an_answer_that_ended_with_its_connection_is_complete(how):
    server = Server(BARE)
    server.ends_with_close = True

    async def scenario():
        async with asked(server, 0.8 * LATE_S if how == "deadline" else None) as found:
            client, flight, record = found
            while flight.stream.first_token_ns is None:
                await asyncio.sleep(0)
            if how != "deadline":
                await asyncio.sleep(0.5 * LATE_S)
                client.catch_up() if how == "catch up" else flight.stop()
                assert record.done()
            return await record

    assert uvloop.run(scenario()).outcome == "completed"
