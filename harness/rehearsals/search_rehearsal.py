"""A whole search in virtual time, against a server whose parameters are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.inference.search_rule import Design, Search, advance, begin
from analysis.inference.sequential import EMPTY, Look, Served
from analysis.schedulers.simulate import Simulation, simulate
from analysis.verdicts.evidence import variance_ratio, work_demand
from harness.rehearsals.rehearsal import SimulatedServer
from loadgen.arrivals import SECOND_NS
from loadgen.records import Run
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
    prompts, outputs = workload.prompt_tokens, workload.output_tokens
    return Design(
        precision=precision,
        theta=theta,
        demand=(
            workload.mean(work_demand(workload)),
            workload.mean(outputs),
            workload.mean(prompts),
        ),
        variance_ratio=variance_ratio(workload),
        first_rate=first_rate,
        max_rate=max_rate,
        max_duration_s=max_duration_s,
    )


def rehearse_search(
    server: SimulatedServer, workload: Workload, design: Design, seed: int, look_s: float = 0.5
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
        run = Run(
            id="search",
            arrival_rate=search.rate,
            horizon_s=stretches[-1].end_s,
            warmup_s=0.0,
            seed=seed,
        )
        simulated = simulate(
            server.limits,
            server.law,
            np.concatenate(arrivals),
            np.concatenate(lengths),
            run.horizon_s,
            ignore_eos=workload.ignore_eos,
            step_factors=server.step_factors(seed),
            slowdown=None if server.slowdown is None else server.slowdown(run),
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
    """Looks at increasing instants, the last look before them being at ``before_s``.

    Work is that of the steps ended by then, as a client counts it: a request that was preempted receives
    nothing meanwhile. Of a prompt computed in parts, every part's step counts.
    """
    records, steps = simulated.records, simulated.steps
    arrived = np.array([r.scheduled_ns for r in records]) / SECOND_NS
    begun = [r for r in records if r.first_token_ns is not None]
    first = np.array([r.first_token_ns for r in begun], dtype=float) / SECOND_NS
    last = np.array([r.last_token_ns for r in begun], dtype=float) / SECOND_NS
    prompt = np.array([r.prompt_tokens for r in begun], dtype=float)
    ended = np.array([r.outcome == "completed" for r in begun], dtype=bool)
    order = np.argsort(last[ended])
    left = last[ended][order]
    stays = (last - first)[ended][order]
    mean = np.cumsum(stays) / np.arange(1, len(stays) + 1)
    sample_s = np.array([s.t_ns for s in simulated.samples]) / SECOND_NS
    waiting, running, generated = (
        np.array([getattr(s, name) for s in simulated.samples], dtype=float)
        for name in ("waiting", "running", "generation_tokens")
    )
    step_ends = steps.start_s + steps.duration_s
    held = np.cumsum(np.concatenate([[0.0], steps.kv_tokens]))
    looks = []
    for now_s in at_s:
        on = first <= now_s
        age = np.where(ended, np.minimum(last, now_s), now_s)[on] - first[on]
        work = (
            float(held[np.searchsorted(step_ends, now_s, "right")]),
            float(np.interp(now_s, sample_s, generated)),
            float(prompt[on].sum()),
        )
        gone = int(np.searchsorted(left, now_s, "right"))
        inside = slice(*np.searchsorted(sample_s, [before_s, now_s]))
        looks.append(
            Look(
                t_s=now_s,
                arrivals=int(np.searchsorted(arrived, now_s)),
                departures=gone,
                waiting=int(waiting[inside][-1]),
                waiting_least=int(waiting[inside].min()),
                running=float(running[inside].mean()),
                work=work,
                residence_s=float(mean[gone - 1]) if gone else math.nan,
                memory_s=Served(work, float(age.sum()), float(age @ age)).memory_s,
            )
        )
        before_s = now_s
    return looks
