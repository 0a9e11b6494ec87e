"""The lean client and the general one against the same server, byte for byte: the same records."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
import time
from contextlib import closing

import pytest
import uvloop

from loadgen import lean_client
from loadgen.client import SessionClient, open_session
from loadgen.exchange import Request
from loadgen.lean_client import READY_CONNECTIONS, LeanClient
from loadgen.lean_connection import Opening
from loadgen.pacing import Alarm

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def event(tokens, finish=None, text=" a"):
    usage = {"prompt_tokens": 11, "completion_tokens": tokens}
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n".encode()


LAST = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":3}}\n\n'
EVENTS = [event(1, text='\r\n0\r\n\r\n "choices":[{'), event(2), event(3, "length"), LAST]
DONE = b"data: [DONE]\n\n"
BODY = b"".join(EVENTS) + DONE


def chunks(*pieces):
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def answer(status, body, *fields):
    head = "".join(f"{field}\r\n" for field in (*fields, f"Content-Length: {len(body)}"))
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GOOD = CHUNKED + chunks(*EVENTS, DONE) + b"0\r\n\r\n"
CLOSE = object()

SCRIPTS = {
    "chunked": [GOOD],
    "chunks across events": [
        CHUNKED + chunks(*(BODY[at : at + 50] for at in range(0, len(BODY), 50))) + b"0\r\n\r\n"
    ],
    "trailers": [CHUNKED + chunks(BODY) + b"0\r\nX-Time: 3\r\nX-More: 4\r\n\r\n"],
    "content length": [HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY],
    "to the close": [HEAD + b"Connection: close\r\n\r\n" + BODY, CLOSE],
    "no DONE": [CHUNKED + chunks(*EVENTS) + b"0\r\n\r\n"],
    "big": [CHUNKED + chunks(event(1, text="a" * 300_000), event(2, "stop")) + b"0\r\n\r\n"],
    "interim": [b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD],
    "abort": [CHUNKED + chunks(event(1), event(2, "abort")) + b"0\r\n\r\n"],
    "error event": [CHUNKED + chunks(event(1), b'data: {"error":"dead"}\n\n') + b"0\r\n\r\n"],
    "no content": [CHUNKED + b"0\r\n\r\n"],
    "429": [answer("429 Too Many Requests", b"queue is full " * 100)],
    "503": [answer("503 Service Unavailable", b"")],
    "500": [answer("500 Oops", b'{"error":"x"}')],
    "500 in chunks": [
        b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n",
        chunks(b"so", b"rry"),
        b"0\r\n\r\n",
    ],
    "401": [answer("401 Unauthorized", b"your key abc is wrong")],
    "307": [answer("307 Temporary Redirect", b"there", "Location: /elsewhere")],
    "204": [b"HTTP/1.1 204 No Content\r\n\r\n"],
    # The texts of what the network does are each client's own.
    "closed at once": [CLOSE],
    "closed in the head": [HEAD, CLOSE],
    "closed in a chunk": [CHUNKED + chunks(event(1), event(2)) + b"ff\r\nda", CLOSE],
    "closed before the last chunk": [CHUNKED + chunks(*EVENTS, DONE), CLOSE],
    "closed in a known length": [HEAD + b"Content-Length: 9999\r\n\r\n" + BODY, CLOSE],
    "no HTTP": [b"220 mail.example.org ESMTP\r\n\r\n", CLOSE],
    "bad chunk": [CHUNKED + b"zz\r\n" + BODY],
}
OWN_WORDS = {name for name in SCRIPTS if "closed" in name} | {"no HTTP", "bad chunk"}
SILENT = "silent"


async def serve(pieces_of, requests):
    """A server that answers with the pieces of the script that a request names; its port."""
    connections = itertools.count()

    async def talk(reader, writer):
        connection = next(connections)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), closing(writer):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                name = json.loads(await reader.readexactly(size))["script"]
                requests.append((connection, head))
                for piece in pieces_of(name):
                    if piece is CLOSE:
                        return
                    writer.write(piece)
                    await writer.drain()
                    # Whoever reads may do so now.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                if name == SILENT:
                    await reader.read()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def both_clients(pieces_of, requests=None):
    """A function that sends a script's request by the client of a name, and waits for its record."""
    server, port = await serve(pieces_of, [] if requests is None else requests)
    alarm = Alarm()
    async with open_session({"X-Mine": "yes"}) as session:
        clients = {"lean": LeanClient(session.headers, alarm), "general": SessionClient(session)}

        def begin(kind, script, timeout_s=None, path="/v1/completions"):
            ended = asyncio.get_running_loop().create_future()
            request = Request(
                id=7,
                url=f"http://127.0.0.1:{port}{path}",
                body=json.dumps({"script": script}).encode(),
                scheduled_ns=time.monotonic_ns(),
                prompt_tokens=11,
                output_tokens_designed=3,
                max_tokens=3,
            )
            return clients[kind].send(request, ended.set_result, timeout_s), ended

        yield begin
        for client in clients.values():
            await client.close()
    alarm.close()
    server.close()


