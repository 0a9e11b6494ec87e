"""Offer the load of one run and write everything that is seen while it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape

from analysis.schedulers.engine import EngineSample
from harness.configs.config import ExperimentConfig
from harness.live.ray_load import Senders, ready_senders
from harness.live.sampler import SamplerStats, ServerGone, sample_engine
from harness.live.target import Target
from harness.machine.display import Countdown, Display
from harness.machine.gpu import NoGpu
from harness.machine.gpu_reader import GpuReader, GpuSample
from harness.records.store import EndReason, Store
from harness.servers.server import ServerFailed
from loadgen.arrivals import run_arrivals
from loadgen.drive import is_plain
from loadgen.prompts import completion_body, make_prompts
from loadgen.records import RequestRecord, Run
from loadgen.replay import run_lengths
from loadgen.workers import Offer, ready_load, usable_cores, workers_for
from loadgen.workload import Workload

START_DELAY_S = 0.5
DRAIN_TIMEOUT_S = 120.0
SPARE_IN_FLIGHT = 1000


@dataclass(frozen=True, eq=False)
class Stage:
    """What all runs of an experiment share."""

    config: ExperimentConfig
    targets: tuple[Target, ...]
    """In the order of the list of URLs: request number i goes to number i mod N."""
    workload: Workload
    store: Store
    display: Display
    gpus: GpuReader | NoGpu
    critical_rate: float
    """Predicted, req/s, of all servers together."""

    @property
    def target(self) -> Target:
        """The server, or the first of several: what it shows of itself is what all show."""
        return self.targets[0]


async def offer(stage: Stage, run: Run, prediction_digest: str, countdown: Countdown) -> None:
    """Drive one run to its horizon; its folder holds all that was seen, however it ends.

    Raises ServerGone when the server stops answering, and passes a cancellation on.
    """
    config, target = stage.config, stage.target
    arrival_s = run_arrivals(run)
    lengths = run_lengths(run, stage.workload, len(arrival_s))
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
    urls = [f"{one.url}/v1/completions" for one in stage.targets]
    schedule = (urls, arrival_s, bodies, lengths, run.horizon_s)
    workers = workers_of(config, urls, stage.workload, run.arrival_rate)
    in_flight = most_in_flight(len(arrival_s), run, stage.critical_rate)
    send_delay_s = config.load.send_delay_ms / 1e3
    async with contextlib.AsyncExitStack() as stack:
        senders: Senders | None = None
        if (cluster := config.load.cluster) is None:
            ready = ready_load(
                workers,
                target.session,
                *schedule,
                send_delay_s=send_delay_s,
                expected_in_flight=in_flight,
            )
            offer_load = await stack.enter_async_context(ready)
        else:
            stage.display.phase(f"waiting for {workers} senders of the cluster")
            senders = await stack.enter_async_context(
                ready_senders(
                    cluster,
                    workers,
                    target.session.headers,
                    *schedule,
                    send_delay_s=send_delay_s,
                    expected_in_flight=in_flight,
                )
            )
            offer_load = senders.offer
        for one in stage.targets:
            await idle(one, stage.display)
        try:
            await _to_the_horizon(stage, run, prediction_digest, countdown, offer_load, senders)
        finally:
            if senders is not None and senders.clocks:
                clocks = {"clocks": [asdict(clock) for clock in senders.clocks]}
                stage.store.write_json(f"runs/{run.id}/clocks.json", clocks)


async def _to_the_horizon(
    stage: Stage,
    run: Run,
    prediction_digest: str,
    countdown: Countdown,
    offer_load: Offer,
    senders: Senders | None,
) -> None:
    store = stage.store
    start_ns = time.monotonic_ns() + round(START_DELAY_S * 1e9)
    store.begin_run(run, start_ns, datetime.now(UTC).isoformat(), prediction_digest)
    load = f"{run.id[3:].removesuffix('-full')} of critical"
    name = f"{run.arrival_rate:.4g} req/s ({load}{', started full' if run.preload else ''})"

    def progress(elapsed_s: float, sent: int, in_flight: int) -> None:
        stage.display.phase(name, elapsed_s / run.horizon_s, countdown.left_s())
        stage.display.load(in_flight, sent)

    reason: EndReason = "interrupted"
    stats: Sequence[SamplerStats] = ()
    end_ns = start_ns
    try:
        async with recording(stage, run.id) as (on_record, sampling):
            loading = asyncio.ensure_future(offer_load(start_ns, on_record, progress))
            try:
                await asyncio.wait({loading, sampling.task}, return_when=asyncio.FIRST_COMPLETED)
                if not loading.done():
                    reason = "server gone"
                elif loading.exception() is None:
                    reason = "horizon"
            finally:
                loading.cancel()
                results = await asyncio.gather(loading, return_exceptions=True)
                # A cluster takes a moment to stop: what is due meanwhile is nobody's.
                stopped_ns = None if senders is None else senders.stopped_ns
                end_ns = stopped_ns or time.monotonic_ns()
            if isinstance(results[0], Exception):
                raise results[0]
            if isinstance(results[0], tuple):
                for lost in results[0]:
                    stage.display.say(escape(f"  warning: {lost}"))
            stats = await sampling.finish()
    except ServerGone as error:
        stats = [error.stats]
        raise
    finally:
        # Only now are the streams whole on the disk.
        first = stats[0] if stats else None
        store.end_run(run.id, end_ns, reason, first, stats if len(stats) > 1 else ())


def workers_of(
    config: ExperimentConfig, urls: Sequence[str], workload: Workload, arrival_rate: float
) -> int:
    """How many processes offer this load: as the config says, or as its streamed tokens take."""
    wanted = config.load.workers
    if wanted != "auto":
        return wanted
    if not is_plain(urls):
        return 1
    output_tokens = workload.mean(workload.output_tokens)
    return workers_for(arrival_rate * output_tokens, usable_cores())


def most_in_flight(arrivals: int, run: Run, critical_rate: float) -> int:
    """Requests in the system at the horizon if the server were half as fast as predicted."""
    unserved = max(0.0, 1.0 - 0.5 * critical_rate / run.arrival_rate)
    later = round((arrivals - run.preload) * unserved)
    return min(arrivals, run.preload + later + SPARE_IN_FLIGHT)


class Sampling:
    """The samplers, one for each server, as a task that can be told to stop."""

    def __init__(self, task: asyncio.Task[list[SamplerStats]], stop: asyncio.Event) -> None:
        self.task = task
        self._stop = stop

    async def finish(self) -> list[SamplerStats]:
        """Stop after the samples under way. Raises what a sampler raised."""
        self._stop.set()
        return await self.task


@contextlib.asynccontextmanager
async def recording(
    stage: Stage, run_id: str, watch: Callable[[EngineSample], None] | None = None
) -> AsyncIterator[tuple[Callable[[RequestRecord], None], Sampling]]:
    """Append-only streams of one run, with the samplers writing into all but one of them.

    Each server has a sampler and a stream of its own; GPUs are read beside the first. ``watch`` sees
    every sample of an engine besides.
    """
    gpus = stage.gpus if isinstance(stage.gpus, GpuReader) else None
    count = len(stage.targets)
    with contextlib.ExitStack() as streams:
        requests = streams.enter_context(stage.store.stream(run_id, "requests"))
        on_gpu: Callable[[Sequence[GpuSample]], None] | None = None
        if gpus is not None:
            gpu = streams.enter_context(stage.store.stream(run_id, "gpu"))

            def on_gpu(rows: Sequence[GpuSample]) -> None:
                for row in rows:
                    gpu.write(row)

        def sampler(index: int, target: Target) -> Coroutine[Any, Any, SamplerStats]:
            engine = streams.enter_context(
                stage.store.stream(run_id, "engine", replica=(index, count))
            )

            def on_sample(sample: EngineSample) -> None:
                engine.write(sample)
                if watch is not None:
                    watch(sample)

            return sample_engine(
                target.session,
                target.url,
                target.facts,
                stage.config.sample_interval_s,
                stop,
                on_sample,
                gpus=gpus if index == 0 else None,
                on_gpu=on_gpu if index == 0 else None,
                version=target.shown.version,
            )

        async def all_of() -> list[SamplerStats]:
            own = [asyncio.create_task(sampler(i, t)) for i, t in enumerate(stage.targets)]
            try:
                return await asyncio.gather(*own)
            finally:
                # Where one server is gone the others' samples are whole before the streams close.
                stop.set()
                await asyncio.gather(*own, return_exceptions=True)

        stop = asyncio.Event()
        task = asyncio.create_task(all_of())
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
