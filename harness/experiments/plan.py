"""From a prediction to runs: which rates, for how long, and with what power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from analysis.inference.growth import (
    DRIFT_BATCHES,
    growth_power,
    needed_requests,
    stability_duration,
    stability_power,
    stationary_variance,
)
from analysis.theory.prediction import Prediction
from analysis.verdicts.evidence import variance_ratio
from analysis.verdicts.run_verdict import MIN_BACKLOG_RESIDENCES
from harness.configs.sections import ConfigError
from loadgen.mendable import Mendable
from loadgen.processes import POISSON, Process, Replay, dispersion, period_s
from loadgen.prompts import label_tokens
from loadgen.records import Run, Start
from loadgen.workload import Workload

StartOption = Literal["empty", "full", "both"]
WARMUP_RESIDENCES = 3.0
"""Until the first requests have left, N grows at the offered rate whatever the load; theory.md 6.3
discards three of the longest residence times."""
MEASURED_RESIDENCES = 9.0
"""An overloaded run is measured for at least so many of the longest residence times."""
PRELOAD_MEMORIES = 10.0
"""A run that starts full has so many times the requests that saturated memory holds."""
PRELOAD_SIGMAS = 4.0
"""... and at least so many standard deviations of N over the run, that chance does not empty it."""
GROWTH_POWER = 0.95
STABILITY_POWER = 0.995


class HorizonTooShort(Mendable):
    """Nothing could be measured within the horizon; the message says which one is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Runs with the thresholds that were fixed before any of them."""

    runs: tuple[Run, ...]
    power: tuple[float, ...]
    """Probability of the right answer for each run, the prediction being off by its own error; NaN for a
    replay, which is not judged."""
    theta: float
    prediction_digest: str

    @property
    def duration_s(self) -> float:
        return sum(run.horizon_s for run in self.runs)

    @property
    def requests(self) -> float:
        return sum(run.preload + run.horizon_s * run.arrival_rate for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def least_excess(theta: float) -> float:
    """Share of the critical rate beyond it whose growth a run at nearly the predicted one is to show."""
    return theta / 4


def preload_size(engine: Prediction, horizon_s: float, variance_ratio: float) -> int:
    """Requests that a run of this length starts full with (theory.md 6.3, steps A and C).

    The larger of ten memory-fulls, which at load rho take 10/(1 - rho) mean residences to drain, and
    4 sqrt(mu (ca2 + cd2) T), beyond the reach of chance. ``variance_ratio`` is ca2 + cd2.
    """
    wander = math.sqrt(engine.critical_rate.value * variance_ratio * horizon_s)
    return math.ceil(max(PRELOAD_MEMORIES * engine.running, PRELOAD_SIGMAS * wander))


def starts(start: StartOption, load: float) -> tuple[Start, ...]:
    """How the runs at this multiple of the predicted critical rate start.

    ``both`` gives pairs below it alone: above it a queue grows from either start.
    """
    if start == "both":
        return ("empty", "full") if load < 1 else ("empty",)
    return (start,)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Aim:
    """What one run has to show: that its queue grows, or (``bounded``) that it does not.

    A replayed trace has no long run, of which any of this could be said: its needs are without bound,
    its power is NaN.
    """

    rate: float
    """Requests per second offered."""
    bounded: bool
    excess: float
    """Distance from the critical rate as a share of it, the prediction's error taken off."""
    stable_below: float
    """A drift below this, in requests per second, counts as none."""
    ca2: float
    """Variance over mean of the arrivals in the long run; NaN for a replay."""
    departures: float
    """The same of what leaves."""
    mean_residence_s: float

    @property
    def spread(self) -> float:
        return self.ca2 + self.departures

    @property
    def _variance(self) -> float:
        return stationary_variance(
            self.rate, self.mean_residence_s, 1.0 - self.excess, self.spread, self.ca2
        )

    @property
    def needed_s(self) -> float:
        """Seconds after the warm-up."""
        if math.isnan(self.ca2):
            return math.inf
        if self.bounded:
            return stability_duration(self.stable_below, self._variance, STABILITY_POWER)
        return needed_requests(self.excess, self.spread, GROWTH_POWER) / self.rate

    def power(self, left_s: float) -> float:
        """Probability that ``left_s`` seconds after the warm-up show it."""
        if math.isnan(self.ca2):
            return math.nan
        if self.bounded:
            return stability_power(self.stable_below, self._variance, left_s)
        return growth_power(self.excess, self.spread, left_s * self.rate)


