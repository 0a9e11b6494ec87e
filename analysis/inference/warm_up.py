"""Was the warm-up long enough? A cross-check by the departures themselves: MSER-5 (theory.md 6.3)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.frames import RunFrames

NEIGHBOURS = 5
BINS_PER_RESIDENCE = 20
"""Departures are counted in bins so short that chance alone seldom leaves a later cut than a warm-up of
three longest residence times; docs/statistics.md has the figures."""


def mser_cut(series: NDArray[np.float64]) -> int | None:
    """How many observations to leave out at the start of a series by MSER-5; None if it cannot say.

    The means of five neighbours each are taken, and so many left out that the variance of the rest over
    its number is least (White, Simulation 69, 1997). A least value in the second half says that the
    series is too short.
    """
    count = len(series) // NEIGHBOURS
    if count < 4:
        return None
    means = series[: count * NEIGHBOURS].reshape(count, NEIGHBOURS).mean(axis=1)
    # From the end on, so that one pass gives the variance of every rest.
    backwards = (means - means.mean())[::-1]
    number = np.arange(1, count + 1)
    variance = np.cumsum(backwards**2) / number - (np.cumsum(backwards) / number) ** 2
    # A rest of one or two has hardly a variance.
    criterion = (variance / number)[::-1][: count - 2]
    cut = int(np.argmin(criterion))
    return cut * NEIGHBOURS if cut <= count / 2 else None


def settled_s(frames: RunFrames) -> float | None:
    """When the departures of a run had settled by MSER-5, in seconds; None if they cannot say."""
    width_s = frames.mean_residence_s / BINS_PER_RESIDENCE
    if not 0.0 < width_s < math.inf:
        return None
    edges = np.arange(0.0, frames.end_s + width_s / 2, width_s)
    cut = mser_cut(np.histogram(frames.departures_s, edges)[0].astype(float))
    return None if cut is None else cut * width_s


def warm_up_warning(frames: RunFrames) -> str | None:
    """A sentence where MSER-5 leaves out more of the run than its warm-up did; None where not."""
    wanted_s = settled_s(frames)
    if wanted_s is None or wanted_s <= frames.run.warmup_s:
        return None
    return (
        f"the departures settled only at {wanted_s:.3g} s by MSER-5, the warm-up ended at "
        f"{frames.run.warmup_s:.3g} s: drift and capacity may hold a transient; repeat the run with a "
        "longer one, and see whether the server's speed was steady"
    )
