"""Does the number in system grow? With honest errors.

N(t) is an integrated process: residuals around a fitted line are not independent, and a t-test on the
slope cries wolf in 40-65 % of stable runs (theory.md 6.4). Everything here works on *increments*.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, ndtri

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import chi2_quantile, normal_quantile, student_quantile
from analysis.schedulers.frames import RunFrames, number_in_system

DRIFT_BATCHES = 6
"""Few batches: in a stable run increments of N over neighbouring batches cancel, so the batch-means
error shrinks with the length of a batch; six leave Student's factor at 2.0 for one side of 95 %."""
DRIFT_LEVEL = 0.90
"""Its ends are one-sided 95 % bounds."""
GROWTH_LEVEL = 0.95
"""One-sided: a run grows when N rose further than at exactly critical load in so many of all runs."""
MIN_DRIFT_RESIDENCES = 3.0
"""A slope is taken over at least so many mean residence times: half of one for each batch."""
HAC_BINS = 60
HAC_BANDWIDTH = math.ceil(1.3 * math.sqrt(HAC_BINS))
"""In bins; 1.3 sqrt(n) after Lazarus, Lewis, Stock and Watson (J. Bus. Econ. Stat. 36, 2018)."""


def batch_edges(start_s: float, end_s: float, batches: int) -> NDArray[np.float64]:
    """Edges of equal batches of [start_s, end_s), shape (batches + 1,).

    Raises ValueError when the window is empty.
    """
    if not end_s > start_s:
        raise ValueError(f"nothing was observed between {start_s:.1f} s and {end_s:.1f} s")
    return np.linspace(start_s, end_s, batches + 1)


def batch_mean(rates: NDArray[np.float64], unit: str, method: str, level: float = 0.95) -> Estimate:
    """Mean of per-batch rates with Student's interval."""
    count = len(rates)
    half = (
        student_quantile(0.5 + level / 2, count - 1)
        * float(np.std(rates, ddof=1))
        / math.sqrt(count)
    )
    value = float(np.mean(rates))
    return Estimate(value, value - half, value + half, level, unit, method)


def why_no_slope(frames: RunFrames, start_s: float, end_s: float) -> str | None:
    """Why the window [start_s, end_s) tells no slope of N, and what to do; None where it does.

    Until the first requests have left, N grows at the offered rate whatever the load: a slope that
    begins before one mean residence time measures the arrivals.
    """
    residence_s = frames.mean_residence_s
    if math.isinf(residence_s):
        return "no request was completed: lengthen the run (load.horizon_s)"
    if start_s < residence_s:
        return (
            f"the window begins {start_s:.3g} s into the run, before one mean residence time of "
            f"{residence_s:.3g} s, so that its slope would be the arrival rate: begin it later, with "
            "a longer warm-up"
        )
    if end_s - start_s < MIN_DRIFT_RESIDENCES * residence_s:
        return (
            f"the window of {max(end_s - start_s, 0.0):.3g} s is shorter than "
            f"{MIN_DRIFT_RESIDENCES:.0f} mean residence times of {residence_s:.3g} s: lengthen the run "
            "(load.horizon_s)"
        )
    return None


def drift(frames: RunFrames, start_s: float, end_s: float) -> Estimate:
    """Growth of the number in system on [start_s, end_s), in requests per second.

    The value is (N(end) - N(start)) / T, the maximum-likelihood slope of a Brownian motion with drift
    (theory.md 6.1); its interval comes from the increments over six equal batches. The level is 90 %,
    so that its ends are the one-sided 95 % bounds by which a run is judged. The measured
    false-alarm and miss rates are in ``docs/statistics.md``.

    Raises ValueError where `why_no_slope` gives a reason; so do the two below.
    """
    rates = _increments(frames, start_s, end_s, DRIFT_BATCHES)
    method = f"increments of N(t) over {DRIFT_BATCHES} batches, 90 % interval"
    return batch_mean(rates, "req/s", method, DRIFT_LEVEL)


def drift_by_hac(frames: RunFrames, start_s: float, end_s: float) -> Estimate:
    """The same slope with the error that autocorrelation leaves, from 60 short increments.

    Newey and West's long-run variance with Bartlett weights. As its bandwidth is a sixth of the window,
    the quantile is that of Kiefer and Vogelsang (Econometric Theory 21, 2005, table 1) and not the
    normal one.
    """
    rates = _increments(frames, start_s, end_s, HAC_BINS)
    deviations = rates - rates.mean()
    variance = float(deviations @ deviations)
    for lag in range(1, HAC_BANDWIDTH):
        weight = 1.0 - lag / HAC_BANDWIDTH
        variance += 2.0 * weight * float(deviations[lag:] @ deviations[:-lag])
    # Bartlett weights keep the sum from being negative, but for rounding.
    error = math.sqrt(max(variance, 0.0)) / HAC_BINS
    half = bartlett_quantile(HAC_BANDWIDTH / HAC_BINS) * error
    value = float(rates.mean())
    method = f"increments of N(t) over {HAC_BINS} bins, autocorrelation up to a sixth of the window"
    return Estimate(value, value - half, value + half, DRIFT_LEVEL, "req/s", method)


def bartlett_quantile(bandwidth: float) -> float:
    """95 % point of a t-ratio whose variance has Bartlett weights up to this share of the sample.

    The cubic fit of Kiefer and Vogelsang (2005), table 1; 1.645 at 0.
    """
    b = bandwidth
    return 1.6449 + 2.1859 * b + 0.3142 * b**2 - 0.3427 * b**3