def a_request(url, body=b"{}"):
    return Request(
        id=0,
        url=url,
        body=body,
        scheduled_ns=time.monotonic_ns(),
        prompt_tokens=1,
        output_tokens_designed=1,
        max_tokens=1,
    )


def shape(record, name):
    """All of a record but the instants, of which only their order can be the same."""
    instants = [record.scheduled_ns, record.sent_ns, record.first_token_ns, record.last_token_ns]
    told = [at for at in instants if at is not None]
    fields = dataclasses.asdict(record) | dict.fromkeys(
        ("scheduled_ns", "sent_ns", "first_token_ns", "last_token_ns")
    )
    if name in OWN_WORDS:
        # aiohttp has no status where the head came with what cannot be read.
        fields |= {"error": bool(record.error), "status": None}
    return fields, [at is None for at in instants], told == sorted(told)


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_clients_record_the_same(name):
    async def scenario():
        async with both_clients(SCRIPTS.get) as begin:
            return [await begin(kind, name)[1] for kind in ("lean", "general", "lean")]

    lean, general, again = asyncio.run(scenario())
    assert shape(lean, name) == shape(general, name) == shape(again, name)
    assert lean.sent_ns is not None


@pytest.mark.parametrize("name", ["chunked", "trailers", "content length", "429"])
def test_any_split_gives_the_same_record(name):
    (data,) = SCRIPTS[name]

    def pieces(split):
        return [data[: int(split)], data[int(split) :]]

    async def scenario():
        async with both_clients(pieces) as begin:
            whole = await begin("general", "0")[1]
            for split in range(1, len(data), 29):
                record = await begin("lean", str(split))[1]
                assert shape(record, name) == shape(whole, name), split

    asyncio.run(scenario())


def test_connections_are_kept_and_requests_have_what_a_server_wants():
    requests = []

    async def scenario():
        async with both_clients(SCRIPTS.get, requests) as begin:
            for script in ("chunked", "429", "content length", "to the close", "chunked"):
                await begin("lean", script, path="/v1/completions?a=b")[1]

    asyncio.run(scenario())
    connections = [connection for connection, _ in requests]
    assert len(set(connections[:4])) == 1
    assert connections[4] != connections[3]
    first, *lines = requests[0][1].decode().split("\r\n")
    assert first == "POST /v1/completions?a=b HTTP/1.1"
    fields = dict(line.split(": ", 1) for line in lines if line)
    assert fields["X-Mine"] == "yes"
    assert fields["Content-Type"] == "application/json"
    assert fields["Accept-Encoding"] == "identity"
    assert fields["Host"].startswith("127.0.0.1:")


@pytest.mark.parametrize("kind", ["lean", "general"])
def test_a_stopped_request_keeps_what_had_come_and_closes_its_connection(kind):
    requests = []

    def pieces(name):
        return [CHUNKED, chunks(event(1), event(2))] if name == SILENT else SCRIPTS[name]

    async def scenario():
        async with both_clients(pieces, requests) as begin:
            flight, ended = begin(kind, SILENT)
            while flight.stream.content_events < 2:
                await asyncio.sleep(0.001)
            flight.stop()
            record = await ended
            await begin(kind, "chunked")[1]
            flight, before = begin(kind, SILENT)
            flight.stop()
            return record, await before

    record, never = asyncio.run(scenario())
    assert (record.outcome, record.output_tokens, record.status) == ("unfinished", 2, 200)
    assert record.first_token_ns is not None
    assert never.outcome == "unfinished"
    assert requests[0][0] != requests[1][0]


@pytest.mark.parametrize("kind", ["lean", "general"])
def test_the_deadline_counts_from_the_scheduled_arrival(kind):
    async def scenario():
        async with both_clients(lambda name: [CHUNKED, chunks(event(1))]) as begin:
            return await begin(kind, SILENT, timeout_s=0.1)[1]

    record = asyncio.run(scenario())
    assert (record.outcome, record.output_tokens) == ("timed_out", 1)


def test_an_idle_connection_that_the_server_closed_is_not_used():
    async def scenario():
        async with both_clients(lambda name: [GOOD, CLOSE]) as begin:
            first = await begin("lean", "x")[1]
            await asyncio.sleep(0.02)
            return first, await begin("lean", "x")[1]

    assert [record.outcome for record in asyncio.run(scenario())] == ["completed", "completed"]


