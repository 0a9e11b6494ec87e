"""critrate's own client on a schedule of the bench.

python ours.py [--transport lean|aiohttp] [--workers N] [--ray N] [--streams N]
    URL RATE SECONDS SEED TOKENS RECORDS
"""

from __future__ import annotations

import argparse
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import uvloop
from generators.schedule import PROMPT, START_S, bodies, drawn
from numpy.typing import NDArray

from loadgen.arrivals import schedule_ns
from loadgen.client import SessionClient, open_session
from loadgen.drive import drive
from loadgen.load import Load
from loadgen.pacing import SECOND_NS, Alarm
from loadgen.request_record import RequestRecord
from loadgen.workers import ready_workers

DRAIN_S = 30.0
EDGE_S = 0.05
"""The horizon comes so much after the schedule's end: an arrival right before that is sent too."""
RAY_START_S = 0.5
"""Until then the actors' clocks have been compared."""
MOST_OPEN = 16_000
"""Streams at once: room is made for so many, lest an hour ask for all of its requests' connections."""
ROW = struct.Struct("<4q")


async def offer(asked: argparse.Namespace) -> None:
    arrival_s, numbers = drawn(asked.rate, asked.seconds, asked.seed, asked.streams)
    requests = bodies(numbers, asked.tokens)
    lengths = np.tile([len(PROMPT), asked.tokens, asked.tokens], (len(arrival_s), 1))
    schedule = (
        [f"{asked.url}/v1/completions"],
        arrival_s,
        requests,
        lengths,
        asked.seconds + EDGE_S,
    )
    room = {"drain_s": DRAIN_S, "expected_in_flight": min(len(arrival_s), MOST_OPEN)}
    with asked.records.open("wb") as file:

        def note(record: RequestRecord) -> None:
            number, due_ns = int(numbers[record.id]), record.scheduled_ns
            done_ns = record.last_token_ns if record.outcome == "completed" else 0
            file.write(ROW.pack(number, due_ns, record.sent_ns or 0, done_ns or 0))

        if asked.workers > 1:
            async with ready_workers(
                asked.workers, {"Content-Type": "application/json"}, *schedule, **room
            ) as workers:
                lost = await workers.offer(soon_ns(), note)
            if lost:
                raise SystemExit("; ".join(lost))
        elif asked.ray:
            # Not at the top: the others' time to the first request is measured.
            from harness.live.ray_load import ready_senders

            async with ready_senders(
                f"local:{asked.ray}", asked.ray, {}, *schedule, **room
            ) as senders:
                lost = await senders.offer(soon_ns(RAY_START_S), note)
            if lost:
                raise SystemExit("; ".join(lost))
            print(*senders.clocks, sep="\n")
        elif asked.transport == "lean":
            async with open_session() as session:
                start_ns = soon_ns()
                await drive(session, *schedule, start_ns, note, **room)
        else:
            await on_aiohttp(schedule, note)


async def on_aiohttp(
    schedule: tuple[list[str], NDArray[np.float64], list[bytes], NDArray[np.int64], float],
    on_record: Callable[[RequestRecord], None],
) -> None:
    """As `drive` does for URLs that are not plain HTTP."""
    urls, arrival_s, requests, lengths, seconds = schedule
    async with open_session() as session:
        start_ns = soon_ns()
        load = Load(
            client=SessionClient(session),
            alarm=Alarm(),
            urls=urls,
            scheduled_ns=schedule_ns(arrival_s, start_ns).tolist(),
            bodies=requests,
            lengths=lengths.ravel().tolist(),
            start_ns=start_ns,
            end_ns=start_ns + round(seconds * SECOND_NS),
            on_record=on_record,
        )
        async with load.under_way():
            await load.offer(DRAIN_S, None)


def soon_ns(seconds: float = START_S) -> int:
    return time.monotonic_ns() + round(seconds * SECOND_NS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transport", choices=("lean", "aiohttp"), default="lean")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ray", type=int, default=0, help="as many actors of a local Ray cluster")
    parser.add_argument("--streams", type=int, default=1, help="seeds side by side")
    parser.add_argument("url")
    parser.add_argument("rate", type=float)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("records", type=Path)
    uvloop.run(offer(parser.parse_args()))


if __name__ == "__main__":
    main()