def drift_by_end_point(
    frames: RunFrames, start_s: float, end_s: float, variance_ratio: float, ca2: float = 1.0
) -> Estimate:
    """The same slope with the error of a diffusion, sigma / sqrt(T), from the laws of the load alone.

    sigma^2 = arrival rate * ca2 + departure rate * cd2, both rates as realised (theory.md 6.1).
    ``variance_ratio`` is ca2 + cd2; ca2 is 1 for Poisson arrivals. A stable queue wanders less: there
    the interval is too wide.
    """
    value = float(_increments(frames, start_s, end_s, 1)[0])
    ends = np.array([start_s, end_s])
    departed = float(np.diff(np.searchsorted(frames.departures_s, ends, "right"))[0])
    scheduled = frames.per_request("scheduled_s")
    arrived = float(np.diff(np.searchsorted(scheduled, ends, "right"))[0])
    error = math.sqrt(ca2 * arrived + departed * (variance_ratio - ca2)) / (end_s - start_s)
    law = "Poisson arrivals" if ca2 == 1.0 else f"arrivals of ca2 {ca2:.3g}"
    method = f"end points of N(t), error of a diffusion with {law} and the designed lengths"
    return Estimate.normal(value, error, "req/s", method, DRIFT_LEVEL)


def _increments(frames: RunFrames, start_s: float, end_s: float, count: int) -> NDArray[np.float64]:
    """Slopes of N over equal parts of a window that tells one, shape (count,), req/s."""
    reason = why_no_slope(frames, start_s, end_s)
    if reason is not None:
        raise ValueError(reason)
    edges = batch_edges(start_s, end_s, count)
    result: NDArray[np.float64] = np.diff(number_in_system(frames, edges)) / np.diff(edges)
    return result


def critical_excursion(
    rate: float, duration_s: float, level: float, variance_ratio: float
) -> float:
    """How far N wanders up from 0 at exactly the critical rate, one-sided ``level``, in requests.

    A reflected Brownian motion: |N(0,1)| * sqrt(rate * (ca2 + cd2) * T) (theory.md 6.1). A run "grows"
    only beyond this. ``variance_ratio`` is ca2 + cd2.
    """
    z = normal_quantile(0.5 + level / 2)
    return z * math.sqrt(rate * variance_ratio * duration_s)


def growth_power(excess: float, variance_ratio: float, requests: float) -> float:
    """Probability that a run of so many arrivals is found to grow by a relative excess; 0 to 1.

    Both conditions of growth have to hold: Student's test of the batches and the excursion beyond what
    critical load makes (theory.md 6.1). Scatter and mean of normal batches are independent, so that this
    is the mean over the scatter of the probability that the drift exceeds both limits.
    """
    shift = abs(excess) * math.sqrt(requests / variance_ratio)
    freedom = DRIFT_BATCHES - 1
    by_batches = student_quantile(GROWTH_LEVEL, freedom) * _scatters(freedom)
    by_excursion = normal_quantile(0.5 + GROWTH_LEVEL / 2)
    return float(np.mean(ndtr(shift - np.maximum(by_batches, by_excursion))))


@cache
def _scatters(freedom: int) -> NDArray[np.float64]:
    """Standard deviations of normal batches over the true one, at 1 000 equally likely points."""
    points = (np.arange(1000) + 0.5) / 1000
    return np.sqrt(np.asarray(chdtri(freedom, 1.0 - points)) / freedom)


def needed_requests(excess: float, variance_ratio: float, power: float) -> float:
    """Arrivals until a relative excess is found with probability ``power``; inverse of `growth_power`.

    About half as many again as theory.md 6.2 has for a known variance: six batches have to estimate it.
    """
    return _needed_shift(power) ** 2 * variance_ratio / excess**2


@cache
def _needed_shift(power: float) -> float:
    """Excess in standard deviations of the drift that is found with probability ``power``."""
    return float(brentq(lambda shift: growth_power(1.0, 1.0, shift**2) - power, 0.1, 20.0))


def stationary_variance(
    arrival_rate: float,
    residence_s: float,
    load: float,
    variance_ratio: float,
    ca2: float = 1.0,
) -> float:
    """Variance of N(t) below the critical rate, in requests squared.

    Requests in service are nearly Poisson with mean arrival rate times residence, or up to ca2 times as
    variable where arrivals are burstier (their peakedness lies between); the queue adds half the square
    of its heavy-traffic mean (ca2 + cd2) / (2 (1 - load)), since below a load of 0.9 it is empty about
    half of the time.
    """
    queue = variance_ratio / (2 * max(1.0 - load, 1e-3))
    return arrival_rate * residence_s * max(ca2, 1.0) + queue**2 / 2


def stability_duration(stable_below: float, variance: float, power: float) -> float:
    """Seconds after the warm-up until a stationary run is called stable with probability ``power``.

    Increments over batches much longer than a residence have the variance 2 Var(N), so the bound of
    `drift` is N(0, 2 Var(N)) / T + t * sqrt(2 B Var(N) chi2 / (B - 1)) / T, chi2 with B - 1 degrees of
    freedom. Both terms are taken at the same probability, which errs on the safe side.
    """
    freedom = DRIFT_BATCHES - 1
    spread = math.sqrt(2 * DRIFT_BATCHES * chi2_quantile(power, freedom) / freedom)
    scale = student_quantile(0.95, freedom) * spread + math.sqrt(2) * float(ndtri(power))
    return scale * math.sqrt(variance) / stable_below


def stability_power(stable_below: float, variance: float, duration_s: float) -> float:
    """Probability that a stationary run of this length is called stable; inverse of the above."""

    def excess(power: float) -> float:
        return stability_duration(stable_below, variance, power) - duration_s

    low, high = 0.5, 0.99999
    if excess(low) > 0:
        return 0.0
    return high if excess(high) < 0 else float(brentq(excess, low, high))
