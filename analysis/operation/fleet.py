"""A whole fleet in virtual time, behind a router: what sizing by one replica is checked with.

The plain engine of `analysis.schedulers.scheduler` runs for every replica, as a router that looks
at the queues needs them all at one clock. It costs some microseconds per running request and step.
"""

from __future__ import annotations

import heapq
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.engine import Engine, EngineLimits, Request, Step
from analysis.schedulers.scheduler import engine_of
from analysis.schedulers.step_time import StepTime

Router = Literal["round-robin", "least-loaded"]


def fleet_waits(
    limits: EngineLimits,
    law: StepTime,
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    replicas: int,
    router: Router = "round-robin",
    ignore_eos: bool = True,
    lost_from_s: float | None = None,
) -> NDArray[np.float64]:
    """Seconds from arrival to the first token of each request, shape (n,), all served to the end.

    ``arrival_s`` increases, shape (n,); ``lengths`` as `analysis.schedulers.simulate.simulate`
    takes them. "round-robin" sends request i to replica i mod N, "least-loaded" to the one with the
    fewest requests in it, the first of equals. From ``lost_from_s`` on the last replica gets no
    more requests; what it has it serves. Raises ValueError for fewer replicas than the router
    needs, or an unknown one.
    """
    if router not in get_args(Router):
        raise ValueError(f"router {router!r} is none of {', '.join(get_args(Router))}")
    if replicas < (1 if lost_from_s is None else 2):
        raise ValueError("a fleet needs a replica, and two where one is lost")
    engines = [engine_of(limits) for _ in range(replicas)]
    held = [0] * replicas
    waits = np.full(len(arrival_s), np.nan)
    ends: list[tuple[float, int]] = []
    """Heap of (end of the running step, replica)."""
    steps: list[Step | None] = [None] * replicas

    def begin(index: int, now_s: float) -> None:
        steps[index] = step = engines[index].start()
        if step is not None:
            duration_s = law(step.tokens, step.kv_tokens, len(step.scheduled))
            heapq.heappush(ends, (now_s + duration_s, index))

    def finish() -> None:
        end_s, index = heapq.heappop(ends)
        for request, finished in _completed(engines[index], steps[index]):
            if request.outputs == 1:
                waits[request.id] = end_s - arrival_s[request.id]
            held[index] -= finished
        begin(index, end_s)

    for number, (now_s, row) in enumerate(zip(arrival_s.tolist(), lengths.tolist(), strict=True)):
        # A step that ends at the very instant begins the next one with the new request.
        while ends and ends[0][0] < now_s:
            finish()
        alive = replicas - (lost_from_s is not None and now_s >= lost_from_s)
        index = number % alive if router == "round-robin" else held.index(min(held[:alive]))
        prompt, output, declared = row
        engines[index].submit(Request(number, prompt, output, declared, ignore_eos))
        held[index] += 1
        if steps[index] is None:
            begin(index, now_s)
    while ends:
        finish()
    return waits


def _completed(engine: Engine, step: Step | None) -> list[tuple[Request, bool]]:
    assert step is not None
    return engine.complete(step)
