"""Where one engine works under saturation: requests per step from its memory and its other budgets.

One step can serve x = M / E[g] requests from M tokens of KV cache, and every other budget of a step
gives a ceiling of the same kind (theory.md 2.5). An engine stays a little below the lowest ceiling
and computes some tokens twice. Both follow from one picture: first come, first served with
newest-first preemption keeps the running requests a prefix of the line of arrivals. A completion
moves the end of that prefix up by s+o tokens of room, growth moves it down by one token per running
request and step, and on balance it moves up by s per completion.

* *Room that cannot be used.* The end lies anywhere within the prompt at the head of the queue:
  E[s^2] / (2 E[s]) tokens stay free, prompts taken in whole blocks. Further room waits for prefill,
  which refills s+o per completion from the token budget: the workload of a queue with that service
  (Pollaczek and Khinchine, for a finite number of customers), less what is refilled at once.
* *Recompute.* Per completion the end moves down o tokens, and each of them is a prompt token thrown
  out that comes back later: E[o] recomputed tokens per request, less those steps in which a
  completion or a refill in progress moves the end up.
* *Two ceilings at once.* With memory full the number running scatters, as footprints differ; a
  limit on sequences cuts that scatter off, so near the crossing neither ceiling is reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import normal_density
from analysis.schedulers.engine import EngineLimits
from analysis.theory import kv_demand
from analysis.theory.prediction import CeilingName
from loadgen.workload import Workload

Floats = NDArray[np.float64]

MODEL_ERROR = 0.005
"""Relative standard deviation of the closed form against `analysis.schedulers.engine` under saturation.

Root mean square of 34 random settings: uniform lengths 1:1, 2:1, 1:2, 1:4 and 8:1 with 25 to 110
requests running, some with a limit on sequences at 0.6 to 1.4 times what memory holds, and step
times constant or linear in tokens, KV and requests: 0.46 %. With 6 to 25 running 14 settings gave
0.7 %, at most 1.8 %. It says nothing about a real engine.
"""
MODEL_ERROR_FIXED = 0.02
"""The same for fixed lengths, where cohorts form: 14 settings, 2.1 %, always predicted too high."""
MODEL_ERROR_BUDGET = 0.02
"""The same where the token budget is below 1.5 times what the other ceilings ask of it: 1 % on
average over 20 settings, up to 2.7 % at the crossing, predicted too low."""
RECOMPUTE_ERROR = 0.15
"""The same of the recomputed tokens: 39 random settings of wide uniform lengths with
12 to 110 running gave 12 %, mostly predicted too high. Where a token costs little it hardly counts."""
RECOMPUTE_ERROR_FIXED = 0.35
"""The same for fixed lengths: 24 settings, 34 %, on average 23 % too low."""
BUDGET_IS_NEAR = 1.5
FIXED_BELOW_CV = 0.2
"""Coefficient of variation of the outputs below which cohorts form (theory.md 3.3)."""


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What one request takes out of each resource, per support point of the law, shape (n,)."""

    kv: Floats
    """Token-steps of memory, in the convention of the claim."""
    resident: Floats
    """Token-steps of KV that steps read."""
    tokens: Floats
    """Tokens scheduled, without recompute."""
    steps: Floats
    """Steps in which it is scheduled."""
    slots: Floats
    """Steps for which it occupies a sequence."""
    crowded: Floats
    """Token-steps of memory held or set aside: what admission compares with the pool."""
    square: Floats
    """Squared footprint summed over steps."""


@dataclass(frozen=True, slots=True)
class Operation:
    """The operating point at saturation."""

    requests_per_step: float
    memory_share: float
    """Share of time in which memory, not the number of sequences, stops admission."""
    recomputed_tokens: float


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """What one engine needs and has, and where that lets it work."""

    demand: Demand
    supply: dict[CeilingName, Estimate]
    """Requests per step that each resource of known size alone would allow."""
    operation: Operation
    model_error: float
    """Relative standard deviation of the closed form against the scheduler."""
    recompute_error: float = 0.0
    """The same of the recomputed tokens."""
    notes: tuple[str, ...] = ()
    settling_steps: int = 0
    """Steps after an idle time until the scheduler's own memory of it has faded."""


