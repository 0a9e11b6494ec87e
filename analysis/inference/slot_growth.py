"""Does the number in system grow? For runs of the slot and batch models, over independent seeds.

The rules are those of `analysis.inference.growth`: increments over batches, never a slope through N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.inference.growth import (
    DRIFT_BATCHES,
    DRIFT_LEVEL,
    GROWTH_LEVEL,
    batch_mean,
    critical_excursion,
)
from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import normal_quantile

STABLE_BELOW = 0.02
"""A run is stable when N grows by less than this share of the arrivals, with 95 % confidence."""


@dataclass(frozen=True, slots=True)
class Growth:
    """``drift``: requests per unit of time, 90 % interval; and what it says."""

    drift: Estimate
    verdict: Literal["stable", "grows", "cannot say"]


def growth(
    numbers: Sequence[NDArray[np.float64]],
    duration: float,
    arrival_rate: float,
    variance_ratio: float,
    unit: str,
) -> Growth:
    """The verdict on runs that differ by seed alone; ``numbers``: N of each at equally spaced instants
    that span ``duration``, the warm-up left out.

    Grows: the lower end of the drift is above 0, and N rose further, in the mean of the runs, than in
    95 % of such sets at exactly critical load from empty (`growth.critical_excursion`). Stable: the
    upper end is below `STABLE_BELOW` of the arrival rate.
    """
    rates = []
    for number in numbers:
        at = np.linspace(0, len(number) - 1, DRIFT_BATCHES + 1).round().astype(int)
        seconds = np.diff(at) / (len(number) - 1) * duration
        rates.append(np.diff(np.asarray(number, float)[at]) / seconds)
    found = batch_mean(
        np.concatenate(rates),
        unit,
        f"increments of N over {DRIFT_BATCHES} batches of {len(numbers)} runs, 90 % interval",
        DRIFT_LEVEL,
    )
    one = critical_excursion(arrival_rate, duration, GROWTH_LEVEL, variance_ratio)
    excursion = one * _of_mean(len(numbers)) / _of_mean(1)
    if found.low > 0 and found.value * duration > excursion:
        return Growth(found, "grows")
    if found.high < STABLE_BELOW * arrival_rate:
        return Growth(found, "stable")
    return Growth(found, "cannot say")


def _of_mean(runs: int) -> float:
    """95 % point of the mean of so many |N(0, 1)|; of more than one by its own mean and variance."""
    z = normal_quantile(GROWTH_LEVEL)
    if runs == 1:
        return normal_quantile(0.5 + GROWTH_LEVEL / 2)
    return math.sqrt(2 / math.pi) + z * math.sqrt((1 - 2 / math.pi) / runs)
