"""Which rate to offer next, and when to stop: the search for a critical rate from what was seen.

One continuous run. *raise*: double the rate until a queue stays. *fill*: overload a little more
until the queue is long enough not to vanish by chance. *warm-up*: hold it while the pool forgets
how it was filled. *above*: measure the service rate at 1 + theta of it. *below*: measure on at
1 - theta while the queue lasts. Measured is only while somebody always waits, so that the two sides
differ in what arrives and in nothing else: the batches of both make the critical rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.inference.sequential import (
    CONTROLLED_BATCHES,
    LEVEL,
    MIN_BATCHES,
    Look,
    Work,
    interval,
    narrow,
    trend,
    work_rates,
)
from analysis.numbers.estimate import Estimate

Phase = Literal["raise", "fill", "warm-up", "above", "below", "finished"]
Side = Literal["above", "below"]
Outcome = Literal["found", "cannot say"]

RAISE = 2.0
FILL = 1.5
QUEUE_RISK = 0.01
"""A queue held at 1 + theta vanishes by chance with this probability."""
MIN_BACKLOG_LOOKS = 2
WARMUP_MEMORIES, BATCH_MEMORIES = 5, 1
"""In units of `Look.memory_s`; what other choices cost and bring is in docs/search.md."""
MOST_LOST = 8
MOST_UNSTEADY = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What is wanted and what is known before: the workload alone, nothing of the server."""

    precision: float
    """Half width of the 95 % interval over the critical rate."""
    theta: float
    demand: Work
    """Means per request of the designed law."""
    variance_ratio: float
    """ca2 + cd2 of theory.md 6.1."""
    first_rate: float = 1.0
    max_rate: float = 1000.0
    max_duration_s: float = 1800.0

    @property
    def queue(self) -> float:
        """Requests that must wait: exp(-2 theta q / (ca2 + cd2)) is the chance to lose them."""
        return math.log(1 / QUEUE_RISK) * self.variance_ratio / (2 * self.theta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A stretch of constant rate in which somebody always waited, after the warm-up."""

    side: Side
    rate: float
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Where the search stands. ``rate`` is to be offered from now on."""

    phase: Phase
    rate: float
    since_s: float = 0.0
    """When this phase, or its rate, began."""
    backlog_s: float = math.nan
    batch_s: float = math.nan
    measured: tuple[Measured, ...] = ()
    lost: int = 0
    unsteady: int = 0
    drained: bool = False
    outcome: Outcome | None = None
    reason: str = ""

    @property
    def warm(self) -> bool:
        return not math.isnan(self.batch_s)


def begin(design: Design) -> Search:
    """A search before its first look: it raises the rate."""
    return Search(phase="raise", rate=design.first_rate)


def advance(design: Design, search: Search, looks: Sequence[Look]) -> Search:
    """The search after its newest look. Pure: the same looks lead to the same search."""
    look = looks[-1]
    if search.phase == "finished":
        return search
    if look.t_s >= design.max_duration_s:
        return _stopped(search, f"after {look.t_s:.0f} s {_lacking(design, search, looks)}")
    if search.phase == "raise":
        return _raise(design, search, looks)
    if look.waiting_least == 0:
        return _queue_lost(design, search, looks)
    if search.phase == "fill":
        if look.waiting < design.queue:
            return search
        if search.warm:
            return _measure(design, search, look, "above", _known(design, search, looks))
        return _held(design, replace(search, phase="warm-up"), looks)
    if search.phase == "warm-up":
        return _warm_up(design, search, looks)
    return _judge(design, _grown(search, look.t_s), looks)


# -- until there is a queue ----------------------------------------------------------------------


def _raise(design: Design, search: Search, looks: Sequence[Look]) -> Search:
    look = looks[-1]
    since_s = _backlog_since(looks)
    usual_s = 0.0 if math.isnan(look.residence_s) else look.residence_s / 2
    queued = len(looks) > MIN_BACKLOG_LOOKS and looks[-1 - MIN_BACKLOG_LOOKS].t_s >= since_s
    full = look.waiting_least > 0 and look.waiting >= design.queue
    if full or (queued and look.t_s - since_s >= usual_s):
        rate = FILL * _recent(design, looks)
        return replace(search, phase="fill", rate=rate, since_s=look.t_s, backlog_s=since_s)
    highest = search.rate >= design.max_rate
    patience = WARMUP_MEMORIES if highest else 1.0
    seen = look.departures > 0 and look.t_s - search.since_s >= patience * look.residence_s
    if not seen or look.waiting >= design.queue / 4:
        return search
    if highest:
        return _stopped(
            search, f"no queue stays at {search.rate:.4g} req/s, the highest rate allowed"
        )
    return replace(search, rate=min(RAISE * search.rate, design.max_rate), since_s=look.t_s)


def _backlog_since(looks: Sequence[Look]) -> float:
    """Since when somebody waited in every sample; infinite if nobody waits."""
    since_s = math.inf
    for earlier, look in zip(reversed(looks[:-1]), reversed(looks), strict=False):
        if look.waiting_least == 0:
            break
        since_s = earlier.t_s
    return since_s


def _recent(design: Design, looks: Sequence[Look]) -> float:
    """Requests per second served lately, by output tokens or by KV demand: the larger, since a filling
    pool is young."""
    look = looks[-1]
    span_s = max(look.residence_s if look.departures else 0.0, looks[-1].t_s - looks[-2].t_s)
    edges = np.array([max(look.t_s - span_s, 0.0), look.t_s])
    served = float(work_rates(looks, edges, design.demand)[0, :2].max())
    # Before the first tokens nothing is served: any rate will do that keeps a queue.
    return served if served > 0 else design.first_rate


def _held(design: Design, search: Search, looks: Sequence[Look]) -> Search:
    rate = (1 + design.theta) * _recent(design, looks)
    return replace(search, rate=rate, since_s=looks[-1].t_s)


def _warm_up(design: Design, search: Search, looks: Sequence[Look]) -> Search:
    look = looks[-1]
    if look.departures and look.t_s - search.backlog_s >= WARMUP_MEMORIES * look.memory_s:
        # Work is known at looks only: batches as short would repeat one another.
        shortest_s = 2 * (look.t_s - looks[-2].t_s)
        warmed = replace(search, batch_s=max(BATCH_MEMORIES * look.memory_s, shortest_s))
        edges = np.linspace(search.backlog_s, look.t_s, CONTROLLED_BATCHES + 1)
        known = interval(work_rates(looks, edges, design.demand))
        return _measure(design, warmed, look, "above", known.value)
    if look.waiting < design.queue / 2:
        return replace(search, phase="fill", rate=FILL * _recent(design, looks), since_s=look.t_s)
    if look.departures and look.t_s - search.since_s >= look.residence_s:
        return _held(design, search, looks)
    return search


def _queue_lost(design: Design, search: Search, looks: Sequence[Look]) -> Search:
    """Somebody should have waited and nobody did: fill again; below the critical rate it drained."""
    drained = search.drained or search.phase == "below"
    lost = search.lost + (search.phase != "below")
    if lost > MOST_LOST:
        return _stopped(search, f"the queue vanished {lost} times: the server does not stay loaded")
    again = replace(search, lost=lost, drained=drained, since_s=looks[-1].t_s)
    if search.warm:
        return replace(again, phase="fill", rate=FILL * _known(design, search, looks))
    return replace(again, phase="raise", rate=FILL * search.rate, backlog_s=math.nan)


# -- with a queue --------------------------------------------------------------------------------


def _measure(design: Design, search: Search, look: Look, side: Side, rate: float) -> Search:
    """A new stretch from now on at theta above, or below, this rate."""
    offered = (1 + design.theta if side == "above" else 1 - design.theta) * rate
    stretch = Measured(side=side, rate=offered, start_s=look.t_s, end_s=look.t_s)
    return replace(
        search, phase=side, rate=offered, since_s=look.t_s, measured=(*search.measured, stretch)
    )


def _grown(search: Search, now_s: float) -> Search:
    *before, last = search.measured
    return replace(search, measured=(*before, replace(last, end_s=now_s)))


def _judge(design: Design, search: Search, looks: Sequence[Look]) -> Search:
    """Measured long enough on this side? On both? Then precise enough, and steady?"""
    look = looks[-1]
    whole = capacity(design, search, looks)
    above, below = (capacity(design, search, looks, side) for side in ("above", "below"))
    grows = narrow(above, design.theta / 2) and above.high < search_rate(search, "above")
    drains = narrow(below, design.theta / 2) and below.low > search_rate(search, "below")
    if search.phase == "above" and narrow(above, design.theta / 2) and not grows:
        return _measure(design, search, look, "above", above.value)
    if search.phase == "above" and grows and not (drains and narrow(whole, design.precision)):
        return search if drains else _measure(design, search, look, "below", whole.value)
    if search.phase == "below" and narrow(below, design.theta / 2) and not drains:
        return _measure(design, search, look, "below", whole.value)
    finished = grows and drains and narrow(whole, design.precision)
    change = trend(batches(design, search, looks)) if finished else None
    if change is not None and abs(change.value) <= design.precision:
        return replace(search, phase="finished", outcome="found")
    if change is not None and not change.low <= 0 <= change.high:
        return _unsteady(design, search, looks)
    if search.phase == "below" and look.waiting < design.queue / 4:
        return replace(search, phase="fill", rate=FILL * whole.value, since_s=look.t_s)
    return search


def _unsteady(design: Design, search: Search, looks: Sequence[Look]) -> Search:
    """The rate changed while it was measured: measured anew, or given up."""
    if search.unsteady == MOST_UNSTEADY:
        return _stopped(search, _changed(design, search, looks))
    again = replace(search, measured=(), unsteady=search.unsteady + 1)
    return replace(again, phase="fill", rate=FILL * _recent(design, looks), since_s=looks[-1].t_s)


def _changed(design: Design, search: Search, looks: Sequence[Look]) -> str:
    """The reason that the service rate changed; empty where that is not certain."""
    change = trend(batches(design, search, looks))
    if change is None or change.low <= 0 <= change.high:
        return ""
    percent = f"{100 * change.value:+.1f} +- {100 * change.half_width:.1f} %"
    return f"the service rate is not steady: it changed by {percent} while measured"


def batches(
    design: Design, search: Search, looks: Sequence[Look], side: Side | None = None
) -> NDArray[np.float64]:
    """Service rates by each kind of work of the whole batches so far, on one side or both: (n, 3)."""
    parts = [np.empty((0, 3))]
    for stretch in search.measured:
        count = int((stretch.end_s - stretch.start_s) / search.batch_s + 1e-9)
        if count and side in (None, stretch.side):
            edges = stretch.start_s + search.batch_s * np.arange(count + 1, dtype=np.float64)
            parts.append(work_rates(looks, edges, design.demand))
    return np.concatenate(parts)


def capacity(
    design: Design, search: Search, looks: Sequence[Look], side: Side | None = None
) -> Estimate:
    """Service rate under backlog, req/s, with its 95 % interval; value NaN before the first batch."""
    return interval(batches(design, search, looks, side))


def _known(design: Design, search: Search, looks: Sequence[Look]) -> float:
    """The service rate by all batches so far; by the last residence where there is none."""
    value = capacity(design, search, looks).value
    return _recent(design, looks) if math.isnan(value) else value


def search_rate(search: Search, side: Side) -> float:
    """The rate offered last on a side, req/s; NaN before there was one."""
    offered = [stretch.rate for stretch in search.measured if stretch.side == side]
    return offered[-1] if offered else math.nan


def _stopped(search: Search, reason: str) -> Search:
    return replace(search, phase="finished", outcome="cannot say", reason=reason)


def _lacking(design: Design, search: Search, looks: Sequence[Look]) -> str:
    if search.phase == "raise":
        return f"no queue stays, at {search.rate:.4g} req/s; allow it longer"
    if not search.warm:
        return "the server is still warming up; allow it longer"
    rates = batches(design, search, looks)
    return _changed(design, search, looks) or (
        f"the interval at {100 * LEVEL:.0f} % is not yet narrow enough, or the rate not steady enough "
        f"({len(rates)} batches, at least {MIN_BATCHES} on each side); allow it longer"
    )
