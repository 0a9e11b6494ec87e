"""A whole search in virtual time, against a server whose parameters are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.engine import EngineLimits
from analysis.evidence import variance_ratio, work_demand
from analysis.search_rule import Design, Search, advance, begin
from analysis.sequential import EMPTY, Look
from analysis.simulate import Simulation, simulate
from analysis.step_time import StepTime
from loadgen.arrivals import SECOND_NS
from loadgen.stretches import Stretch, stretch_arrivals, stretch_seed
from loadgen.workload import Workload

AHEAD = 1.0
"""Share of the time so far that is simulated in advance at an unchanged rate."""
FEWEST_AHEAD = 20


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A search in virtual time: where it ended, what it saw and what it offered."""

    search: Search
    looks: tuple[Look, ...]
    stretches: tuple[Stretch, ...]

    @property
    def requests(self) -> int:
        """All that were offered, from the first to the last."""
        return self.looks[-1].arrivals


def design_for(
    workload: Workload,
    precision: float,
    theta: float,
    first_rate: float = 1.0,
    max_rate: float = 1000.0,
    max_duration_s: float = 1800.0,
) -> Design:
    """A design that knows the workload and nothing of the server."""
    return Design(
        precision=precision,
        theta=theta,
        kv_demand=workload.mean(work_demand(workload)),
        output_tokens=workload.mean(workload.output_tokens),
        variance_ratio=variance_ratio(workload),
        first_rate=first_rate,
        max_rate=max_rate,
        max_duration_s=max_duration_s,
    )


def rehearse_search(
    limits: EngineLimits,
    step_time: StepTime,
    workload: Workload,
    design: Design,
    seed: int,
    look_s: float = 0.5,
) -> Rehearsal:
    """The search as it goes live, with a look every ``look_s`` seconds.

    The simulator takes a whole schedule, so that the rate is first kept some way ahead; where the
    rule changes it, all is simulated again with the schedule as it was until then.
    """
    search = begin(design)
    looks: list[Look] = [EMPTY]
    stretches: list[Stretch] = []
    arrivals: list[NDArray[np.float64]] = []
    lengths: list[NDArray[np.int64]] = []
    while search.phase != "finished":
        done = len(stretches)
        for index in range(done, done + max(round(AHEAD * done), FEWEST_AHEAD)):
            stretch = Stretch(
                index=index,
                start_s=index * look_s,
                end_s=(index + 1) * look_s,
                rate=search.rate,
                seed=seed,
            )
            instants = stretch_arrivals(stretch)
            rng = np.random.default_rng([stretch_seed(seed, index), 1])
            stretches.append(stretch)
            arrivals.append(instants)
            lengths.append(workload.sample(rng, len(instants)))
        simulated = simulate(
            limits,
            step_time,
            np.concatenate(arrivals),
            np.concatenate(lengths),
            stretches[-1].end_s,
            ignore_eos=workload.ignore_eos,
        )
        rate = search.rate
        for look in looks_of(simulated, [s.end_s for s in stretches[done:]], looks[-1].t_s):
            looks.append(look)
            search = advance(design, search, looks)
            if search.phase == "finished" or search.rate != rate:
                break
        kept = len(looks) - 1
        del stretches[kept:], arrivals[kept:], lengths[kept:]
    return Rehearsal(search, tuple(looks), tuple(stretches))


def looks_of(simulated: Simulation, at_s: list[float], before_s: float) -> list[Look]:
    """Looks at increasing instants, the last look before them being at ``before_s``."""
    records = simulated.records
    arrived = np.array([r.scheduled_ns for r in records]) / SECOND_NS
    begun = [r for r in records if r.first_token_ns is not None]
    first = np.array([r.first_token_ns for r in begun], dtype=float) / SECOND_NS
    last = np.array([r.last_token_ns for r in begun], dtype=float) / SECOND_NS
    prompt, got = (
        np.array([getattr(r, name) for r in begun], dtype=float)
        for name in ("prompt_tokens", "output_tokens")
    )
    ended = np.array([r.outcome == "completed" for r in begun], dtype=bool)
    order = np.argsort(last[ended])
    left = last[ended][order]
    stays = (last - first)[ended][order]
    mean = np.cumsum(stays) / np.arange(1, len(stays) + 1)
    sample_s = np.array([s.t_ns for s in simulated.samples]) / SECOND_NS
    gauges = {
        name: np.array([getattr(s, name) for s in simulated.samples], dtype=float)
        for name in ("waiting", "running", "kv_usage")
    }
    looks = []
    for now_s in at_s:
        tokens = np.where(
            now_s >= first,
            1.0 + (got - 1.0) * np.clip((now_s - first) / np.maximum(last - first, 1e-9), 0, 1),
            0.0,
        )
        gone = int(np.searchsorted(left, now_s, "right"))
        stayed = np.clip(np.where(ended, np.minimum(last, now_s), now_s) - first, 0.0, None)
        inside = slice(*np.searchsorted(sample_s, [before_s, now_s]))
        looks.append(
            Look(
                t_s=now_s,
                arrivals=int(np.searchsorted(arrived, now_s)),
                departures=gone,
                waiting=int(gauges["waiting"][inside][-1]),
                waiting_least=int(gauges["waiting"][inside].min()),
                running=float(gauges["running"][inside].mean()),
                kv_usage=float(gauges["kv_usage"][inside].mean()),
                kv_work=float((prompt * tokens + tokens * (tokens - 1.0) / 2.0).sum()),
                token_work=float(tokens.sum()),
                residence_s=float(mean[gone - 1]) if gone else float("nan"),
                memory_s=float(stayed @ stayed) / max(float(stayed.sum()), 1e-9),
            )
        )
        before_s = now_s
    return looks
