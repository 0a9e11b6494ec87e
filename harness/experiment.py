"""The experiment from a config to a verdict, one stage after another, each written before the next."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import aiohttp
import numpy as np
import yaml

from analysis.engine import EngineLimits
from analysis.judge import judge
from analysis.prediction import Prediction
from analysis.summary import summary
from analysis.verdict import Verdict
from harness.analyse import analyse, load_evidence
from harness.calibrate import Calibration, calibrate
from harness.config import ConfigError, ExperimentConfig
from harness.display import Countdown, Display
from harness.engines import ENGINES, EngineFacts, ServerLimits, mock_argv, read_limits
from harness.environment import environment
from harness.gpu import GpuReader, GpuSample, NoGpu, open_gpus
from harness.plan import Plan, make_plan
from harness.predict import predictions
from harness.sampler import SamplerStats, ServerGone, sample_engine
from harness.server import ServerFailed, attached, free_port, launched
from harness.store import EndReason, Store
from loadgen.arrivals import poisson
from loadgen.client import open_session
from loadgen.drive import drive
from loadgen.prompts import completion_body, make_prompts
from loadgen.records import RequestRecord, Run
from loadgen.workload import Workload

START_DELAY_S = 0.5
DRAIN_TIMEOUT_S = 120.0
MAX_EXTRA_RUNS = 3


@dataclass(frozen=True, eq=False)
class Target:
    """A server that answers, and what it shows of itself."""

    url: str
    facts: EngineFacts
    session: aiohttp.ClientSession
    shown: ServerLimits
    limits: EngineLimits
    poll: Callable[[], str | None]


async def run_experiment(
    config: ExperimentConfig, store: Store, display: Display, plan_only: bool = False
) -> Verdict | None:
    """Carry out the experiment and return its verdict; None with ``plan_only``.

    On an interrupt, or when the
    server is gone, what was measured is kept and judged; then the interrupt goes on to the caller.
    """
    workload = config.law()
    gpus = open_gpus()
    _write_inputs(config, store)
    async with target_server(config, store, display) as target:
        _require_fitting(workload, target.limits)
        calibration = await _calibrated(config, target, workload, display)
        store.write_json("calibration.json", calibration.to_dict())
        limits = calibration.limits(target.limits)
        store.write_json("limits.json", {"shown": target.shown, "used": limits})
        prediction = predictions(config, workload, limits, calibration.fit, "P1")
        store.write_json("prediction.json", prediction)
        claim = Prediction.from_dict(prediction["claim"])
        digest = store.digest("prediction.json")
        plan = _plan(config, workload, claim, digest, config.load.rates)
        store.write_json("plan.json", plan.to_dict())
        _announce(claim, plan, display)
        if plan_only:
            return None
        try:
            await _drive_all(config, target, workload, plan, store, display, gpus)
        except ServerGone as error:
            display.say(f"[red]{error}[/red]; what was measured until then is judged")
        except asyncio.CancelledError:
            if store.run_ids():
                _summarise_interrupted(store, display)
            raise
    return analyse(store)


# -- before the load -----------------------------------------------------------------------------


def _write_inputs(config: ExperimentConfig, store: Store) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)
    store.write_text("config.yaml", text)
    store.write_json("environment.json", environment())


@contextlib.asynccontextmanager
async def target_server(
    config: ExperimentConfig, store: Store, display: Display
) -> AsyncIterator[Target]:
    """The server of the config, attached to or started as a mock, with its limits read back."""
    if config.server is None:
        raise ConfigError(
            "server: give a url or a mock to drive; without one use `critrate predict`"
        )
    server = config.server
    facts = ENGINES["mock" if server.mock is not None else server.engine]
    display.phase("starting the server")
    async with contextlib.AsyncExitStack() as stack:
        if server.mock is not None:
            mock_file = store.path / "mock.yaml"
            parameters = server.mock.model_dump(mode="json", exclude_none=True)
            store.write_text("mock.yaml", yaml.safe_dump(parameters, sort_keys=False))
            url = f"http://127.0.0.1:{server.port or free_port()}"
            argv = [*mock_argv(mock_file), "--port", url.rsplit(":", 1)[1]]
            running = await stack.enter_async_context(
                launched(
                    argv,
                    {},
                    url,
                    facts.health_path,
                    server.ready_timeout_s,
                    store.path / "engine.log",
                )
            )
        else:
            assert server.url is not None
            url = server.url.rstrip("/")
            running = await stack.enter_async_context(attached(url, facts.health_path))
        session = await stack.enter_async_context(open_session(server.headers))
        given = config.limits
        blocks = None
        if given.pool_tokens is not None and given.block_size is not None:
            blocks = given.pool_tokens // given.block_size + 1
        shown = await read_limits(session, url, facts, blocks)
        yield Target(url, facts, session, shown, engine_limits(shown, config), running.poll)


def engine_limits(shown: ServerLimits, config: ExperimentConfig) -> EngineLimits:
    """Limits that the server shows, completed by those that the config states."""
    given = config.limits
    watermark = given.watermark if shown.watermark is None else shown.watermark
    ahead = given.async_scheduling if shown.async_scheduling is None else shown.async_scheduling
    return EngineLimits(
        num_blocks=shown.num_blocks,
        block_size=shown.block_size,
        max_num_seqs=shown.max_num_seqs or given.max_num_seqs,
        max_num_batched_tokens=shown.max_num_batched_tokens or given.max_num_batched_tokens,
        max_model_len=shown.max_model_len,
        watermark=watermark or 0.0,
        long_prefill_token_threshold=shown.long_prefill_token_threshold or 0,
        async_scheduling=bool(ahead),
    )


def _require_fitting(workload: Workload, limits: EngineLimits) -> None:
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    bounds = {"the KV pool": limits.pool_tokens, "max_model_len": limits.max_model_len}
    for name, bound in bounds.items():
        if bound is not None and longest > bound:
            raise ConfigError(
                f"workload: prompt + output reach {longest} tokens, {name} of the server is {bound}: "
                f"shorten the lengths or set workload.max_total_tokens: {bound}"
            )


async def _calibrated(
    config: ExperimentConfig, target: Target, workload: Workload, display: Display
) -> Calibration:
    return await calibrate(
        target.session,
        target.url,
        target.facts,
        target.shown.model_id,
        workload,
        target.limits,
        range(*config.load.vocabulary),
        config.load.seed,
        lambda probe, share: display.phase(f"calibrating: {probe}", share),
    )


def _plan(
    config: ExperimentConfig,
    workload: Workload,
    prediction: Prediction,
    digest: str,
    loads: tuple[float, ...],
    first_index: int = 0,
) -> Plan:
    return make_plan(
        prediction,
        workload,
        loads=loads,
        horizon_s=config.load.horizon_s,
        max_horizon_s=config.load.max_horizon_s,
        theta=config.theta,
        seed=config.load.seed,
        prediction_digest=digest,
        first_index=first_index,
    )


def _announce(prediction: Prediction, plan: Plan, display: Display) -> None:
    rate = prediction.critical_rate
    display.say(
        f"predicted   {rate.value:.4g} req/s [{rate.low:.4g}, {rate.high:.4g}]   "
        f"{prediction.claim} {prediction.grade}, bound by {prediction.binding}"
    )
    for run, power in zip(plan.runs, plan.power, strict=True):
        display.say(
            f"plan        {run.arrival_rate:.4g} req/s for {run.horizon_s:.0f} s, "
            f"{run.arrival_rate * run.horizon_s:.0f} requests, power {power:.0%}"
        )
    display.say(f"            {plan.duration_s / 60:.1f} minutes, {plan.requests:.0f} requests")


# -- the load ------------------------------------------------------------------------------------


async def _drive_all(
    config: ExperimentConfig,
    target: Target,
    workload: Workload,
    plan: Plan,
    store: Store,
    display: Display,
    gpus: GpuReader | NoGpu,
) -> None:
    """Every planned run, then runs at other rates while the truth lies outside those tried."""
    countdown = Countdown(plan.duration_s)
    for run in plan.runs:
        await _drive_run(config, target, workload, run, plan, store, display, gpus, countdown)
    for _ in range(MAX_EXTRA_RUNS if config.load.extend else 0):
        load = outside(load_evidence(store))
        if load is None:
            return
        claim = Prediction.from_dict(store.read_json("prediction.json")["claim"])
        more = _plan(config, workload, claim, plan.prediction_digest, (load,), len(plan.runs))
        display.say(f"extending   to {load:.2f} of the predicted rate: the answer lies outside")
        plan = replace(plan, runs=plan.runs + more.runs, power=plan.power + more.power)
        store.write_json("plan.json", plan.to_dict())
        countdown = Countdown(more.duration_s)
        await _drive_run(
            config, target, workload, more.runs[0], plan, store, display, gpus, countdown
        )


async def _drive_run(
    config: ExperimentConfig,
    target: Target,
    workload: Workload,
    run: Run,
    plan: Plan,
    store: Store,
    display: Display,
    gpus: GpuReader | NoGpu,
    countdown: Countdown,
) -> None:
    """Offer one run's load and write everything that is seen while it lasts."""
    arrival_s = poisson(run.arrival_rate, run.horizon_s, run.seed)
    lengths = workload.sample(np.random.default_rng([run.seed, 1]), len(arrival_s))
    prompts = make_prompts(lengths[:, 0], run.seed, range(*config.load.vocabulary))
    bodies = [
        completion_body(target.shown.model_id, prompt, int(o), int(declared))
        for prompt, (_, o, declared) in zip(prompts, lengths, strict=True)
    ]
    await _idle(target, display)
    start_ns = time.monotonic_ns() + round(START_DELAY_S * 1e9)
    store.begin_run(run, start_ns, datetime.now(UTC).isoformat(), plan.prediction_digest)
    name = f"{run.arrival_rate:.4g} req/s ({run.id[3:]} of critical)"

    def progress(elapsed_s: float, sent: int, in_flight: int) -> None:
        display.phase(name, elapsed_s / run.horizon_s, countdown.left_s())
        display.load(in_flight, sent)

    reason: EndReason = "interrupted"
    stats: SamplerStats | None = None
    async with _recording(target, config, store, run.id, gpus) as (on_record, sampling):
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
            )
        )
        try:
            await asyncio.wait({loading, sampling.task}, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)
                reason = "server gone"
            else:
                loading.result()
                reason = "horizon"
            stats = await sampling.finish()
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            end_ns = time.monotonic_ns()
            store.end_run(run.id, end_ns, reason, stats)


