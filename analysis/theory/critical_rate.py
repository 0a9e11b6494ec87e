"""The critical arrival rate in closed form: what the KV cache and other budgets of a step allow.

It is the number of requests that one step can serve (`analysis.theory.operating_point`) over the
mean step time there. As the step time is linear in what a step holds, 1/mu is a linear combination
of its coefficients (theory.md 2.5), and it is a mean over the law of lengths: both the covariance of the
measured coefficients and the sampling error of observed lengths go through exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTimeFit
from analysis.theory.operating_point import (
    Demand,
    Operation,
    output_cv,
    paper_point,
    vllm_point,
)
from analysis.theory.prediction import Ceiling, CeilingName, Claim, Grade, Prediction, digest
from analysis.theory.reservation import sglang_point
from loadgen.workload import Workload

__all__ = ["Ceiling", "Prediction", "digest", "mixture_rate", "predict"]

Floats = NDArray[np.float64]

VLLM_CEILINGS: tuple[CeilingName, ...] = ("kv_cache", "max_num_seqs", "max_num_batched_tokens")
SGLANG_CEILINGS: tuple[CeilingName, ...] = ("kv_cache", "output_reservation", "max_num_seqs")

LOCKSTEP_BELOW_CV = 0.02
"""Coefficient of variation of the outputs below which the batch that filled an empty server stays
together over several residence times; at 0.04 it has spread after three."""
LOCKSTEP_RESIDENCES = 5.0
"""... so many: over the first eight vLLM's rules serve 0.4 % more than in the long run (64/64, 40 at
once) or 1 to 3 % less (16/256, 30 at once); from the sixth on that is within the interval."""

ONSET_QUANTILE = 1.645
"""Normal quantile of 5 %: the share of time for which memory is short at the onset."""


def predict(
    workload: Workload,
    limits: EngineLimits,
    step_time: StepTimeFit,
    claim: Claim,
    grade: Grade,
    chunk: int | None = None,
    replicas: int = 1,
) -> Prediction:
    """The critical arrival rate of ``replicas`` engines that share the arrivals evenly.

    ``paper``: M/(b E[g]) with the paper's g and only the KV cache as a ceiling (theory.md 2.2);
    ``b`` is the step time at full memory. ``engine``: whole blocks, the ceilings of the engine,
    unusable room, and recomputed tokens or room set aside for outputs. ``chunk`` is the prefill
    chunk in tokens; by default what a step can take of one prompt (``paper``: the token budget).
    The interval (95 %) holds the errors of the step-time law, of the sampled lengths and, for
    ``engine``, of the closed form and of the tokens that it says are computed again.

    Raises ValueError when a request can never fit, or when ``paper`` lacks a chunk.
    """
    if claim not in get_args(Claim) or grade not in get_args(Grade):
        raise ValueError(f"claim {claim!r} and grade {grade!r} must be one of the documented ones")
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1, got {replicas}")
    largest = _largest_request(workload, limits)
    point = (
        paper_point(workload, limits, chunk)
        if claim == "paper"
        else sglang_point(workload, limits, chunk)
        if limits.sglang is not None
        else vllm_point(workload, limits, chunk)
    )
    demand, supply, operation = point.demand, point.supply, point.operation
    binding = min(supply, key=lambda name: supply[name].value)
    x = operation.requests_per_step
    seconds, error = _seconds_per_request(workload, step_time, demand, operation, binding)
    again_s = step_time.law.b1_s_per_token * operation.recomputed_tokens
    error = float(np.hypot(error, point.recompute_error * again_s))
    rate = Estimate.log_normal(
        replicas / seconds,
        float(np.hypot(error / seconds, point.model_error)),
        "req/s",
        f"closed form, claim {claim}; step time: {step_time.method}",
    )
    delta = largest / limits.pool_tokens
    names: tuple[CeilingName, ...] = tuple(supply)
    if claim == "engine":
        names = SGLANG_CEILINGS if limits.sglang is not None else VLLM_CEILINGS
    longest = float(demand.slots.max())
    lockstep = LOCKSTEP_RESIDENCES * longest if output_cv(workload) < LOCKSTEP_BELOW_CV else 0.0
    return Prediction(
        claim=claim,
        grade=grade,
        critical_rate=rate,
        lower=rate.value * (1 - delta),
        delta=delta,
        binding=binding,
        ceilings=tuple(Ceiling(name=name, requests_per_step=supply.get(name)) for name in names),
        kv_demand=_mean(workload, demand.kv, "token-steps", f"E[g], claim {claim}"),
        step_time_s=Estimate.log_normal(
            x * seconds, error / seconds, "s", "step-time law at the operating point"
        ),
        running=x * workload.mean(demand.slots),
        mean_residence_s=x * seconds * workload.mean(demand.slots),
        longest_residence_s=x * seconds * longest,
        settling_s=x * seconds * max(point.settling_steps, lockstep),
        recomputed_tokens=operation.recomputed_tokens,
        under_fill=x / supply[binding].value,
        onset_rate=_onset(workload, limits, step_time, demand, x, replicas),
        replicas=replicas,
        workload=workload.name,
        inputs_digest=_inputs_digest(workload, limits, step_time),
        notes=point.notes,
    )


def mixture_rate(parts: Sequence[tuple[float, float]]) -> float:
    """Harmonic mean of the rates mu_l with shares q_l, (sum q_l/mu_l)^-1 (theory.md 2.2).

    The paper's form for regimes that follow each other; the shares are of requests and sum to 1.
    """
    if not np.isclose(sum(q for q, _ in parts), 1.0) or any(q < 0 or mu <= 0 for q, mu in parts):
        raise ValueError("a mixture needs shares that sum to 1 and positive rates")
    return 1.0 / sum(q / mu for q, mu in parts)


def _largest_request(workload: Workload, limits: EngineLimits) -> int:
    largest = int((workload.prompt_tokens + workload.output_tokens).max())
    for name, bound in (
        ("the KV cache", limits.pool_tokens),
        ("max_model_len", limits.max_model_len),
    ):
        if bound is not None and largest > bound:
            raise ValueError(
                f"{workload.name} has requests of {largest} tokens, more than {name} of {bound}: "
                f"clip the workload to {bound} tokens in total"
            )
    return largest


# -- seconds per request ---------------------------------------------------------------------------


def _seconds_per_request(
    workload: Workload,
    step_time: StepTimeFit,
    demand: Demand,
    operation: Operation,
    binding: CeilingName,
) -> tuple[float, float]:
    """1/mu and its standard error, formula (*) of theory.md 2.5 with recomputed tokens.

    It is the mean over the law of a cost per request, so the sampling error is exact as well.
    """
    x = operation.requests_per_step
    again = operation.recomputed_tokens / workload.mean(workload.output_tokens)
    tokens = demand.tokens + again * workload.output_tokens
    weights = [1 / x, *(workload.mean(d) for d in (tokens, demand.resident, demand.steps))]
    value, error = step_time.combination(weights)
    if value <= 0:
        raise ValueError("the step-time law gives a step of no duration: calibrate it again")
    if workload.exact:
        return value, error
    crowded = demand.tokens if binding == "max_num_batched_tokens" else demand.crowded
    share = operation.memory_share
    steps = share * crowded / workload.mean(crowded)
    steps = (steps + (1 - share) * demand.slots / workload.mean(demand.slots)) / x
    b0, b1, b2, b3 = step_time.law.coefficients()
    cost = b0 * steps + b1 * tokens + b2 * demand.resident + b3 * demand.steps
    return value, float(np.hypot(error, workload.standard_error(cost)))


def _onset(
    workload: Workload,
    limits: EngineLimits,
    step_time: StepTimeFit,
    demand: Demand,
    saturated: float,
    replicas: int,
) -> Estimate | None:
    """Rate at which an unbounded cache holds more than M for 5 % of the time (theory.md 2.7)."""
    mean = workload.mean(demand.crowded)
    spread = ONSET_QUANTILE * np.sqrt(workload.mean(demand.square))
    root = (np.sqrt(spread**2 + 4 * mean * limits.pool_tokens) - spread) / (2 * mean)
    x = float(root) ** 2
    if x >= saturated:
        return None
    means = (workload.mean(d) for d in (demand.tokens, demand.resident, demand.steps))
    value, error = step_time.combination([1 / x, *means])
    relative = float(np.hypot(error / value, workload.standard_error(demand.crowded) / mean))
    return Estimate.log_normal(replicas / value, relative, "req/s", "normal occupancy, z = 1.645")


def _mean(workload: Workload, values: Floats, unit: str, method: str) -> Estimate:
    mean = workload.mean(values)
    return Estimate.log_normal(mean, workload.standard_error(values) / mean, unit, method)


def _inputs_digest(workload: Workload, limits: EngineLimits, step_time: StepTimeFit) -> str:
    stated = {"limits": asdict(limits), "ignore_eos": workload.ignore_eos}
    hashed = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
    arrays = (workload.prompt_tokens, workload.output_tokens, workload.max_tokens)
    for array in (*arrays, workload.weight, step_time.law.coefficients(), step_time.covariance):
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()
