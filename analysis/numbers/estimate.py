"""A number with its uncertainty and how it was got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.numbers.quantiles import normal_quantile


@dataclass(frozen=True, slots=True)
class Estimate:
    """``value`` with the interval ``[low, high]`` that covers the truth with probability ``level``.

    ``unit`` is written out ("req/s"), ``method`` says in a few words how the number and its
    interval were got. An exact number has ``low == value == high``.
    """

    value: float
    low: float
    high: float
    level: float
    unit: str
    method: str

    def __post_init__(self) -> None:
        if not 0.0 < self.level <= 1.0:
            raise ValueError(f"level must lie in (0, 1], got {self.level}")
        if not (math.isnan(self.value) or self.low <= self.value <= self.high):
            raise ValueError(f"{self.value} lies outside its interval [{self.low}, {self.high}]")

    @staticmethod
    def exact(value: float, unit: str, method: str) -> Estimate:
        return Estimate(value, value, value, 1.0, unit, method)

    @staticmethod
    def normal(
        value: float, standard_error: float, unit: str, method: str, level: float = 0.95
    ) -> Estimate:
        """Symmetric interval of a normally distributed estimator."""
        half = normal_quantile(0.5 + level / 2) * standard_error
        return Estimate(value, value - half, value + half, level, unit, method)

    @staticmethod
    def log_normal(value: float, relative_error: float, unit: str, method: str) -> Estimate:
        """95 % interval of a positive number from its relative error; exact if that is 0."""
        if relative_error == 0.0:
            return Estimate.exact(value, unit, method)
        spread = math.exp(normal_quantile(0.975) * relative_error)
        return Estimate(value, value / spread, value * spread, 0.95, unit, method)

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def standard_error(self) -> float:
        """Half width over the normal quantile; 0 for an exact number."""
        if self.level == 1.0:
            return 0.0
        return self.half_width / normal_quantile(0.5 + self.level / 2)

    def at_level(self, level: float) -> Estimate:
        """The same estimate with the interval of another level (normal approximation)."""
        if self.level == 1.0:
            return self
        factor = normal_quantile(0.5 + level / 2) / normal_quantile(0.5 + self.level / 2)
        return Estimate(
            self.value,
            self.value - factor * (self.value - self.low),
            self.value + factor * (self.high - self.value),
            level,
            self.unit,
            self.method,
        )

    def scaled(self, factor: float, unit: str | None = None) -> Estimate:
        """The estimate times a positive exact factor."""
        if factor <= 0:
            raise ValueError("an estimate is scaled by a positive factor only")
        return Estimate(
            self.value * factor,
            self.low * factor,
            self.high * factor,
            self.level,
            unit or self.unit,
            self.method,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Estimate:
        return Estimate(**data)


def ratio(numerator: Estimate, denominator: Estimate, method: str) -> Estimate:
    """Quotient of two independent positive estimates, errors added in quadrature on the log scale.

    The result has the level 0.95.
    """
    if numerator.value <= 0 or denominator.value <= 0:
        raise ValueError("a ratio needs two positive estimates")
    value = numerator.value / denominator.value
    relative = math.hypot(
        numerator.standard_error / numerator.value, denominator.standard_error / denominator.value
    )
    spread = math.exp(normal_quantile(0.975) * relative)
    return Estimate(value, value / spread, value * spread, 0.95, "", method)


def combined(estimates: Sequence[Estimate]) -> Estimate | None:
    """Inverse-variance mean of independent estimates of one number; None of none.

    The error is widened where they differ by more than their own errors explain.
    """
    if not estimates:
        return None
    errors = np.maximum([e.standard_error for e in estimates], 1e-9)
    values = np.array([e.value for e in estimates])
    weights = 1.0 / errors**2
    mean = float(weights @ values / weights.sum())
    if len(estimates) == 1:
        return estimates[0]
    reduced = float(weights @ (values - mean) ** 2) / (len(values) - 1)
    error = math.sqrt(max(1.0, reduced) / float(weights.sum()))
    method = f"{estimates[0].method}; {len(values)} runs, inverse-variance mean"
    return Estimate.normal(mean, error, estimates[0].unit, method)
