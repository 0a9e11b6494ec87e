"""The hypothesis H9 on a simulated server: burstiness moves the queue, not the critical rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.inference.capacity import backlogged_window, work_served
from analysis.schedulers.step_time import exact_step_time
from analysis.theory.critical_rate import predict
from analysis.verdicts.evidence import work_demand
from harness.hypotheses.hypothesis_config import HypothesisConfig
from harness.hypotheses.hypothesis_verdict import ANYWHERE, Part, Verdict, over_seeds
from harness.rehearsals.rehearsal import SimulatedServer, offered
from loadgen.processes import POISSON, Process
from loadgen.records import Run
from loadgen.workload import Workload

OVERLOAD, BELOW, ABOVE, QUEUE_AT = 1.3, 0.95, 1.05, 0.9
CUT = 0.05
"""Share of each run that is left out at its beginning."""


@dataclass(frozen=True)
class Seen:
    """One run after its first twentieth: what N(t) grew by in req/s, how many waited on average, the
    share of time with any, and the service rate of a queue that was never empty (NaN where it was)."""

    growth: float
    waiting: float
    with_any: float
    served: float


def watched(
    server: SimulatedServer,
    workload: Workload,
    process: Process,
    rate: float,
    requests: int,
    seed: int,
) -> Seen:
    """One simulated run of so many requests at ``rate`` req/s under this law of arrivals."""
    horizon_s = requests / rate
    run = Run(
        id="arrivals",
        arrival_rate=rate,
        horizon_s=horizon_s,
        warmup_s=CUT * horizon_s,
        seed=seed,
        arrivals=process,
    )
    frames = offered(server, workload, run, test_load=False).frames
    later = frames.per_sample("t_s") >= run.warmup_s
    waiting, running = (frames.per_sample(name)[later] for name in ("waiting", "running"))
    inside = waiting + running
    window = backlogged_window(frames, run.warmup_s)
    served = math.nan
    if window is not None and window.duration_s > 0.8 * (horizon_s - run.warmup_s):
        served = work_served(frames, window, workload.mean(work_demand(workload))).estimate.value
    grown = float(inside[-1] - inside[0]) / (horizon_s - run.warmup_s)
    return Seen(grown, float(waiting.mean()), float((waiting > 0).mean()), served)


def h9(config: HypothesisConfig) -> Verdict:
    """The critical rate within 1 % of that under Poisson arrivals, growth above it and none below.

    The law of each pair of runs is the only thing that differs: same lengths, from the same seeds.
    """
    engine = config.engine
    if engine is None or not config.arrivals:
        raise ValueError("H9 needs the sections engine and arrivals")
    workload = engine.workloads[0].build()
    server = SimulatedServer(engine.limits(), engine.step_time.law())
    closed = predict(workload, server.limits, exact_step_time(server.law), "engine", "P1")
    laws: list[Process] = [POISSON, *(each.law() for each in config.arrivals)]
    seeds = range(1, engine.seeds + 1)

    def seen(law: Process, rate: float) -> list[Seen]:
        return [watched(server, workload, law, rate, engine.requests, seed) for seed in seeds]

    served = [[s.served for s in seen(law, OVERLOAD * closed.critical_rate.value)] for law in laws]
    critical = over_seeds(served[0]).value
    queues = [[s.waiting for s in seen(law, QUEUE_AT * critical)] for law in laws]
    parts = []
    for law, rates, queue in zip(laws[1:], served[1:], queues[1:], strict=True):
        over = over_seeds(_shares(rates, served[0]))
        parts.append(Part(f"{law.text}: critical rate over Poisson's", over, (0.99, 1.01)))
        for load, allowed in ((BELOW, (-math.inf, 0.01)), (ABOVE, (0.03, math.inf))):
            grown = over_seeds([s.growth / critical for s in seen(law, load * critical)])
            what = f"{law.text}: growth of N(t) at {load} of it, over the critical rate"
            parts.append(Part(what, grown, allowed))
        what = f"{law.text}: requests that wait at {QUEUE_AT} of it, over Poisson's"
        parts.append(Part(what, over_seeds(_shares(queue, queues[0])), ANYWHERE))
    return Verdict("H9", tuple(parts))


def _shares(values: Sequence[float], of: Sequence[float]) -> list[float]:
    """Of runs with the same seed."""
    return [one / other for one, other in zip(values, of, strict=True)]
