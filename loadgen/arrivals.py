"""Arrival instants on [0, horizon): pure functions of a rate, a horizon and a seed.

Every schedule is a renewal process: one generator seeded once, the cumulative sum of its gaps, cut
at the horizon. Nothing is rescaled to hit the nominal count, so the number of arrivals is random
with the variance that the process really has, and the schedule for a longer horizon starts with the
schedule for a shorter one. One seed at two rates gives the same schedule on a stretched clock: give
replicates seeds of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from loadgen.records import Run

SECOND_NS = 1_000_000_000


def poisson(rate_per_s: float, horizon_s: float, seed: int) -> NDArray[np.float64]:
    """Instants of a Poisson process, increasing seconds in [0, horizon_s), shape (n,).

    Raises ValueError unless the rate and the horizon are positive and finite.
    """
    _require_positive(rate_per_s=rate_per_s, horizon_s=horizon_s)
    rng = np.random.default_rng(seed)
    return _renewal(
        lambda count: rng.standard_exponential(count) / rate_per_s, rate_per_s, horizon_s
    )


def run_arrivals(run: Run) -> NDArray[np.float64]:
    """The whole offered load of a run, seconds in [0, horizon_s), shape (n,), never decreasing.

    The burst of a run that starts full comes first, all of it at 0; the Poisson arrivals are those of
    the same run without it.
    """
    return np.concatenate(
        [np.zeros(run.preload), poisson(run.arrival_rate, run.horizon_s, run.seed)]
    )


def gamma(rate_per_s: float, cv: float, horizon_s: float, seed: int) -> NDArray[np.float64]:
    """Instants of a renewal process with gamma gaps of coefficient of variation ``cv``, shape (n,).

    ``cv`` = 1 is a Poisson process, above 1 is burstier, below 1 more regular. The process starts
    with a full gap at 0, so that its rate over a short horizon is a little off: (cv^2 - 1)/2
    arrivals in the mean. Raises ValueError unless rate, cv and horizon are positive and finite.
    """
    _require_positive(rate_per_s=rate_per_s, cv=cv, horizon_s=horizon_s)
    rng = np.random.default_rng(seed)
    shape = 1.0 / cv**2
    scale_s = cv**2 / rate_per_s
    return _renewal(lambda count: rng.standard_gamma(shape, count) * scale_s, rate_per_s, horizon_s)


def evenly_spaced(rate_per_s: float, horizon_s: float, seed: int) -> NDArray[np.float64]:
    """Instants one mean gap apart, the first one uniform in [0, gap), shape (n,).

    The random phase makes the expected count exactly ``rate_per_s * horizon_s``. Raises ValueError
    unless the rate and the horizon are positive and finite.
    """
    _require_positive(rate_per_s=rate_per_s, horizon_s=horizon_s)
    phase = np.random.default_rng(seed).random()
    instants = (np.arange(math.ceil(rate_per_s * horizon_s), dtype=np.float64) + phase) / rate_per_s
    return instants[instants < horizon_s]


def shard(instants_s: NDArray[np.float64], index: int, of: int) -> NDArray[np.float64]:
    """Every ``of``-th instant of one schedule, beginning with number ``index``.

    All shards together are the schedule itself: load from several processes stays one process of
    arrivals, which separately seeded (or equally seeded) generators would not be. Raises ValueError
    unless 0 <= index < of.
    """
    if not 0 <= index < of:
        raise ValueError(f"shard {index} of {of} does not exist: index must be in [0, {of})")
    return instants_s[index::of]


def schedule_ns(instants_s: NDArray[np.float64], start_ns: int) -> NDArray[np.int64]:
    """The instants on the monotonic clock, in nanoseconds: ``scheduled_ns`` of their records."""
    return start_ns + np.rint(instants_s * SECOND_NS).astype(np.int64)


def _renewal(
    gaps_s: Callable[[int], NDArray[np.float64]], rate_per_s: float, horizon_s: float
) -> NDArray[np.float64]:
    """Cumulative sums of gaps up to the horizon.

    Gaps are drawn in batches; each batch continues the sum of the last one in the same order of
    additions, so that the result does not depend on the batch size to the last bit.
    """
    expected = rate_per_s * horizon_s
    batch = math.ceil(expected + 5.0 * math.sqrt(expected)) + 16
    parts: list[NDArray[np.float64]] = []
    end_s = 0.0
    while end_s < horizon_s:
        gaps = gaps_s(batch)
        gaps[0] += end_s
        parts.append(np.cumsum(gaps))
        end_s = float(parts[-1][-1])
    instants = np.concatenate(parts)
    return instants[instants < horizon_s]


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")
