"""When is a measured service rate narrow enough to stop, if one looks after every batch?

Stopping because an interval is *narrow* is not stopping because a result is *significant*: the rule sees
the scatter of the batch means alone, and for normal batches scatter and mean are independent. Given the
look at which it stops, the mean is as unbiased as at a fixed look (Chow and Robbins 1965). What remains
is that it tends to stop where the scatter happens to be small. `STUDENT_LEVEL` pays for that: the
coverage of `interval`, looked at after every batch from the fourth on, is at least 95 % whatever the
scatter (docs/search.md has the figures, tests/analysis/test_sequential.py counts them again).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress, t

from analysis.estimate import Estimate

Unit = Literal["kv", "token"]
"""What the served work is counted in: KV demand, or output tokens where sequences are what is short."""

LEVEL = 0.95
MIN_BATCHES = 4
STUDENT_LEVEL = 0.975
"""Level of Student's quantile that leaves 95 % when the scatter decides when to stop."""
LEAST_CORRELATION, MOST_CORRELATION = 0.2, 0.6
"""Of neighbouring batches. A pool that forgets exponentially makes 0.54 in batches as long as its
memory; few batches cannot show that there is none."""
STEADY_LEVEL = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What had been seen until one instant, in seconds since the load began."""

    t_s: float
    arrivals: int
    departures: int
    waiting: int
    """Requests waiting now."""
    waiting_least: int
    """Fewest waiting in any sample since the look before."""
    running: float
    """Mean of the samples since the look before; so is the next."""
    kv_usage: float
    kv_work: float
    """KV demand served until now, token-steps, in the convention of `analysis.growth.work_done`."""
    token_work: float
    """Output tokens received until now."""
    residence_s: float
    """Mean of first to last token over the completed requests; NaN before the first."""
    memory_s: float
    """Sum of squares over sum of residences, of all that started, those under way with their age: the
    mean residence of a request found running at a random instant. So long does the pool remember."""


EMPTY = Look(
    t_s=0.0,
    arrivals=0,
    departures=0,
    waiting=0,
    waiting_least=0,
    running=0.0,
    kv_usage=0.0,
    kv_work=0.0,
    token_work=0.0,
    residence_s=math.nan,
    memory_s=0.0,
)
"""Before the first request."""


def work_rate(
    looks: Sequence[Look], unit: Unit, edges_s: NDArray[np.float64], demand: float
) -> NDArray[np.float64]:
    """Requests per second served between neighbouring edges: work over its mean per request.

    Shape (edges - 1,). ``demand`` is the mean of the designed law in the same unit. In the long run
    every unit gives the departure rate; the one that the server is short of scatters least.
    """
    times = np.array([look.t_s for look in looks])
    work = np.array([look.kv_work if unit == "kv" else look.token_work for look in looks])
    rates: NDArray[np.float64] = np.diff(np.interp(edges_s, times, work)) / np.diff(edges_s)
    return rates / demand


def interval(rates: NDArray[np.float64], what: str) -> Estimate:
    """Mean of per-batch rates with a 95 % interval that may be looked at after every batch.

    Batch means with Student's quantile at `STUDENT_LEVEL`, the variance times (1 + r)/(1 - r) with r the
    correlation of neighbouring batches, taken as `LEAST_CORRELATION` where it looks smaller. Below
    `MIN_BATCHES` the interval is unbounded.
    """
    count = len(rates)
    method = f"{what}, {count} batches, narrow enough by repeated looks"
    if count < MIN_BATCHES:
        value = float(np.mean(rates)) if count else math.nan
        return Estimate(value, -math.inf, math.inf, LEVEL, "req/s", method)
    value = float(np.mean(rates))
    error = float(np.std(rates, ddof=1)) / math.sqrt(count) * math.sqrt(_alike(rates - value))
    half = float(t.ppf(0.5 + STUDENT_LEVEL / 2, count - 1)) * error
    return Estimate(value, value - half, value + half, LEVEL, "req/s", method)


def narrow(estimate: Estimate, share: float) -> bool:
    """Is half of the interval at most this share of the value?"""
    return estimate.half_width <= share * estimate.value


def drifted(rates: NDArray[np.float64], share: float) -> float | None:
    """Relative change of the rate over the batches if it is certain and beyond ``share``, else None.

    A straight line through the batch means, tested at 1 %: a server that grows slower, or one whose
    warm-up had not ended.
    """
    if len(rates) < 2 * MIN_BATCHES:
        return None
    line = linregress(np.arange(len(rates)), rates)
    change = float(line.slope) * (len(rates) - 1) / float(np.mean(rates))
    certain = float(line.pvalue) < STEADY_LEVEL and abs(change) > share
    return change if certain else None


def _alike(deviations: NDArray[np.float64]) -> float:
    """Factor on the variance of the mean from the lag-1 correlation of the batches."""
    count, scatter = len(deviations), float(deviations @ deviations)
    if scatter == 0.0:
        return 1.0
    # The estimate is too low by about 1/count.
    r = float(deviations[1:] @ deviations[:-1]) / scatter + 1.0 / count
    r = min(max(r, LEAST_CORRELATION), MOST_CORRELATION)
    return (1.0 + r) / (1.0 - r)
