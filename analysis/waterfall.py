"""From the paper's critical rate to the engine's, one mechanism at a time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from analysis.engine import EngineLimits
from analysis.operating_point import Demand, Operation, paper_point, vllm_point
from analysis.reservation import reserved_demand, reserving, sglang_demand
from analysis.step_time import StepTime
from loadgen.workload import Workload


@dataclass(frozen=True, slots=True)
class Mechanism:
    """By which factor one mechanism changes the predicted rate."""

    name: str
    factor: float


def waterfall(
    workload: Workload, limits: EngineLimits, law: StepTime, chunk: int | None = None
) -> tuple[float, tuple[Mechanism, ...]]:
    """The paper's rate of one engine, req/s, and the factors that lead from it to the engine's.

    In this order: the engine's own E[g] (no step for the first output, whole blocks), the output
    reservation, another ceiling than the KV cache, room that cannot be used, prompts in steps of their
    own, recomputed tokens. ``chunk`` is that of the paper's form. Mechanisms without effect are left
    out. Raises what `critical_rate.predict` raises.
    """
    paper = paper_point(
        workload, replace(limits, num_blocks=limits.pool_tokens, block_size=1), chunk
    )
    stages = [("", _rate(workload, law, paper.demand, paper.operation))]
    stages += _reserving(workload, limits, law) if limits.sglang else _vllm(workload, limits, law)
    factors = [
        Mechanism(name, rate / before) for (_, before), (name, rate) in itertools.pairwise(stages)
    ]
    return stages[0][1], tuple(m for m in factors if abs(m.factor - 1) > 1e-9)


def _vllm(workload: Workload, limits: EngineLimits, law: StepTime) -> list[tuple[str, float]]:
    point = vllm_point(workload, limits, None)
    memory = point.supply["kv_cache"].value
    lowest = min(e.value for e in point.supply.values())
    filled = replace(point.operation, recomputed_tokens=0.0)
    return [
        (name, _rate(workload, law, point.demand, operation))
        for name, operation in (
            ("rounding", Operation(memory, 1.0, 0.0)),
            ("ceiling", Operation(lowest, 1.0, 0.0)),
            ("under-fill", filled),
            ("recompute", point.operation),
        )
    ]


def _reserving(workload: Workload, limits: EngineLimits, law: StepTime) -> list[tuple[str, float]]:
    found = reserving(workload, limits)
    reserved = reserved_demand(workload, limits, found.ratio)
    lowest = min(found.ceilings.values())
    stages = (
        ("rounding", found.ceilings["kv_cache"], 0.0),
        ("reservation", found.ceilings["output_reservation"], 0.0),
        ("ceiling", lowest, 0.0),
        ("under-fill", found.requests, 0.0),
        ("prefill steps", found.requests, found.prefill_steps),
    )
    rates = []
    for name, x, prefill_steps in stages:
        stretch = 1 + prefill_steps * x
        demand = sglang_demand(workload, limits, reserved, stretch, None)
        rates.append((name, _rate(workload, law, demand, Operation(x / stretch, 1.0, 0.0))))
    return rates


def _rate(workload: Workload, law: StepTime, demand: Demand, operation: Operation) -> float:
    """Formula (*) of theory.md 2.5 with recomputed tokens."""
    b0, b1, b2, b3 = law.coefficients()
    seconds = (
        b0 / operation.requests_per_step
        + b1 * (workload.mean(demand.tokens) + operation.recomputed_tokens)
        + b2 * workload.mean(demand.resident)
        + b3 * workload.mean(demand.steps)
    )
    return float(1 / seconds)
