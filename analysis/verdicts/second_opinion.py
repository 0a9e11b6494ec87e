"""The critical rate by simulation: the scheduler itself under sustained Poisson overload."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from analysis.inference.capacity import Backlog, work_served
from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import student_quantile
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.prediction import Prediction
from analysis.theory.reserved_demand import keeps_its_fill
from analysis.theory.wave_walk import FILL_RESIDENCES, FILLS, meeting
from analysis.verdicts.evidence import work_demand
from loadgen.records import Run
from loadgen.workload import Workload

WINDOW_RESIDENCES = 12
WARM_UP_RESIDENCES = 2.5
COMPILED_FROM = 1_000_000
"""Requests times steps from which the compiled engine pays: compiling takes half a minute, once."""
FASTER = 0.25
"""Where the rate depends on how chance filled the batch, a wave may be served by so much faster than the
prediction says."""


def simulated_rate(
    workload: Workload,
    limits: EngineLimits,
    law: StepTime,
    requests: int = 1000,
    seed: int = 0,
    overload: float = 1.3,
) -> Estimate:
    """Requests per second that one engine completes under Poisson arrivals at ``overload`` mu.

    The first 2.5 longest residences are left out; then a backlog joins the queue, so that it lasts.
    Departures are normalised by work in the unit of the ceiling that is predicted to bind
    (`analysis.inference.capacity.work_served`). The window is as long as ``requests`` completions
    should take, and at least 12 mean residences. Where the rate depends on how the batch was filled
    (`analysis.theory.reserved_demand.keeps_its_fill`) they are shared by `FILLS` servers that are
    offered what they serve in the mean, and the interval is that of one more: what a measurement meets.

    Raises ValueError if the queue ever empties: then the engine was not saturated.
    """
    first = predict(workload, limits, exact_step_time(law), "engine", "P0")
    rate = first.critical_rate.value
    if not keeps_its_fill(workload, limits):
        return _saturated(first, workload, limits, law, requests, seed, overload * rate)
    seeds = np.random.SeedSequence(seed).generate_state(FILLS).tolist()
    each = math.ceil(requests / FILLS)

    def served(offered: float) -> NDArray[np.float64]:
        rates = [
            _saturated(first, workload, limits, law, each, own, offered).value for own in seeds
        ]
        return np.array(rates)

    found, known_to = meeting(served, rate)
    one_more = math.hypot(float(found.std(ddof=1)), known_to)
    half = student_quantile(0.975, FILLS - 1) * one_more
    mean = float(found.mean())
    method = f"simulated overload of {FILLS} servers, each filled anew; interval: of one"
    return Estimate(mean, mean - half, mean + half, 0.95, "req/s", method)


def _saturated(
    first: Prediction,
    workload: Workload,
    limits: EngineLimits,
    law: StepTime,
    requests: int,
    seed: int,
    arrival_rate: float,
) -> Estimate:
    """The rate of one server from empty; ``first`` is the closed form's prediction."""
    rate = first.critical_rate.value
    waves = keeps_its_fill(workload, limits)
    filling = FILL_RESIDENCES if waves else WARM_UP_RESIDENCES
    warm_up_s = max(filling * first.longest_residence_s, first.settling_s)
    window_s = max(requests / rate, WINDOW_RESIDENCES * first.mean_residence_s)
    run = Run(
        id="overload",
        arrival_rate=arrival_rate,
        horizon_s=warm_up_s + window_s,
        warmup_s=warm_up_s,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    wanted = run.arrival_rate * run.horizon_s
    gaps_s = rng.exponential(1 / run.arrival_rate, math.ceil(wanted + 10 * math.sqrt(wanted) + 10))
    # Memory is full by the end of the warm-up, unless less is offered than is served: a reserve at the
    # back of the queue then starts no cohort.
    faster = FASTER * rate * window_s if waves else 0.0
    backlog = math.ceil(first.running + 4 * math.sqrt(2 * window_s * rate) + faster)
    arrival_s = np.sort(np.concatenate([np.cumsum(gaps_s), np.full(backlog, warm_up_s)]))
    arrival_s = arrival_s[arrival_s < run.horizon_s]
    lengths = workload.sample(rng, len(arrival_s))
    request_steps = len(arrival_s) * first.mean_residence_s / first.step_time_s.value
    simulated = simulate(
        limits,
        law,
        arrival_s,
        lengths,
        run.horizon_s,
        sample_interval_s=first.mean_residence_s / 4,
        ignore_eos=workload.ignore_eos,
        compiled=False if request_steps < COMPILED_FROM else None,
    )
    steps = simulated.steps
    inside = steps.start_s >= warm_up_s
    if not steps.waiting[inside].all():
        emptied_s = float(steps.start_s[inside][steps.waiting[inside] == 0][0]) - warm_up_s
        raise ValueError(f"the queue emptied {emptied_s:.3g} s into the window: raise the overload")
    frames = simulated.frames(run)
    window = Backlog(warm_up_s, float(frames.per_sample("t_s")[-1]))
    demand = workload.mean(work_demand(workload, first.binding))
    found = work_served(frames, window, demand, first.binding).estimate
    completed = int((frames.departures_s >= warm_up_s).sum())
    return replace(found, method=f"simulated overload, {completed} completions")
