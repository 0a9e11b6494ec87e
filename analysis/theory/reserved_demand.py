"""What one request takes out of an engine that sets room aside for outputs to come.

Between two decode steps a request that has j outputs holds s + j - 1 tokens, and the share rho of its
d - j declared tokens to come is set aside (`analysis.schedulers.sglang`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.theory.kv_demand import rounded_sum
from analysis.theory.operating_point import forms_cohorts
from loadgen.workload import Workload

Floats = NDArray[np.float64]


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


def decoding(workload: Workload) -> Workload:
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


def keeps_its_fill(workload: Workload, limits: EngineLimits) -> bool:
    """Do requests stay in the waves in which chance first admitted them?

    SGLang computes prompts in steps of their own, which a wave shares: it is served the faster the
    larger it is, and equal outputs keep it together. No operating point stands for that.
    """
    return limits.sglang is not None and forms_cohorts(workload)


def second_moment_of_reserved(workload: Workload, demand: ReservedDemand) -> float:
    """Squared footprint summed over decode steps, the footprint taken as constant: tokens^2 steps."""
    steps = np.maximum(demand.decode_steps, 1.0)
    return workload.mean(np.asarray(demand.reserved**2 / steps))
