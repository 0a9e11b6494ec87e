"""At nearly the critical rate: does the queue settle, wander like sqrt(t), or grow like t?

Around the critical rate the queue behaves as a Brownian motion reflected at zero with drift
d = rate - mu and variance sigma^2 = mu (ca2 + cd2) per second (theory.md 6.1):

* d < 0: bounded, sigma^2 / (2 |d|) on average, reached after a few 2 sigma^2 / d^2;
* d = 0: N(T) = |N(0, 1)| sigma sqrt(T), without bound and without a rate;
* d > 0: N(T) = d T, give or take sigma sqrt(T).

The offered rate is exact, so that d is as certain as the measured critical rate, which work gives far
more exactly than N(t) does. So d decides, and what the queue did is held against what d makes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from scipy.optimize import brentq

from analysis.inference.growth import why_no_slope
from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.formatting import decimals_for, grouped
from analysis.numbers.quantiles import normal_quantile
from analysis.verdicts.evidence import Evidence, MeasuredRun
from loadgen.processes import stationary

Growth = Literal["bounded", "sqrt(t)", "linear", "cannot say"]
ANSWERS: dict[Growth, str] = {
    "bounded": "bounded",
    "sqrt(t)": "as at critical",
    "linear": "grows like t",
    "cannot say": "cannot say",
}

NEAR = 0.05
"""Runs within this share of the measured critical rate are asked how their queue grows. Five relaxation
times are 10 (ca2 + cd2) / 0.05^2 = 6 400 requests there; at 3 % they would be 18 000."""
RELAXATIONS = 5.0
"""A queue is seen to settle when it is watched for so many relaxation times (theory.md 6.1)."""
BOUNDED_BELOW = -math.sqrt(2 * RELAXATIONS)
"""d T / (sigma sqrt(T)) at which a run lasts that long: T = 5 x 2 sigma^2 / d^2."""
LINEAR_ABOVE = 1.0
"""d T / (sigma sqrt(T)) at which growth is as large as the wandering."""
PATH_LEVEL = 0.99
"""The queue contradicts the rate when it lies outside what the rate makes in so many of 100 runs."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Waiting requests of a run that started empty: after the warm-up, at the end, and at most."""

    begin: float
    end: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settling:
    """How the queue of one run grows, from its distance to the measured critical rate."""

    run: str
    load: float
    """Offered rate over the predicted critical rate."""
    growth: Growth
    text: str
    """What the queue did, or why that cannot be said."""
    distance: Estimate
    """Offered rate over the measured critical rate, less 1."""
    departure: Estimate
    """d T / (sigma sqrt(T)): growth over wandering, which tells the three apart."""
    wandering: float
    """sigma sqrt(T): how far an exactly critical queue wanders in this run, in requests."""
    duration_s: float
    """T, from the end of the warm-up on."""
    queue: Queue

    @property
    def answer(self) -> str:
        """The growth in words."""
        return ANSWERS[self.growth]

    @property
    def distance_text(self) -> str:
        """Such as "+0.4 % [+0.2, +0.6] from the measured rate"."""
        decimals = decimals_for(100 * self.distance.half_width)
        value, low, high = (
            ("+" if x >= 0 else "") + grouped(100 * x, decimals)
            for x in (self.distance.value, self.distance.low, self.distance.high)
        )
        return f"{value} % [{low}, {high}] from the measured rate"


def near_critical(
    evidence: Evidence, measured: Estimate | None, steady: bool
) -> tuple[Settling, ...]:
    """How the queues of the runs within 5 % of the measured critical rate grow, in order of the runs.

    Valid runs that started empty, at one rate, and are long enough for a slope. None where no critical
    rate was measured. An engine that was not ``steady`` has no one critical rate: then that cannot be
    said.
    """
    if measured is None:
        return ()
    predicted = evidence.prediction.critical_rate.value
    found = tuple(
        of_run(
            run,
            run.frames.run.arrival_rate / predicted,
            measured,
            evidence.variance_ratio_of(run.frames.run),
        )
        for run in evidence.runs
        if abs(run.frames.run.arrival_rate / measured.value - 1) <= NEAR and _usable(run)
    )
    if steady:
        return found
    text = "the engine's speed changed while it was measured: there is no one critical rate"
    return tuple(replace(settling, growth="cannot say", text=text) for settling in found)


def _usable(run: MeasuredRun) -> bool:
    frames = run.frames
    return (
        run.valid
        and frames.run.start == "empty"
        and stationary(frames.run.arrivals)
        and why_no_slope(frames, frames.run.warmup_s, frames.end_s) is None
    )


def of_run(run: MeasuredRun, load: float, measured: Estimate, variance_ratio: float) -> Settling:
    """The same for one run at any rate; ``variance_ratio`` is ca2 + cd2."""
    frames = run.frames
    start_s = frames.run.warmup_s
    times = frames.per_sample("t_s")
    waiting = frames.per_sample("waiting")[(times >= start_s) & (times <= frames.end_s)]
    return settling(
        frames.run.id,
        load,
        frames.run.arrival_rate,
        measured,
        Queue(float(waiting[0]), float(waiting[-1]), float(waiting.max())),
        frames.end_s - start_s,
        variance_ratio,
    )


