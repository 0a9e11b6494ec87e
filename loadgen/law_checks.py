"""The statistical tests of arrivals against their law.

Every check rejects an honest load with probability `LEVEL`, so that six of them throw away fewer than
one honest run in a thousand. Tests by counts, order and extremes stand beside the gap histogram because
repeated gaps, missing variance and clipped gaps do not show in it.

All laws have the same tests, since each has a clock on which it is a Poisson process. Where that is a
clock of its rate, what was sent is tested. Where it is that of its own history, many gaps are shorter
than any lag: then the drawn schedule is tested, of which the sends are shown to be a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from loadgen.processes import (
    Gamma,
    OnOff,
    Piecewise,
    Poisson,
    Process,
    Replay,
    Sinusoidal,
    Varying,
    Weibull,
    expected_arrivals,
)
from loadgen.records import FidelityCheck
from loadgen.rescaling import rescaled

LEVEL = 1e-4
"""Honest runs that one check rejects. Real defects are many standard errors away at n = 1000."""
TWO_SIDED_Z = NormalDist().inv_cdf(1.0 - LEVEL / 2.0)
ONE_SIDED_Z = NormalDist().inv_cdf(1.0 - LEVEL)
MIN_REQUESTS = 100
"""Below, the large-sample critical values do not hold and no defect would be found."""
WINDOW_ARRIVALS = 20.0
"""Expected arrivals per counting window: enough for the chi-square law of the dispersion."""
PHASE_BEFORE_S = 0.001
PHASE_WIDTH_S = 0.005
"""Slice of each second, from 1 ms before its start, in which arrivals pinned to seconds show."""


OfSends = Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[FidelityCheck, ...]]
"""Checks of the law from the instants at which the requests were sent and by how much each was late."""


def law_checks(
    law: Process, rate: float, due_s: NDArray[np.float64], end_s: float, since_s: float = -math.inf
) -> OfSends:
    """The tests of arrivals of this law and mean rate, due at ``due_s``, sent from ``since_s`` on.

    A replay has no law: that its schedule is the trace is all that can be tested.
    """
    from_s = max(since_s, 0.0)
    match law:
        case Poisson():
            return on_clock(lambda at_s: at_s - from_s, rate, end_s)
        case Piecewise() | Sinusoidal():
            before = expected_arrivals(law, rate, np.array([from_s]))[0]
            near = _expected_near(law, rate, from_s, end_s)
            return on_clock(
                lambda at_s: expected_arrivals(law, rate, at_s) - before, 1.0, end_s, near
            )
        case Gamma() | Weibull() | OnOff():
            own = rescaled(law, rate, due_s[due_s < end_s], end_s)
            # An instant that is off by the resolution is as one that is late by it.
            off = np.full(len(own.instants), own.resolution)
            checks = poisson_checks(own.instants, off, 1.0, own.end)[:-1]
            said = f"on the clock on which {law.text} are a Poisson process: "
            return lambda *_: tuple(replace(c, meaning=said + c.meaning) for c in checks)
        case Replay():
            return lambda *_: ()


def on_clock(
    clock: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    rate: float,
    end_s: float,
    near_seconds: float | None = None,
) -> OfSends:
    """``clock`` makes the arrivals a Poisson process of this constant rate."""

    def checks(
        sent_s: NDArray[np.float64], lag_s: NDArray[np.float64]
    ) -> tuple[FidelityCheck, ...]:
        lag = clock(sent_s) - clock(sent_s - lag_s)
        end = float(clock(np.array([end_s]))[0])
        # Whole seconds are those of the wall, not of the clock of the load.
        return (
            *poisson_checks(clock(sent_s), lag, rate, end)[:-1],
            _phase_check(np.sort(sent_s), near_seconds),
        )

    return checks


def poisson_checks(
    instants_s: NDArray[np.float64],
    lag_s: NDArray[np.float64],
    arrival_rate: float,
    end_s: float,
) -> tuple[FidelityCheck, ...]:
    """Are these instants, shape (n,), a Poisson process of this rate on [0, end_s)?

    ``lag_s``, shape (n,), is by how much each one may be late: shifts of that size are allowed for,
    so that a timer's grid does not reject an honest load at a high rate.
    """
    instants = np.sort(instants_s)
    gaps = np.diff(instants, prepend=0.0) * arrival_rate
    usual_lag, longest_lag = (_quantile(lag_s, q) * arrival_rate for q in (0.99, 1.0))
    return (
        _rate_check(len(instants), arrival_rate * end_s),
        _gap_check(gaps, usual_lag),
        _longest_gap_check(gaps, longest_lag),
        _dispersion_check(instants, arrival_rate, end_s),
        _correlation_check(gaps, usual_lag),
        _phase_check(instants),
    )


def _rate_check(count: int, expected: float) -> FidelityCheck:
    z = _poisson_z(count, expected)
    return FidelityCheck(
        name="rate",
        passed=abs(z) <= TWO_SIDED_Z if expected >= MIN_REQUESTS else None,
        statistic=z,
        threshold=TWO_SIDED_Z,
        meaning=f"{count} requests sent where {expected:.1f} were expected, in standard deviations "
        "of a Poisson count; if outside, the client lost or added load",
    )


def _gap_check(gaps: NDArray[np.float64], allowed_shift: float) -> FidelityCheck:
    """Kolmogorov-Smirnov distance of gaps (in mean gaps) from the exponential law, less lag.

    Lags in [0, d] move each ordered instant, so each gap, by at most d: the empirical law at x lies
    between those of the schedule at x - d and x + d. With d their 99th percentile, at most 2 % of
    the gaps move further. Critical value: Kolmogorov's tail 2 exp(-2 c^2) with Stephens' correction
    for n.
    """
    n = len(gaps)
    ordered = np.sort(gaps)
    rank = np.arange(n + 1) / n if n else np.zeros(1)
    above = rank[1:] + np.expm1(-(ordered + allowed_shift))
    below = -np.expm1(-np.maximum(ordered - allowed_shift, 0.0)) - rank[:-1]
    distance = float(max(above.max(initial=0.0), below.max(initial=0.0)))
    root = math.sqrt(max(n, 1))
    critical = math.sqrt(math.log(2.0 / LEVEL) / 2.0) / (root + 0.12 + 0.11 / root)
    threshold = critical + (0.02 if allowed_shift > 0 else 0.0)
    return FidelityCheck(
        name="gaps",
        passed=distance <= threshold if n >= MIN_REQUESTS else None,
        statistic=distance,
        threshold=threshold,
        meaning="largest distance between the law of the gaps and the exponential one beyond what "
        "the send lag explains; if larger, the sends are not Poisson at this rate",
    )


def _longest_gap_check(gaps: NDArray[np.float64], allowed_shift: float) -> FidelityCheck:
    """P(longest of n exponential gaps <= x) = (1 - exp(-x))^n, cut at LEVEL/2 on both sides."""
    n = len(gaps)
    longest = float(gaps.max(initial=0.0))
    lower, upper = (
        -math.log(-math.expm1(math.log(p) / max(n, 1))) for p in (LEVEL / 2, 1 - LEVEL / 2)
    )
    lower, upper = max(lower - allowed_shift, 0.0), upper + allowed_shift
    return FidelityCheck(
        name="longest gap",
        passed=lower <= longest <= upper if n >= MIN_REQUESTS else None,
        statistic=longest,
        threshold=upper if longest > math.log(max(n, 1)) else lower,
        meaning=f"longest gap in mean gaps, which should lie in [{lower:.1f}, {upper:.1f}]; below, "
        "gaps were clipped; above, the generator stood still",
    )


def _dispersion_check(
    instants: NDArray[np.float64], arrival_rate: float, end_s: float
) -> FidelityCheck:
    """Variance over mean of counts in k windows; times k - 1 nearly chi-square (Fisher 1950)."""
    windows = int(arrival_rate * end_s / WINDOW_ARRIVALS)
    enough = windows * WINDOW_ARRIVALS >= MIN_REQUESTS and len(instants) >= MIN_REQUESTS
    index, lower, upper = math.nan, math.nan, math.nan
    if enough:
        counts = np.histogram(instants, bins=windows, range=(0.0, end_s))[0]
        index = float(counts.var(ddof=1) / counts.mean())
        lower, upper = (
            _chi_square(z, windows - 1) / (windows - 1) for z in (-TWO_SIDED_Z, TWO_SIDED_Z)
        )
    return FidelityCheck(
        name="dispersion",
        passed=lower <= index <= upper if enough else None,
        statistic=index,
        threshold=upper if index > 1.0 else lower,
        meaning=f"variance over mean of counts in {windows} windows, which should lie in "
        f"[{lower:.2f}, {upper:.2f}]; below, the load is too regular; above, it comes in bursts",
    )


def _correlation_check(gaps: NDArray[np.float64], allowed_shift: float) -> FidelityCheck:
    """Lag-1 autocorrelation of exp(-gap), which is uniform: its error is normal from n = 100 on.

    Independent lags, uniform over the allowed shift, take their variance from one gap and give it
    to the next: the correlation that this brings is allowed for.
    """
    n = len(gaps)
    enough = n >= MIN_REQUESTS
    correlation, threshold = math.nan, math.nan
    if enough:
        score = np.exp(-gaps)
        score -= score.mean()
        correlation = float((score[1:] @ score[:-1]) / max(score @ score, 1e-300))
        threshold = TWO_SIDED_Z / math.sqrt(n) + allowed_shift**2 / 12.0
    return FidelityCheck(
        name="gap correlation",
        passed=abs(correlation) <= threshold if enough else None,
        statistic=correlation,
        threshold=threshold,
        meaning="correlation between successive gaps; if larger in size, gaps are repeated or made "
        "up for",
    )


def _phase_check(instants: NDArray[np.float64], expected: float | None = None) -> FidelityCheck:
    near = int(((instants + PHASE_BEFORE_S) % 1.0 < PHASE_WIDTH_S).sum())
    expected = len(instants) * PHASE_WIDTH_S if expected is None else expected
    z = _poisson_z(near, expected) if expected >= 1.0 else math.nan
    return FidelityCheck(
        name="whole seconds",
        passed=z <= ONE_SIDED_Z if expected >= 1.0 else None,
        statistic=z,
        threshold=ONE_SIDED_Z,
        meaning=f"{near} requests within 5 ms of a whole second where {expected:.1f} belong there, "
        "in standard deviations; if larger, arrivals are pinned to seconds",
    )


def _expected_near(law: Varying, rate: float, from_s: float, end_s: float) -> float:
    """Arrivals that a rate with a clock of its own puts near whole seconds of [from_s, end_s)."""
    begin_s = np.arange(math.floor(from_s), math.ceil(end_s) + 1.0) - PHASE_BEFORE_S
    first, last = (
        expected_arrivals(law, rate, np.clip(at_s, from_s, end_s))
        for at_s in (begin_s, begin_s + PHASE_WIDTH_S)
    )
    return float((last - first).sum())


def _poisson_z(count: int, expected: float) -> float:
    """Standard normal score of a Poisson count by the power 2/3, which removes the skewness."""
    spread = (math.pow(count, 2 / 3) - math.pow(expected, 2 / 3)) / math.pow(expected, 1 / 6)
    return 1.5 * spread + 1.0 / (6.0 * math.sqrt(expected))


def _chi_square(z: float, freedom: int) -> float:
    """Quantile of chi-square at the normal score ``z`` (Wilson and Hilferty 1931)."""
    part = 2.0 / (9.0 * freedom)
    return freedom * max(1.0 - part + z * math.sqrt(part), 0.0) ** 3


def _quantile(values: NDArray[np.float64], q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else 0.0
