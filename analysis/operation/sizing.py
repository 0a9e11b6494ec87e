"""How many replicas a demand needs, so that a quantile of the wait meets a target.

Behind round-robin every one of N alike replicas gets every N-th request: Poisson arrivals then have gaps
of variance 1/N (Erlang's law), and a fleet is N times one replica. What one may carry is a share of its
critical rate; the engine model finds it at the predicted step time, for fleets whose sizes lie on
`ANCHORS`. Between them the room that is left, 1 - share, goes with ca2 + cd2, as the mean wait does in
heavy traffic (Kingman 1961; theory.md 6.1): 1/N plus the squared coefficient of variation of the work.

The critical rate enters by its interval alone: a server c times as fast as predicted has the same waits
at c times the rate, divided by c. The wait is the time from arrival to the first token, of
`analysis.operation.slo`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import normal_quantile, student_quantile
from analysis.operation.slo import Draws, ttft_s
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime

SURE = 0.95
"""How sure it is that the fleet that is advised meets the target: of one side."""
ANCHORS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
SHARES = (
    *(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.83, 0.86, 0.88, 0.9),
    *(0.915, 0.93, 0.945, 0.96, 0.975, 0.99),
)
"""Shares of critical at which a replica is simulated. Between two, the logarithm of the wait is taken
as straight. Nearer to 1 queues take longer to build up than a simulated day lasts."""
MOST_REPLICAS = 10_000

Days = Callable[[int], Sequence[Draws]]
"""Simulated days of one replica of so many: two or more, the same ones whenever asked."""


class CannotSize(ValueError):
    """No number of replicas meets the target; the message says why."""


@dataclass(frozen=True, slots=True)
class Share:
    """The share of the critical rate that a replica may carry, and its error (one standard error)."""

    value: float
    error: float


Allowed = Callable[[int, float], Share | None]
"""(replicas, target in seconds) -> the share; None where the target is met at no rate. It grows, or
stays, with the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The answer: replicas for a demand."""

    demand: float
    """req/s, of the whole fleet."""
    target_s: float
    replicas: int
    """Smallest fleet that meets the target for sure: with probability `SURE`."""
    likely: int
    """The smallest one if the prediction is right to the digit."""
    low: int
    high: int
    """Ends of the 95 % interval of the smallest fleet."""
    share: Share
    """What one of ``replicas`` may carry, of its critical rate."""
    load: Estimate
    """Share of the critical rate that the demand is, on ``replicas``."""
    fits: Estimate
    """req/s that ``replicas`` take before the wait misses the target."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


# -- the rule ------------------------------------------------------------------------------------


def smallest_fleet(demand: float, capacity: Callable[[int], float]) -> int:
    """The smallest N with N capacity(N) >= demand: ``capacity`` in req/s of one of N replicas.

    More demand never needs fewer, nor does less capacity, whatever ``capacity`` is.
    Raises CannotSize beyond `MOST_REPLICAS`.
    """
    for replicas in range(1, MOST_REPLICAS + 1):
        if replicas * capacity(replicas) >= demand:
            return replicas
    raise CannotSize(
        f"more than {MOST_REPLICAS} replicas for {demand:g} req/s: the target leaves hardly any room, "
        "or the rate is of another service"
    )