def settling(
    run: str,
    load: float,
    arrival_rate: float,
    critical: Estimate,
    queue: Queue,
    duration_s: float,
    variance_ratio: float,
) -> Settling:
    """Which growth a run of ``duration_s`` seconds shows; "cannot say" where rate and queue disagree.

    ``critical`` is the measured critical rate. The 95 % interval of d T / (sigma sqrt(T)) decides: below
    -sqrt(10) the run lasts five relaxation times, within 1 of zero the wandering is the larger part,
    above 1 the growth is.
    """
    share = ratio(Estimate.exact(arrival_rate, "req/s", "asked"), critical, "asked over measured")
    distance = _affine(share, 1.0, "")
    served = critical.value * duration_s
    wandering = math.sqrt(served * variance_ratio)
    departure = _affine(share, served / wandering, "d T over sigma sqrt(T)")
    growth = _growth(departure)
    text = _undecided(departure, distance, duration_s)
    if growth != "cannot say":
        contradiction = _contradiction(growth, departure, wandering, queue)
        text = contradiction or _text(growth, departure, wandering, duration_s, queue)
        growth = "cannot say" if contradiction else growth
    return Settling(
        run=run,
        load=load,
        growth=growth,
        text=text,
        distance=distance,
        departure=departure,
        wandering=wandering,
        duration_s=duration_s,
        queue=queue,
    )


def _affine(share: Estimate, factor: float, method: str) -> Estimate:
    """(share - 1) times a positive factor."""
    low, value, high = (factor * (x - 1) for x in (share.low, share.value, share.high))
    return Estimate(value, low, high, share.level, "", method or share.method)


def _growth(departure: Estimate) -> Growth:
    if departure.high <= BOUNDED_BELOW:
        return "bounded"
    if departure.low >= LINEAR_ABOVE:
        return "linear"
    if departure.low >= -LINEAR_ABOVE and departure.high <= LINEAR_ABOVE:
        return "sqrt(t)"
    return "cannot say"


def _text(
    growth: Growth, departure: Estimate, wandering: float, duration_s: float, queue: Queue
) -> str:
    if growth == "bounded":
        low, value, high = (
            wandering / (2 * -x) for x in (departure.low, departure.value, departure.high)
        )
        return (
            f"by the measured rate {value:.3g} [{low:.3g}, {high:.3g}] wait on average; "
            f"{queue.end:.0f} do at the end, {queue.highest:.0f} at most"
        )
    if growth == "linear":
        low, value, high = (
            x * wandering / duration_s for x in (departure.low, departure.value, departure.high)
        )
        return (
            f"{value:.2g} req/s [{low:.2g}, {high:.2g}] above critical; the queue went from "
            f"{queue.begin:.0f} to {queue.end:.0f} in {duration_s:.0f} s"
        )
    return (
        f"wanders like sqrt(t): {queue.end:.0f} wait at the end, {queue.highest:.0f} at most; "
        f"sigma sqrt(T) is {wandering:.0f} over {duration_s:.0f} s"
    )


def _undecided(departure: Estimate, distance: Estimate, duration_s: float) -> str:
    """Between which answers the rate lies, and what would tell."""
    if departure.high < 0:
        factor = (BOUNDED_BELOW / departure.high) ** 2
        return (
            f"between bounded and as at critical; to see it settle takes {factor:.1f} times the "
            f"{duration_s:.0f} s"
        )
    if departure.low > 0:
        factor = (LINEAR_ABOVE / departure.low) ** 2
        return (
            f"between as at critical and linear; to see it grow takes {factor:.1f} times the "
            f"{duration_s:.0f} s"
        )
    return (
        f"the critical rate is known to {100 * distance.half_width:.1f} % only: run longer above it"
    )


def _contradiction(
    growth: Growth, departure: Estimate, wandering: float, queue: Queue
) -> str | None:
    """What the queue did, where the measured rate makes that in less than 1 of 100 runs."""
    reach = normal_quantile(0.5 + PATH_LEVEL / 2)
    lowest, most = -math.inf, math.inf
    if growth == "bounded":
        # The stationary queue is exponential with mean sigma^2 / (2 |d|).
        most = -math.log(1 - PATH_LEVEL) * wandering / (2 * -departure.high)
    else:
        most = queue.begin + (max(departure.high, 0.0) + reach) * wandering
    if growth == "linear":
        lowest = queue.begin + (departure.low - reach) * wandering
    if not lowest <= queue.end <= most:
        side = f"at least {lowest:.0f}" if queue.end < lowest else f"at most {most:.0f}"
        return (
            f"{queue.end:.0f} wait at the end, by the measured rate {side} would: a second branch, or "
            "an engine whose speed moved"
        )
    if growth == "sqrt(t)":
        rare = stays_below(queue.highest / wandering, departure.low)
        if rare < (1 - PATH_LEVEL) / 2:
            return (
                f"never more than {queue.highest:.0f} waited, which a critical queue does in "
                f"{100 * rare:.2g} % of runs: the server is faster while few wait, or something caps "
                "its queue"
            )
    return None


def stays_below(level: float, departure: float) -> float:
    """Probability that a queue from empty never exceeds ``level`` sigma sqrt(T) until T.

    Brownian motion of unit variance and drift ``departure`` over unit time, reflected at 0 and absorbed
    at ``level``: the slowest mode of its generator, which is all that is left where the probability is
    small (to 1e-6 below 0.05). 1 where that mode does not exist, at ``level`` >= 1 / -``departure``.
    """
    if level <= 0.0:
        return 0.0
    if -departure * level >= 1:
        return 1.0
    z = math.pi / 2
    if departure:
        # exp(-d y) sin(w (level - y)) is 0 at level, and flat at 0 where tan(w level) = -w / d.
        ends = (1e-9, z) if departure < 0 else (z, math.pi - 1e-9)
        z = float(
            brentq(lambda x: departure * math.sin(x) + x / level * math.cos(x), ends[0], ends[1])
        )
    w = z / level
    decay = (w**2 + departure**2) / 2
    weight = level / 2 - math.sin(2 * z) / (4 * w)
    mode = math.sin(z) * w * math.exp(departure * level) / (2 * decay * weight)
    return min(1.0, mode * math.exp(-decay))
