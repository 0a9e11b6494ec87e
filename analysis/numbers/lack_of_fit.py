"""Is the step time linear? What whole designs are off by, against what repeating one design gives.

The residuals of repeated designs split into two sums of squares: of the designs' means about the
law (lack of fit), and of the repeats about their design's mean (pure error). If the law holds, both
mean squares estimate one variance and their quotient follows an F distribution.

A bend that hides between the designs grows outside of their range. So for each term the square of what
a step holds is set against the residuals, and what it explains beyond chance is carried to the point
that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

FALSE_ALARM = 0.05
"""A p value below this counts as a law that is not linear: so often by chance alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LackOfFit:
    """The F test of lack of fit, from residuals as fractions of the duration."""

    statistic: float
    """Mean square of the lack of fit over that of the pure error."""
    p_value: float
    """Probability of so large a quotient if the law were linear."""
    designs_dof: int
    """Designs less coefficients."""
    repeats_dof: int
    """Observations less designs."""
    mean_square: float
    """Of what whole designs are off by."""
    error_mean_square: float
    """Of the repeats about their design's mean."""

    @property
    def seen(self) -> bool:
        """Is the law not linear beyond chance?"""
        return self.p_value < FALSE_ALARM


@dataclass(frozen=True, slots=True, kw_only=True)
class Bend:
    """A square of what a step holds, beside the straight line that it looks like at the designs."""

    term: int
    """1 tokens, 2 KV tokens, 3 requests."""
    size: float
    """Seconds per square, without sign; at least 0."""
    line: tuple[float, ...]
    """Coefficients of b0..b3."""

    def off_s(self, weights: NDArray[np.float64]) -> float:
        """Seconds by which steps leave the line; ``weights`` are steps and their sums, shape (4,)."""
        square = weights[self.term] ** 2 / weights[0]
        return self.size * float(square - weights @ np.array(self.line))


def lack_of_fit(
    probes: Sequence[str], residual: NDArray[np.float64], width: int
) -> LackOfFit | None:
    """The test for a fit of ``width`` coefficients; residuals have shape (n,), constant variance.

    None where the designs are not named, no more than the coefficients, or none is repeated.
    """
    groups, owner = np.unique(np.asarray(probes, dtype=str), return_inverse=True)
    between, within = len(groups) - width, len(residual) - len(groups)
    if between < 1 or within < 1 or "" in groups:
        return None
    counts = np.bincount(owner)
    means = np.bincount(owner, residual) / counts
    squares = float(np.sum(counts * means**2)) / between
    error = float(np.sum((residual - means[owner]) ** 2)) / within
    # A clock without any scatter: whatever a design is off by is no chance.
    statistic = squares / error if error > 0 else float("inf") if squares > 0 else 0.0
    return LackOfFit(
        statistic=statistic,
        p_value=float(fdtrc(between, within, statistic)),
        designs_dof=between,
        repeats_dof=within,
        mean_square=squares,
        error_mean_square=error,
    )


def bends(
    columns: NDArray[np.float64],
    design: NDArray[np.float64],
    index: Sequence[int],
    residual: NDArray[np.float64],
    error_mean_square: float,
) -> tuple[Bend, ...]:
    """A bend in tokens, KV tokens and requests each, as far as it is beyond chance.

    ``columns`` are steps and the three sums over them, shape (n, 4), ``design`` the columns that were
    fitted, shape (n, k), the first of them the terms ``index`` of b0..b3, ``residual`` what was left;
    all are weighed alike. The variance of chance is taken off the squared coefficient.
    """
    found = []
    for term in (1, 2, 3):
        square = columns[:, term] ** 2 / columns[:, 0]
        found_line = np.linalg.lstsq(design, square, rcond=None)[0]
        rest = square - design @ found_line
        power = float(rest @ rest)
        if power <= 1e-8 * float(square @ square):
            continue
        size = max((float(rest @ residual) / power) ** 2 - error_mean_square / power, 0.0)
        if size > 0:
            line = np.zeros(4)
            line[list(index)] = found_line[: len(index)]
            found.append(Bend(term=term, size=float(np.sqrt(size)), line=tuple(line.tolist())))
    return tuple(found)
