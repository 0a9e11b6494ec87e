"""The largest share of the critical rate at which a target for the time to the first token holds.

Stability says nothing about waiting: queues form well below the critical rate (theory.md 2.7). The
scheduler itself is simulated at rates below it; the caller draws the random numbers, the same ones at
every rate, so that the time to first token at a quantile grows with the rate and a bisection finds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import student_quantile
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime

Floats = NDArray[np.float64]

WARM_UP = 0.2
"""Share of the requests that is left out while the server fills."""
LEAST_SHARE, MOST_SHARE = 0.02, 1.0
WIDTH = 0.004
"""Of the last bracket of a bisection."""


@dataclass(frozen=True, eq=False)
class Draws:
    """The random part of one simulated day: Poisson arrivals at rate 1, shape (n,); lengths, (n, 3)."""

    arrivals: Floats
    lengths: NDArray[np.int64]


def ttft_s(
    limits: EngineLimits,
    law: StepTime,
    draws: Draws,
    rate: float,
    quantile: float,
    ignore_eos: bool,
    step_factors: Floats | None = None,
) -> float:
    """Time from arrival to the first token at ``quantile``, seconds, of the requests after the warm-up.

    Those that still wait at the end count with an endless time. ``step_factors`` is the noise of steps,
    as `analysis.schedulers.simulate.simulate` takes it.
    """
    arrival_s = draws.arrivals / rate
    horizon_s = float(arrival_s[-1])
    run = simulate(
        limits,
        law,
        arrival_s,
        draws.lengths,
        horizon_s,
        sample_interval_s=horizon_s,
        ignore_eos=ignore_eos,
        step_factors=step_factors,
    )
    rows = run.rows[run.rows["id"] >= WARM_UP * len(arrival_s)]
    waits = rows["first_s"] - rows["arrival_s"]
    # What arrived within the wait of the last ones has not had the time to be served.
    seen = ~np.isnan(waits)
    waiting = horizon_s - rows["arrival_s"]
    limit = float(np.max(waits[seen], initial=0.0))
    endless = ~seen & (waiting > limit)
    counted = np.concatenate([waits[seen], np.full(int(endless.sum()), math.inf)])
    return float(np.quantile(counted, quantile, method="higher")) if len(counted) else math.inf


def largest_share(
    limits: EngineLimits,
    law: StepTime,
    critical_rate: float,
    days: Sequence[Draws],
    target_s: float,
    quantile: float = 0.95,
    ignore_eos: bool = True,
) -> Estimate | None:
    """Share of ``critical_rate`` up to which the quantile stays under ``target_s``; None if at none.

    One bisection for each of two or more ``days``; the interval (95 %) is Student's over them. 1 means:
    at every rate below the critical one, as far as days of this length show.
    """
    if len(days) < 2:
        raise ValueError("an interval needs two or more simulated days")

    def holds(share: float, day: Draws) -> bool:
        return ttft_s(limits, law, day, share * critical_rate, quantile, ignore_eos) <= target_s

    found = []
    for day in days:
        low, high = LEAST_SHARE, MOST_SHARE
        if not holds(low, day):
            return None
        if holds(high, day):
            low = high
        while high - low > WIDTH:
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle, day) else (low, middle)
        found.append(low)
    mean = float(np.mean(found))
    half = student_quantile(0.975, len(found) - 1) * float(np.std(found, ddof=1))
    half = half / math.sqrt(len(found)) + WIDTH / 2
    method = (
        f"bisection of the simulated scheduler, {len(found)} x {len(days[0].arrivals)} requests"
    )
    return Estimate(mean, max(mean - half, 0.0), mean + half, 0.95, "of critical", method)


def mean_ttft(
    limits: EngineLimits,
    law: StepTime,
    days: Sequence[Draws],
    rate: float,
    quantile: float = 0.95,
    ignore_eos: bool = True,
) -> Estimate:
    """The quantile of the time to first token at one rate, with Student's interval over the days."""
    seen = [ttft_s(limits, law, day, rate, quantile, ignore_eos) for day in days]
    mean = float(np.mean(seen))
    if not math.isfinite(mean):
        return Estimate(math.inf, math.inf, math.inf, 0.95, "s", "the queue grows")
    half = student_quantile(0.975, len(seen) - 1) * float(np.std(seen, ddof=1)) / len(seen) ** 0.5
    return Estimate(mean, max(mean - half, 0.0), mean + half, 0.95, "s", "simulated scheduler")
