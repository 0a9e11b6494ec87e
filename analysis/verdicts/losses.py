"""Where throughput goes under congestion, each loss by itself (theory.md 3.4, 2.6).

Of the eviction-free best M / (E[g] b), b the step with the pool full and nothing computed twice, a
server serves the product of four shares: how full the pool was; how much of what it held was not thrown
away; how much of a step was not spent on tokens computed before; and what the rest of the step took.
Exact for recorded steps, by the memory-time identity. What a live engine shows of the same,
`analysis.verdicts.explain` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.inference.work import work_done
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import RunFrames
from analysis.schedulers.simulate import Simulation
from analysis.schedulers.step_time import StepTime
from analysis.slot_models.slots import Load, SlotRun
from analysis.verdicts.audit import counter_at
from analysis.verdicts.evidence import rounding, work_demand
from loadgen.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Shares of the eviction-free rate that are left; `left` is their product."""

    best_rate: float
    """M / (E[g] b), req/s."""
    filled: float
    """Mean tokens held over the pool: 1 less the under-fill."""
    kept: float
    """Memory-time of what was served over all that was held: 1 less the waste."""
    first_time: float
    """Step without tokens computed again over the step: what recompute costs in time."""
    other_step: float
    """The best step over that step: contents other than those of a full pool."""
    recomputed_tokens: float
    """Computed again per completion."""
    evictions: float
    """Per completion."""

    @property
    def left(self) -> float:
        return self.filled * self.kept * self.first_time * self.other_step

    @property
    def rate(self) -> float:
        """Served, req/s."""
        return self.best_rate * self.left


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Over all steps of a saturated window."""

    steps: float
    seconds: float
    held: float
    """Token-steps."""
    served: float
    """Token-steps of the requests that were served."""
    demand: float
    """Token-steps of a mean request, counted likewise."""
    again_tokens: float
    evictions: float


def losses(sums: Sums, pool_tokens: float, law: StepTime, best_step_s: float) -> Losses:
    """The four shares of sums over a window; ``best_step_s`` is a step at the eviction-free rate."""
    completed = sums.served / sums.demand
    step_s = sums.seconds / sums.steps
    fresh_s = step_s - law.b1_s_per_token * sums.again_tokens / sums.steps
    return Losses(
        best_rate=pool_tokens / sums.demand / best_step_s,
        filled=sums.held / sums.steps / pool_tokens,
        kept=sums.served / sums.held,
        first_time=fresh_s / step_s,
        other_step=best_step_s / fresh_s,
        recomputed_tokens=sums.again_tokens / completed,
        evictions=sums.evictions / completed,
    )


def simulated_losses(
    done: Simulation,
    frames: RunFrames,
    law: StepTime,
    workload: Workload,
    start_s: float,
    end_s: float,
) -> Losses:
    """Of a simulated engine between two instants with a queue that is never empty."""
    steps, limits = done.steps, done.limits
    inside = (steps.start_s >= start_s) & (steps.start_s < end_s)
    edges = np.array([start_s, end_s])
    blocks = rounding(workload, limits.block_size)
    demand = workload.mean(work_demand(workload)) * blocks
    sums = Sums(
        steps=float(inside.sum()),
        seconds=float(steps.duration_s[inside].sum()),
        held=float(steps.used_blocks[inside].sum()) * limits.block_size,
        served=float(np.diff(work_done(frames, edges))[0]) * blocks,
        demand=demand,
        again_tokens=float(steps.recomputed_tokens[inside].sum()),
        evictions=float(np.diff(counter_at(frames, "preemptions", edges))[0]),
    )
    return losses(sums, limits.pool_tokens, law, _full_step_s(limits, law, workload, demand))


def slot_losses(run: SlotRun, first: int, memory_tokens: int, law: StepTime) -> Losses:
    """Of the slot model from slot ``first`` on; prompts are computed in the slot that admits them.

    Computed again: prompts of readmitted requests, and outputs that evictions threw away.
    """
    load: Load = run.load
    slots = run.slots[first:]
    served = run.finished_slot >= first
    demand = float(load.work_token_slots[served].mean())
    prompts = float(load.prompt_tokens[served].mean())
    lost = float(slots["lost_token_slots"].sum())
    readmitted = float(slots["recomputed_tokens"].sum())
    again = readmitted + float(slots["lost_tokens"].sum())
    made, used, n = (float(slots[x].sum()) for x in ("made_tokens", "used_tokens", "running"))
    fresh_prompts = (used - lost) / demand * prompts
    count = len(slots)
    sums = Sums(
        steps=count,
        seconds=law(made + fresh_prompts + readmitted, used, n) + (count - 1) * law(0, 0, 0),
        held=used,
        served=used - lost,
        demand=demand,
        again_tokens=again,
        evictions=float(slots["evicted"].sum()),
    )
    best = memory_tokens / demand
    outputs = float(load.output_tokens[served].mean())
    step_s = law(best * (prompts + outputs), memory_tokens, best * outputs)
    return losses(sums, memory_tokens, law, step_s)


def _full_step_s(limits: EngineLimits, law: StepTime, workload: Workload, demand: float) -> float:
    """A step with the pool full of requests at the eviction-free rate, in seconds.

    By theory.md 2.5, engine convention: s + o - 1 tokens and o steps for each request, its KV in tokens.
    """
    best = limits.pool_tokens / demand
    outputs = workload.mean(workload.output_tokens)
    tokens = best * (workload.mean(workload.prompt_tokens) + outputs - 1)
    held = best * workload.mean(work_demand(workload))
    return law(tokens, held, best * outputs)
