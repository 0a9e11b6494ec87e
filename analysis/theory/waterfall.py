"""From the paper's critical rate to the engine's, one mechanism at a time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime
from analysis.theory.operating_point import (
    Demand,
    Operation,
    engine_demand,
    paper_point,
    vllm_point,
)
from analysis.theory.reservation import reserving, sglang_demand
from analysis.theory.reserved_demand import reserved_demand
from loadgen.workload import Workload

Floats = NDArray[np.float64]


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


@dataclass(frozen=True, slots=True, eq=False)
class Counting:
    """One way to count what a request holds."""

    name: str
    """What it adds to the way before it; the first is set against the paper's."""
    kv: float
    """Mean token-steps of KV per request: summed over steps, of SGLang over decode steps."""
    sums: Floats
    """What a request takes of b0..b3 with the pool full so, see `steps_and_sums`; shape (4,)."""


def countings(workload: Workload, limits: EngineLimits) -> tuple[Counting, ...]:
    """From the paper's way to count KV to the engine's: arithmetic on the law of lengths.

    "first token": the step that ends the prompt gives the first output, and the last output is never
    written. "block rounding": whole blocks. "async scheduling": a finished request keeps its blocks for
    a step more.
    """
    tokens = replace(limits, num_blocks=limits.pool_tokens, block_size=1, async_scheduling=False)
    ways = [("first token", tokens), ("block rounding", replace(limits, async_scheduling=False))]
    if limits.async_scheduling and limits.sglang is None:
        ways.append(("async scheduling", limits))
    found = []
    for name, way in ways:
        if way.sglang is None:
            demand = engine_demand(workload, way, None)
            kv = workload.mean(demand.kv)
        else:
            reserved = reserved_demand(workload, way, 1.0)
            demand = sglang_demand(workload, way, reserved, 1.0, None)
            kv = workload.mean(reserved.decode_kv)
        full = Operation(limits.pool_tokens / kv, 1.0, 0.0)
        found.append(Counting(name, kv, steps_and_sums(workload, demand, full)))
    return tuple(found)


def steps_and_sums(workload: Workload, demand: Demand, operation: Operation) -> Floats:
    """What multiplies b0..b3 in 1/mu, formula (*) of theory.md 2.5 with recomputed tokens, shape (4,).

    Steps, tokens, resident token-steps and steps scheduled, all per request.
    """
    return np.array(
        [
            1 / operation.requests_per_step,
            workload.mean(demand.tokens) + operation.recomputed_tokens,
            workload.mean(demand.resident),
            workload.mean(demand.steps),
        ]
    )


def _rate(workload: Workload, law: StepTime, demand: Demand, operation: Operation) -> float:
    return float(1 / (steps_and_sums(workload, demand, operation) @ law.coefficients()))
