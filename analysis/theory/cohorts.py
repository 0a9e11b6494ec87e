"""The model of arXiv 2606.15555 step by step, for any law of output lengths (theory.md 3.1).

Greedy admission, constant memory, evicted requests start anew, one token per request and iteration.
Requests that were admitted together are one cohort: an amount of requests, of which the law says how
many are still there. Evictions take the least progressed first, so that a cohort is cut as a whole.
Against these steps the closed forms of `analysis.theory.congestion` and the spectrum are held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.theory.congestion import Floats, Ints
from analysis.theory.spectrum import survival_weights

LOST, LARGE = 1e-13, 1e-3
"""A disturbance of this share of the equilibrium is lost in rounding, or large enough for evictions."""


@dataclass(frozen=True, eq=False)
class Law:
    """Output lengths and their shares, shape (n,) each, and what requests hold.

    ``weights``: W_j of `spectrum.survival_weights`, shape (L,); ``alive``: share of requests with more
    than j outputs, shape (L,).
    """

    weights: Floats
    alive: Floats

    @staticmethod
    def of(prompt_tokens: float, output_tokens: Ints, shares: Floats) -> Law:
        """The law of a prompt length and of output lengths with their shares, shape (n,) each."""
        weights = survival_weights(prompt_tokens, output_tokens, shares)
        alive = survival_weights(1.0, output_tokens, shares, reserved_tokens=np.zeros(len(shares)))
        return Law(weights, alive)

    def equilibrium(self, pool_tokens: float) -> Floats:
        """Cohorts of the eviction-free rate x* = M / sum(W), shape (L,)."""
        return np.full(len(self.weights), pool_tokens / float(self.weights.sum()))


@dataclass(frozen=True, eq=False)
class Steps:
    """What happened in each iteration: requests and tokens held after it, shape (iterations,) each.

    ``cohorts``: what was left of each cohort at the end, youngest first, shape (L,).
    """

    admitted: Floats
    completed: Floats
    evicted: Floats
    held_tokens: Floats
    cohorts: Floats


def spaced(law: Law, pool_tokens: float, cohorts: int) -> Floats:
    """So many equal cohorts, equally spaced, that fill the pool in their last iteration, shape (L,)."""
    longest = len(law.weights)
    ages = np.arange(1, cohorts + 1) * (longest // cohorts) - 1
    start = np.zeros(longest)
    start[ages] = pool_tokens / float(law.weights[ages].sum())
    return start


def run(
    law: Law,
    pool_tokens: float,
    start: Floats,
    iterations: int,
    *,
    cap: float = np.inf,
    whole: bool = False,
) -> Steps:
    """So many iterations from cohorts ``start``, shape (L,), youngest first, with a queue never empty.

    ``cap``: most requests admitted in an iteration. ``whole``: requests are not divided, which a law of
    one length allows. In each iteration all advance and the finished leave; if the others exceed the
    pool the youngest cohorts are cut until they fit; then the queue is admitted.
    """
    weights, alive = law.weights, law.alive
    ends = alive - np.r_[alive[1:], 0.0]
    y = np.array(start, dtype=float)
    rows = np.empty((4, iterations))
    for i in range(iterations):
        completed = float(ends @ y)
        y[1:] = y[:-1]
        y[0] = 0.0
        held = weights * y
        excess = float(held.sum()) - pool_tokens
        evicted = _evict(y, held, law, excess, whole) if excess > 0 else 0.0
        free = pool_tokens - float(weights @ y)
        admitted = min(max(free, 0.0) / weights[0], cap)
        if whole:
            admitted = float(np.floor(admitted + 1e-9))
        y[0] = admitted
        rows[:, i] = admitted, completed, evicted, float(weights @ y)
    return Steps(rows[0], rows[1], rows[2], rows[3], y)


def _evict(y: Floats, held: Floats, law: Law, excess: float, whole: bool) -> float:
    """Cut the youngest cohorts in place until ``excess`` tokens are free; how many were evicted."""
    upto = np.cumsum(held)
    last = int(np.searchsorted(upto, excess))
    before = y.copy()
    y[:last] = 0.0
    cut = (excess - (float(upto[last - 1]) if last else 0.0)) / law.weights[last]
    y[last] -= min(np.ceil(cut - 1e-9) if whole else cut, y[last])
    return float(law.alive @ (before - y))


def growth_per_iteration(law: Law, start: Floats, iterations: int) -> float:
    """By which factor a small disturbance of the equilibrium grows in an iteration, as simulated.

    ``start``: the disturbance of the cohorts relative to the equilibrium, shape (L,), about 1e-10. Its
    size is that of L iterations together, and its growth that of the later half of what is left while it
    is neither lost in rounding nor large enough for evictions, `LOST` and `LARGE` of the equilibrium.

    Raises ValueError where fewer than two times L iterations are left.
    """
    pool = float(law.weights.sum())
    steps = run(law, pool, law.equilibrium(pool) * (1 + start), iterations)
    longest = len(law.weights)
    off = (steps.admitted - 1)[: iterations // longest * longest].reshape(-1, longest)
    size = np.sqrt((off**2).mean(axis=1))
    left = np.flatnonzero((size > LARGE) | (size < LOST))
    size = size[: int(left[0]) if len(left) else len(size)]
    later = size[min(len(size) // 2, max(len(size) - 2, 0)) :]
    if len(later) < 2:
        raise ValueError("the disturbance left the linear range at once: start from a smaller one")
    slope = np.polyfit(np.arange(len(later)), np.log(later), 1)[0]
    return float(np.exp(slope / longest))
