"""Admission where a share rho < 1 of the outputs to come is set aside: a walk of the free room.

Between two decode steps the room A, free tokens less what is set aside, loses 1 - rho per running
request; a completion gives back what its request held and had set aside, R tokens. Only after a
completion does SGLang look at the head of the queue again, and within that pass each prompt that it
admits is charged with its *whole* declared output (`PrefillAdder`); from the next pass on it counts
with rho and keeps a tokens. So a pass leaves room unused that a fluid would fill. How much, and how many
passes there are, has no closed form: the walk is played, with the same draws every time.

With A below nothing nobody is admitted, and A falls on by y with the chance exp(-eta y), where

    1 - E[exp(-eta R)] = eta E[R - a]:

the adjustment coefficient of ruin theory (Cramer and Lundberg), whatever the rate of completions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from loadgen.workload import Workload

Floats = NDArray[np.float64]

COMPLETIONS = 20_000
"""Of a walk: what it says of x then scatters by 0.3 %."""
SPARE_HEADS = 2
"""Times as many heads of the queue are drawn: the walk takes as many as complete, but for chance."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a walk met, of one engine."""

    unused_tokens: float
    """Mean room between decode steps."""
    passes: float
    """Passes of admission that admit somebody, per request."""
    overdrawn: float
    """How often per decode step the room falls below nothing, once between two admissions."""


@dataclass(frozen=True, slots=True, eq=False)
class Charges:
    """What admission makes of one request, per support point of the law, shape (n,)."""

    asked: Floats
    """It is admitted where that is no more than the room that its pass has left."""
    charged: Floats
    """Taken out of what its pass has left."""
    kept: Floats
    """Taken out of the room itself."""
    released: Floats
    """Given back when it completes."""


def play(workload: Workload, charges: Charges, x: float, seed: int = 0) -> Room:
    """The walk under ``x`` completions per decode step; what it admits keeps it where it is."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(workload.weight)
    # A Poisson number in each step; steps without any are not listed.
    instants = np.cumsum(rng.exponential(1 / x, COMPLETIONS))
    at, completed = np.unique(np.floor(instants), return_counts=True)
    steps = float(at[-1]) + 1

    def drawn(count: int) -> NDArray[np.int64]:
        points = np.searchsorted(cumulative, rng.random(count) * cumulative[-1])
        return np.asarray(points.clip(max=len(cumulative) - 1))

    freed = np.concatenate([[0.0], np.cumsum(charges.released[drawn(COMPLETIONS)])])
    ends = np.cumsum(completed)
    heads = drawn(SPARE_HEADS * COMPLETIONS)
    asked, charged, kept = (
        c[heads].tolist() for c in (charges.asked, charges.charged, charges.kept)
    )
    per_step = x * workload.mean(charges.released - charges.kept)
    given = (freed[ends] - freed[ends - completed]).tolist()
    waits = np.diff(at, prepend=-1).tolist()
    room = area = 0.0
    head = passes = overdrawn = 0
    above = True
    for steps_since, back in zip(waits, given, strict=True):
        # Each of these steps takes its share; with the last one somebody completes.
        area += steps_since * room - per_step * steps_since * (steps_since - 1) / 2
        room -= per_step * steps_since
        if above and room < 0:
            # Once until somebody is admitted: the chance to fall on holds what comes back meanwhile.
            overdrawn, above = overdrawn + 1, False
        room += back
        left, first = room, head
        while asked[head] <= left:
            left -= charged[head]
            room -= kept[head]
            head += 1
        if head > first:
            passes, above = passes + 1, True
    return Room(area / steps, passes / max(head, 1), overdrawn / steps)


def ruin_exponent(workload: Workload, charges: Charges) -> float:
    """eta of the module, per token. Raises ValueError where no request decodes."""
    released = charges.released
    grown = workload.mean(released - charges.kept)
    if not grown > 0:
        raise ValueError(f"{workload.name}: no request decodes")

    def drift(eta: float) -> float:
        return -workload.mean(np.expm1(-eta * released)) - eta * grown

    # Positive just above 0, as more is released than was grown; negative from 1 / E[grown] on.
    least = 1e-6 * workload.mean(charges.kept) / workload.mean(released * released)
    return float(brentq(drift, least, 2 / grown))
