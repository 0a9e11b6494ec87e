"""A load whose rate is decided as it goes, in stretches of constant rate.

Each is a Poisson process of its own seed. A stretch is drawn when its rate is decided, before it
begins, and nothing that happens in it changes it: within a stretch the loop stays open. Together the
stretches are a Poisson process of a piecewise constant rate, because such a process has no memory
across their borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import poisson


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Poisson arrivals of one rate, in requests per second, on [start_s, end_s) of the load's clock."""

    index: int
    start_s: float
    end_s: float
    rate: float
    seed: int
    """Of the whole load; the stretch has the seed that `stretch_seed` makes of it."""


def stretch_seed(seed: int, index: int) -> int:
    """A seed of its own for each stretch of a load."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def stretch_arrivals(stretch: Stretch) -> NDArray[np.float64]:
    """Instants of the stretch on the load's clock, increasing, shape (n,)."""
    own_s = stretch.end_s - stretch.start_s
    return stretch.start_s + poisson(stretch.rate, own_s, stretch_seed(stretch.seed, stretch.index))


def operational(stretches: Sequence[Stretch], at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected arrivals until each instant, shape of ``at_s``.

    On this clock the load is a Poisson process of rate 1, whatever the stretches: all of them can be
    tested together.
    """
    edges = np.array([stretches[0].start_s, *(s.end_s for s in stretches)])
    expected = np.cumsum([0.0, *(s.rate * (s.end_s - s.start_s) for s in stretches)])
    result: NDArray[np.float64] = np.interp(at_s, edges, expected)
    return result