def make_plan(
    prediction: Prediction,
    engine: Prediction,
    workload: Workload,
    *,
    loads: Sequence[float],
    horizon_s: float | None,
    max_horizon_s: float,
    theta: float,
    seed: int,
    prediction_digest: str,
    first_index: int = 0,
    start: StartOption = "empty",
    arrivals: Process = POISSON,
) -> Plan:
    """Runs for each load (multiple of the predicted critical rate), numbered from ``first_index``.

    One for each load, or with ``start`` "both" a pair below the critical rate, see `starts`.

    ``engine`` is the prediction with the engine's own blocks and ceilings, whatever is claimed: from
    it come the residence times.

    Where no horizon is given, a run above, and one that starts full, is as long as its drift needs to
    show (theory.md 6.2), a run below as long as its drift needs to be bounded; the error of the
    prediction is taken off the distance from critical. No run is longer than ``max_horizon_s``.
    """
    longest_s, mean_s = engine.longest_residence_s, engine.mean_residence_s
    # As of `analysis.verdicts.evidence.Evidence`: what the sum of several queues wanders by at most.
    departures = engine.replicas * (variance_ratio(workload) - 1.0)
    critical = prediction.critical_rate
    relative_error = critical.standard_error / critical.value
    warmup_s = max(WARMUP_RESIDENCES * longest_s, engine.settling_s)
    runs, powers = [], []
    cases = [(load, how) for load in loads for how in starts(start, load)]
    for index, (load, how) in enumerate(cases, first_index):
        rate = load * critical.value
        aim = _Aim(
            rate=rate,
            bounded=load < 1 and how == "empty",
            excess=max(abs(load - 1.0) - relative_error, least_excess(theta)),
            stable_below=theta / 2 * rate,
            ca2=dispersion(arrivals, rate),
            departures=departures,
            mean_residence_s=mean_s,
        )
        wanted_s = horizon_s or warmup_s + max(aim.needed_s, MEASURED_RESIDENCES * longest_s)
        length_s = _length_s(arrivals, rate, round(warmup_s, 2), wanted_s, max_horizon_s)
        left_s = length_s - warmup_s
        if left_s < MIN_BACKLOG_RESIDENCES * mean_s:
            shortest_s = warmup_s + 2 * MIN_BACKLOG_RESIDENCES * mean_s
            raise HorizonTooShort(
                f"a run of {length_s:.0f} s has {max(left_s, 0):.0f} s left after its warm-up of "
                f"{warmup_s:.0f} s ({warmup_s / longest_s:.0f} of the longest residence times): set "
                f"load.max_horizon_s and load.horizon_s to at least {shortest_s:.0f}"
            )
        powers.append(aim.power(left_s))
        runs.append(
            Run(
                id=f"{index:02d}-{load:.2f}" + ("-full" if how == "full" else ""),
                arrival_rate=rate,
                horizon_s=length_s,
                warmup_s=round(warmup_s, 2),
                seed=seed * 1000 + index,
                preload=preload_size(engine, length_s, aim.spread) if how == "full" else 0,
                arrivals=arrivals,
            )
        )
    return Plan(
        runs=tuple(runs), power=tuple(powers), theta=theta, prediction_digest=prediction_digest
    )


def _length_s(
    arrivals: Process, rate: float, warmup_s: float, wanted_s: float, max_horizon_s: float
) -> float:
    """How long a run is: at most as long as it may be, and as a replayed trace is.

    Where the rate follows the clock, so many whole periods follow the warm-up that each batch of
    `analysis.inference.growth.drift` has as many.
    """
    if isinstance(arrivals, Replay):
        own_s = arrivals.duration_s * arrivals.own_rate / rate
        return math.floor(10 * min(wanted_s, max_horizon_s, own_s)) / 10
    period = period_s(arrivals)
    if period is None:
        return round(min(wanted_s, max_horizon_s), 1)
    batches_s = DRIFT_BATCHES * period
    most = math.floor((max_horizon_s - warmup_s) / batches_s + 1e-9)
    if most < 1:
        raise HorizonTooShort(
            f"the rate repeats every {period:g} s, and a run is judged over {DRIFT_BATCHES} whole "
            f"periods or a multiple: set load.max_horizon_s to at least {warmup_s + batches_s:.0f}, or "
            "shorten the period"
        )
    return warmup_s + batches_s * max(min(most, math.ceil((wanted_s - warmup_s) / batches_s)), 1)


def require_distinct_prompts(plan: Plan, workload: Workload, vocabulary: range) -> None:
    """Raise ConfigError where the shortest prompts are too short to differ from all others of a run."""
    most = max(run.preload + run.arrival_rate * run.horizon_s for run in plan.runs)
    needed = label_tokens(round(1.2 * most), len(vocabulary))
    shortest = int(workload.prompt_tokens.min())
    if shortest < needed:
        raise ConfigError(
            f"workload: prompts of {shortest} tokens cannot all differ among {most:.0f} with "
            f"{len(vocabulary)} token ids: let prompts have {needed} tokens or more, or widen "
            "load.vocabulary"
        )
