"""The experiment from a config to a verdict, one stage after another, each written before the next."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import yaml
from rich.markup import escape

from analysis.calibration_lines import pool_differs, pool_text
from analysis.judge import judge
from analysis.prediction import Prediction
from analysis.summary import summary
from analysis.verdict import Verdict
from harness.analyse import analyse, load_evidence
from harness.calibrate import Calibration, calibrate
from harness.config import ConfigError, ExperimentConfig
from harness.display import Countdown, Display
from harness.engines import MissingMetric
from harness.environment import environment
from harness.gpu import NoGpu
from harness.gpu_choice import engine_gpus, gpu_note
from harness.gpu_reader import GpuReader
from harness.offer import Stage, most_in_flight, offer
from harness.plan import (
    Plan,
    StartOption,
    least_excess,
    make_plan,
    require_distinct_prompts,
)
from harness.predict import narrow_enough, predictions
from harness.sampler import ServerGone
from harness.saturated import calibration_record
from harness.server import ServerFailed
from harness.store import INPUTS, Store
from harness.target import Target, assumptions, require_fitting, target_server
from loadgen.drive import TooFewFileDescriptors, require_file_descriptors
from loadgen.records import Run
from loadgen.workload import Workload

MAX_EXTRA_RUNS = 3


async def run_experiment(
    config: ExperimentConfig, store: Store, display: Display, plan_only: bool = False
) -> Verdict | None:
    """Carry out the experiment and return its verdict; None with ``plan_only``.

    On an interrupt, or when the server is gone, what was measured is kept and judged; then the
    interrupt goes on to the caller.
    """
    workload, estimated = config.law(), config.estimated_law()
    _refuse_offline_keys(config)
    write_inputs(config, store)
    for line in dict.fromkeys((*workload.notes, *estimated.notes)):
        display.say(escape(f"note        {line}"))
    display.phase("starting the server")
    async with target_server(config, store) as target:
        gpus = gpus_of(config, target, store, display)
        require_fitting(workload, target.limits)
        require_fitting(estimated, target.limits)
        for line in assumptions(target.shown, config):
            display.say(f"note        {line}")
        prediction, _ = await predicted(config, target, estimated, display, store)
        claim = Prediction.from_dict(prediction["claim"])
        digest = store.digest("prediction.json")
        engine = Prediction.from_dict(prediction["engine"])
        load = config.load
        plan = _plan(config, workload, claim, engine, digest, load.rates, load.start)
        store.write_json("plan.json", plan.to_dict())
        _announce(claim, plan, display)
        require_distinct_prompts(plan, workload, range(*config.load.vocabulary))
        for run in plan.runs:
            arrivals = run.preload + round(run.arrival_rate * run.horizon_s)
            require_file_descriptors(most_in_flight(arrivals, run, claim.critical_rate.value))
        if plan_only:
            return None
        try:
            rate = claim.critical_rate.value
            stage = Stage(config, target, workload, store, display, gpus, rate)
            await _drive_all(stage, plan)
        except (ServerGone, ServerFailed, MissingMetric, TooFewFileDescriptors) as error:
            if not store.whole_runs():
                raise
            ended = target.poll()
            display.say(escape(f"error       {error}" + (f"; {ended}" if ended else "")))
            display.say("            what was measured until then is judged")
        except asyncio.CancelledError:
            if store.whole_runs():
                display.say("interrupted: the best verdict so far")
                display.say(summary(analyse(store)))
            raise
    return analyse(store)


# -- before the load -----------------------------------------------------------------------------


def _refuse_offline_keys(config: ExperimentConfig) -> None:
    """Keys that only a prediction without a server uses must not change a live claim unseen."""
    offline = {"step_time": config.step_time, "published": config.published}
    given = [name for name, value in offline.items() if value is not None]
    if config.replicas > 1:
        given.append("replicas")
    if config.limits.sglang is not None:
        given.append("limits.sglang")
    if given:
        raise ConfigError(
            f"{given[0]}: only `critrate predict` uses it; a run measures one server: remove it"
        )


def gpus_of(
    config: ExperimentConfig, target: Target, store: Store, display: Display
) -> GpuReader | NoGpu:
    """The GPUs of the engine, opened, or why there are none; said unless none is expected."""
    assert config.server is not None
    gpus = engine_gpus(config.server, target.url, store)
    if config.server.on_gpu:
        display.say(escape(f"note        {gpu_note(gpus)}"))
    return gpus


def write_inputs(config: ExperimentConfig, store: Store) -> None:
    """The config without what opens the server's door, and where this runs, into the folder."""
    # What opens the server's door goes to the server and nowhere else.
    secret = {"server": {"headers", "api_key_env", "tls_ca"}}
    shown = config.model_dump(mode="json", exclude_none=True, exclude=secret)
    text = yaml.safe_dump(shown, sort_keys=False)
    store.write_text("config.yaml", text)
    store.write_json("environment.json", environment())


