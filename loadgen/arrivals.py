"""Arrival instants on [0, horizon): pure functions of a law, a rate, a horizon and a seed.

Every schedule is the cumulative sum of random gaps from one seed, on its own clock or on that of its
rate, cut at the horizon. Nothing is rescaled to hit the nominal count, so the number of arrivals is
random with the variance that the process really has, and the schedule for a longer horizon starts with
the schedule for a shorter one. One seed at two rates gives the same schedule on a stretched clock where
the law has no clock of its own: give replicates seeds of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

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
    instants_of,
)
from loadgen.records import Run
from loadgen.replay import replayed

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

    The burst of a run that starts full comes first, all of it at 0; the other arrivals are those of
    the same run without it.
    """
    later = arrivals(run.arrivals, run.arrival_rate, run.horizon_s, run.seed)
    return np.concatenate([np.zeros(run.preload), later])


def arrivals(
    process: Process, rate_per_s: float, horizon_s: float, seed: int
) -> NDArray[np.float64]:
    """Instants of any law with this mean rate, in [0, horizon_s), shape (n,), never decreasing.

    A replay has no chance in it. Raises ValueError for a horizon beyond the end of its trace, and as the
    functions below.
    """
    match process:
        case Poisson():
            return poisson(rate_per_s, horizon_s, seed)
        case Gamma(cv=cv):
            return gamma(rate_per_s, cv, horizon_s, seed)
        case Weibull(cv=cv):
            return weibull(rate_per_s, cv, horizon_s, seed)
        case OnOff():
            return on_off(process, rate_per_s, horizon_s, seed)
        case Piecewise() | Sinusoidal():
            return varying(process, rate_per_s, horizon_s, seed)
        case Replay():
            return replayed(process, rate_per_s, horizon_s).instants_s


def gamma(rate_per_s: float, cv: float, horizon_s: float, seed: int) -> NDArray[np.float64]:
    """Instants of a renewal process with gamma gaps of coefficient of variation ``cv``, shape (n,).

    ``cv`` = 1 is a Poisson process, above 1 is burstier, below 1 more regular. The process is in full
    swing at 0: the first arrival comes after the rest of a gap that was under way, a uniform share of a
    gap drawn in proportion to its length (Cox, Renewal Theory, 1962). Far above 1 many gaps are smaller
    than a float can add to the sum: arrivals may coincide. Raises ValueError unless rate, cv and horizon
    are positive and finite.
    """
    _require_positive(rate_per_s=rate_per_s, cv=cv, horizon_s=horizon_s)
    rng = np.random.default_rng(seed)
    shape = 1.0 / cv**2
    scale_s = cv**2 / rate_per_s
    first_s = rng.random() * rng.standard_gamma(shape + 1.0) * scale_s
    return _renewal(
        lambda count: rng.standard_gamma(shape, count) * scale_s, rate_per_s, horizon_s, first_s
    )


def weibull(rate_per_s: float, cv: float, horizon_s: float, seed: int) -> NDArray[np.float64]:
    """The same with Weibull gaps, whose shape is `weibull_shape`, shape (n,)."""
    _require_positive(rate_per_s=rate_per_s, cv=cv, horizon_s=horizon_s)
    rng = np.random.default_rng(seed)
    shape = weibull_shape(cv)
    scale_s = 1.0 / (rate_per_s * math.gamma(1.0 + 1.0 / shape))
    first_s = rng.random() * rng.standard_gamma(1.0 + 1.0 / shape) ** (1.0 / shape) * scale_s
    return _renewal(
        lambda count: rng.weibull(shape, count) * scale_s, rate_per_s, horizon_s, first_s
    )


@cache
def weibull_shape(cv: float) -> float:
    """The k of a Weibull law of this coefficient of variation: 1 + cv^2 = G(1 + 2/k) / G(1 + 1/k)^2."""

    # Not at the top: it takes longer to import than the rest of a client together.
    from scipy.optimize import brentq

    def excess(shape: float) -> float:
        return math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape) - math.log1p(cv**2)

    return float(brentq(excess, 0.1, 200.0, xtol=1e-14))


def on_off(process: OnOff, rate_per_s: float, horizon_s: float, seed: int) -> NDArray[np.float64]:
    """Instants of a two-state MMPP that begins in its stationary law, shape (n,).

    States and arrivals have streams of their own from the one seed. The arrivals are a Poisson process
    of rate 1 on the clock of the expected arrivals given the states.
    """
    _require_positive(rate_per_s=rate_per_s, horizon_s=horizon_s)
    states = np.random.default_rng([seed, 2])
    begins_on = states.random() < process.on_s / (process.on_s + process.off_s)
    means_s = np.array(
        [process.on_s, process.off_s] if begins_on else [process.off_s, process.on_s]
    )
    rates = process.rates(rate_per_s)
    ends_s = _renewal(
        lambda pairs: (states.standard_exponential((pairs, 2)) * means_s).ravel(),
        1.0 / (process.on_s + process.off_s),
        horizon_s,
        past_the_end=True,
    )
    in_turn = np.resize(np.array(rates if begins_on else rates[::-1]), len(ends_s))
    edges_s = np.append(0.0, ends_s)
    expected = np.append(0.0, np.cumsum(in_turn * np.diff(edges_s)))
    arrived = _unit_poisson(float(np.interp(horizon_s, edges_s, expected)), seed)
    instants: NDArray[np.float64] = np.interp(arrived, expected, edges_s)
    return instants[instants < horizon_s]


def varying(
    process: Varying, rate_per_s: float, horizon_s: float, seed: int
) -> NDArray[np.float64]:
    """Instants of a Poisson process whose rate follows the clock, shape (n,).

    A Poisson process of rate 1 on the clock of the expected arrivals, exactly (Cinlar, Introduction to
    Stochastic Processes, 1975, chapter 4.7).
    """
    _require_positive(rate_per_s=rate_per_s, horizon_s=horizon_s)
    until = float(expected_arrivals(process, rate_per_s, np.array([horizon_s]))[0])
    instants = instants_of(process, rate_per_s, _unit_poisson(until, seed))
    return instants[instants < horizon_s]


def _unit_poisson(until: float, seed: int) -> NDArray[np.float64]:
    """Poisson instants of rate 1 in [0, until); none where nothing is expected."""
    return poisson(1.0, until, seed) if until > 0 else np.empty(0)


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
    gaps_s: Callable[[int], NDArray[np.float64]],
    rate_per_s: float,
    horizon_s: float,
    first_s: float | None = None,
    past_the_end: bool = False,
) -> NDArray[np.float64]:
    """Cumulative sums of gaps up to the horizon, after an instant ``first_s`` if one is given.

    Gaps are drawn in batches; each batch continues the sum of the last one in the same order of
    additions, so that the result does not depend on the batch size to the last bit. ``past_the_end``
    keeps the instants beyond the horizon that were drawn, at least one.
    """
    expected = rate_per_s * horizon_s
    batch = math.ceil(expected + 5.0 * math.sqrt(expected)) + 16
    parts: list[NDArray[np.float64]] = [] if first_s is None else [np.array([first_s])]
    end_s = first_s or 0.0
    while end_s < horizon_s:
        gaps = gaps_s(batch)
        gaps[0] += end_s
        parts.append(np.cumsum(gaps))
        end_s = float(parts[-1][-1])
    instants = np.concatenate(parts)
    return instants if past_the_end else instants[instants < horizon_s]


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")
