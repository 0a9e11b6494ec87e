"""One fixed-tick loop that reads the engine, and the GPUs beside it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import numpy as np

from analysis.schedulers.engine import EngineSample
from harness.machine.gpu import in_daemon
from harness.machine.gpu_reader import GpuEvent, GpuReader, GpuSample, Reading
from harness.servers.engine_metrics import engine_sample
from harness.servers.engines import EngineFacts
from harness.servers.server import answered
from loadgen.mendable import Mendable

GONE_FAILURES = 3
"""A server counts as gone after this many failures in a row, and not before ``gone_after_s``."""
GPU_FINISH_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerStats:
    """How well the fixed tick was kept. Scrape times are None when no scrape succeeded."""

    ticks: int
    """Scrapes that were started."""
    missed: int
    """Ticks that passed while an earlier scrape was still under way: left out, never made up."""
    failures: int
    """Scrapes that gave no sample: refused, timed out, not 200. Each leaves a gap in the stream."""
    longest_gap_s: float
    """Longest time between two samples, or before the first."""
    last_failure: str | None
    scrape_p50_ms: float | None
    scrape_p99_ms: float | None
    gpu_missed: int = 0
    """Ticks at which NVML was still busy with an earlier one."""
    gpu_failures: int = 0
    """Queries of a GPU that failed once; the quantity is null in that sample."""
    gpu_last_failure: str | None = None
    gpu_events: tuple[GpuEvent, ...] = ()
    """XID errors, and GPUs that were lost, in this run or before it."""
    gpu_error: str | None = None
    """Why the GPU stream ended early."""


class ServerGone(Mendable):
    """The server stopped answering. ``stats`` are those of the sampler until then."""

    def __init__(self, url: str, gap_s: float, stats: SamplerStats) -> None:
        self.stats = stats
        super().__init__(
            f"{url} has not answered for {gap_s:.1f} s ({stats.last_failure}): the server is gone"
        )


@dataclass(slots=True)
class _Log:
    ticks: int = 0
    missed: int = 0
    failures: int = 0
    failures_in_row: int = 0
    last_failure: str | None = None
    last_good_ns: int = 0
    longest_gap_ns: int = 0
    scrape_ms: list[float] = field(default_factory=list)

    def stats(self) -> SamplerStats:
        p50, p99 = np.percentile(self.scrape_ms, [50, 99]) if self.scrape_ms else (None, None)
        return SamplerStats(
            ticks=self.ticks,
            missed=self.missed,
            failures=self.failures,
            longest_gap_s=max(self.longest_gap_ns, time.monotonic_ns() - self.last_good_ns) / 1e9,
            last_failure=self.last_failure,
            scrape_p50_ms=None if p50 is None else float(p50),
            scrape_p99_ms=None if p99 is None else float(p99),
        )


class _GpuTicks:
    """NVML reads in a thread of their own, at most one at a time: a driver that is slow, or hangs for
    good, stalls neither the tick nor the end of the program."""

    def __init__(self, gpus: GpuReader, on_gpu: Callable[[Sequence[GpuSample]], None]) -> None:
        self._gpus, self._on_gpu = gpus, on_gpu
        self._missed = self._failures = 0
        self._last_failure: str | None = None
        self._events = list(gpus.lost)
        self._error: str | None = None
        self._pending: asyncio.Future[Reading] | None = None
        self._asked_ns = 0

    def tick(self) -> None:
        if self._pending is not None and not self._pending.done():
            self._missed += 1
            return
        self._collect()
        self._asked_ns = time.monotonic_ns()
        self._pending = asyncio.wrap_future(in_daemon(self._gpus.read))

    async def finish(self) -> None:
        """Take the read under way along, unless the driver hangs."""
        if self._pending is not None:
            await asyncio.wait([self._pending], timeout=GPU_FINISH_S)
            if self._pending.done():
                self._collect()
            else:
                waited_s = (time.monotonic_ns() - self._asked_ns) / 1e9
                self._error = f"NVML had not answered for {waited_s:.0f} s when the run ended"

    def abandon(self) -> None:
        """Nobody waits any more for a read that is still under way."""
        if self._pending is not None:
            self._pending.cancel()

    def stats(self) -> dict[str, Any]:
        return {
            "gpu_missed": self._missed,
            "gpu_failures": self._failures,
            "gpu_last_failure": self._last_failure,
            "gpu_events": tuple(self._events),
            "gpu_error": self._error,
        }

    def _collect(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        reading = pending.result()
        self._events += reading.events
        self._failures += len(reading.failures)
        if reading.failures:
            self._last_failure = reading.failures[-1]
        self._on_gpu(reading.samples)


async def sample_engine(
    session: aiohttp.ClientSession,
    url: str,
    facts: EngineFacts,
    interval_s: float,
    stop: asyncio.Event,
    on_sample: Callable[[EngineSample], None],
    *,
    gpus: GpuReader | None = None,
    on_gpu: Callable[[Sequence[GpuSample]], None] | None = None,
    version: str | None = None,
    timeout_s: float = 2.0,
    gone_after_s: float = 3.0,
) -> SamplerStats:
    """Sample the server every ``interval_s`` on absolute times until ``stop`` is set.

    Tick k is due at start + k * interval_s whatever the earlier scrapes took; a scrape that
    outlasts its interval skips the ticks it covers. Samples carry the instants before and after the
    read. GPUs are read on the same ticks. Raises MissingMetric at once, and ServerGone when nothing
    but failures came for ``gone_after_s``.
    """
    if (gpus is None) != (on_gpu is None):
        raise ValueError("gpus and on_gpu come together")
    gpu = _GpuTicks(gpus, on_gpu) if gpus is not None and on_gpu is not None else None
    interval_ns = round(interval_s * 1e9)
    start_ns = time.monotonic_ns()
    log = _Log(last_good_ns=start_ns)
    tick = 0
    try:
        while not stop.is_set():
            if gpu is not None:
                gpu.tick()
            log.ticks += 1
            sample = await _scrape(session, url, facts, version, timeout_s, log)
            if sample is not None:
                on_sample(sample)
            elif log.failures_in_row >= GONE_FAILURES:
                gap_s = (time.monotonic_ns() - log.last_good_ns) / 1e9
                if gap_s >= gone_after_s:
                    raise ServerGone(url, gap_s, _with_gpu(log.stats(), gpu))
            due = (time.monotonic_ns() - start_ns) // interval_ns + 1
            log.missed += due - tick - 1
            tick = due
            wait_s = (start_ns + tick * interval_ns - time.monotonic_ns()) / 1e9
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(wait_s, 0.0))
        # Of the engine's ticks: a driver that keeps the end waiting makes no gap in them.
        stats = log.stats()
        if gpu is not None:
            await gpu.finish()
        return _with_gpu(stats, gpu)
    finally:
        if gpu is not None:
            gpu.abandon()


def _with_gpu(stats: SamplerStats, gpu: _GpuTicks | None) -> SamplerStats:
    return stats if gpu is None else replace(stats, **gpu.stats())


async def _scrape(
    session: aiohttp.ClientSession,
    url: str,
    facts: EngineFacts,
    version: str | None,
    timeout_s: float,
    log: _Log,
) -> EngineSample | None:
    """One sample, or None with the failure noted in ``log``."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    read_ns = time.monotonic_ns()
    failure = ""
    try:
        async with session.get(url + facts.metrics_path, timeout=timeout) as response:
            text = await response.text()
            if response.status != 200:
                failure = f"{facts.metrics_path} {answered(response.status)}"
    except TimeoutError:
        failure = f"{facts.metrics_path} did not answer within {timeout_s:g} s"
    except aiohttp.ClientError as error:
        failure = f"{type(error).__name__}: {error}"
    t_ns = time.monotonic_ns()
    if failure:
        log.failures += 1
        log.failures_in_row += 1
        log.last_failure = failure
        return None
    log.scrape_ms.append((t_ns - read_ns) / 1e6)
    log.failures_in_row = 0
    log.longest_gap_ns = max(log.longest_gap_ns, t_ns - log.last_good_ns)
    log.last_good_ns = t_ns
    return engine_sample(text, read_ns, t_ns, facts, version)
