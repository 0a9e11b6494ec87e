"""Is tonight's critical rate lower than that of the nights before? A rule with measured error rates.

The logarithm of a night's measured rate scatters about its level with the night's own error, known
from its interval, and with a scatter from night to night, which the nights themselves tell. Tonight is
compared with the level by Student's t. `scripts/bench/nightly` measures how often that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import decimals_for, grouped, interval_text, percent
from analysis.numbers.quantiles import normal_quantile, student_quantile

Answer = Literal["regression", "rise", "steady", "cannot say"]
LEAST_NIGHTS = 5
"""Nights without which nothing is said: the scatter of fewer is hardly known."""
ALARM = 0.003
"""Probability of a false regression in one night; of a false rise the same: 0.08 in 25 nights."""
WANTED_DROP = 0.08
"""The drop that is to be found; where it would not be, the answer is "cannot say"."""
POWER = 0.90


@dataclass(frozen=True, slots=True, kw_only=True)
class NightAnswer:
    """One night against the level of the nights before it."""

    answer: Answer
    text: str
    """One sentence for the reader."""
    change: Estimate | None
    """Tonight over the level, minus 1, as a share, with a 95 % interval; None without a level."""
    nights: int
    """Nights that the level is the mean of."""
    level_since: int
    """Index of the first of them."""
    scatter: float
    """From night to night, as a share, beyond the nights' own errors; NaN where it is unknown."""
    findable: float
    """The drop, as a share, that would be called a regression in 90 % of such nights; NaN likewise."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge_nights(rates: Sequence[Estimate]) -> tuple[NightAnswer, ...]:
    """Each night against those before it, all measured in one environment, in their order.

    A night that leaves the level is not counted into it. If the next one lies nearer to that night
    than to the level, the change lasts: the two begin a new level, and no further alarm is given; else
    the night is set aside and the level stays. The scatter is that within all levels so far.
    Raises ValueError for a rate that is not positive or has no error of its own.
    """
    if any(rate.value <= 0 or rate.standard_error <= 0 for rate in rates):
        raise ValueError("each night needs a positive rate with an error of its own")
    y = np.log([rate.value for rate in rates])
    errors = np.array([rate.standard_error / rate.value for rate in rates])
    levels: list[list[int]] = [[]]
    suspect: int | None = None
    answers = []
    for night in range(len(y)):
        if suspect is not None:
            mean = _mean(y, errors, levels[-1], _scatter(y, errors, levels))[0]
            if abs(y[night] - y[suspect]) < abs(y[night] - mean):
                levels.append([suspect])
            suspect = None
        answers.append(_answer(y, errors, levels, night))
        if answers[-1].answer in ("regression", "rise"):
            suspect = night
        else:
            levels[-1].append(night)
    return tuple(answers)


def _answer(
    y: NDArray[np.float64], errors: NDArray[np.float64], levels: list[list[int]], night: int
) -> NightAnswer:
    level = levels[-1]
    known = sum(map(len, levels))
    if known < LEAST_NIGHTS:
        return NightAnswer(
            answer="cannot say",
            text=f"nights in this environment before tonight: {known}, needed: {LEAST_NIGHTS}",
            change=None,
            nights=len(level),
            level_since=level[0] if level else night,
            scatter=math.nan,
            findable=math.nan,
        )
    scatter = _scatter(y, errors, levels)
    mean, error = _mean(y, errors, level, scatter)
    spread = math.sqrt(errors[night] ** 2 + scatter**2 + error**2)
    freedom = known - len(levels)
    alarm = student_quantile(1 - ALARM, freedom)
    difference = float(y[night]) - mean
    findable = 1 - math.exp(-(alarm + normal_quantile(POWER)) * spread)
    if abs(difference) > alarm * spread:
        answer: Answer = "regression" if difference < 0 else "rise"
    else:
        answer = "steady" if findable <= WANTED_DROP else "cannot say"
    half = student_quantile(0.975, freedom) * spread
    low, high = math.expm1(difference - half), math.expm1(difference + half)
    method = f"against {len(level)} nights, Student's t of {freedom} degrees of freedom"
    change = Estimate(math.expm1(difference), low, high, 0.95, "", method)
    return NightAnswer(
        answer=answer,
        text=_text(answer, change, len(level), scatter, findable),
        change=change,
        nights=len(level),
        level_since=level[0],
        scatter=scatter,
        findable=findable,
    )


def _text(answer: Answer, change: Estimate, nights: int, scatter: float, findable: float) -> str:
    moved = change.scaled(100.0)
    value = grouped(abs(moved.value), decimals_for(moved.half_width))
    sign = "-" if moved.value < 0 else "+"
    plural = "night" if nights == 1 else "nights"
    said = f"{sign}{value} % {interval_text(moved)} against the level of {nights} {plural}"
    least = f"a drop of {percent(findable)} would be found in {percent(POWER, 0)} of nights"
    if answer == "regression":
        return f"lower than by chance: {said}"
    if answer == "rise":
        return f"higher than by chance: {said}"
    if answer == "steady":
        return f"{said}; {least}"
    return (
        f"{said}; a drop of {percent(WANTED_DROP, 0)} could be missed, only {least}: the scatter from "
        f"night to night is {percent(scatter)}; longer runs, a quieter machine or more nights mend it"
    )


def _mean(
    y: NDArray[np.float64], errors: NDArray[np.float64], level: list[int], scatter: float
) -> tuple[float, float]:
    """Inverse-variance mean of a level's nights, and its standard error, both of logarithms."""
    weights = 1.0 / (errors[level] ** 2 + scatter**2)
    total = float(weights.sum())
    return float(weights @ y[level]) / total, total**-0.5


def _scatter(y: NDArray[np.float64], errors: NDArray[np.float64], levels: list[list[int]]) -> float:
    """Standard deviation from night to night of the logarithm, beyond the nights' own errors.

    The one with which the weighted squares about the levels' means are as many as their degrees of
    freedom (Paule and Mandel 1982); 0 where the own errors explain them.
    """
    freedom = sum(map(len, levels)) - len(levels)

    def excess(variance: float) -> float:
        squares = 0.0
        for level in levels:
            weights = 1.0 / (errors[level] ** 2 + variance)
            mean = weights @ y[level] / weights.sum()
            squares += float(weights @ (y[level] - mean) ** 2)
        return squares - freedom

    if excess(0.0) <= 0:
        return 0.0
    # With this variance each weight is smaller than its inverse, so that the excess is negative.
    most = sum(float(np.sum((y[level] - y[level].mean()) ** 2)) for level in levels) / freedom
    return math.sqrt(brentq(excess, 0.0, most, xtol=1e-10, rtol=1e-6))
