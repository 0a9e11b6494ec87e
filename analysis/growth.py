"""Does the number in system grow, and at what rate can the server serve? With honest errors.

N(t) is an integrated process: residuals around a fitted line are not independent, and a t-test on the
slope cries wolf in 40-65 % of stable runs (theory.md 6.4). Everything here works on *increments*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2, norm, t

from analysis.estimate import Estimate
from analysis.frames import RunFrames, number_in_system, started, tokens_received

Number = TypeVar("Number", float, NDArray[np.float64])

DRIFT_BATCHES = 6
"""Few batches: in a stable run increments of N over neighbouring batches cancel, so the batch-means
error shrinks with the length of a batch; six leave Student's factor at 2.0 for one side of 95 %."""
CAPACITY_BATCHES = 10


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
        float(t.ppf(0.5 + level / 2, count - 1)) * float(np.std(rates, ddof=1)) / math.sqrt(count)
    )
    value = float(np.mean(rates))
    return Estimate(value, value - half, value + half, level, unit, method)


def drift(frames: RunFrames, start_s: float, end_s: float) -> Estimate:
    """Growth of the number in system on [start_s, end_s), in requests per second.

    The value is (N(end) - N(start)) / T, the maximum-likelihood slope of a Brownian motion with drift
    (theory.md 6.1); its interval comes from the increments over six equal batches. The level is 90 %,
    so that its ends are the one-sided 95 % bounds by which a run is judged. The measured
    false-alarm and miss rates are in ``docs/statistics.md``.
    """
    edges = batch_edges(start_s, end_s, DRIFT_BATCHES)
    increments = np.diff(number_in_system(frames, edges)) / np.diff(edges)
    method = f"increments of N(t) over {DRIFT_BATCHES} batches, 90 % interval"
    return batch_mean(increments, "req/s", method, level=0.90)


def critical_excursion(
    rate: float, duration_s: float, level: float, variance_ratio: float
) -> float:
    """How far N wanders up from 0 at exactly the critical rate, one-sided ``level``, in requests.

    A reflected Brownian motion: |N(0,1)| * sqrt(rate * (ca2 + cd2) * T) (theory.md 6.1). A run "grows"
    only beyond this. ``variance_ratio`` is ca2 + cd2.
    """
    z = float(norm.ppf(0.5 + level / 2))
    return z * math.sqrt(rate * variance_ratio * duration_s)


def kv_work(prompt_tokens: Number, tokens: Number) -> Number:
    """KV demand served, in token-steps, of a request that has so many of its output tokens.

    s*j + j*(j-1)/2: the prompt's step holds s tokens, each later step one more (theory.md 1.1, engine
    convention, whole prompt in one step).
    """
    return prompt_tokens * tokens + tokens * (tokens - 1.0) / 2.0