def test_a_server_that_is_not_there_is_a_failure_and_nothing_was_sent():
    async def scenario():
        server, port = await serve(SCRIPTS.get, [])
        server.close()
        await server.wait_closed()
        ended = asyncio.get_running_loop().create_future()
        client = LeanClient({}, Alarm())
        client.send(a_request(f"http://localhost:{port}"), ended.set_result, None)
        record = await ended
        await client.close()
        return record

    record = asyncio.run(scenario())
    assert (record.outcome, record.sent_ns, record.status) == ("failed", None, None)
    assert record.error.startswith("Cannot connect to host localhost:")


def test_connections_to_known_servers_are_open_before_they_are_needed():
    opened = []

    async def talk(reader, writer):
        opened.append(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def scenario():
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/completions"
        client = LeanClient({}, Alarm(), [url, url])
        counts = []
        flights = []
        for number in range(READY_CONNECTIONS + 1):
            async with asyncio.timeout(20.0):
                while len(opened) < number + READY_CONNECTIONS:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            counts.append(len(opened))
            flights.append(client.send(a_request(url), lambda record: None, None))
            # In the same turn of the loop: it did not have to wait.
            assert flights[-1].stream.sent_ns is not None
        for flight in flights:
            flight.stop()
        await client.close()
        server.close()
        return counts

    ahead = asyncio.run(scenario())
    assert ahead == list(range(READY_CONNECTIONS, 2 * READY_CONNECTIONS + 1))


def test_a_server_that_closes_connections_which_say_nothing_gets_no_more_of_them():
    opened = []

    async def talk(reader, writer):
        opened.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 0.02)
            writer.write(GOOD)
            await writer.drain()
        writer.close()

    async def scenario():
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/completions"
        client = LeanClient({}, Alarm(), [url])
        records = []
        for _ in range(5):
            await asyncio.sleep(0.1)
            ended = asyncio.get_running_loop().create_future()
            client.send(a_request(url), ended.set_result, None)
            records.append(await ended)
        await client.close()
        server.close()
        return records

    assert {record.outcome for record in asyncio.run(scenario())} == {"completed"}
    assert len(opened) == READY_CONNECTIONS + 5


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_that_gets_free_is_taken_by_who_waits_for_one(run, monkeypatch):
    """However long the connection takes that was begun for it."""
    try_next = Opening.try_next
    begun = itertools.count()

    def only_the_first(opening, problem):
        if next(begun) == 0:
            try_next(opening, problem)

    monkeypatch.setattr(Opening, "try_next", only_the_first)

    async def scenario():
        server, port = await serve(SCRIPTS.get, requests := [])
        client = LeanClient({}, Alarm())
        url = f"http://127.0.0.1:{port}/v1/completions"
        waited = [asyncio.get_running_loop().create_future() for _ in range(3)]
        for ended in waited:
            client.send(a_request(url, b'{"script": "chunked"}'), ended.set_result, None)
        async with asyncio.timeout(20.0):
            records = [await ended for ended in waited]
        await client.close()
        server.close()
        return records, requests

    records, requests = run(scenario())
    assert [record.outcome for record in records] == ["completed"] * 3
    assert len({connection for connection, _ in requests}) == 1


def test_connections_ahead_of_requests_to_a_server_that_is_not_there_are_not_tried_for_ever():
    tried = []

    class Counting(LeanClient):
        def new_socket(self, family):
            tried.append(family)
            return super().new_socket(family)

    async def scenario():
        server, port = await serve(SCRIPTS.get, [])
        server.close()
        await server.wait_closed()
        url = f"http://127.0.0.1:{port}"
        client = Counting({}, Alarm(), [url])
        async with asyncio.timeout(20.0):
            while not tried:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.2)
        ahead = len(tried)
        ended = asyncio.get_running_loop().create_future()
        client.send(a_request(url), ended.set_result, None)
        record = await ended
        await asyncio.sleep(0.1)
        await client.close()
        return ahead, record

    ahead, record = asyncio.run(scenario())
    assert (ahead, len(tried)) == (READY_CONNECTIONS, READY_CONNECTIONS + 1)
    assert (record.outcome, record.sent_ns) == ("failed", None)
    assert record.error.startswith("Cannot connect to host 127.0.0.1:")


