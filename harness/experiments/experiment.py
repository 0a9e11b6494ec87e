"""The experiment from a config to a verdict, one stage after another, each written before the next."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml
from rich.markup import escape

from analysis.calibration.calibration_lines import pool_differs, pool_text
from analysis.reports.summary import summary
from analysis.theory.prediction import Prediction
from analysis.verdicts.replica_verdict import verdict_of
from analysis.verdicts.verdict import Verdict
from harness.configs.config import ConfigError, ExperimentConfig
from harness.experiments.analyse import analyse, load_evidence
from harness.experiments.plan import (
    Plan,
    StartOption,
    least_excess,
    make_plan,
    require_distinct_prompts,
)
from harness.experiments.predict import narrow_enough, predictions
from harness.experiments.replicas import at_once, bounding, pooled, predictions_of_all
from harness.experiments.saturated import calibration_record
from harness.live.calibrate import Calibration, calibrate
from harness.live.gpu_choice import engine_gpus, gpu_note
from harness.live.offer import Stage, most_in_flight, offer, workers_of
from harness.live.ray_load import ClusterFailed
from harness.live.sampler import ServerGone
from harness.live.target import ENGINE_LOG, Target, assumptions, require_fitting, target_servers
from harness.machine.display import Countdown, Display
from harness.machine.environment import environment
from harness.machine.gpu import NoGpu
from harness.machine.gpu_reader import GpuReader
from harness.machine.machine_limits import gate, needs_of, saved
from harness.records.store import INPUTS, Store
from harness.records.streams import of_replica
from harness.servers.engines import MissingMetric
from harness.servers.server import ServerFailed, url_is_loopback
from loadgen.drive import TooFewFileDescriptors, require_file_descriptors
from loadgen.processes import POISSON, Replay
from loadgen.records import Run
from loadgen.workers import WorkerFailed
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
    async with target_servers(config, store) as targets:
        target = targets[0]
        away = (one for one in targets if not url_is_loopback(one.url))
        gpus = gpus_of(config, next(away, target), store, display)
        require_fitting(workload, target.limits)
        require_fitting(estimated, target.limits)
        for line in assumptions(target.shown, config):
            display.say(f"note        {line}")
        if len(targets) == 1:
            prediction, _ = await predicted(config, target, estimated, display, store)
        else:
            prediction = await predicted_of_all(config, targets, estimated, display, store)
        claim = Prediction.from_dict(prediction["claim"])
        digest = store.digest("prediction.json")
        engine = Prediction.from_dict(prediction["engine"])
        load = config.load
        loads = config.loads(claim.critical_rate.value)
        plan = _plan(config, workload, claim, engine, digest, loads, load.start)
        store.write_json("plan.json", plan.to_dict())
        _announce(claim, plan, display)
        require_distinct_prompts(plan, workload, range(*config.load.vocabulary))
        display.say(f"note        {reach(plan, config, targets, workload, claim)}")
        if plan_only:
            return None
        try:
            rate = claim.critical_rate.value
            stage = Stage(config, targets, workload, store, display, gpus, rate)
            await _drive_all(stage, plan)
        except (
            ServerGone,
            ServerFailed,
            MissingMetric,
            TooFewFileDescriptors,
            WorkerFailed,
            ClusterFailed,
        ) as error:
            if not store.whole_runs():
                raise
            ended = [said for one in targets if (said := one.poll())]
            display.say(escape(f"error       {'; '.join([str(error), *ended])}"))
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
        several = "; server.replicas starts several" if given[0] == "replicas" else ""
        raise ConfigError(f"{given[0]}: only `critrate predict` uses it: remove it{several}")


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
    where the claim has no prediction, and what `harness.live.calibrate.calibrate` raises.
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
    return prediction, sum(len(probe.lengths) for probe in calibration.probes)


async def predicted_of_all(
    config: ExperimentConfig,
    targets: Sequence[Target],
    workload: Workload,
    display: Display,
    store: Store,
) -> dict[str, Any]:
    """The same for several servers: calibration-<i>.json is of each, calibration.json of those that
    bound the whole."""
    found = await at_once(
        [calibrated(config, one, workload, display, store, i) for i, one in enumerate(targets)]
    )
    shown = targets[0].limits
    for index, calibration in enumerate(found):
        record = calibration_record(config, workload, shown, calibration)
        store.write_json(of_replica("calibration.json", index, len(found)), record)
        if pool_differs(record):
            display.say(escape(f"warning     KV pool of replica {index}: {pool_text(record)}"))
    limits, fits = found[0].limits(shown), [one.fit for one in found]
    slow = bounding(config, workload, limits, fits)
    if len(slow) < len(found):
        names = " and ".join(map(str, slow))
        display.say(
            f"note        replica {names} is slower: round-robin gives all what it can take"
        )
    together = pooled([found[index] for index in slow])
    store.write_json("calibration.json", calibration_record(config, workload, shown, together))
    store.write_json("limits.json", {"shown": targets[0].shown, "used": limits})
    prediction = predictions_of_all(config, workload, limits, fits, together.fit, slow)
    prediction["made_from"] = {name: store.digest(name) for name in INPUTS}
    store.write_json("prediction.json", prediction)
    return prediction


async def calibrated(
    config: ExperimentConfig,
    target: Target,
    workload: Workload,
    display: Display,
    store: Store,
    index: int = 0,
) -> Calibration:
    """Probes until the prediction's 90 % interval is narrower than two fifths of the band.

    ``index``: which of several servers ``target`` is.
    """
    assert config.server is not None
    count = config.server.count
    name = "calibrating" if count == 1 else f"calibrating replica {index}"
    log = store.path / of_replica(ENGINE_LOG, index, count)
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
        lambda probe, share: display.phase(f"{name}: {probe}", share),
        log=None if config.server.running else log,
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
        arrivals=config.arrivals(),
    )


def reach(
    plan: Plan,
    config: ExperimentConfig,
    targets: Sequence[Target],
    workload: Workload,
    prediction: Prediction,
) -> str:
    """What this machine can offer, in a line. Raises TooFewFileDescriptors and BeyondThisMachine."""
    if config.load.cluster is not None:
        return (
            "the load comes from a cluster, whose machines' limits are not known here: the send lag of "
            "each run tells"
        )
    needs = []
    urls = [one.url for one in targets]
    rate, mean = prediction.critical_rate.value, workload.mean(workload.output_tokens)
    for run in plan.runs:
        arrivals = run.preload + round(run.arrival_rate * run.horizon_s)
        in_flight = most_in_flight(arrivals, run, rate)
        require_file_descriptors(in_flight)
        workers = workers_of(config, urls, workload, run.arrival_rate)
        needs.append(needs_of(run, mean, rate, in_flight, workers))
    return gate(needs, saved())


def _announce(prediction: Prediction, plan: Plan, display: Display) -> None:
    rate = prediction.critical_rate
    display.say(
        f"predicted   {rate.value:.4g} req/s [{rate.low:.4g}, {rate.high:.4g}]   "
        f"{prediction.claim} {prediction.grade}, bound by {prediction.binding}"
    )
    if plan.runs[0].arrivals != POISSON:
        display.say(f"arrivals    {plan.runs[0].arrivals.text}")
    for run, power in zip(plan.runs, plan.power, strict=True):
        display.say(
            f"plan        {run.arrival_rate:.4g} req/s for {run.horizon_s:.0f} s, "
            f"{run.arrival_rate * run.horizon_s:.0f} requests{_burst(run)}, {_power(power)}"
            + _of_what(run, prediction, plan.theta)
        )
    display.say(f"            {plan.duration_s / 60:.1f} minutes, {plan.requests:.0f} requests")


def _power(power: float) -> str:
    return "a replay: not judged" if math.isnan(power) else f"power {100 * power:.0f} %"


def _burst(run: Run) -> str:
    return f" behind a burst of {run.preload}" if run.preload else ""


def _of_what(run: Run, prediction: Prediction, theta: float) -> str:
    """At nearly the predicted rate no answer is the right one: what the power is the power of."""
    rate, least = prediction.critical_rate.value, least_excess(theta)
    if abs(run.arrival_rate / rate - 1) >= least or isinstance(run.arrivals, Replay):
        return ""
    side = "higher" if run.arrival_rate < rate else "lower"
    return f" if the critical rate is {100 * least:.3g} % {side}"


# -- the load ------------------------------------------------------------------------------------


async def _drive_all(stage: Stage, plan: Plan) -> None:
    """Every planned run, then runs at other rates while the truth lies outside those tried."""
    countdown = Countdown(plan.duration_s)
    for run in plan.runs:
        await offer(stage, run, plan.prediction_digest, countdown)
    extend = stage.config.load.extend and not isinstance(plan.runs[0].arrivals, Replay)
    for _ in range(MAX_EXTRA_RUNS if extend else 0):
        evidence = load_evidence(stage.store)
        load = outside(verdict_of(evidence))
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
