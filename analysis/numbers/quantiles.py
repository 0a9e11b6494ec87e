"""Quantiles of the usual laws, for the many small questions of a verdict; each is computed once.

From scipy.special: scipy.stats has the same numbers, and takes a second to import.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri, fdtri, ndtri, stdtrit


@cache
def normal_quantile(probability: float) -> float:
    """Of the standard normal law."""
    return float(ndtri(probability))


@cache
def student_quantile(probability: float, freedom: float) -> float:
    """Of Student's t."""
    return float(stdtrit(freedom, probability))


@cache
def f_quantile(probability: float, above: float, below: float) -> float:
    """Of Fisher's F with so many degrees of freedom of numerator and denominator."""
    return float(fdtri(above, below, probability))


def chi2_quantile(probability: float, freedom: float) -> float:
    """Of chi-square. Not kept: it is asked for by those who search for a probability."""
    return float(chdtri(freedom, 1.0 - probability))


def normal_density(x: ArrayLike) -> NDArray[np.float64]:
    """Of the standard normal law at ``x``, of its shape."""
    return np.asarray(np.exp(-np.square(x, dtype=float) / 2) / math.sqrt(2 * math.pi))
