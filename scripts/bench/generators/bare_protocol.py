"""The least that a client on asyncio can do: write a request, count bytes until the stream ends.

    python bare_protocol.py URL RATE SECONDS SEED TOKENS RECORDS

Nothing is parsed. Poisson arrivals of one seed at their own instants, connections kept and re-used.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import uvloop
from generators.schedule import START_S, bodies, drawn, write_notes

END = b"\r\n0\r\n\r\n"


class Stream(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, load: Load) -> None:
        self.load = load

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, number: int, request: bytes) -> None:
        self.number = number
        self.load.sent_ns[number] = time.monotonic_ns()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if data.endswith(END):
            load = self.load
            load.done_ns[self.number] = time.monotonic_ns()
            load.free.append(self)
            load.left -= 1
            if not load.left:
                load.finished.set()


class Load:
    def __init__(self, host: str, port: int, requests: list[bytes], due_ns: list[int]) -> None:
        self.host, self.port, self.requests, self.due_ns = host, port, requests, due_ns
        self.sent_ns, self.done_ns = [0] * len(requests), [0] * len(requests)
        self.free: list[Stream] = []
        self.left = len(requests)
        self.finished = asyncio.Event()
        self.connecting: set[asyncio.Task[None]] = set()

    async def connect(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: Stream(self), self.host, self.port)
        stream.send(number, self.requests[number])

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number, due_ns in enumerate(self.due_ns):
            wait_s = (due_ns - time.monotonic_ns()) / 1e9
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif number % 8 == 0:
                await asyncio.sleep(0)
            if self.free:
                self.free.pop().send(number, self.requests[number])
            else:
                task = loop.create_task(self.connect(number))
                self.connecting.add(task)
                task.add_done_callback(self.connecting.discard)
        await self.finished.wait()


async def main() -> None:
    url, rate, seconds, seed, tokens, out = sys.argv[1:7]
    parts = urlsplit(url)
    arrival_s, numbers = drawn(float(rate), float(seconds), int(seed))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    )
    requests = [
        head.replace("{}", str(len(body))).encode() + body for body in bodies(numbers, int(tokens))
    ]
    start_ns = time.monotonic_ns() + round(START_S * 1e9)
    due_ns = start_ns + np.round(arrival_s * 1e9).astype(np.int64)
    load = Load(parts.hostname or "", parts.port or 80, requests, due_ns.tolist())
    gc.freeze()
    gc.disable()
    await load.run()
    write_notes(Path(out), numbers, due_ns, load.sent_ns, load.done_ns)


if __name__ == "__main__":
    uvloop.run(main())
