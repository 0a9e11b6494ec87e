"""Offer the load of one run and write everything that is seen while it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from analysis.engine import EngineSample
from harness.config import ExperimentConfig
from harness.display import Countdown, Display
from harness.gpu import NoGpu
from harness.gpu_reader import GpuReader, GpuSample
from harness.sampler import SamplerStats, ServerGone, sample_engine
from harness.server import ServerFailed
from harness.store import EndReason, Store
from harness.target import Target
from loadgen.arrivals import run_arrivals
from loadgen.drive import drive
from loadgen.prompts import completion_body, make_prompts
from loadgen.records import RequestRecord, Run
from loadgen.workload import Workload

START_DELAY_S = 0.5
DRAIN_TIMEOUT_S = 120.0
SPARE_IN_FLIGHT = 1000


@dataclass(frozen=True, eq=False)
class Stage:
    """What all runs of an experiment share."""

    config: ExperimentConfig
    target: Target
    workload: Workload
    store: Store
    display: Display
    gpus: GpuReader | NoGpu
    critical_rate: float
    """Predicted, req/s."""


async def offer(stage: Stage, run: Run, prediction_digest: str, countdown: Countdown) -> None:
    """Drive one run to its horizon; its folder holds all that was seen, however it ends.

    Raises ServerGone when the server stops answering, and passes a cancellation on.
    """
    config, target, store = stage.config, stage.target, stage.store
    arrival_s = run_arrivals(run)
    lengths = stage.workload.sample(np.random.default_rng([run.seed, 1]), len(arrival_s))
    prompts = make_prompts(lengths[:, 0], run.seed, range(*config.load.vocabulary))
    bodies = [
        completion_body(
            target.shown.model_id,
            prompt,
            int(o),
            int(declared),
            ignore_eos=stage.workload.ignore_eos,
            stop_id=config.load.vocabulary[1] - 1,
        )
        for prompt, (_, o, declared) in zip(prompts, lengths, strict=True)
    ]
    await idle(target, stage.display)
    start_ns = time.monotonic_ns() + round(START_DELAY_S * 1e9)
    store.begin_run(run, start_ns, datetime.now(UTC).isoformat(), prediction_digest)
    load = f"{run.id[3:].removesuffix('-full')} of critical"
    name = f"{run.arrival_rate:.4g} req/s ({load}{', started full' if run.preload else ''})"

    def progress(elapsed_s: float, sent: int, in_flight: int) -> None:
        stage.display.phase(name, elapsed_s / run.horizon_s, countdown.left_s())
        stage.display.load(in_flight, sent)

    reason: EndReason = "interrupted"
    stats: SamplerStats | None = None
    end_ns = start_ns
    try:
        async with recording(stage, run.id) as (on_record, sampling):
            loading = asyncio.create_task(
                drive(
                    target.session,
                    f"{target.url}/v1/completions",
                    arrival_s,
                    bodies,
                    lengths,
                    run.horizon_s,
                    start_ns,
                    on_record,
                    progress=progress,
                    send_delay_s=config.load.send_delay_ms / 1e3,
                    expected_in_flight=most_in_flight(len(arrival_s), run, stage.critical_rate),
                )
            )
            try:
                await asyncio.wait({loading, sampling.task}, return_when=asyncio.FIRST_COMPLETED)
                if not loading.done():
                    reason = "server gone"
                elif loading.exception() is None:
                    reason = "horizon"
            finally:
                loading.cancel()
                results = await asyncio.gather(loading, return_exceptions=True)
                end_ns = time.monotonic_ns()
            if isinstance(results[0], Exception):
                raise results[0]
            stats = await sampling.finish()
    except ServerGone as error:
        stats = error.stats
        raise
    finally:
        # Only now are the streams whole on the disk.
        store.end_run(run.id, end_ns, reason, stats)


def most_in_flight(arrivals: int, run: Run, critical_rate: float) -> int:
    """Requests in the system at the horizon if the server were half as fast as predicted."""
    unserved = max(0.0, 1.0 - 0.5 * critical_rate / run.arrival_rate)
    later = round((arrivals - run.preload) * unserved)
    return min(arrivals, run.preload + later + SPARE_IN_FLIGHT)


class Sampling:
    """The sampler as a task that can be told to stop."""

    def __init__(self, task: asyncio.Task[SamplerStats], stop: asyncio.Event) -> None:
        self.task = task
        self._stop = stop

    async def finish(self) -> SamplerStats:
        """Stop after the sample under way. Raises what the sampler raised."""
        self._stop.set()
        return await self.task


@contextlib.asynccontextmanager
async def recording(
    stage: Stage, run_id: str, watch: Callable[[EngineSample], None] | None = None
) -> AsyncIterator[tuple[Callable[[RequestRecord], None], Sampling]]:
    """Append-only streams of one run, with the sampler writing into two of them.

    ``watch`` sees every sample of the engine besides.
    """
    gpus = stage.gpus if isinstance(stage.gpus, GpuReader) else None
    with contextlib.ExitStack() as streams:
        requests = streams.enter_context(stage.store.stream(run_id, "requests"))
        engine = streams.enter_context(stage.store.stream(run_id, "engine"))
        on_gpu: Callable[[Sequence[GpuSample]], None] | None = None
        if gpus is not None:
            gpu = streams.enter_context(stage.store.stream(run_id, "gpu"))

            def on_gpu(rows: Sequence[GpuSample]) -> None:
                for row in rows:
                    gpu.write(row)

        def on_sample(sample: EngineSample) -> None:
            engine.write(sample)
            if watch is not None:
                watch(sample)

        stop = asyncio.Event()
        task = asyncio.create_task(
            sample_engine(
                stage.target.session,
                stage.target.url,
                stage.target.facts,
                stage.config.sample_interval_s,
                stop,
                on_sample,
                gpus=gpus,
                on_gpu=on_gpu,
                version=stage.target.shown.version,
            )
        )
        try:
            yield requests.write, Sampling(task, stop)
        finally:
            stop.set()
            await asyncio.gather(task, return_exceptions=True)


async def idle(target: Target, display: Display) -> None:
    """Wait until nothing is left of the run before. Raises ServerFailed if the server never is."""
    display.phase("waiting for an idle server")
    seen = asyncio.Event()

    def look(sample: Any) -> None:
        if sample.waiting == 0 and sample.running == 0:
            seen.set()

    try:
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            await sample_engine(target.session, target.url, target.facts, 0.2, seen, look)
    except TimeoutError as error:
        raise ServerFailed(
            f"{target.url} still had requests after {DRAIN_TIMEOUT_S:.0f} s: stop other clients"
        ) from error
