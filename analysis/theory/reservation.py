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
  the pool overflows first. Both terms above then come from `analysis.theory.room_walk`; see `saturated`.

Equal outputs have no operating point: where all is set aside `analysis.theory.wave_walk` says what they
are served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import cumulative_trapezoid

from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.sglang import (
    INITIAL_RATIO,
    MIN_RATIO_FACTOR,
    RATIO_DECAY_STEPS,
    RETRACT_DECODE_STEPS,
)
from analysis.theory import kv_demand
from analysis.theory.kv_demand import rounded_sum
from analysis.theory.operating_point import Demand, Operation, Point, cut_off, forms_cohorts
from analysis.theory.prediction import CeilingName
from analysis.theory.prefill_passes import heads_uncovered, passes_in_a_row, steps_per_pass
from analysis.theory.room_walk import COMPLETIONS, Charges, Room, play, ruin_exponent
from analysis.theory.wave_walk import FILLS, Admission, waves
from loadgen.workload import Workload

Floats = NDArray[np.float64]

MODEL_ERROR = 0.01
"""Relative standard deviation of the closed form against `analysis.schedulers.sglang` under
saturation, where the whole output is set aside and ten or more run: at most 1.2 % off in 18 settings."""
MODEL_ERROR_RATIO = 0.012
"""The same where the ratio decides: `scripts/known_truth --set-aside`."""
SETTLED = 3
"""Rounds in which a walk and its rate agree."""
BELOW_ALL = 0.99
"""Of the outputs to come: with all of them set aside nothing grows into free room."""
TOOTH_WALKS, TOOTH_POINTS = 5, 200
"""Ratios between floor and jump at which the room is walked, and over which one tooth is summed: the
overflows fall exponentially."""
LEAST_CHANCE, LONGEST = 1e-300, 300.0
"""An overflow that never comes; logarithm of the decode steps until it does."""
MODEL_ERROR_WAVES = 0.01
"""Of what is served to equal outputs that stay in waves, the mean over fills of the batch; to it comes
the scatter from one fill to the next. `scripts/known_truth --waves`."""
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