class _Sampling:
    """The sampler as a task that can be told to stop."""

    def __init__(self, task: asyncio.Task[SamplerStats], stop: asyncio.Event) -> None:
        self.task = task
        self._stop = stop

    async def finish(self) -> SamplerStats:
        """Stop after the sample under way. Raises what the sampler raised."""
        self._stop.set()
        return await self.task


@contextlib.asynccontextmanager
async def _recording(
    target: Target, config: ExperimentConfig, store: Store, run_id: str, gpus: GpuReader | NoGpu
) -> AsyncIterator[tuple[Callable[[RequestRecord], None], _Sampling]]:
    """Append-only streams of one run, with the sampler writing into two of them."""
    with contextlib.ExitStack() as streams:
        requests, engine, gpu = (
            streams.enter_context(store.stream(run_id, name))
            for name in ("requests", "engine", "gpu")
        )

        def write_gpus(rows: Sequence[GpuSample]) -> None:
            for row in rows:
                gpu.write(row)

        stop = asyncio.Event()
        task = asyncio.create_task(
            sample_engine(
                target.session,
                target.url,
                target.facts,
                config.sample_interval_s,
                stop,
                engine.write,
                gpus=gpus if isinstance(gpus, GpuReader) else None,
                on_gpu=write_gpus if isinstance(gpus, GpuReader) else None,
                version=target.shown.version,
            )
        )
        try:
            yield requests.write, _Sampling(task, stop)
        finally:
            stop.set()
            await asyncio.gather(task, return_exceptions=True)