# -- demand per request ----------------------------------------------------------------------------


def paper_demand(workload: Workload, limits: EngineLimits, chunk: int | None) -> Demand:
    """Demand in the paper's convention; ValueError without a prefill chunk."""
    s, o = workload.prompt_tokens, workload.output_tokens
    c = limits.max_num_batched_tokens if chunk is None else chunk
    if c is None:
        raise ValueError("the paper's form needs a prefill chunk: state it, or the token budget")
    kv = kv_demand.kv_demand_paper(s, o, c)
    steps = kv_demand.residence_steps(s, o, c).astype(float)
    square = kv_demand.second_moment(s, o, c).astype(float)
    return Demand(kv, kv, (s + o - 1).astype(float), steps, steps, kv, square)


def engine_demand(workload: Workload, limits: EngineLimits, chunk: int | None) -> Demand:
    """Demand as vLLM takes it: whole blocks, the step more of an asynchronous scheduler."""
    s, o = workload.prompt_tokens, workload.output_tokens
    c = _whole_prompt_chunk(workload, limits) if chunk is None else chunk
    late = limits.async_scheduling
    kv = kv_demand.kv_demand_blocks(s, o, c, limits.block_size, late).astype(float)
    return Demand(
        kv=kv,
        resident=kv_demand.kv_demand_engine(s, o, c).astype(float),
        tokens=(s + o - 1).astype(float),
        steps=kv_demand.residence_steps(s, o, c).astype(float),
        slots=kv_demand.residence_steps(s, o, c, late).astype(float),
        crowded=kv,
        square=kv_demand.second_moment(s, o, c) - (s + o).astype(float) ** 2,
    )


def _whole_prompt_chunk(workload: Workload, limits: EngineLimits) -> int:
    """What a step can take of one prompt: the smallest of prompt, budget and threshold."""
    longest = int(workload.prompt_tokens.max())
    bounds = (limits.max_num_batched_tokens, limits.long_prefill_token_threshold or None)
    return min([longest, *(b for b in bounds if b is not None)])


# -- ceilings and the operating point --------------------------------------------------------------


def paper_point(workload: Workload, limits: EngineLimits, chunk: int | None) -> Point:
    """The paper's: only the KV cache, filled to the last token (theory.md 2.2)."""
    demand = paper_demand(workload, limits, chunk)
    supply: dict[CeilingName, Estimate] = {
        "kv_cache": ceiling(workload, limits.pool_tokens, demand.kv)
    }
    return Point(demand, supply, Operation(supply["kv_cache"].value, 1.0, 0.0), 0.0)


def vllm_point(workload: Workload, limits: EngineLimits, chunk: int | None) -> Point:
    """vLLM's: whole blocks, three ceilings, room that cannot be used, recomputed tokens."""
    demand = engine_demand(workload, limits, chunk)
    supply = ceilings(workload, limits, demand)
    notes = []
    if limits.max_num_seqs is None:
        notes.append("max_num_seqs is unknown and was taken as not binding")
    if limits.max_num_batched_tokens is None:
        notes.append("max_num_batched_tokens is unknown and was taken as not binding")
    if limits.watermark > 0:
        notes.append(f"a watermark of {limits.watermark:g} of the blocks is not modelled")
    return Point(
        demand,
        supply,
        operate(workload, limits, demand),
        model_error(workload, supply),
        RECOMPUTE_ERROR_FIXED if forms_cohorts(workload) else RECOMPUTE_ERROR,
        tuple(notes),
    )


def ceiling(workload: Workload, supply: int, demand: Floats) -> Estimate:
    """Requests per step that one resource alone would allow: supply over mean demand."""
    mean = workload.mean(demand)
    relative = workload.standard_error(demand) / mean
    return Estimate.log_normal(supply / mean, relative, "req/step", "supply over mean demand")


def ceilings(
    workload: Workload, limits: EngineLimits, demand: Demand
) -> dict[CeilingName, Estimate]:
    """The ceilings whose size is known, requests per step."""
    supply: dict[CeilingName, Estimate] = {
        "kv_cache": ceiling(workload, limits.pool_tokens, demand.kv)
    }
    if limits.max_num_seqs is not None:
        supply["max_num_seqs"] = ceiling(workload, limits.max_num_seqs, demand.slots)
    if limits.max_num_batched_tokens is not None:
        supply["max_num_batched_tokens"] = ceiling(
            workload, limits.max_num_batched_tokens, demand.tokens
        )
    return supply


