"""A server that only streams and counts: what a client can do at most, without an engine.

    python -m harness.machine.recording_sink INTERVAL_MS

Answers POST with as many events as max_tokens says, the interval apart, each written by itself, usage
with the last; GET /said with what it has counted since it was asked last. Ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import deque
from typing import Any

from loadgen.pacing import NEVER_NS, SECOND_NS, Alarm, without_collection_pauses

BACKLOG = 4096
WRITTEN_AT_ONCE = 32
"""Then sockets are looked at."""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
MAX_TOKENS = re.compile(rb'"max_tokens"\s*:\s*(\d+)')


def _chunk(*events: str) -> bytes:
    data = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def _content(finish_reason: str) -> str:
    return f'{{"id":"0","choices":[{{"index":0,"text":" w","finish_reason":{finish_reason}}}]}}'


EVENT = _chunk(_content("null"))


class Sink:
    """All streams of one process: with one interval they are due in the order of a queue."""

    def __init__(self, interval_ns: int) -> None:
        self.interval_ns = interval_ns
        self.queue: deque[tuple[int, Stream]] = deque()
        self.alarm = Alarm()
        self.alarm.ring = self.write_due
        self.open = 0
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.late_ns: list[int] = []
        self.requests = 0
        self.open_most = self.open
        self.cpu_s = time.process_time()

    def said(self) -> dict[str, Any]:
        """Since it was asked last: lateness of writes (99th percentile), requests, streams, CPU."""
        late = sorted(self.late_ns)
        said = {
            "late_p99_ms": late[int(0.99 * len(late))] / 1e6 if late else 0.0,
            "requests": self.requests,
            "open_most": self.open_most,
            "cpu_s": time.process_time() - self.cpu_s,
        }
        self.forget()
        return said

    def begin(self, stream: Stream) -> None:
        """A request came."""
        self.open += 1
        self.requests += 1
        self.open_most = max(self.open, self.open_most)
        self.queue.append((time.monotonic_ns() + self.interval_ns, stream))
        if len(self.queue) == 1:
            self.alarm.set(self.queue[0][0])

    def write_due(self, now_ns: int) -> None:
        """Write the events that are due, and set the alarm for those that are not."""
        for _ in range(WRITTEN_AT_ONCE):
            if not self.queue or self.queue[0][0] > now_ns:
                break
            due_ns, stream = self.queue.popleft()
            self.late_ns.append(now_ns - due_ns)
            if stream.write():
                self.queue.append((due_ns + self.interval_ns, stream))
            else:
                self.open -= 1
            now_ns = time.monotonic_ns()
        self.alarm.set(self.queue[0][0] if self.queue else NEVER_NS)
        if self.alarm.at_ns <= now_ns:
            self.alarm.set_next_turn()


class Stream(asyncio.Protocol):
    """One connection, one request at a time."""

    transport: asyncio.WriteTransport

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.came = b""
        self.left = self.asked = 0
        self.gone = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.came += data
        head, between, body = self.came.partition(b"\r\n\r\n")
        if not between:
            return
        if head.startswith(b"GET"):
            self.came = b""
            text = json.dumps(self.sink.said()).encode()
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text
            )
            return
        length = LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return
        self.came = b""
        asked = MAX_TOKENS.search(body)
        self.left = self.asked = int(asked[1]) if asked else 16
        self.transport.write(HEAD)
        self.sink.begin(self)

    def write(self) -> bool:
        """The next event; is there another one?"""
        if self.gone:
            return False
        self.left -= 1
        if self.left > 0:
            self.transport.write(EVENT)
            return True
        usage = f'{{"choices":[],"usage":{{"prompt_tokens":1,"completion_tokens":{self.asked}}}}}'
        self.transport.write(_chunk(_content('"length"'), usage, "[DONE]") + b"0\r\n\r\n")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True


async def serve(interval_ns: int) -> None:
    """Say the port on standard output, then serve until standard input ends."""
    loop = asyncio.get_running_loop()
    sink = Sink(interval_ns)
    server = await loop.create_server(lambda: Stream(sink), "127.0.0.1", 0, backlog=BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    with without_collection_pauses():
        await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(round(float(sys.argv[1]) / 1e3 * SECOND_NS)))
