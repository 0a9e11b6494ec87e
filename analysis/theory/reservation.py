"""Where an engine that sets room aside for outputs works under saturation: SGLang's point.

Steps either compute prompts or decode, so that the unit here is the *decode* step. A request sits
in the batch for o - 1 of them. What it takes out of the pool between two of them is what it holds
and what is set aside for it (`analysis.schedulers.sglang`): s + j - 1 tokens after j outputs, and
the share rho of its d - j declared tokens to come. Summed over its decode steps this is R, its reserved
demand, and

    x = (M - u) / E[R]        requests per decode step,

which is 0.71 of M / E[g] for uniform lengths and rho = 1 (theory.md 7.2). Three further terms:

* *Room that cannot be used.* With everything set aside, the head of the queue is asked for N tokens,
  s + d, or s when looking ahead, and keeps X = s + d of them: room lies anywhere in [N - X, N] while it
  waits, so that u = E[X (2 N - X)] / (2 E[X]); with N = X that is E[X^2] / (2 E[X]).
* *Prefill steps.* Prompts are computed when a request leaves and the head then fits: see
  `analysis.theory.prefill_passes`.
* *rho.* Requests that may end early count with ``new_token_ratio``, which falls to its floor unless
  the pool overflows first. Both terms above then come from `analysis.theory.room_walk`; see
  `analysis.theory.saw_tooth`.

Equal outputs have no operating point: where all is set aside `analysis.theory.wave_walk` says what they
are served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.sglang import (
    RATIO_DECAY_STEPS,
)
from analysis.theory import kv_demand
from analysis.theory.operating_point import Demand, Operation, Point, forms_cohorts
from analysis.theory.prediction import CeilingName
from analysis.theory.prefill_passes import heads_uncovered, passes_in_a_row, steps_per_pass
from analysis.theory.reserved_demand import (
    ReservedDemand,
    decoding,
    keeps_its_fill,
    looks_ahead,
    reserved_demand,
    sets_all_aside,
)
from analysis.theory.reserved_room import allowed_by_pool, charges_of, in_rows, usable_tokens
from analysis.theory.saw_tooth import saturated
from analysis.theory.wave_walk import GENTLE_LOAD, Admission, waves
from loadgen.workload import Workload

Floats = NDArray[np.float64]

MODEL_ERROR = 0.01
"""Relative standard deviation of the closed form against `analysis.schedulers.sglang` under
saturation, where the whole output is set aside and ten or more run: at most 1.2 % off in 18 settings."""
MODEL_ERROR_RATIO = 0.012
"""The same where the ratio decides: `scripts/known_truth --set-aside`."""
MODEL_ERROR_WAVES = 0.02
"""Of what is served to equal outputs that stay in waves, the mean over fills of the batch, against
truths that are known to 1 to 2 % themselves (`scripts/known_truth --waves`); to it comes the scatter
from one fill to the next."""
MODEL_ERROR_WAVES_RATIO = 0.15
"""The same where the ratio decides, which no walk plays: equal outputs overflow the pool together, and
32 % more was served."""
MODEL_ERROR_LOOKING = 0.08
"""The same for the older rule that looks ahead and counts running requests by the ratio."""
MODEL_ERROR_ALONE = 0.15
"""Added to these, over the number running, as whole requests fit or do not: 14 % off with one, 6 %
with 1.4, 1 % with 2.7."""
MODEL_ERROR_ALONE_RATIO = 0.4
"""The same where the ratio decides: what fell due for few comes in swells."""


@dataclass(frozen=True, slots=True)
class Reserving:
    """Operating point of a reserving engine; everything is per decode step, of one engine."""

    requests: float
    """Completions per decode step."""
    by_pool: float
    """Completions that the pool and its reservations alone would allow, in room that can be used."""
    ceilings: dict[CeilingName, float]
    """Completions that each resource alone would allow."""
    running: float
    prefill_steps: float
    """Prefill steps per request."""
    ratio: float
    """Share rho of the outputs to come that is set aside."""
    memory_share: float
    """Share of time in which the pool, not the number of rows, stops admission."""
    scatter: float = 0.0
    """Relative standard deviation of the rate, from one fill of the batch to the next."""


def sglang_point(workload: Workload, limits: EngineLimits, chunk: int | None) -> Point:
    """SGLang's operating point in steps of either kind. Raises what `reserving` raises."""
    found = reserving(workload, limits)
    reserved = reserved_demand(workload, limits, found.ratio)
    # Steps per decode step: KV is held while the prompts of others are computed.
    stretch = 1 + found.prefill_steps * found.requests
    demand = sglang_demand(workload, limits, reserved, stretch, chunk)
    crowd = {
        "kv_cache": demand.kv,
        "output_reservation": demand.crowded,
        "max_num_seqs": demand.slots,
    }
    supply: dict[CeilingName, Estimate] = {
        name: Estimate.log_normal(
            x / stretch,
            workload.standard_error(crowd[name]) / workload.mean(crowd[name]),
            "req/step",
            "supply over mean demand",
        )
        for name, x in found.ceilings.items()
    }
    notes = []
    if looks_ahead(workload, limits) and not sets_all_aside(workload, limits):
        notes.append("admission looks ahead; the closed form takes the ratio rule alone")
    if found.scatter:
        notes.append(
            "outputs are nearly fixed: requests that were admitted together leave together and share "
            "prefill steps, so that the rate depends on how the batch was filled; this is the one at "
            f"which a fill serves, in the mean, what is offered: keep load.rates to {GENTLE_LOAD:g}"
        )
    elif keeps_its_fill(workload, limits):
        notes.append(
            "outputs are nearly fixed, and the rate depends on how the batch was filled: the closed "
            "form of independent requests stands here, known to 30 %"
        )
    if found.ratio < 1:
        notes.append(f"new_token_ratio is taken as {found.ratio:.3f} under saturation")
    return Point(
        demand,
        supply,
        Operation(found.requests / stretch, found.memory_share, 0.0),
        _model_error(workload, limits, found),
        notes=tuple(notes),
        settling_steps=0 if found.ratio == 1 else math.ceil(RATIO_DECAY_STEPS * stretch),
    )