def fleet(
    demand: float,
    critical_rate: Estimate,
    target_s: float,
    allowed: Allowed,
    model_rate: float | None = None,
) -> Fleet:
    """Replicas for ``demand`` req/s, where ``critical_rate`` is of one of them.

    ``model_rate`` is the critical rate of the model that ``allowed`` comes from, where another one was
    measured: the server is taken to be faster or slower than the model by their ratio.
    The interval holds that of the critical rate and the error of ``allowed``, on the log scale, as
    independent. Raises CannotSize where the target is met at no rate, ValueError for a demand, target
    or critical rate that is not positive.
    """
    if not all(math.isfinite(x) and x > 0 for x in (demand, target_s, critical_rate.low)):
        raise ValueError("demand, target and critical rate (all of its interval) must be positive")
    rate = critical_rate.value
    model = rate if model_rate is None else model_rate
    spread = 0.0
    if critical_rate.level < 1.0:
        quantile = normal_quantile(0.5 + critical_rate.level / 2)
        spread = math.log(critical_rate.high / critical_rate.low) / 2 / quantile

    def capacity(replicas: int, deviations: float) -> float:
        share = carried(replicas, target_s * rate / model)
        speed = rate / model * math.exp(deviations * math.hypot(spread, share.error / share.value))
        carries = model * speed * carried(replicas, target_s * speed).value
        return min(carries, most(deviations))

    def most(deviations: float) -> float:
        # Nobody carries more than the critical rate: fleets too small for that need no simulation.
        return rate * math.exp(deviations * spread)

    def carried(replicas: int, wanted_s: float) -> Share:
        share = allowed(replicas, wanted_s)
        if share is None:
            raise CannotSize(
                f"the wait is longer than {wanted_s:.3g} s at any rate: a prompt alone takes as long; "
                "raise the target, or take a faster GPU"
            )
        return share

    def needed(deviations: float) -> int:
        def enough(replicas: int) -> float:
            hopeless = replicas * most(deviations) < demand
            return 0.0 if hopeless else capacity(replicas, deviations)

        return smallest_fleet(demand, enough)

    wide, sure = normal_quantile(0.975), normal_quantile(SURE)
    replicas = needed(-sure)
    ends = [replicas * capacity(replicas, z) for z in (-wide, 0.0, wide)]
    per_critical = demand / replicas / rate
    return Fleet(
        demand=demand,
        target_s=target_s,
        replicas=replicas,
        likely=needed(0.0),
        low=needed(wide),
        high=needed(-wide),
        share=carried(replicas, target_s * rate / model),
        load=Estimate(
            per_critical,
            per_critical * math.exp(-wide * spread),
            per_critical * math.exp(wide * spread),
            1.0 if spread == 0.0 else 0.95,
            "of critical",
            critical_rate.method,
        ),
        fits=Estimate(ends[1], ends[0], ends[2], 0.95, "req/s", "engine model, round-robin"),
    )


# -- what one replica may carry --------------------------------------------------------------------


def simulated_shares(
    limits: EngineLimits,
    law: StepTime,
    critical_rate: float,
    work_cv2: float,
    days: Days,
    quantile: float = 0.95,
    ignore_eos: bool = True,
) -> Allowed:
    """`Allowed` from the engine model at the step time ``law``, simulated when first asked for.

    ``critical_rate`` is that of one replica by the same ``law``; ``work_cv2`` the squared coefficient
    of variation of a request's work; ``days`` are asked for the sizes in `ANCHORS`.
    """
    drawn = cache(days)

    @cache
    def wait_s(anchor: int, day: int, index: int) -> float:
        draws = drawn(anchor)[day]
        return ttft_s(limits, law, draws, SHARES[index] * critical_rate, quantile, ignore_eos)

    def allowed(replicas: int, target_s: float) -> Share | None:
        anchor = nearest_anchor(replicas)
        shares = [
            crossing(partial(wait_s, anchor, day), target_s) for day in range(len(drawn(anchor)))
        ]
        if None in shares:
            return None
        found = np.array(shares, dtype=float)
        ratio = (1 / replicas + work_cv2) / (1 / anchor + work_cv2)
        rooms = (1 - found) * ratio
        # Student's wider tail, so that the caller may treat the error as a normal one.
        tail = student_quantile(0.975, len(found) - 1) / normal_quantile(0.975)
        error = tail * float(rooms.std(ddof=1)) / math.sqrt(len(found))
        value = 1 - float(rooms.mean())
        return Share(value, error) if value > 0 else None

    return allowed


def crossing(wait_s: Callable[[int], float], target_s: float) -> float | None:
    """The share up to which the wait stays within the target; ``wait_s`` is of an index into `SHARES`.

    A bisection over `SHARES`, then a straight line of log wait between two of them. It never falls when
    the target grows, whatever ``wait_s`` is: the bisections part where only the larger one holds.
    """
    low, high = 0, len(SHARES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wait_s(middle) <= target_s else (low, middle)
    if low == 0 and wait_s(0) > target_s:
        return None
    if high == len(SHARES):
        return SHARES[-1]
    below, above = wait_s(low), wait_s(high)
    part = 0.0
    if math.isfinite(above) and 0 < below < above:
        part = math.log(target_s / below) / math.log(above / below)
    return SHARES[low] + (SHARES[high] - SHARES[low]) * min(part, 1.0)


def nearest_anchor(replicas: int) -> int:
    """The size in `ANCHORS` nearest to ``replicas``, as a ratio."""
    after = min(bisect_left(ANCHORS, replicas), len(ANCHORS) - 1)
    before = max(after - 1, 0)
    nearer = replicas**2 < ANCHORS[before] * ANCHORS[after]
    return ANCHORS[before if nearer else after]


def squared_variation(weight: NDArray[np.float64], work: NDArray[np.float64]) -> float:
    """Squared coefficient of variation of ``work`` under ``weight``, both of shape (n,)."""
    mean = float(weight @ work)
    return float(weight @ (work - mean) ** 2) / mean**2
