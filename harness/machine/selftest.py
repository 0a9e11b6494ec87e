"""What this machine's load generator can do at most, measured against a sink of its own.

One process of the generator, on plain HTTP, against `harness.machine.recording_sink` in processes
beside it: how late it sends at a light load, how many streamed tokens and requests per second it
takes before it sends late, and how many streams it holds open at once. A run that asks for more is
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import resource
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.machine.machine_limits import BeyondThisMachine, MachineLimits, machine
from loadgen.arrivals import poisson
from loadgen.client import open_session
from loadgen.drive import drive
from loadgen.fidelity import MAX_LAG_MS as RUN_MAX_LAG_MS
from loadgen.late_reading import LATE_S
from loadgen.open_files import SPARE_FILE_DESCRIPTORS
from loadgen.pacing import SECOND_NS
from loadgen.request_record import RequestRecord
from loadgen.workers import usable_cores

MAX_LAG_MS = RUN_MAX_LAG_MS / 2
"""99th percentile of the send lag: above it a rate is not reached; at twice as much a run is invalid."""
MAX_READ_LAG_MS = 10.0
"""The same of how much longer an answer's first token or its last took than the sink's intervals, or how
much more than `LATE_S` after its last token an answer was taken in: above it reading falls behind."""
TOKENS = 64
INTERVAL_MS = 5.0
LIGHT_RATE = 50.0
FIRST_RATE = 100.0
LEAST_RATE = 10.0
LEAST_REQUESTS = 120
"""Of one load tried: a percentile of fewer is the slowest of them."""
COLD = 20
"""First requests whose lag is not counted: they open connections and run all code for the first time."""
RAISED, LOWERED = 1.25, 1.5
STEP_S = 2.0
MOST_STREAMS = 10_000
STREAM_TOKENS = 4
STREAM_INTERVAL_MS = 1000.0
OPENED_IN_S = 3.0
START_S = 0.1
DRAIN_S = 10.0
MOST_SINKS = 3
SEED = 1

Said = Callable[[str], None]
Ended = tuple[RequestRecord, int]
"""A record, and when it was had, ns of time.monotonic_ns."""


@dataclass(frozen=True, slots=True)
class Step:
    """One load that was tried."""

    rate: float
    lag_p50_ms: float
    lag_p99_ms: float
    read_lag_p99_ms: float
    completed: int
    offered: int
    tokens_per_s: float
    most_open: int
    sink_late_ms: float

    @property
    def reached(self) -> bool:
        """Was all of it sent in time, read in time, and completed?"""
        kept_up = self.lag_p99_ms < MAX_LAG_MS and self.read_lag_p99_ms < MAX_READ_LAG_MS
        return kept_up and self.completed == self.offered


async def measure(
    say: Said, *, step_s: float = STEP_S, most_rate: float = 1e6, most_streams: int = MOST_STREAMS
) -> MachineLimits:
    """The limits of this machine, after about half a minute. ``say`` gets a line for each load tried.

    Raises BeyondThisMachine where not even `LEAST_RATE` is reached: something else keeps it busy.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    open_files = None if hard == resource.RLIM_INFINITY else hard
    async with sinks(INTERVAL_MS) as urls:
        light = await tried(urls, LIGHT_RATE, step_s)
        say(line_of(light))
        best, last = await raised(urls, step_s, most_rate, say)
    wanted = most_streams
    if open_files is not None:
        # A sink has as many connections as the client, shared by few processes.
        wanted = min(wanted, open_files - SPARE_FILE_DESCRIPTORS)
    streams = await streams_held(wanted, say)
    return MachineLimits(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine(),
        send_lag_p50_ms=light.lag_p50_ms,
        send_lag_p99_ms=light.lag_p99_ms,
        requests_per_s=best.rate,
        tokens_per_s=best.tokens_per_s,
        sink_late_ms=best.sink_late_ms,
        sink_bound=last.sink_late_ms > MAX_LAG_MS,
        streams=streams,
        streams_tried=wanted,
        open_files=open_files,
    )


async def raised(
    urls: Sequence[str], step_s: float, most_rate: float, say: Said
) -> tuple[Step, Step]:
    """The highest load reached, and the lowest one tried that was not (else the highest again).

    Where `FIRST_RATE` is too much already, lower rates are tried down to `LEAST_RATE`.
    """
    best: Step | None = None
    missed: Step | None = None
    rate = min(FIRST_RATE, most_rate)
    while rate <= most_rate and (best is None or missed is None):
        step = await tried(urls, rate, step_s)
        if not step.reached:
            # A moment's disturbance is not a limit.
            step = await tried(urls, rate, step_s)
        say(line_of(step))
        if step.reached:
            best, rate = step, rate * RAISED
        else:
            missed, rate = step, rate / LOWERED
        if best is None and rate < LEAST_RATE:
            raise BeyondThisMachine(
                f"at {step.rate:.0f} requests/s the 99th percentile of the send lag is already "
                f"{step.lag_p99_ms:.1f} ms: stop what else runs on this machine and try again"
            )
    assert best is not None
    return best, missed or best