def operate(workload: Workload, limits: EngineLimits, demand: Demand) -> Operation:
    """Requests per step that memory, sequences and budget allow together; see the module."""
    by_memory = _fill_memory(workload, limits, demand)
    x, share = by_memory, 1.0
    slots = workload.mean(demand.slots)
    if limits.max_num_seqs is not None:
        # With memory full the number running scatters by its footprints; the limit cuts it off.
        footprint = workload.mean(demand.resident) / slots
        cv2 = workload.mean(demand.square) / slots / footprint**2 - 1
        running, share = cut_off(by_memory * slots, cv2, limits.max_num_seqs)
        x = running / slots
    moved_up = 1.0
    tokens = workload.mean(demand.tokens)
    budget = limits.max_num_batched_tokens
    if budget is not None:
        moved_up = workload.mean(np.ceil(demand.tokens / budget).astype(np.int64))
    still = float(np.exp(-x * moved_up))
    if budget is not None:
        still = min(still, max(1 - x * tokens / budget, 0.0))
    return Operation(x, share, workload.mean(workload.output_tokens) * share * still)


def cut_off(running: float, cv2: float, limit: int) -> tuple[float, float]:
    """Mean of a number running that scatters around ``running`` but never exceeds ``limit``.

    Its variance is cv2 * running, cv2 the squared coefficient of variation of footprints. Also
    returned: the share of time in which the limit is not what stops admission.
    """
    sd = math.sqrt(max(cv2, 1e-12) * running)
    z = (limit - running) / sd
    share = float(ndtr(z))
    return running * share + limit * float(ndtr(-z)) - sd * float(normal_density(z)), share


def head_room_tokens(workload: Workload, limits: EngineLimits) -> float:
    """Tokens that the prompt at the head of the queue leaves free on average; see the module."""
    block = limits.block_size
    prompts = -(-workload.prompt_tokens // block) * block
    return (workload.mean(prompts**2) / workload.mean(prompts) - block) / 2


def _fill_memory(workload: Workload, limits: EngineLimits, demand: Demand) -> float:
    """Requests per step with memory as full as head-of-line prompts and prefill let it be."""
    room = limits.pool_tokens - head_room_tokens(workload, limits)
    kv, tokens = workload.mean(demand.kv), workload.mean(demand.tokens)
    budget = limits.max_num_batched_tokens
    if budget is None:
        return room / kv
    square = workload.mean(demand.tokens * demand.tokens)
    # As many customers as fit the room circulate between decode and refill: the queue they form is
    # shorter than that of an open stream, by the one that never waits for itself.
    others = 1 - kv / (room * workload.mean(demand.slots))

    def excess(x: float) -> float:
        load = x * tokens
        waiting = x * square / (2 * (budget - load * others)) - load / 2
        return x * kv + max(waiting, 0.0) - room

    highest = min(budget / tokens, room / kv)
    return highest if excess(highest) <= 0 else float(brentq(excess, 0.0, highest))


def model_error(workload: Workload, supply: dict[CeilingName, Estimate]) -> float:
    """Relative standard deviation of the closed form against the scheduler under saturation."""
    values = {name: estimate.value for name, estimate in supply.items()}
    budget = values.pop("max_num_batched_tokens", float("inf"))
    if budget < BUDGET_IS_NEAR * min(values.values()):
        return MODEL_ERROR_BUDGET
    return MODEL_ERROR_FIXED if forms_cohorts(workload) else MODEL_ERROR


def forms_cohorts(workload: Workload) -> bool:
    """Are the outputs so alike that requests that began together end together?"""
    return output_cv(workload) < FIXED_BELOW_CV


def output_cv(workload: Workload) -> float:
    """Coefficient of variation of the output lengths."""
    outputs = workload.output_tokens
    mean = workload.mean(outputs)
    return math.sqrt(workload.mean(np.asarray((outputs - mean) ** 2))) / mean