async def predicted(
    config: ExperimentConfig, target: Target, workload: Workload, display: Display, store: Store
) -> tuple[dict[str, Any], int]:
    """Calibrate and predict: limits.json, calibration.json and prediction.json are written.

    What is returned is prediction.json, and the requests that the probes sent. Raises ConfigError
    where the claim has no prediction, and what `harness.calibrate.calibrate` raises.
    """
    calibration = await calibrated(config, target, workload, display, store)
    record = calibration_record(config, workload, target.limits, calibration)
    store.write_json("calibration.json", record)
    if pool_differs(record):
        display.say(escape(f"warning     KV pool: {pool_text(record)}"))
    limits = calibration.limits(target.limits)
    store.write_json("limits.json", {"shown": target.shown, "used": limits})
    prediction = predictions(config, workload, limits, calibration.fit, "P1")
    prediction["made_from"] = {name: store.digest(name) for name in INPUTS}
    store.write_json("prediction.json", prediction)
    return prediction, sum(probe.requests for probe in calibration.probes)


async def calibrated(
    config: ExperimentConfig, target: Target, workload: Workload, display: Display, store: Store
) -> Calibration:
    """Probes until the prediction's 90 % interval is narrower than two fifths of the band."""
    return await calibrate(
        target.session,
        target.url,
        target.facts,
        target.shown.model_id,
        workload,
        target.limits,
        range(*config.load.vocabulary),
        config.load.seed,
        narrow_enough(config, workload, target.limits),
        lambda probe, share: display.phase(f"calibrating: {probe}", share),
        log=None if config.server is None or config.server.url else store.path / "engine.log",
    )


def _plan(
    config: ExperimentConfig,
    workload: Workload,
    prediction: Prediction,
    engine: Prediction,
    digest: str,
    loads: tuple[float, ...],
    start: StartOption,
    first_index: int = 0,
) -> Plan:
    return make_plan(
        prediction,
        engine,
        workload,
        loads=loads,
        horizon_s=config.load.horizon_s,
        max_horizon_s=config.load.max_horizon_s,
        theta=config.theta,
        seed=config.load.seed,
        prediction_digest=digest,
        first_index=first_index,
        start=start,
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
            f"{run.arrival_rate * run.horizon_s:.0f} requests{_burst(run)}, power {100 * power:.0f} %"
            + _of_what(run, prediction, plan.theta)
        )
    display.say(f"            {plan.duration_s / 60:.1f} minutes, {plan.requests:.0f} requests")


def _burst(run: Run) -> str:
    return f" behind a burst of {run.preload}" if run.preload else ""


def _of_what(run: Run, prediction: Prediction, theta: float) -> str:
    """At nearly the predicted rate no answer is the right one: what the power is the power of."""
    rate, least = prediction.critical_rate.value, least_excess(theta)
    if abs(run.arrival_rate / rate - 1) >= least:
        return ""
    side = "higher" if run.arrival_rate < rate else "lower"
    return f" if the critical rate is {100 * least:.3g} % {side}"


# -- the load ------------------------------------------------------------------------------------


async def _drive_all(stage: Stage, plan: Plan) -> None:
    """Every planned run, then runs at other rates while the truth lies outside those tried."""
    countdown = Countdown(plan.duration_s)
    for run in plan.runs:
        await offer(stage, run, plan.prediction_digest, countdown)
    for _ in range(MAX_EXTRA_RUNS if stage.config.load.extend else 0):
        evidence = load_evidence(stage.store)
        load = outside(judge(evidence))
        if load is None:
            return
        more = _plan(
            stage.config,
            stage.workload,
            evidence.prediction,
            evidence.engine,
            plan.prediction_digest,
            (load,),
            "full" if stage.config.load.start == "full" else "empty",
            len(plan.runs),
        )
        stage.display.say(
            f"extending   to {load:.2f} of the predicted rate: the answer lies outside"
        )
        plan = replace(plan, runs=plan.runs + more.runs, power=plan.power + more.power)
        stage.store.write_json("plan.json", plan.to_dict())
        await offer(stage, more.runs[0], plan.prediction_digest, Countdown(more.duration_s))


def outside(verdict: Verdict) -> float | None:
    """The load to try next when the critical rate lies outside the rates tried, else None.

    Above all rates when no queue stayed; below all rates when none was stable.
    """
    valid = [run for run in verdict.runs if run.verdict != "invalid"]
    if not valid:
        return None
    if verdict.measured is None:
        highest = max(run.load for run in valid)
        return 1.5 * highest if highest < 4 else None
    critical_load = verdict.measured.value / verdict.predicted.value
    below = [r for r in valid if r.load < critical_load]
    if not any(r.verdict == "stable" for r in below):
        candidate = 0.85 * critical_load
        return candidate if all(abs(r.load - candidate) > 0.02 for r in valid) else None
    return None
