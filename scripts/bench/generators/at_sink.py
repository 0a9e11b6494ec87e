"""What a load looked like where it arrived, and by how much that may be chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DELIVERED = 0.99
ONE_SIDED_Z = 1.645


@dataclass(frozen=True)
class Arrivals:
    """Statistics of arrivals at a nominal rate; ``_se``: their standard error for Poisson ones.

    ``ks_p``: of the gaps against the exponential law of the nominal rate. ``dispersion``: variance over
    mean of the counts in windows of 1 s. ``correlation``: of successive gaps.
    """

    count: int
    share: float
    ks_p: float
    dispersion: float
    dispersion_se: float
    correlation: float
    correlation_se: float


def arrivals(instants_s: NDArray[np.float64], rate: float) -> Arrivals:
    """Of ascending instants, shape (n,). ``share`` is the achieved rate over the nominal one: n - 1 gaps
    over their time."""
    count = len(instants_s)
    if count < 3:
        return Arrivals(count, 0.0, 0.0, *[math.nan] * 4)
    gaps = np.diff(instants_s)
    length_s = float(instants_s[-1] - instants_s[0])
    counts = window_counts(instants_s - instants_s[0], length_s)
    windows = len(counts)
    return Arrivals(
        count=count,
        share=(count - 1) / length_s / rate,
        ks_p=float(stats.kstest(gaps * rate, "expon").pvalue),
        dispersion=dispersion(counts) if windows > 1 else math.nan,
        dispersion_se=math.sqrt(2 / (windows - 1)) if windows > 1 else math.nan,
        correlation=correlation(gaps),
        correlation_se=1 / math.sqrt(len(gaps)),
    )


def window_counts(instants_s: NDArray[np.float64], length_s: float) -> NDArray[np.int64]:
    """Arrivals in each whole second of [0, length_s)."""
    windows = int(length_s)
    whole = instants_s[(instants_s >= 0) & (instants_s < windows)]
    return np.bincount(whole.astype(np.int64), minlength=windows)


def dispersion(counts: NDArray[np.int64]) -> float:
    return float(counts.var(ddof=1) / counts.mean())


def correlation(gaps: NDArray[np.float64]) -> float:
    """Lag-1 autocorrelation of gaps."""
    apart = gaps - gaps.mean()
    return float(apart[1:] @ apart[:-1] / (apart @ apart))


def delivers(share: float, count: int, exact: bool) -> bool:
    """Was 99 % of the load delivered? The share of a known schedule is exact; of arrivals that a client
    drew itself the rate varies by 1/sqrt(n), and one-sided 95 % of that is granted."""
    granted = 0.0 if exact or not count else ONE_SIDED_Z / math.sqrt(count)
    return share >= DELIVERED - granted