async def streams_held(wanted: int, say: Said) -> int:
    """Streams open at once that all came to their end, at most ``wanted``."""
    async with sinks(STREAM_INTERVAL_MS) as urls:
        while wanted >= 1:
            arrival_s = np.linspace(0.0, OPENED_IN_S, wanted, endpoint=False)
            step = await offered(urls, arrival_s, OPENED_IN_S, STREAM_TOKENS)
            say(f"{wanted} streams: {step.most_open} at once, {step.completed} complete")
            if step.completed == step.offered:
                return step.most_open
            wanted //= 2
    return 0


async def tried(urls: Sequence[str], rate: float, seconds: float) -> Step:
    """Poisson arrivals of this rate, `TOKENS` tokens each, for so long or until there are enough."""
    seconds = max(seconds, LEAST_REQUESTS / rate)
    return await offered(urls, poisson(rate, seconds, SEED), seconds, TOKENS)


async def offered(
    urls: Sequence[str], arrival_s: NDArray[np.float64], seconds: float, tokens: int
) -> Step:
    """One load driven to its end, as a run drives it."""
    body = json.dumps({"model": "sink", "prompt": [1], "max_tokens": tokens, "stream": True})
    ended: list[Ended] = []
    for url in urls:
        await said_of(url)
    async with open_session() as session:
        await drive(
            session,
            [f"{url}/v1/completions" for url in urls],
            arrival_s,
            [body.encode()] * len(arrival_s),
            np.tile([1, tokens, tokens], (len(arrival_s), 1)),
            seconds,
            time.monotonic_ns() + round(START_S * SECOND_NS),
            lambda record: ended.append((record, time.monotonic_ns())),
            drain_s=DRAIN_S,
        )
    said = [await said_of(url) for url in urls]
    return step_of(ended, len(arrival_s) / seconds, tokens, said)


def step_of(
    ended: Sequence[Ended], rate: float, tokens: int, said: Sequence[dict[str, Any]]
) -> Step:
    """What became of a load: its records, when each was had, and what the sinks ``said``."""
    sent = sorted((r for r, _ in ended if r.sent_ns is not None), key=lambda r: r.scheduled_ns)
    lag_ms = [((r.sent_ns or 0) - r.scheduled_ns) / 1e6 for r in sent[COLD:] or sent]
    whole = [
        (r, had_ns) for r, had_ns in ended if r.outcome == "completed" and r.output_tokens == tokens
    ]
    read_late_ms = [
        max(
            late_ms(r, 1),
            late_ms(r, tokens),
            (had_ns - (r.last_token_ns or 0)) / 1e6 - 1e3 * LATE_S,
        )
        for r, had_ns in whole
    ]
    p50, p99 = np.quantile(lag_ms, [0.5, 0.99]) if lag_ms else (np.inf, np.inf)
    return Step(
        rate=rate,
        lag_p50_ms=float(p50),
        lag_p99_ms=float(p99),
        read_lag_p99_ms=float(np.quantile(read_late_ms, 0.99)) if read_late_ms else np.inf,
        completed=len(whole),
        offered=len(ended),
        tokens_per_s=rate * tokens,
        most_open=sum(one["open_most"] for one in said),
        sink_late_ms=max(one["late_p99_ms"] for one in said),
    )


def late_ms(record: RequestRecord, token: int) -> float:
    """How much later than its intervals the first token of a complete record came, or its last."""
    came_ns = record.first_token_ns if token == 1 else record.last_token_ns
    return ((came_ns or 0) - (record.sent_ns or 0)) / 1e6 - token * INTERVAL_MS


def line_of(step: Step) -> str:
    """A step in words."""
    return (
        f"{step.rate:.0f} requests/s, {step.tokens_per_s:.0f} tokens/s: send lag "
        f"{step.lag_p50_ms:.2f} ms, {step.lag_p99_ms:.2f} at the 99th percentile, "
        f"read {step.read_lag_p99_ms:.1f} ms late; {step.completed} of {step.offered} complete; "
        f"the sink wrote {step.sink_late_ms:.2f} ms late"
    )


@contextlib.asynccontextmanager
async def sinks(interval_ms: float) -> AsyncIterator[list[str]]:
    """URLs of sinks in processes of their own, one for each core that the generator leaves free."""
    command = [sys.executable, "-m", "harness.machine.recording_sink", f"{interval_ms}"]
    pipe = asyncio.subprocess.PIPE
    started = []
    try:
        for _ in range(min(max(usable_cores() - 1, 1), MOST_SINKS)):
            started.append(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
        urls = []
        for process in started:
            assert process.stdout is not None
            urls.append(f"http://127.0.0.1:{int(await process.stdout.readline())}")
        yield urls
    finally:
        for process in started:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


async def said_of(url: str) -> dict[str, Any]:
    """What a sink has counted since it was asked last."""

    def ask() -> dict[str, Any]:
        with urllib.request.urlopen(f"{url}/said", timeout=DRAIN_S) as answer:
            said: dict[str, Any] = json.load(answer)
        return said

    return await asyncio.to_thread(ask)