async def _idle(target: Target, display: Display) -> None:
    """Wait until nothing is left of the run before. Raises ServerFailed if the server never is."""
    display.phase("waiting for an idle server")
    seen = asyncio.Event()

    def look(sample: Any) -> None:
        if sample.waiting == 0 and sample.running == 0:
            seen.set()

    async with asyncio.timeout(DRAIN_TIMEOUT_S):
        try:
            await sample_engine(target.session, target.url, target.facts, 0.2, seen, look)
        except TimeoutError as error:
            raise ServerFailed(
                f"{target.url} still had requests after {DRAIN_TIMEOUT_S:.0f} s: stop other clients"
            ) from error


def outside(evidence: Any) -> float | None:
    """The load to try next when the critical rate lies outside the rates tried, else None.

    Above all rates when no queue stayed; below all rates when none was stable.
    """
    verdict = judge(evidence)
    valid = [run for run in verdict.runs if run.verdict != "invalid"]
    if not valid:
        return None
    predicted = evidence.prediction.critical_rate.value
    if verdict.measured is None:
        highest = max(run.load for run in valid)
        return 1.5 * highest if highest < 4 else None
    critical_load = verdict.measured.value / predicted
    below = [r for r in valid if r.load < critical_load]
    if not any(r.verdict == "stable" for r in below):
        candidate = 0.85 * critical_load
        return candidate if all(abs(r.load - candidate) > 0.02 for r in valid) else None
    return None


def _summarise_interrupted(store: Store, display: Display) -> None:
    verdict = analyse(store)
    display.say("[yellow]interrupted[/yellow]: the best verdict so far")
    display.say(summary(verdict))
