"""The critical rate by simulation: the scheduler itself under sustained Poisson overload."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from analysis.critical_rate import predict
from analysis.engine import EngineLimits, Request
from analysis.estimate import Estimate
from analysis.prediction import CeilingName, Prediction
from analysis.scheduler import engine_of
from analysis.step_time import StepTime, exact_step_time
from loadgen.workload import Workload

BATCHES = 10
WINDOW_RESIDENCES = 12
WARM_UP_RESIDENCES = 2.5


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
    Departures are normalised by work: each delivered token is credited with what it takes of the
    binding resource, and the credit per second is divided by the mean credit of a request of the
    law. The interval (95 %) is that of the means of 10 batches of steps. The window is as long as
    ``requests`` completions take, and at least 12 mean residences.

    Raises ValueError if the queue ever empties: then the engine was not saturated.
    """
    first = predict(workload, limits, exact_step_time(law), "engine", "P0")
    step_s = first.step_time_s.value
    x = first.critical_rate.value * step_s
    warm_up_s = max(WARM_UP_RESIDENCES * first.longest_residence_s, first.settling_s)
    warm_up = math.ceil(warm_up_s / step_s)
    window = math.ceil(max(requests / x, WINDOW_RESIDENCES * first.mean_residence_s / step_s))
    log = _saturate(
        workload,
        limits,
        law,
        first,
        overload,
        (warm_up, window),
        np.random.default_rng(seed),
    )
    credit = _mean_credit(workload, first.binding)
    batches = np.array_split(np.arange(window), BATCHES)
    work = np.array([log.credit[b].sum() for b in batches]) / credit
    seconds = np.array([log.seconds[b].sum() for b in batches])
    rate = float(work.sum() / seconds.sum())
    # Ratio of means: the scatter is that of what the batch completed beyond its share of time.
    scatter = float(np.std(work - rate * seconds, ddof=1)) * np.sqrt(BATCHES) / seconds.sum()
    half = float(t.ppf(0.975, BATCHES - 1)) * float(scatter)
    return Estimate(
        rate,
        rate - half,
        rate + half,
        0.95,
        "req/s",
        f"simulated overload, {int(log.completed)} completions, batch means",
    )


@dataclass(slots=True)
class _Log:
    credit: NDArray[np.float64]
    seconds: NDArray[np.float64]
    completed: int = 0


def _saturate(
    workload: Workload,
    limits: EngineLimits,
    law: StepTime,
    first: Prediction,
    overload: float,
    steps: tuple[int, int],
    rng: np.random.Generator,
) -> _Log:
    """Credit delivered and seconds taken in each step of the window after the warm-up."""
    warm_up, window = steps
    arrival_rate = overload * first.critical_rate.value
    engine = engine_of(limits)
    log = _Log(np.zeros(window), np.zeros(window))
    arrivals: list[tuple[float, list[int]]] = []
    now = last = 0.0
    index = -warm_up
    x = first.critical_rate.value * first.step_time_s.value
    while index < window:
        while last <= now:
            gaps = rng.exponential(1 / arrival_rate, 256)
            times = last + np.cumsum(gaps)
            lengths = workload.sample(rng, 256).tolist()
            arrivals += zip(times.tolist(), lengths, strict=True)
            last = float(times[-1])
        due = 0
        while due < len(arrivals) and arrivals[due][0] <= now:
            s, o, declared = arrivals[due][1]
            engine.submit(Request(0, s, o, declared, workload.ignore_eos))
            due += 1
        del arrivals[:due]
        step = engine.start()
        if step is None:
            now = arrivals[0][0]
            continue
        if index == 0:
            # Memory is full by now: a reserve at the back of the queue starts no cohort.
            backlog = math.ceil(first.running + 4 * math.sqrt(2 * window * x))
            for s, o, declared in workload.sample(rng, backlog).tolist():
                engine.submit(Request(0, s, o, declared, workload.ignore_eos))
        if index >= 0 and not engine.waiting:
            raise ValueError(f"the queue emptied {index} steps into the window: raise the overload")
        duration = law(step.tokens, step.kv_tokens, len(step.scheduled))
        now += duration
        delivered = engine.complete(step)
        if index >= 0:
            log.seconds[index] = duration
            log.credit[index] = sum(_credit(request, first.binding) for request, _ in delivered)
            log.completed += sum(finished for _, finished in delivered)
        index += 1
    return log


def _credit(request: Request, binding: CeilingName) -> int:
    """What the token just delivered took of the binding resource; a prompt with its first."""
    if binding == "kv_cache":
        return request.prompt_tokens + request.outputs - 1
    if binding == "output_reservation":
        return request.prompt_tokens + request.max_tokens - 1 if request.outputs > 1 else 0
    if binding == "max_num_batched_tokens":
        return request.prompt_tokens if request.outputs == 1 else 1
    return 1


def _mean_credit(workload: Workload, binding: CeilingName) -> float:
    s, o, d = workload.prompt_tokens, workload.output_tokens, workload.max_tokens
    if binding == "kv_cache":
        return workload.mean(s * o + o * (o - 1) // 2)
    if binding == "output_reservation":
        return workload.mean((s + d - 1) * (o - 1))
    return workload.mean(s + o - 1 if binding == "max_num_batched_tokens" else o)