def test_the_next_address_is_tried_where_one_refuses():
    async def scenario():
        server, port = await serve(SCRIPTS.get, [])
        loop = asyncio.get_running_loop()

        async def getaddrinfo(host, port, *, type):
            answers = [(socket.AF_INET, ("127.0.0.2", port)), (socket.AF_INET, ("127.0.0.1", port))]
            return [(family, type, 6, "", address) for family, address in answers]

        loop.getaddrinfo = getaddrinfo
        client = LeanClient({}, Alarm())
        ended = loop.create_future()
        request = a_request(f"http://two.invalid:{port}", b'{"script": "chunked"}')
        client.send(request, ended.set_result, None)
        record = await ended
        await client.close()
        server.close()
        return record

    assert asyncio.run(scenario()).outcome == "completed"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_all_who_wait_for_a_host_without_address_fail(run):
    async def scenario():
        client = LeanClient({}, Alarm())
        waited = [asyncio.get_running_loop().create_future() for _ in range(3)]
        for ended in waited:
            client.send(a_request("http://nowhere.invalid:1"), ended.set_result, None)
        async with asyncio.timeout(30.0):
            records = [await ended for ended in waited]
        await client.close()
        return records

    for record in run(scenario()):
        assert (record.outcome, record.sent_ns) == ("failed", None)
        assert record.error.startswith("Cannot connect to host nowhere.invalid:1: gaierror")


def test_a_connection_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(Opening, "try_next", lambda opening, problem: None)
    monkeypatch.setattr(lean_client, "CONNECT_TIMEOUT_S", 0.01)

    async def scenario():
        client = LeanClient({}, Alarm())
        ended = asyncio.get_running_loop().create_future()
        client.send(a_request("http://127.0.0.1:1"), ended.set_result, None)
        async with asyncio.timeout(20.0):
            record = await ended
        await client.close()
        return record

    record = asyncio.run(scenario())
    assert (record.outcome, record.sent_ns) == ("failed", None)
    assert record.error == "Cannot connect to host 127.0.0.1:1: TimeoutError: "


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_request_larger_than_the_kernel_takes_at_once_is_sent_whole(run):
    requests = []
    body = json.dumps({"script": "chunked", "prompt": "a" * 30_000_000}).encode()

    async def scenario():
        server, port = await serve(SCRIPTS.get, requests)
        client = LeanClient({}, Alarm())
        records = []
        for _ in range(2):
            ended = asyncio.get_running_loop().create_future()
            client.send(a_request(f"http://127.0.0.1:{port}", body), ended.set_result, None)
            async with asyncio.timeout(60.0):
                records.append(await ended)
        await client.close()
        server.close()
        return records

    assert {record.outcome for record in run(scenario())} == {"completed"}
    # What read them had all of the bytes that their heads say; the connection was kept.
    assert [connection for connection, _ in requests] == [0, 0]


def test_a_server_that_goes_while_it_is_sent_to_is_a_failure():
    async def talk(reader, writer):
        await reader.readexactly(100_000)
        writer.transport.abort()

    async def scenario():
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = LeanClient({}, Alarm())
        ended = asyncio.get_running_loop().create_future()
        client.send(a_request(url, b"a" * 30_000_000), ended.set_result, None)
        async with asyncio.timeout(20.0):
            record = await ended
        await client.close()
        server.close()
        return record

    record = asyncio.run(scenario())
    assert record.outcome == "failed"
    assert record.error.startswith("Server disconnected before its answer")


@pytest.mark.parametrize("name", ["chunked", "429", "closed in a chunk", "big"])
def test_without_epoll_the_loop_itself_watches(name, monkeypatch):
    async def scenario():
        # uvloop has no need of Python's.
        monkeypatch.delattr("select.epoll")
        async with both_clients(SCRIPTS.get) as begin:
            return [await begin(kind, name)[1] for kind in ("lean", "general", "lean")]

    lean, general, again = uvloop.run(scenario())
    assert shape(lean, name) == shape(general, name) == shape(again, name)


def test_stray_bytes_on_an_idle_connection_close_it():
    async def scenario():
        async with both_clients(lambda name: [GOOD, b"HTTP/1.1 200 OK\r\n\r\n"]) as begin:
            await begin("lean", "x")[1]
            await asyncio.sleep(0.02)
            return await begin("lean", "x")[1]

    assert asyncio.run(scenario()).outcome == "completed"


@pytest.mark.parametrize("turns", range(6))
def test_connections_that_are_being_made_are_closed_too(turns):
    async def scenario():
        async with both_clients(SCRIPTS.get) as begin, asyncio.timeout(20.0):
            started = [begin("lean", "chunked") for _ in range(20)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for flight, _ in started:
                flight.stop()
            return [await ended for _, ended in started]

    outcomes = {record.outcome for record in uvloop.run(scenario())}
    assert outcomes <= {"unfinished", "completed"}
