"""The clock on which arrivals with a memory are a Poisson process of rate 1.

By the time-rescaling theorem (Papangelou, Trans. Amer. Math. Soc. 165, 1972; Brown et al., Neural
Computation 14, 2002) that is the integral of their intensity given all arrivals so far: it grows by
-log P(gap > g | what came before) over a gap of length g, so that 1 - exp(-growth) is uniform and
independent from gap to gap. One set of tests then serves every law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincc

from loadgen.arrivals import weibull_shape
from loadgen.processes import Gamma, OnOff, Weibull

LEAST_SURVIVAL = 1e-300


@dataclass(frozen=True, eq=False)
class Rescaled:
    """Arrivals on their own clock, shape (n,), where it ends, and by how much an instant may be off."""

    instants: NDArray[np.float64]
    end: float
    resolution: float


def rescaled(
    process: Gamma | Weibull | OnOff, rate: float, instants_s: NDArray[np.float64], end_s: float
) -> Rescaled:
    """Arrivals of this law in [0, end_s), shape (n,), on the clock on which they are Poisson of rate 1.

    Sums of gaps are floats: a gap is known to the spacing of floats at ``end_s``, and stands for the
    mean over that. Of gaps far more variable than exponential ones that is not nothing.
    """
    gaps_s = np.diff(instants_s, prepend=0.0, append=end_s)
    if isinstance(process, OnOff):
        growth, resolution = _on_off_growth(process, rate, gaps_s), 0.0
    else:
        width_s = float(np.spacing(end_s))
        growth = _renewal_growth(process, rate, gaps_s, width_s)
        resolution = -math.log(_survival(process, rate, np.array([2.0 * width_s]))[0])
    clock = np.cumsum(growth)
    return Rescaled(clock[:-1], float(clock[-1]), resolution)


def _renewal_growth(
    process: Gamma | Weibull, rate: float, gaps_s: NDArray[np.float64], width_s: float
) -> NDArray[np.float64]:
    """The first gap is the rest of one that was under way."""
    shorter, longer = np.maximum(gaps_s - width_s, 0.0), gaps_s + width_s
    survival = (_survival(process, rate, shorter) + _survival(process, rate, longer)) / 2.0
    survival[0] = _residual_survival(process, rate, float(gaps_s[0]))
    return np.asarray(-np.log(np.maximum(survival, LEAST_SURVIVAL)))


def _survival(
    process: Gamma | Weibull, rate: float, gaps_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """P(gap > g)."""
    if isinstance(process, Gamma):
        shape = 1.0 / process.cv**2
        return np.asarray(gammaincc(shape, gaps_s * rate * shape))
    shape = weibull_shape(process.cv)
    return np.asarray(np.exp(-((gaps_s * rate * math.gamma(1.0 + 1.0 / shape)) ** shape)))


def _residual_survival(process: Gamma | Weibull, rate: float, gap_s: float) -> float:
    """P(rest of a gap under way > g): the rate times the integral of `_survival` from g on."""
    if isinstance(process, Gamma):
        shape = 1.0 / process.cv**2
        x = gap_s * rate * shape
        return float(gammaincc(shape + 1.0, x) - x / shape * gammaincc(shape, x))
    shape = weibull_shape(process.cv)
    return float(gammaincc(1.0 / shape, (gap_s * rate * math.gamma(1.0 + 1.0 / shape)) ** shape))


def _on_off_growth(process: OnOff, rate: float, gaps_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Forward recursion over the state that only the arrivals show.

    With A = Q - diag(rates) the probabilities p of the states become p exp(A g) over a gap without
    arrivals, whose sum is its probability, and are weighted by the rates at an arrival. A has two real
    eigenvalues m + d and m - d: exp(A g) = exp((m + d) g) (I + B + (I - B) exp(-2 d g)) / 2 with
    B = (A - m I) / d.
    """
    on, off = process.rates(rate)
    leave_on, leave_off = 1.0 / process.on_s, 1.0 / process.off_s
    mean = -(leave_on + on + leave_off + off) / 2.0
    half = (leave_off + off - leave_on - on) / 2.0
    d = math.sqrt(half**2 + leave_on * leave_off)
    b_on, b_on_off, b_off_on = half / d, leave_on / d, leave_off / d
    fading = np.exp(-2.0 * d * gaps_s).tolist()
    p_on = process.on_s / (process.on_s + process.off_s)
    growth = []
    for gap_s, rest in zip(gaps_s.tolist(), fading, strict=True):
        p_off = 1.0 - p_on
        same, other = (1.0 + rest) / 2.0, (1.0 - rest) / 2.0
        to_on = p_on * (same + b_on * other) + p_off * b_off_on * other
        to_off = p_off * (same - b_on * other) + p_on * b_on_off * other
        growth.append(-(mean + d) * gap_s - math.log(to_on + to_off))
        p_on = to_on * on / (to_on * on + to_off * off)
    return np.array(growth)
