"""How many requests fit the pool and the rows of an engine that sets room aside for outputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineLimits
from analysis.theory.operating_point import cut_off
from analysis.theory.reserved_demand import ReservedDemand, second_moment_of_reserved
from analysis.theory.room_walk import Charges, Room, play
from loadgen.workload import Workload

Floats = NDArray[np.float64]

SETTLED = 3
"""Rounds in which a walk and its rate agree."""


def usable_tokens(workload: Workload, limits: EngineLimits, demand: ReservedDemand) -> float:
    """The pool less the room u that the head of the queue leaves, see `analysis.theory.reservation`."""
    if demand.ratio < 1:
        return limits.pool_tokens - walked(workload, limits, demand)[1].unused_tokens
    kept = demand.kept
    u = workload.mean(kept * (2 * demand.asked - kept)) / (2 * workload.mean(kept))
    return limits.pool_tokens - u


def allowed_by_pool(law: Workload, demand: ReservedDemand, usable: float) -> float:
    """Requests per decode step that so many usable tokens allow."""
    # A request that fits an empty pool always finds one.
    return max(usable / law.mean(demand.reserved), 1 / law.mean(demand.decode_steps))


def walked(law: Workload, limits: EngineLimits, demand: ReservedDemand) -> tuple[float, Room]:
    """Requests per decode step that the pool allows where only a share is set aside, and its room."""
    x = allowed_by_pool(law, demand, limits.pool_tokens)
    for _ in range(SETTLED):
        room = play(law, charges_of(demand), x)
        x = allowed_by_pool(law, demand, limits.pool_tokens - room.unused_tokens)
    return x, room


def charges_of(demand: ReservedDemand) -> Charges:
    """What admission makes of each request, see `analysis.theory.room_walk`."""
    return Charges(
        asked=demand.asked,
        charged=demand.declared,
        kept=demand.kept,
        released=demand.kept + demand.decode_steps - demand.ratio * demand.shed,
    )


def in_rows(
    law: Workload, limits: EngineLimits, demand: ReservedDemand, by_pool: float
) -> tuple[float, float]:
    """Requests per decode step where so many fit the pool, and the share of time in which the pool, not
    the number of rows, stops admission."""
    if limits.max_num_seqs is None:
        return by_pool, 1.0
    in_batch = law.mean(demand.decode_steps)
    spread = second_moment_of_reserved(law, demand) / in_batch
    cv2 = spread / (law.mean(demand.reserved) / in_batch) ** 2 - 1
    running, share = cut_off(by_pool * in_batch, cv2, limits.max_num_seqs)
    return running / in_batch, share