def sglang_demand(
    workload: Workload,
    limits: EngineLimits,
    reserved: ReservedDemand,
    stretch: float,
    chunk: int | None,
) -> Demand:
    """Demand in steps of either kind, ``stretch`` of them per decode step."""
    s, o = workload.prompt_tokens, workload.output_tokens
    whole = int(s.max())
    c = min(chunk or limits.max_num_batched_tokens or whole, whole)
    prompt_steps = kv_demand.prefill_steps(s, c).astype(float)
    prompt_kv = kv_demand.prefill_demand(s, c).astype(float)
    return Demand(
        kv=stretch * reserved.decode_kv + prompt_kv,
        resident=kv_demand.kv_demand_engine(s, o, c).astype(float),
        tokens=(s + o - 1).astype(float),
        steps=kv_demand.residence_steps(s, o, c).astype(float),
        slots=stretch * reserved.decode_steps + prompt_steps,
        crowded=stretch * reserved.reserved,
        square=stretch * reserved.reserved**2 / np.maximum(reserved.decode_steps, 1.0),
    )


def _model_error(workload: Workload, limits: EngineLimits, found: Reserving) -> float:
    if forms_cohorts(workload):
        if found.ratio < 1:
            return MODEL_ERROR_WAVES_RATIO
        return math.hypot(MODEL_ERROR_WAVES, found.scatter, MODEL_ERROR_ALONE / found.running)
    error = MODEL_ERROR if found.ratio == 1 else MODEL_ERROR_RATIO
    if looks_ahead(workload, limits) and found.ratio < 1:
        error = MODEL_ERROR_LOOKING
    alone = MODEL_ERROR_ALONE if found.ratio == 1 else MODEL_ERROR_ALONE_RATIO
    return math.hypot(error, alone / found.running)


@lru_cache(maxsize=16)
def reserving(workload: Workload, limits: EngineLimits) -> Reserving:
    """The operating point under saturation. Raises ValueError when no request decodes."""
    assert limits.sglang is not None
    if int(workload.output_tokens.max()) < 2:
        raise ValueError(f"{workload.name}: every output is one token, so that no step decodes")
    alone = float(workload.weight[workload.output_tokens == 1].sum())
    law = decoding(workload)
    tooth = None if sets_all_aside(law, limits) else saturated(workload, limits)
    demand = reserved_demand(law, limits, 1.0 if tooth is None else tooth.ratio)
    in_batch = law.mean(demand.decode_steps)
    if tooth is None:
        by_pool = allowed_by_pool(law, demand, usable_tokens(law, limits, demand))
    else:
        by_pool = tooth.requests
    ceilings: dict[CeilingName, float] = {
        "kv_cache": limits.pool_tokens / law.mean(demand.decode_kv),
        "output_reservation": limits.pool_tokens / law.mean(demand.reserved),
    }
    x, share = in_rows(law, limits, demand, by_pool)
    if limits.max_num_seqs is not None:
        ceilings["max_num_seqs"] = limits.max_num_seqs / in_batch
    by_rows = -math.expm1(-x) / x
    by_room = heads_uncovered(law, demand.declared, x) if tooth is None else tooth.passes
    events = share * by_room + (1 - share) * by_rows
    passes = events * (1 - alone) * passes_in_a_row(alone, events * (1 - alone))
    prefill_steps = passes * steps_per_pass(workload, limits, max(1 / passes, 1.0))
    scatter = 0.0
    if forms_cohorts(workload) and tooth is None:
        stretch = 1 + prefill_steps * x
        chunk = limits.max_num_batched_tokens or int(law.prompt_tokens.max())
        residence = (law.output_tokens - 1) * stretch + -(-law.prompt_tokens // chunk)
        admission = _admission(law, limits, demand)
        filled = waves(law, admission, x / stretch, math.ceil(float(residence.max())))
        x, scatter = filled.requests, filled.scatter
        events = filled.prefill_steps * (1 - alone)
        prefill_steps = events * passes_in_a_row(alone, events)
    return Reserving(
        requests=x / (1 - alone),
        by_pool=by_pool / (1 - alone),
        ceilings={name: ceiling / (1 - alone) for name, ceiling in ceilings.items()},
        running=x * in_batch,
        prefill_steps=prefill_steps,
        ratio=demand.ratio,
        memory_share=share,
        scatter=scatter,
    )


def _admission(law: Workload, limits: EngineLimits, demand: ReservedDemand) -> Admission:
    """What admission goes by; a request takes the mean room that it holds between decode steps."""
    assert limits.sglang is not None
    charges, steps = charges_of(demand), demand.decode_steps
    growth = (charges.released - charges.kept) / steps
    kept = demand.reserved / steps - growth * (steps - 1) / 2
    # The head of the queue is asked for its prompt by the token, and charged with it by the page.
    unpaged = -law.prompt_tokens % limits.block_size
    return Admission(
        charges=replace(
            charges, asked=charges.asked - unpaged, kept=kept, released=kept + growth * steps
        ),
        room_tokens=limits.pool_tokens,
        rows=limits.max_num_seqs,
        chunk=limits.max_num_batched_tokens,
        max_prefill_tokens=limits.sglang.max_prefill_tokens,
        page=limits.block_size,
        lags=limits.async_scheduling,
    )