def work_done(frames: RunFrames, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """KV demand served until each instant, in token-steps (`kv_work`), shape of ``at_s``."""
    prompt = started(frames)["prompt_tokens"].to_numpy(dtype=float)[:, None]
    tokens = tokens_received(frames, at_s)
    result: NDArray[np.float64] = kv_work(prompt, tokens).sum(axis=0)
    return result


@dataclass(frozen=True, slots=True)
class Backlog:
    """The stretch of a run in which the waiting queue was never seen empty."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def backlogged_window(frames: RunFrames, start_s: float) -> Backlog | None:
    """Longest suffix-to-gap stretch after ``start_s`` with waiting > 0 in every sample; None if none."""
    engine = frames.engine
    inside = engine[(engine["t_s"] >= start_s) & (engine["t_s"] <= frames.end_s)]
    times = inside["t_s"].to_numpy(dtype=float)
    waiting = inside["waiting"].to_numpy(dtype=float) > 0
    best: Backlog | None = None
    begin: int | None = None
    for i, busy in enumerate([*waiting.tolist(), False]):
        if busy and begin is None:
            begin = i
        elif not busy and begin is not None:
            stretch = Backlog(float(times[begin]), float(times[i - 1]))
            if best is None or stretch.duration_s > best.duration_s:
                best = stretch
            begin = None
    return best


def capacity_by_work(
    frames: RunFrames, window: Backlog, kv_demand: float, batches: int = CAPACITY_BATCHES
) -> Estimate:
    """Saturated service rate from KV demand served, in requests per second (theory.md 6.3).

    ``kv_demand`` is E[g] of the designed law in the convention of `work_done`. The mix of lengths that
    happened to be served drops out, so the error is several times smaller than that of counting.
    """
    edges = batch_edges(window.start_s, window.end_s, batches)
    rates = np.diff(work_done(frames, edges)) / np.diff(edges) / kv_demand
    method = f"KV demand served under backlog over E[g], {batches} batches"
    return batch_mean(rates, "req/s", method)


def capacity_by_count(
    frames: RunFrames, window: Backlog, batches: int = CAPACITY_BATCHES
) -> Estimate:
    """Saturated service rate from completions under backlog, in requests per second."""
    done = frames.requests[frames.requests["outcome"] == "completed"]
    instants = np.sort(done["last_token_s"].to_numpy(dtype=float))
    edges = batch_edges(window.start_s, window.end_s, batches)
    rates = np.diff(np.searchsorted(instants, edges)) / np.diff(edges)
    return batch_mean(rates, "req/s", f"completions under backlog, {batches} batches")


@dataclass(frozen=True, slots=True)
class HingePoint:
    """One run in the hinge fit: realised arrival rate and drift, requests per second."""

    arrival_rate: float
    drift: float
    standard_error: float


def hinge(points: Sequence[HingePoint]) -> Estimate | None:
    """Critical rate from drift = max(0, arrival rate - critical rate), weighted least squares.

    The interval holds all rates whose chi-square exceeds the minimum by the 95 % quantile of one
    degree of freedom, widened by the root of the reduced chi-square where the fit is poor. None when
    no run grew, since then any rate above the highest one fits equally well.
    """
    if not any(p.drift > 2 * p.standard_error for p in points):
        return None
    rates = np.array([p.arrival_rate for p in points])
    drifts = np.array([p.drift for p in points])
    errors = np.maximum(np.array([p.standard_error for p in points]), 1e-9)

    def misfit(critical: float) -> float:
        residual = (drifts - np.maximum(0.0, rates - critical)) / errors
        return float(residual @ residual)

    low, high = float((rates - drifts).min()), float(rates.max())
    pad = max(high - low, 1e-6)
    grid = np.linspace(max(low - pad, 0.0), high, 801)
    start = grid[int(np.argmin([misfit(float(c)) for c in grid]))]
    step = grid[1] - grid[0]
    best = minimize_scalar(misfit, bounds=(start - step, start + step), method="bounded")
    value = float(best.x)
    inflation = max(1.0, float(best.fun) / max(len(points) - 1, 1))
    limit = float(best.fun) + float(chi2.ppf(0.95, 1)) * inflation
    inside = [float(c) for c in grid if misfit(float(c)) <= limit]
    return Estimate(
        value,
        min([value, *inside]),
        max([value, *inside]),
        0.95,
        "req/s",
        f"hinge max(0, arrival rate - critical rate) over {len(points)} runs",
    )


def needed_requests(excess: float, variance_ratio: float, alpha: float, power: float) -> float:
    """Arrivals that a run needs to tell a relative excess from zero (theory.md 6.2).

    n = (z_alpha + z_power)^2 (ca2 + cd2) / excess^2, one-sided.
    """
    z = float(norm.ppf(1 - alpha) + norm.ppf(power))
    return z**2 * variance_ratio / excess**2


def growth_power(excess: float, variance_ratio: float, alpha: float, requests: float) -> float:
    """Probability that a run of so many arrivals shows a relative excess: inverse of the above."""
    shift = abs(excess) * math.sqrt(requests / variance_ratio)
    return float(norm.cdf(shift - norm.ppf(1 - alpha)))


def stationary_variance(
    arrival_rate: float, residence_s: float, load: float, variance_ratio: float
) -> float:
    """Variance of N(t) below the critical rate, in requests squared.

    Requests in service are nearly Poisson with mean arrival rate times residence; the queue adds half
    the square of its heavy-traffic mean (ca2 + cd2) / (2 (1 - load)), since below a load of 0.9 it is
    empty about half of the time.
    """
    queue = variance_ratio / (2 * max(1.0 - load, 1e-3))
    return arrival_rate * residence_s + queue**2 / 2


def stability_duration(stable_below: float, variance: float, power: float) -> float:
    """Seconds after the warm-up until a stationary run is called stable with probability ``power``.

    Increments over batches much longer than a residence have the variance 2 Var(N), so the bound of
    `drift` is N(0, 2 Var(N)) / T + t * sqrt(2 B Var(N) chi2 / (B - 1)) / T, chi2 with B - 1 degrees of
    freedom. Both terms are taken at the same probability, which errs on the safe side.
    """
    freedom = DRIFT_BATCHES - 1
    spread = math.sqrt(2 * DRIFT_BATCHES * float(chi2.ppf(power, freedom)) / freedom)
    scale = float(t.ppf(0.95, freedom)) * spread + math.sqrt(2) * float(norm.ppf(power))
    return scale * math.sqrt(variance) / stable_below


def stability_power(stable_below: float, variance: float, duration_s: float) -> float:
    """Probability that a stationary run of this length is called stable; inverse of the above."""

    def excess(power: float) -> float:
        return stability_duration(stable_below, variance, power) - duration_s

    low, high = 0.5, 0.99999
    if excess(low) > 0:
        return 0.0
    return high if excess(high) < 0 else float(brentq(excess, low, high))
