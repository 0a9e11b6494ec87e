"""What an outcome of a hypothesis rests on: figures with intervals, and the ranges allowed to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import student_quantile

Outcome = Literal["confirmed", "refuted", "cannot say"]
ANYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Part:
    """One figure that a verdict rests on, and the range that the hypothesis allows it."""

    what: str
    estimate: Estimate
    allowed: tuple[float, float]

    @property
    def outcome(self) -> Outcome:
        low, high = self.allowed
        if low <= self.estimate.low and self.estimate.high <= high:
            return "confirmed"
        if self.estimate.high < low or self.estimate.low > high:
            return "refuted"
        return "cannot say"

    @property
    def decides(self) -> bool:
        return self.allowed != ANYWHERE


@dataclass(frozen=True, slots=True)
class Verdict:
    """A hypothesis on one side; its outcome is the worst of its parts."""

    hypothesis: str
    parts: tuple[Part, ...]

    @property
    def outcome(self) -> Outcome:
        found = {part.outcome for part in self.parts if part.decides}
        for outcome in ("refuted", "cannot say"):
            if outcome in found:
                return outcome
        return "confirmed"

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self) | {"outcome": self.outcome}
        for part in data["parts"]:
            # JSON has no infinity: null is no bound.
            part["allowed"] = [x if math.isfinite(x) else None for x in part["allowed"]]
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Verdict:
        parts = tuple(
            Part(
                part["what"],
                Estimate.from_dict(part["estimate"]),
                _bounds(*part["allowed"]),
            )
            for part in data["parts"]
        )
        return Verdict(data["hypothesis"], parts)


def _bounds(low: float | None, high: float | None) -> tuple[float, float]:
    return (-math.inf if low is None else low, math.inf if high is None else high)


def over_seeds(values: Sequence[float], unit: str = "") -> Estimate:
    """Mean of independent runs with Student's interval of 95 %."""
    mean = float(np.mean(values))
    half = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half *= student_quantile(0.975, len(values) - 1)
    return Estimate(mean, mean - half, mean + half, 0.95, unit, f"{len(values)} seeds")
