"""At what rate does a server serve while its queue is never empty? By work, by count, and by the hinge.

Counting completions takes in which lengths happened to be served; work leaves it out (theory.md 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from analysis.inference.growth import batch_edges
from analysis.inference.long_run import Stretch, bins_of
from analysis.inference.work import kv_work, work_by_counter
from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import chi2_quantile, student_quantile
from analysis.schedulers.frames import RunFrames
from analysis.theory.critical_rate import LOCKSTEP_BELOW_CV

CAPACITY_BATCHES = 10
WAVE_POINTS = 8
"""Instants within a wave at which the work is taken."""
UNITS = {
    "kv_cache": "KV demand served",
    "output_reservation": "KV demand with its reservation served",
    "max_num_batched_tokens": "tokens computed",
    "max_num_seqs": "output tokens served",
}


def service_rates(
    work: NDArray[np.float64], edges_s: NDArray[np.float64], demand: float
) -> NDArray[np.float64]:
    """Requests per second served between neighbouring edges: work over its mean per request.

    ``work`` is what was served until each edge, shape (n,); ``demand`` is the mean of the designed law
    in the same unit. Shape (n - 1,).
    """
    rates: NDArray[np.float64] = np.diff(work) / np.diff(edges_s) / demand
    return rates


@dataclass(frozen=True, slots=True)
class Backlog:
    """The stretch of a run in which the waiting queue was never seen empty."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def backlogged_window(frames: RunFrames, start_s: float) -> Backlog | None:
    """The stretch after ``start_s`` with waiting > 0 in every sample until the end; None if it ended.

    A queue empties when service was fast: stretches that ended so would make the rate too high.
    """
    seen_s = frames.per_sample("t_s")
    inside = (seen_s >= start_s) & (seen_s <= frames.end_s)
    times = seen_s[inside]
    empty = np.flatnonzero(frames.per_sample("waiting")[inside] == 0)
    first = empty[-1] + 1 if len(empty) else 0
    if first >= len(times):
        return None
    return Backlog(float(times[first]), float(times[-1]))


def work_served(
    frames: RunFrames,
    window: Backlog,
    demand: float,
    binding: str = "kv_cache",
    *,
    waves_tell: bool = False,
) -> Stretch:
    """Saturated service rate from work served, in requests per second (theory.md 6.3).

    ``demand`` is the mean of the designed law in the unit of ``binding`` (`work_of`). The mix of lengths
    that happened to be served drops out, so that the error is several times smaller than that of
    counting, most of all in the unit of the resource that is short. In the long run all agree.

    Requests of equal outputs stay in step, and work is served in waves of one residence each. What would
    remain of them at the two ends of the window is left out: the work there is a mean over a wave. Not
    with ``waves_tell``, for servers that keep their fill (`analysis.theory.reserved_demand`):
    the next run's waves are others there, and so is its rate; this run's waves are the only measure of
    that.
    """
    wave_s = frames.mean_residence_s if in_step(frames) and not waves_tell else 0.0
    duration_s = window.duration_s - wave_s
    residences = duration_s / frames.mean_residence_s
    edges = batch_edges(window.start_s, window.start_s + duration_s, bins_of(residences))
    points = WAVE_POINTS if wave_s else 1
    at_s = edges[:, None] + wave_s * (np.arange(points) + 0.5) / points
    order = np.argsort(at_s, axis=None, kind="stable")
    work = np.empty(at_s.size)
    work[order] = work_by_counter(frames, at_s.ravel()[order], binding)
    rates = service_rates(work.reshape(at_s.shape).mean(axis=1), edges, demand)
    method = f"{UNITS[binding]} under backlog over its mean per request"
    return Stretch(rates, duration_s, residences, "req/s", method)


def in_step(frames: RunFrames) -> bool:
    """Are the outputs so equal that the batch which filled the server stays together?"""
    outputs = frames.per_request("output_tokens")[frames.completed]
    return bool(len(outputs)) and float(outputs.std()) < LOCKSTEP_BELOW_CV * float(outputs.mean())


def completions(frames: RunFrames, window: Backlog) -> Stretch:
    """Saturated service rate by counting, in requests per second."""
    instants = np.sort(frames.per_request("last_token_s")[frames.completed])
    residences = window.duration_s / frames.mean_residence_s
    edges = batch_edges(window.start_s, window.end_s, bins_of(residences))
    rates = np.diff(np.searchsorted(instants, edges)) / np.diff(edges)
    return Stretch(rates, window.duration_s, residences, "req/s", "completions under backlog")


def capacity_by_regression(
    frames: RunFrames, window: Backlog, kv_demand: float, batches: int = CAPACITY_BATCHES
) -> Estimate:
    """Saturated service rate from completions, with what was served and offered as control variates.

    Completions per batch are regressed on two quantities whose means are known: the KV demand of the
    completed beyond ``kv_demand`` each, and the arrivals beyond the designed rate; the rate is that at
    the means (theory.md 6.3). The first is a sum and not a mean, since the mean of a random number of
    requests is biased.

    Raises ValueError with fewer than four batches.
    """
    if batches < 4:
        raise ValueError(f"a regression on two variates needs four batches or more, got {batches}")
    edges = batch_edges(window.start_s, window.end_s, batches)
    prompt, tokens, left_s = (
        frames.per_request(column)[frames.completed]
        for column in ("prompt_tokens", "output_tokens", "last_token_s")
    )
    excess = kv_work(prompt, tokens) / kv_demand - 1.0
    arrived, completed, beyond = (
        np.histogram(instants, edges, weights=weights)[0] / np.diff(edges)
        for instants, weights in (
            (frames.per_request("scheduled_s"), None),
            (left_s, None),
            (left_s, excess),
        )
    )
    variates = np.column_stack([np.ones(batches), beyond, arrived - frames.run.arrival_rate])
    # A pseudo-inverse leaves out a variate that does not vary, as that of fixed lengths.
    inverse = np.linalg.pinv(variates.T @ variates)
    coefficients = inverse @ variates.T @ completed
    residual = completed - variates @ coefficients
    freedom = batches - int(np.linalg.matrix_rank(variates))
    variance = float(residual @ residual) / freedom * float(inverse[0, 0])
    half = student_quantile(0.975, freedom) * math.sqrt(variance)
    value = float(coefficients[0])
    method = f"completions under backlog given lengths and arrivals, {batches} batches"
    return Estimate(value, value - half, value + half, 0.95, "req/s", method)


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

    def misfit(critical: NDArray[np.float64]) -> NDArray[np.float64]:
        """Chi-square of each of the critical rates, shape (n,)."""
        beyond = np.maximum(0.0, rates - critical[:, None])
        return np.asarray((((drifts - beyond) / errors) ** 2).sum(axis=1))

    low, high = float((rates - drifts).min()), float(rates.max())
    pad = max(high - low, 1e-6)
    grid = np.linspace(max(low - pad, 0.0), high, 801)
    over_grid = misfit(grid)
    start = grid[int(np.argmin(over_grid))]
    step = grid[1] - grid[0]
    best = minimize_scalar(
        lambda critical: float(misfit(np.array([critical]))[0]),
        bounds=(start - step, start + step),
        method="bounded",
    )
    value = float(best.x)
    inflation = max(1.0, float(best.fun) / max(len(points) - 1, 1))
    limit = float(best.fun) + chi2_quantile(0.95, 1) * inflation
    inside = grid[over_grid <= limit].tolist()
    return Estimate(
        value,
        min([value, *inside]),
        max([value, *inside]),
        0.95,
        "req/s",
        f"hinge max(0, arrival rate - critical rate) over {len(points)} runs",
    )
