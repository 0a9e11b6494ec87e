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
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from analysis.inference.capacity import service_rates
from analysis.inference.work import kv_work
from analysis.numbers.estimate import Estimate

Floats = NDArray[np.float64]
Work = tuple[float, float, float]
"""KV demand in token-steps, output tokens, and prompt tokens of requests that have started."""

LEVEL = 0.95
MIN_BATCHES = 4
CONTROLLED_BATCHES = 6
"""So many batches leave three degrees of freedom beside a mean and two control variates."""
STUDENT_LEVEL = 0.975
"""Level of Student's quantile that leaves 95 % when the scatter decides when to stop."""
LEAST_CORRELATION, MOST_CORRELATION = 0.2, 0.6
"""Of neighbouring batches. Few of them cannot show that there is none; without control variates, heavy
tails make 0.45 in batches as long as the memory (docs/search.md)."""
NOTHING = 1e-9
"""Control variates that vary by less than this share of the rate are rounding errors."""


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
    """Mean of the samples since the look before."""
    work: Work
    """Served until now."""
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
    work=(0.0, 0.0, 0.0),
    residence_s=math.nan,
    memory_s=0.0,
)
"""Before the first request."""


@dataclass(frozen=True, slots=True)
class Served:
    """Sums over requests that have started: their work, their ages, and the squares of these."""

    work: Work = (0.0, 0.0, 0.0)
    ages_s: float = 0.0
    squares_s2: float = 0.0

    def __add__(self, other: Served) -> Served:
        kv, outputs, prompts = (a + b for a, b in zip(self.work, other.work, strict=True))
        return Served(
            (kv, outputs, prompts),
            self.ages_s + other.ages_s,
            self.squares_s2 + other.squares_s2,
        )

    @property
    def memory_s(self) -> float:
        """`Look.memory_s`; 0 before the first token."""
        return self.squares_s2 / self.ages_s if self.ages_s > 0 else 0.0


def served(prompt_tokens: Floats, tokens: Floats, age_s: Floats) -> Served:
    """Of requests with so many of their output tokens, so long after the first; arrays of shape (n,)."""
    return Served(
        (
            float(kv_work(prompt_tokens, tokens).sum()),
            float(tokens.sum()),
            float(prompt_tokens.sum()),
        ),
        float(age_s.sum()),
        float(age_s @ age_s),
    )


def work_rates(looks: Sequence[Look], edges_s: Floats, demand: Work) -> Floats:
    """Requests per second served between neighbouring edges by each kind of work: (edges - 1, 3).

    ``demand`` is the mean work of a request by the designed law. In the long run all three are the
    departure rate.
    """
    first = max(bisect_right(looks, edges_s[0], key=lambda look: look.t_s) - 1, 0)
    times = np.array([look.t_s for look in looks[first:]])
    work = np.array([look.work for look in looks[first:]]).T
    return np.stack(
        [
            service_rates(np.interp(edges_s, times, done), edges_s, mean)
            for done, mean in zip(work, demand, strict=True)
        ],
        axis=1,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Coefficients with their standard errors, and the degrees of freedom of these."""

    coefficients: Floats
    errors: Floats
    freedom: int


def regression(rates: Floats, *regressors: Floats) -> Fit:
    """The rate by KV demand, shape (n, 3), on a constant, the control variates and more regressors.

    The first coefficient is the service rate. Control variates: by how much the rates by output tokens
    and by prompt tokens exceed the one by KV demand. Their mean is 0, whatever binds; in a batch they
    say which mix of lengths, and of ages, was in service. The time that work takes is linear in its
    three kinds, so that the rate at 0 is that of the mean mix (Lavenberg and Welch, Management Science
    27, 1981). Below `CONTROLLED_BATCHES` there are none. Variances are multiplied by (1 + r)/(1 - r), r
    the correlation of neighbouring residuals, taken as `LEAST_CORRELATION` where it looks smaller.
    """
    count, rate = len(rates), rates[:, 0]
    scale = float(np.abs(rates).max()) or 1.0
    columns = [np.ones(count), *regressors]
    if count >= CONTROLLED_BATCHES:
        columns += [(other - rate) / scale for other in rates[:, 1:].T]
    x = np.stack(columns, axis=1)
    inverse = np.linalg.pinv(x, rcond=NOTHING)
    hat = x @ inverse
    freedom = count - round(float(np.trace(hat)))
    coefficients = inverse @ rate
    residuals = rate - x @ coefficients
    squares = float(residuals @ residuals)
    if freedom < 1 or squares <= (NOTHING * scale) ** 2:
        return Fit(coefficients, np.zeros(x.shape[1]), max(freedom, 0))
    # Residuals of independent batches are a little anticorrelated: what the fit takes is put back.
    alike = float(residuals[1:] @ residuals[:-1]) / squares + float(np.trace(hat, 1)) / freedom
    alike = min(max(alike, LEAST_CORRELATION), MOST_CORRELATION)
    variance = squares / freedom * (1 + alike) / (1 - alike)
    return Fit(coefficients, np.sqrt(variance * (inverse**2).sum(axis=1)), freedom)


def interval(rates: Floats) -> Estimate:
    """Service rate from per-batch rates, shape (n, 3), with a 95 % interval that may be looked at after
    every batch: `regression`, with Student's quantile at `STUDENT_LEVEL`.

    Below `MIN_BATCHES` the interval is unbounded.
    """
    count = len(rates)
    method = f"work served under backlog, {count} batches, narrow enough by repeated looks"
    if count < MIN_BATCHES:
        value = float(np.mean(rates[:, 0])) if count else math.nan
        return Estimate(value, -math.inf, math.inf, LEVEL, "req/s", method)
    fit = regression(rates)
    value = float(fit.coefficients[0])
    half = float(stdtrit(fit.freedom, 0.5 + STUDENT_LEVEL / 2)) * float(fit.errors[0])
    return Estimate(value, value - half, value + half, LEVEL, "req/s", method)


def narrow(estimate: Estimate, share: float) -> bool:
    """Is half of the interval at most this share of the value?"""
    return estimate.half_width <= share * estimate.value


def trend(rates: Floats) -> Estimate | None:
    """Relative change of the rate over the batches, with a 95 % interval; None for fewer than eight.

    A straight line through the batches beside the control variates: it shows a server that grows slower,
    or one whose warm-up had not ended.
    """
    count = len(rates)
    if count < 2 * MIN_BATCHES:
        return None
    fit = regression(rates, np.linspace(-0.5, 0.5, count))
    change, error = (
        float(part[1] / fit.coefficients[0]) for part in (fit.coefficients, fit.errors)
    )
    half = float(stdtrit(fit.freedom, 0.5 + LEVEL / 2)) * error
    return Estimate(change, change - half, change + half, LEVEL, "1", f"a line, {count} batches")