@dataclass(frozen=True, slots=True, eq=False)
class ReservedDemand:
    """What one request takes, per support point of the law, shape (n,)."""

    ratio: float
    """Share rho of the outputs to come that is set aside."""
    decode_kv: Floats
    """Token-steps of whole pages held in decode steps."""
    reserved: Floats
    """Token-steps held or set aside between decode steps."""
    to_come: Floats
    """Declared tokens still to come, summed over its decode steps: what rho multiplies."""
    asked: Floats
    """N: tokens that admission asks for."""
    kept: Floats
    """a: tokens that are held and set aside right after admission."""
    declared: Floats
    """X: the prompt and the whole declared output."""
    shed: Floats
    """Tokens by which what is to come falls from admission to the end."""
    decode_steps: Floats


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
    if keeps_its_fill(workload, limits):
        notes.append(
            "outputs are nearly fixed: requests that were admitted together leave together and share "
            "prefill steps, so that the rate depends on how the batch was filled; this is the one at "
            "which a fill serves, in the mean, what is offered: keep load.rates below 1.1"
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


def keeps_its_fill(workload: Workload, limits: EngineLimits) -> bool:
    """Do requests stay in the waves in which chance first admitted them?

    SGLang computes prompts in steps of their own, which a wave shares: it is served the faster the
    larger it is, and equal outputs keep it together. No operating point stands for that.
    """
    return limits.sglang is not None and forms_cohorts(workload)


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
        return math.hypot(MODEL_ERROR_WAVES, found.scatter * math.sqrt(1 + 1 / FILLS))
    error = MODEL_ERROR if found.ratio == 1 else MODEL_ERROR_RATIO
    if looks_ahead(workload, limits) and found.ratio < 1:
        error = MODEL_ERROR_LOOKING
    alone = MODEL_ERROR_ALONE if found.ratio == 1 else MODEL_ERROR_ALONE_RATIO
    return math.hypot(error, alone / found.running)


def declared_to_come(workload: Workload, rules: SGLangRules) -> Floats:
    """Sum over the decode steps j = 1..o-1 of min(d - j, clip), per support point."""
    o, d = workload.output_tokens, workload.max_tokens
    clip = rules.clip_max_new_tokens
    clipped = np.clip(d - clip, 0, o - 1)
    rest = (o - 1 - clipped) * d - (o * (o - 1) - clipped * (clipped + 1)) // 2
    return np.asarray(clipped * clip + rest, dtype=float)


def reserved_demand(workload: Workload, limits: EngineLimits, ratio: float) -> ReservedDemand:
    """Demand in the convention of `analysis.schedulers.sglang`, with the share ``ratio`` of outputs
    set aside."""
    assert limits.sglang is not None
    s, o, page = workload.prompt_tokens, workload.output_tokens, limits.block_size
    held = rounded_sum(s + o - 2, page) - rounded_sum(s - 1, page)
    prompt = -(-s // page) * page
    clip = limits.sglang.clip_max_new_tokens
    declared = np.minimum(workload.max_tokens, clip)
    to_come = declared_to_come(workload, limits.sglang)
    ahead = looks_ahead(workload, limits)
    return ReservedDemand(
        ratio=ratio,
        decode_kv=(rounded_sum(s + o - 1, page) - rounded_sum(s, page)).astype(float),
        reserved=held + ratio * to_come,
        to_come=to_come,
        asked=(prompt + page + (0 if ahead else declared)).astype(float),
        kept=np.where(o > 1, prompt + page + ratio * declared, 0.0),
        declared=(prompt + page + declared).astype(float),
        shed=(declared - np.minimum(workload.max_tokens - o + 1, clip)).astype(float),
        decode_steps=(o - 1).astype(float),
    )


def looks_ahead(workload: Workload, limits: EngineLimits) -> bool:
    """Is admission by looking ahead: no radix cache, and requests that ignore the end of text?"""
    assert limits.sglang is not None
    return workload.ignore_eos and not limits.sglang.radix_cache


def sets_all_aside(workload: Workload, limits: EngineLimits) -> bool:
    """Is the whole declared output of a running request set aside, whatever the ratio?"""
    assert limits.sglang is not None
    return workload.ignore_eos and limits.sglang.whole_output_of_ignore_eos


@lru_cache(maxsize=16)
def reserving(workload: Workload, limits: EngineLimits) -> Reserving:
    """The operating point under saturation. Raises ValueError when no request decodes."""
    assert limits.sglang is not None
    if int(workload.output_tokens.max()) < 2:
        raise ValueError(f"{workload.name}: every output is one token, so that no step decodes")
    alone = float(workload.weight[workload.output_tokens == 1].sum())
    law = _decoding(workload)
    tooth = None if sets_all_aside(law, limits) else saturated(workload, limits)
    demand = reserved_demand(law, limits, 1.0 if tooth is None else tooth.ratio)
    in_batch = law.mean(demand.decode_steps)
    if tooth is None:
        by_pool = _by_pool(law, demand, usable_tokens(law, limits, demand))
    else:
        by_pool = tooth.requests
    ceilings: dict[CeilingName, float] = {
        "kv_cache": limits.pool_tokens / law.mean(demand.decode_kv),
        "output_reservation": limits.pool_tokens / law.mean(demand.reserved),
    }
    x, share = _in_rows(law, limits, demand, by_pool)
    if limits.max_num_seqs is not None:
        ceilings["max_num_seqs"] = limits.max_num_seqs / in_batch
    by_rows = -math.expm1(-x) / x
    by_room = heads_uncovered(law, demand.declared, x) if tooth is None else tooth.passes
    events = share * by_room + (1 - share) * by_rows
    passes = events * (1 - alone) * passes_in_a_row(alone, events * (1 - alone))
    prefill_steps = passes * steps_per_pass(workload, limits, max(1 / passes, 1.0))
    scatter = 0.0
    if forms_cohorts(workload) and tooth is None:
        filled = waves(law, _admission(limits, demand), x / (1 + prefill_steps * x))
        x, prefill_steps = filled.requests, filled.prefill_steps * (1 - alone)
        scatter = filled.scatter
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


def _admission(limits: EngineLimits, demand: ReservedDemand) -> Admission:
    """What admission goes by; a request takes the mean room that it holds between decode steps."""
    assert limits.sglang is not None
    charges, steps = _charges(demand), demand.decode_steps
    growth = (charges.released - charges.kept) / steps
    kept = demand.reserved / steps - growth * (steps - 1) / 2
    chunk, most = limits.max_num_batched_tokens, limits.sglang.max_prefill_tokens
    return Admission(
        charges=replace(charges, kept=kept, released=kept + growth * steps),
        room_tokens=limits.pool_tokens,
        rows=limits.max_num_seqs,
        prefill_tokens=most if chunk is None else min(chunk, most),
        lags=limits.async_scheduling,
    )


def _decoding(workload: Workload) -> Workload:
    """The law of the requests that decode, those of two outputs or more."""
    some = workload.output_tokens > 1
    if some.all():
        return workload
    return replace(
        workload,
        prompt_tokens=workload.prompt_tokens[some],
        output_tokens=workload.output_tokens[some],
        max_tokens=workload.max_tokens[some],
        weight=workload.weight[some] / workload.weight[some].sum(),
        observed=workload.observed[some],
    )


def usable_tokens(workload: Workload, limits: EngineLimits, demand: ReservedDemand) -> float:
    """The pool less the room u that the head of the queue leaves; see the module."""
    if demand.ratio < 1:
        return limits.pool_tokens - _walked(workload, limits, demand)[1].unused_tokens
    kept = demand.kept
    u = workload.mean(kept * (2 * demand.asked - kept)) / (2 * workload.mean(kept))
    return limits.pool_tokens - u


def _by_pool(law: Workload, demand: ReservedDemand, usable: float) -> float:
    """Requests per decode step that so many usable tokens allow."""
    # A request that fits an empty pool always finds one.
    return max(usable / law.mean(demand.reserved), 1 / law.mean(demand.decode_steps))


def _walked(law: Workload, limits: EngineLimits, demand: ReservedDemand) -> tuple[float, Room]:
    """Requests per decode step that the pool allows where only a share is set aside, and its room."""
    x = _by_pool(law, demand, limits.pool_tokens)
    for _ in range(SETTLED):
        room = play(law, _charges(demand), x)
        x = _by_pool(law, demand, limits.pool_tokens - room.unused_tokens)
    return x, room


def _charges(demand: ReservedDemand) -> Charges:
    return Charges(
        asked=demand.asked,
        charged=demand.declared,
        kept=demand.kept,
        released=demand.kept + demand.decode_steps - demand.ratio * demand.shed,
    )


def second_moment_of_reserved(workload: Workload, demand: ReservedDemand) -> float:
    """Squared footprint summed over decode steps, the footprint taken as constant: tokens^2 steps."""
    steps = np.maximum(demand.decode_steps, 1.0)
    return workload.mean(np.asarray(demand.reserved**2 / steps))


# -- new_token_ratio -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SawTooth:
    """A pool under saturation while ``new_token_ratio`` falls, and jumps when it overflows; means over
    the decode steps."""

    ratio: float
    requests: float
    """Completions per decode step."""
    passes: float
    """Passes of admission that admit somebody, per request."""


@lru_cache(maxsize=16)
def saturated(workload: Workload, limits: EngineLimits) -> SawTooth:
    """The saw tooth of ``new_token_ratio``, for requests that do not ignore the end of text.

    It falls by a fixed amount each decode step, down to a floor. The pool overflows when the batch
    outgrows the share rho of the outputs to come that is spare: as often as the walk of the room falls
    below nothing, times the chance exp(-eta rho T) that it falls on by that spare room, T the outputs to
    come of all that run (`analysis.theory.room_walk`). An overflow lifts the ratio to what the batch has
    generated over what it declared. So in one tooth the ratio is seen at rho for as long as it takes to
    fall past it, if it has not jumped before, and at the floor until the next overflow.
    """
    law, rules = _decoding(workload), limits.sglang
    assert rules is not None
    initial = min(INITIAL_RATIO * rules.schedule_conservativeness, 1.0)
    least = initial * MIN_RATIO_FACTOR
    fall = (initial - least) / RATIO_DECAY_STEPS
    to_come = law.mean(reserved_demand(law, limits, least).to_come)

    def at(ratio: float) -> tuple[float, float, float]:
        """Requests, passes and the logarithm of overflows, per decode step."""
        demand = reserved_demand(law, limits, min(ratio, BELOW_ALL))
        x, room = _walked(law, limits, demand)
        admitted, share = _in_rows(law, limits, demand, x)
        # Rows that are all taken leave the room to those who have them.
        overdrawn = share * max(room.overdrawn, x / COMPLETIONS)
        falls = ruin_exponent(law, _charges(demand)) * ratio * admitted * to_come
        return x, room.passes, math.log(max(overdrawn, LEAST_CHANCE)) - falls

    floor = at(least)
    jump = max(_ratio_after_overflow(law, least * to_come), least)
    walked = np.linspace(least, jump, TOOTH_WALKS)
    found = np.array([floor, *(at(float(ratio)) for ratio in walked[1:])])
    ratios = np.linspace(least, jump, TOOTH_POINTS)
    x, passes, overflows = (np.interp(ratios, walked, column) for column in found.T)
    # From the jump down: the chance that no overflow came before.
    risk = cumulative_trapezoid(np.exp(overflows[::-1]) / fall, -ratios[::-1], initial=0)[::-1]
    weight = np.exp(-risk) * np.gradient(ratios) / fall
    weight[[0, -1]] /= 2
    weight[0] += math.exp(min(-float(overflows[0]), LONGEST) - float(risk[0]))
    weight /= weight.sum()
    mean_x = float(weight @ x)
    return SawTooth(float(weight @ ratios), mean_x, float(weight @ (x * passes)) / mean_x)


def _in_rows(
    law: Workload, limits: EngineLimits, demand: ReservedDemand, by_pool: float
) -> tuple[float, float]:
    """Requests per decode step where so many fit the pool, and the share of time in which the pool, not
    the number of rows, stops admission."""
    if limits.max_num_seqs is None:
        return by_pool, 1.0
    in_batch = law.mean(demand.decode_steps)
    spread = second_moment_of_reserved(law, demand) / in_batch
    cv2 = spread / (law.mean(demand.reserved) / in_batch) ** 2 - 1
    running, share = cut_off(by_pool * in_batch, cv2, limits.max_num_seqs)
    return running / in_batch, share


def _ratio_after_overflow(workload: Workload, outgrown_tokens: float) -> float:
    """(generated + 20 per request) / declared over the batch, at its mean.

    Before it overflows it grows by ``outgrown_tokens`` per completion of a decode step.
    """
    o, d = workload.output_tokens, workload.max_tokens
    generated = workload.mean(o * (o - 1) / 2) + RETRACT_DECODE_STEPS * workload.mean(o - 1)
    return min((generated + outgrown_tokens) / workload.mean((o - 1) * d), 1.0)
