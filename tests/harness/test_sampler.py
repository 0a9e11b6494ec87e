from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.step_time import StepTime
from harness.live.sampler import SamplerStats, ServerGone, sample_engine
from harness.machine.gpu_reader import GpuEvent, GpuReader, GpuSample, Reading
from harness.mock.mock import MockConfig
from harness.mock.mock_http import serve
from harness.servers.engines import MOCK, VLLM, MissingMetric
from harness.servers.limits import read_limits
from harness.servers.server_limits import ServerLimits

pytestmark = pytest.mark.live

PAGE = """vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:prefix_cache_hits_total{engine="0"} 0.0
vllm:num_preemptions_total{engine="0"} 0.0
vllm:prompt_tokens_total{engine="0"} 10.0
vllm:generation_tokens_total{engine="0"} 10.0
vllm:request_success_total{engine="0",finished_reason="length"} 1.0
vllm:iteration_tokens_total_count{engine="0"} 5.0
vllm:iteration_tokens_total_sum{engine="0"} 20.0
"""
Answer = Callable[[int], Awaitable[web.Response]]


async def ok(_: int) -> web.Response:
    return web.Response(text=PAGE)


def sampled(
    answer: Answer, seconds: float, interval_s: float = 0.02, **options: Any
) -> tuple[SamplerStats, list[EngineSample]]:
    """Sample a server whose k-th scrape gets ``answer(k)``."""

    async def run() -> tuple[SamplerStats, list[EngineSample]]:
        asked = 0

        async def metrics(_: web.Request) -> web.Response:
            nonlocal asked
            asked += 1
            return await answer(asked - 1)

        app = web.Application()
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        samples: list[EngineSample] = []
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stop.set)
        try:
            async with aiohttp.ClientSession() as session:
                stats = await sample_engine(
                    session, url, VLLM, interval_s, stop, samples.append, **options
                )
        finally:
            await runner.cleanup()
        return stats, samples

    return asyncio.run(run())


def slots(samples: list[EngineSample]) -> float:
    """Ticks of 20 ms from the first sample to the last, both included."""
    return round((samples[-1].read_ns - samples[0].read_ns) / 20e6) + 1


def test_ticks_are_absolute_and_read_times_enclose_the_scrape() -> None:
    stats, samples = sampled(ok, 1.2)
    assert stats.ticks + stats.missed == pytest.approx(slots(samples), abs=1)
    assert stats.ticks == len(samples)
    assert stats.failures == 0
    assert stats.scrape_p50_ms is not None
    assert stats.scrape_p99_ms is not None
    assert 0 < stats.scrape_p50_ms <= stats.scrape_p99_ms
    assert all(s.read_ns < s.t_ns and s.running == 3 for s in samples)
    # Reads are due at one phase of the interval, and lateness does not add up: 0.2 ms at each of the
    # 60 ticks would bring the mean vector of the phases to 0.5, 1 ms to nothing.
    phase = np.array([s.read_ns / 20e6 % 1.0 for s in samples])
    assert abs(np.mean(np.exp(2j * np.pi * phase))) > 0.5


