"""The mean of an autocorrelated rate, with an error that waves and slow wandering do not fool.

Batch means take batches to be independent. Requests admitted together leave together, so that a busy
server works in waves: batches shorter than a wave are alike in pairs and opposite in others, and their
scatter says little about the mean's. Here the error comes from the low frequencies of the rate itself:
the first few cosine transforms of its bins are nearly independent normal numbers, each with the variance
that the mean has, up to a known factor (Lazarus, Lewis, Stock, Watson, J. Bus. Econ. Stat. 36, 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import f_quantile, student_quantile

BINS_PER_RESIDENCE = 4
"""A wave lasts a residence or less: in coarser bins it would look like a slower one."""
LEAST_BINS, MOST_BINS = 64, 256
RESIDENCES_PER_COSINE = 5.0
"""What is correlated over a residence has lost a fifth of its variance at one cosine for five of them
(measured where sequences are short: there the mix in service changes over a residence)."""
LEAST_COSINES = 3
MOST_COSINES = 12
DIFFERENT = 0.99
"""Level at which stretches are taken to differ by more than chance."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """A rate in equal bins of a stretch of a run, as many as `bins_of` says.

    ``rates`` has the shape (bins,); ``residences`` is the stretch's length in mean residence times, over
    which what is served stays correlated.
    """

    rates: NDArray[np.float64]
    duration_s: float
    residences: float
    unit: str
    method: str

    @property
    def mean(self) -> float:
        return float(self.rates.mean())

    @property
    def estimate(self) -> Estimate:
        """Its mean with a 95 % interval."""
        return long_run_mean([self])

    def scatters(self) -> NDArray[np.float64]:
        """Squares whose expectation is the variance of the mean times the duration, shape (cosines,).

        One cosine for `RESIDENCES_PER_COSINE`: the slowest wave, and what else is of a residence's
        length, stays above them.
        """
        cosines = max(
            LEAST_COSINES, min(MOST_COSINES, int(self.residences / RESIDENCES_PER_COSINE))
        )
        transformed = dct(self.rates, norm="ortho")[1 : cosines + 1]
        squares: NDArray[np.float64] = transformed**2 * (self.duration_s / len(self.rates))
        return squares


def bins_of(residences: float) -> int:
    """How many bins a stretch of so many mean residence times is cut into."""
    return max(LEAST_BINS, min(MOST_BINS, round(BINS_PER_RESIDENCE * residences)))


def long_run_mean(stretches: Sequence[Stretch]) -> Estimate:
    """Mean of one rate over independent stretches, each weighted by its duration.

    All stretches are taken to scatter alike, so that their cosines give one variance, and so do their
    means around the common mean; the interval is Student's, at 95 %. Where the means differ by more than
    that at the level ``DIFFERENT``, as on a server that changed between runs, they alone give the
    variance. Raises ValueError of none.
    """
    if not stretches:
        raise ValueError("there is no mean of no stretch")
    lengths = np.array([s.duration_s for s in stretches])
    means = np.array([s.mean for s in stretches])
    value = float(lengths @ means / lengths.sum())
    within = np.concatenate([s.scatters() for s in stretches])
    between, others = float(lengths @ (means - value) ** 2), len(stretches) - 1
    freedom = len(within) + others
    variance = (float(within.sum()) + between) / freedom
    if others and between / others > f_quantile(DIFFERENT, others, len(within)) * within.mean():
        variance, freedom = between / others, others
    half = student_quantile(0.975, freedom) * math.sqrt(variance / float(lengths.sum()))
    method = stretches[0].method
    if others:
        method += f"; {len(stretches)} runs, each for its length"
    return Estimate(value, value - half, value + half, 0.95, stretches[0].unit, method)
