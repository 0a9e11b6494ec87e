"""The least that a client on aiohttp can do: post a request, read until the stream ends.

python bare_aiohttp.py URL RATE SECONDS SEED TOKENS RECORDS
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import uvloop
from generators.schedule import START_S, bodies, drawn, write_notes

JSON = {"Content-Type": "application/json"}


async def main() -> None:
    url, rate, seconds, seed, tokens, out = sys.argv[1:7]
    arrival_s, numbers = drawn(float(rate), float(seconds), int(seed))
    requests = bodies(numbers, int(tokens))
    sent_ns, done_ns = [0] * len(requests), [0] * len(requests)
    start_ns = time.monotonic_ns() + round(START_S * 1e9)
    due_ns = start_ns + np.round(arrival_s * 1e9).astype(np.int64)
    gc.freeze()
    gc.disable()

    async def follow(number: int) -> None:
        sent_ns[number] = time.monotonic_ns()
        async with session.post(f"{url}/v1/completions", data=requests[number]) as response:
            while await response.content.readany():
                pass
        done_ns[number] = time.monotonic_ns()

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=JSON) as session,
        asyncio.TaskGroup() as group,
    ):
        for number, due in enumerate(due_ns.tolist()):
            await asyncio.sleep(max(due - time.monotonic_ns(), 0) / 1e9)
            group.create_task(follow(number))
    write_notes(Path(out), numbers, due_ns, sent_ns, done_ns)


if __name__ == "__main__":
    uvloop.run(main())
