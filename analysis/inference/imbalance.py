"""What stateless round-robin costs: queues of several servers that get the same requests by count.

It evens out how many requests each gets, not how much work: one may have a queue while another has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.schedulers.frames import RunFrames, number_in_system


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What one replica had of one run, after the warm-up."""

    offered: float
    """req/s that arrived at it."""
    drift: Estimate
    """Growth of its number in system, req/s."""
    waiting: float
    in_system: float
    """Mean requests."""
    served: Estimate | None
    """req/s while its queue was never empty; None where that was too short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imbalance:
    """The replicas of one run beside each other, after the warm-up."""

    run: str
    load: float
    """Offered rate of all over the predicted critical rate."""
    replicas: tuple[ReplicaLoad, ...]
    apart: float
    """Most less fewest requests in the system of one replica, mean over time."""
    one_waits: float
    """Share of the time in which one has a queue while another has none."""
    beside_empty: float
    """Mean requests that wait while another's queue is empty."""

    @property
    def wait_s(self) -> float:
        """Mean seconds of a request's waiting that it spends so, by Little's law: what a balancer that
        looks at the queues could spare it at most."""
        offered = sum(replica.offered for replica in self.replicas)
        return self.beside_empty / offered if offered else math.nan


def last_seen(frames: RunFrames, column: str, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """A column of the engine's samples as it was last seen at each instant, shape of ``at_s``.

    Before the first sample that one counts; NaN without any.
    """
    times, values = frames.per_sample("t_s"), frames.per_sample(column)
    if not len(times):
        return np.full(len(at_s), math.nan)
    found: NDArray[np.float64] = values[np.searchsorted(times, at_s, "right").clip(1) - 1]
    return found


def imbalance(
    parts: Sequence[RunFrames],
    load: float,
    drifts: Sequence[Estimate],
    served: Sequence[Estimate | None],
) -> Imbalance:
    """The replicas of a run, of frames of each; what was not observed is NaN.

    Their queues are compared at the instants of the first one's samples, each as last seen.
    """
    run, end_s = parts[0].run, min(part.end_s for part in parts)
    times = parts[0].per_sample("t_s")
    at_s = times[(times >= run.warmup_s) & (times <= end_s)]
    duration_s = max(end_s - run.warmup_s, 1e-9)
    seen = len(at_s) > 0 and all(len(part.engine) for part in parts)
    if not seen:
        at_s = np.array([end_s])
    waiting = np.full((len(parts), len(at_s)), math.nan)
    if seen:
        waiting = np.array([last_seen(part, "waiting", at_s) for part in parts])
    inside = np.array([number_in_system(part, at_s) for part in parts])
    empty = (waiting == 0).any(axis=0)
    beside = np.where(empty, waiting.sum(axis=0), 0.0)
    arrived = [
        float(
            ((due := part.per_request("scheduled_s")) >= run.warmup_s).sum() - (due > end_s).sum()
        )
        for part in parts
    ]
    return Imbalance(
        run=run.id,
        load=load,
        replicas=tuple(
            ReplicaLoad(
                offered=arrived[i] / duration_s,
                drift=drifts[i],
                waiting=float(waiting[i].mean()),
                in_system=float(inside[i].mean()),
                served=served[i],
            )
            for i in range(len(parts))
        ),
        apart=float((inside.max(axis=0) - inside.min(axis=0)).mean()),
        one_waits=float((beside > 0).mean()) if seen else math.nan,
        beside_empty=float(beside.mean()) if seen else math.nan,
    )
