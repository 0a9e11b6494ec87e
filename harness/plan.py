"""From a prediction to runs: which rates, for how long, and with what power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.growth import needed_requests, power_of
from loadgen.records import Run

WARMUP_RESIDENCES = 3.0
"""Until the first requests have left, N grows at the offered rate whatever the load; theory.md 6.3
discards three of the longest residence times."""
POWER = 0.95
ALPHA = 0.05
STABLE_FACTOR = 2.2
"""A stable run needs more arrivals than one that shows growth: its bound must fall below theta/2. The
factor gives 99.5 % stable verdicts at 0.85 of critical in simulation (docs/statistics.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Runs with the thresholds that were fixed before any of them."""

    runs: tuple[Run, ...]
    power: tuple[float, ...]
    """Probability of the right answer for each run, the prediction taken as true."""
    theta: float
    prediction_digest: str

    @property
    def duration_s(self) -> float:
        return sum(run.horizon_s for run in self.runs)

    @property
    def requests(self) -> float:
        return sum(run.horizon_s * run.arrival_rate for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    *,
    critical_rate: float,
    relative_error: float,
    residence_s: float,
    variance_ratio: float,
    loads: Sequence[float],
    horizon_s: float | None,
    max_horizon_s: float,
    theta: float,
    seed: int,
    prediction_digest: str,
    first_index: int = 0,
) -> Plan:
    """One run per load (multiple of the predicted critical rate).

    ``residence_s`` is the longest residence of a request at saturation, ``variance_ratio`` is ca2 + cd2.
    Where no horizon is given it is what the load's distance from 1 needs, the prediction's own error
    taken off that distance, between 12 residence times and ``max_horizon_s``.
    """
    warmup_s = WARMUP_RESIDENCES * residence_s
    runs, powers = [], []
    for offset, load in enumerate(loads):
        rate = load * critical_rate
        excess = _certain_excess(load, relative_error, theta)
        needed = needed_requests(excess, variance_ratio, ALPHA, POWER)
        if load < 1:
            needed *= STABLE_FACTOR
        wanted_s = horizon_s or warmup_s + max(needed / rate, 9 * residence_s)
        length_s = min(max(wanted_s, warmup_s * 1.5), max_horizon_s)
        requests = max(length_s - warmup_s, 0.0) * rate
        shrink = STABLE_FACTOR if load < 1 else 1.0
        powers.append(power_of(excess, variance_ratio, ALPHA, requests / shrink))
        runs.append(
            Run(
                id=f"{first_index + offset:02d}-{load:.2f}",
                arrival_rate=rate,
                horizon_s=round(length_s, 1),
                warmup_s=round(warmup_s, 2),
                seed=seed * 1000 + first_index + offset,
            )
        )
    return Plan(
        runs=tuple(runs), power=tuple(powers), theta=theta, prediction_digest=prediction_digest
    )


def _certain_excess(load: float, relative_error: float, theta: float) -> float:
    """Distance from critical that is left when the prediction errs by its own standard error."""
    return max(abs(load - 1.0) - relative_error, theta / 4)
