"""What `critrate size` simulates, with its random numbers: replicas of a fleet, and the fleet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import student_quantile
from analysis.operation.fleet import Router, fleet_waits
from analysis.operation.sizing import Allowed, simulated_shares, squared_variation
from analysis.operation.slo import Draws, mean_ttft
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime
from analysis.theory.prediction import Prediction
from analysis.verdicts.evidence import work_demand
from harness.configs.sections import ConfigError
from harness.rehearsals.size_source import Replica
from loadgen.traces import FORMATS, read_requests
from loadgen.workload import Workload

WIDEST = 0.04
"""Half width at 90 % of a critical rate, as a share of it, from which on calibrating again pays: what
`critrate run` goes on probing for at its usual band of agreement
(`harness.experiments.predict.NARROW` of 10 %)."""
DAYS = 4
"""Simulated; those for the waits that are shown are half as long."""
REQUESTS, REQUEST_STEPS = 12_000, 4_000_000
"""Of a day, at most; but no fewer than `LEAST_REQUESTS`."""
LEAST_REQUESTS = 2000
CHECK_EACH, CHECK_MEMORIES = 400, 8
"""Requests of each replica of a whole simulated fleet: so many, and so many times those in it."""
CHECK_REQUEST_STEPS = 20_000_000
"""Of all of them together, at most: some two minutes for each of four cases."""
CHECK_PARTS = 6


def engine_shares(
    workload: Workload,
    limits: EngineLimits,
    law: StepTime,
    prediction: Prediction,
    seed: int,
    quantile: float = 0.95,
) -> Allowed:
    """What one replica may carry, by the engine model: `analysis.operation.sizing.simulated_shares`
    on drawn days.

    ``prediction`` is of one replica, by the same law and limits.
    """
    work = work_demand(workload, prediction.binding)
    requests = day_requests(prediction)
    return simulated_shares(
        limits,
        law,
        prediction.critical_rate.value,
        squared_variation(workload.weight, np.asarray(work, dtype=float)),
        lambda replicas: [
            fleet_draws(workload, replicas, [seed, 11, day], requests) for day in range(DAYS)
        ],
        quantile,
        workload.ignore_eos,
    )


def day_requests(prediction: Prediction) -> int:
    """Requests of a simulated day, fewer where each takes many steps."""
    steps = prediction.mean_residence_s / prediction.step_time_s.value
    return max(min(REQUESTS, int(REQUEST_STEPS / steps)), LEAST_REQUESTS)


def fleet_draws(workload: Workload, replicas: int, seed: Sequence[int], requests: int) -> Draws:
    """What one of ``replicas`` behind round-robin gets of Poisson arrivals: every N-th, at rate 1."""
    rng = np.random.default_rng([*seed, replicas])
    gaps = rng.gamma(replicas, 1.0 / replicas, requests)
    return Draws(np.cumsum(gaps), even_lengths(workload, np.random.default_rng(seed), requests))


def even_lengths(workload: Workload, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """``count`` draws of lengths, shape (count, 3), whose work is that of the law almost exactly.

    The law, in order of work, is cut into ``count`` parts of equal weight; one draw is of each, in a
    random order: the chance that one day has more work than the next would hide what matters.
    Parts of a mixture that take turns are sampled as they are.
    """
    if workload.cycle_requests:
        return workload.sample(rng, count)
    order = np.argsort(workload.decode_demand(), kind="stable")
    cumulative = np.cumsum(workload.weight[order])
    at = (rng.permutation(count) + rng.random(count)) / count
    index = order[np.searchsorted(cumulative / cumulative[-1], at, side="right")]
    return np.stack(
        [workload.prompt_tokens[index], workload.output_tokens[index], workload.max_tokens[index]],
        axis=1,
    )


# -- a demand ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """Requests per second to size for; ``mean`` and what follows are of a trace."""

    rate: float
    mean: float | None = None
    window_s: float | None = None
    burstiness: float | None = None
    """Index of dispersion of the counts of seconds in the busiest window; 1 for Poisson arrivals."""

    def scaled(self, factor: float) -> Demand:
        """So many times as much, otherwise alike."""
        mean = None if self.mean is None else self.mean * factor
        return replace(self, rate=self.rate * factor, mean=mean)


def trace_demand(path: Path, format: str, window_s: float) -> Demand:
    """The rate of the busiest ``window_s`` of a trace. Raises ConfigError where it has none."""
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: known are {', '.join(FORMATS)}")
    try:
        instants_ns = read_requests(path, format).instants_ns
    except ValueError as error:
        raise ConfigError(f"--trace: {error}") from error
    assert instants_ns is not None
    instants_s = np.sort(instants_ns) / 1e9
    length_s = float(instants_s[-1] - instants_s[0])
    if length_s < window_s:
        raise ConfigError(
            f"--trace {path}: it lasts {length_s:.4g} s, less than one --window of {window_s:g} s"
        )
    starts = np.arange(0.0, length_s - window_s, window_s / 10) + instants_s[0]
    first, last = (np.searchsorted(instants_s, at) for at in (starts, starts + window_s))
    busiest = int(np.argmax(last - first))
    inside = instants_s[first[busiest] : last[busiest]] - starts[busiest]
    counts = np.histogram(inside, bins=max(int(window_s), 2), range=(0.0, window_s))[0]
    return Demand(
        rate=len(inside) / window_s,
        mean=len(instants_s) / length_s,
        window_s=window_s,
        burstiness=float(counts.var(ddof=1) / counts.mean()),
    )


# -- waits ---------------------------------------------------------------------------------------


def waits(
    replica: Replica, replicas: int, demand: float, speed: float, quantile: float, seed: int
) -> dict[str, Any]:
    """p50 and the quantile of the wait of one of ``replicas`` that share ``demand``, and its load.

    ``speed`` is that of the server over the engine model's.
    """
    rate, prediction = demand / replicas / speed, replica.predicted()
    load, requests = rate / prediction.critical_rate.value, day_requests(prediction) // 2
    days = [
        fleet_draws(replica.workload, replicas, [seed, 11, day], requests) for day in range(DAYS)
    ]

    def wait(which: float) -> dict[str, Any]:
        if load >= 1.0:
            return Estimate(math.inf, math.inf, math.inf, 0.95, "s", "the queue grows").to_dict()
        law, eos = replica.fit.law, replica.workload.ignore_eos
        found = mean_ttft(replica.limits, law, days, rate, which, eos)
        return found.scaled(1 / speed).to_dict() if math.isfinite(found.value) else found.to_dict()

    return {"load": load, "p50": wait(0.5), "tail": wait(quantile)}


def checked_fleet(
    replica: Replica, replicas: int, demand: float, quantile: float, seed: int
) -> list[dict[str, Any]]:
    """The quantile of the wait of a whole simulated fleet: both routers, all replicas and one lost.

    One is lost after a third of the requests, and the waits are of those after that. Raises ConfigError
    where it would take too long.
    """
    prediction, law = replica.predicted(), replica.workload
    speed = replica.critical_rate().value / prediction.critical_rate.value
    steps = prediction.mean_residence_s / prediction.step_time_s.value
    count = replicas * max(CHECK_EACH, int(CHECK_MEMORIES * prediction.running))
    if count * steps > CHECK_REQUEST_STEPS:
        raise ConfigError(
            f"--check: {count} requests of {steps:.0f} steps would take an hour or so: leave it out, or "
            "check a smaller demand"
        )
    rng = np.random.default_rng([seed, 12])
    arrival_s = np.cumsum(rng.exponential(speed / demand, count))
    lengths = even_lengths(law, rng, count)
    from_s = float(arrival_s[count // 3])
    counted = arrival_s >= from_s
    found = []
    for router in get_args(Router):
        for lost in (False, True)[: 1 + (replicas > 1)]:
            waited = fleet_waits(
                replica.limits,
                replica.fit.law,
                arrival_s,
                lengths,
                replicas,
                router,
                law.ignore_eos,
                from_s if lost else None,
            )
            parts = np.array_split(waited[counted] / speed, CHECK_PARTS)
            text = f"{router}, {'one lost' if lost else 'all there'}, {count} requests"
            found.append({"text": text, "wait": _over_parts(parts, quantile).to_dict()})
    return found


def _over_parts(parts: Sequence[NDArray[np.float64]], quantile: float) -> Estimate:
    """A quantile of all, its interval (95 %) from those of successive parts."""
    value = float(np.quantile(np.concatenate(parts), quantile))
    scatter = float(np.std([np.quantile(part, quantile) for part in parts], ddof=1))
    half = student_quantile(0.975, len(parts) - 1) * scatter / math.sqrt(len(parts))
    return Estimate(value, max(value - half, 0.0), value + half, 0.95, "s", "simulated fleet")