def test_a_slow_scrape_skips_ticks_and_never_bunches() -> None:
    async def slow_once(k: int) -> web.Response:
        await asyncio.sleep(0.15 if k == 5 else 0)
        return await ok(k)

    stats, samples = sampled(slow_once, 0.5)
    assert stats.missed >= 6
    assert stats.failures == 0
    assert stats.ticks + stats.missed == pytest.approx(slots(samples), abs=1)
    slot = [(s.read_ns - samples[0].read_ns + 5_000_000) // 20_000_000 for s in samples]
    assert len(set(slot)) == len(slot), "two reads in one tick"


def test_failures_leave_a_gap_and_are_counted() -> None:
    async def failing(k: int) -> web.Response:
        if k in (4, 5):
            return web.Response(status=500)
        await asyncio.sleep(0.5 if k == 8 else 0)
        return await ok(k)

    stats, samples = sampled(failing, 0.6, timeout_s=0.1)
    assert stats.failures >= 3
    assert len(samples) == stats.ticks - stats.failures
    assert stats.last_failure == "/metrics did not answer within 0.1 s"
    assert stats.longest_gap_s >= 0.1


def test_a_server_that_stops_answering_is_gone() -> None:
    async def breaking(k: int) -> web.Response:
        return await ok(k) if k < 5 else web.Response(status=503)

    start = time.monotonic()
    with pytest.raises(ServerGone, match="answers 503") as caught:
        sampled(breaking, 9.0, gone_after_s=0.3)
    assert time.monotonic() - start < 8.0
    assert caught.value.stats.failures >= 3
    assert caught.value.stats.longest_gap_s >= 0.3


def test_a_refused_connection_is_gone() -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            await sample_engine(
                session,
                "http://127.0.0.1:1",
                VLLM,
                0.02,
                asyncio.Event(),
                lambda _: None,
                gone_after_s=0.1,
            )

    with pytest.raises(ServerGone, match="ClientConnectorError") as caught:
        asyncio.run(run())
    assert caught.value.stats.scrape_p50_ms is None


def test_a_missing_metric_raises_at_once() -> None:
    async def wrong(_: int) -> web.Response:
        return web.Response(text=PAGE.replace("kv_cache_usage", "renamed"))

    with pytest.raises(MissingMetric, match=r"0\.40"):
        sampled(wrong, 5.0, version="0.40")


class StandInGpus:
    """What the sampler needs of a GpuReader, with a driver that takes its time."""

    def __init__(self, seconds: float, lost_after: int = 10**9) -> None:
        self.seconds, self.lost_after, self.reads = seconds, lost_after, 0
        self.lost: tuple[GpuEvent, ...] = ()

    def read(self) -> Reading:
        self.reads += 1
        if self.reads > self.lost_after:
            news = () if self.lost else (GpuEvent(time.monotonic_ns(), 0, "lost", "off the bus"),)
            self.lost += news
            return Reading((), news, ("GPU 1: power_w: Timeout",))
        time.sleep(self.seconds)
        sample = GpuSample(
            t_ns=time.monotonic_ns(),
            gpu=0,
            utilization=0.5,
            memory_bytes=1,
            power_w=None,
            sm_clock_mhz=None,
            memory_clock_mhz=None,
            temperature_c=None,
            throttle_reasons=None,
            ecc_corrected=None,
            ecc_uncorrected=None,
        )
        return Reading((sample,))


def test_a_slow_driver_never_stalls_the_tick() -> None:
    gpus, seen = StandInGpus(0.09), list[GpuSample]()
    stats, samples = sampled(
        ok, 0.6, gpus=cast(GpuReader, gpus), on_gpu=lambda new: seen.extend(new)
    )
    assert len(samples) + stats.missed == pytest.approx(slots(samples), abs=1)
    assert stats.missed < 4 * gpus.reads, "a read of 90 ms would cost four ticks"
    assert len(seen) == gpus.reads >= 3
    assert stats.gpu_missed > stats.missed
    assert stats.gpu_error is None


def test_a_lost_gpu_ends_its_samples_and_not_the_run() -> None:
    gpus, seen = StandInGpus(0.0, lost_after=3), list[GpuSample]()
    stats, samples = sampled(
        ok, 0.3, gpus=cast(GpuReader, gpus), on_gpu=lambda new: seen.extend(new)
    )
    (event,) = stats.gpu_events
    assert (event.gpu, event.kind, event.text) == (0, "lost", "off the bus")
    assert stats.gpu_error is None
    assert stats.gpu_failures == gpus.reads - 3 > 1
    assert stats.gpu_last_failure == "GPU 1: power_w: Timeout"
    assert len(seen) == 3
    assert samples[-1].t_ns > seen[-1].t_ns, "the engine is sampled on"
    assert len(samples) + stats.missed == pytest.approx(slots(samples), abs=1)
    again, _ = sampled(ok, 0.1, gpus=cast(GpuReader, gpus), on_gpu=lambda new: None)
    assert again.gpu_events == (event,), "the next run knows what was lost before it"


def test_the_mock_server_is_sampled_and_its_limits_are_read() -> None:
    config = MockConfig(
        limits=EngineLimits(
            num_blocks=64, block_size=16, max_num_seqs=4, max_num_batched_tokens=64
        ),
        step_time=StepTime(b0_s=0.005),
    )

    async def run() -> tuple[ServerLimits, list[EngineSample]]:
        stop, done = asyncio.Event(), asyncio.Event()
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(serve(config, port.set_result, stop))
        url = f"http://127.0.0.1:{await port}"
        samples: list[EngineSample] = []
        async with aiohttp.ClientSession() as session:
            limits = await read_limits(session, url, MOCK)
            sampling = asyncio.create_task(
                sample_engine(session, url, MOCK, 0.02, done, samples.append)
            )

            async def ask() -> None:
                body = {"model": limits.model_id, "prompt": [7] * 20, "max_tokens": 40}
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    assert response.status == 200
                    await response.read()

            await asyncio.gather(*(ask() for _ in range(6)))
            await asyncio.sleep(0.05)
            done.set()
            await sampling
        stop.set()
        await server
        return limits, samples

    limits, samples = asyncio.run(run())
    assert (limits.num_blocks, limits.block_size, limits.max_model_len) == (64, 16, 1024)
    assert limits.version == "0.32.0"
    assert "max_num_seqs" in limits.not_shown
    assert max(s.running for s in samples) == 4
    assert max(s.waiting for s in samples) == 2
    last = samples[-1]
    assert (last.finished, last.rejected) == (6, 0)
    assert (last.prompt_tokens, last.generation_tokens) == (120, 240)
    assert last.kv_usage == 0.0
    assert last.preemptions == 0
