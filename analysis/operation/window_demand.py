"""What a window's traffic asked of each ceiling of an engine, and what saturation adds to that.

Areas over sizes: how many full steps would have done the same work. Terms of a few per cent come from
`analysis.operation.serving_window.assumed_law` through the closed forms of the critical rate: room
that stays free in a full pool, tokens computed again, SGLang's prefill steps and what it sets aside
for outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.inference.long_run import Stretch, bins_of
from analysis.operation.serving_window import CannotSay, ServingWindow, assumed_law
from analysis.theory.operating_point import Point, vllm_point
from analysis.theory.prediction import CeilingName
from analysis.theory.reservation import reserving, sglang_point
from analysis.theory.reserved_demand import reserved_demand
from loadgen.workload import Workload

Floats = NDArray[np.float64]

CLOSE = 0.01
"""Ceilings as close as this, in shares of the fuller one, are told apart by nobody."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What the window asked of each ceiling, and what saturation adds to it."""

    full_steps: dict[CeilingName, Floats]
    """Area over size, shape (intervals,): full steps that would have done the same work."""
    law: Workload
    point: Point
    stretched: dict[CeilingName, float]
    """Full steps that a step's worth of work takes at saturation, at least about 1: room stays free."""
    more_steps: float
    """Steps per request that no ceiling decides: SGLang computes prompts in steps of their own."""
    again: float
    """Tokens per request that saturation computes again beyond what the window did."""


def ceilings_of(window: ServingWindow) -> tuple[CeilingName, ...]:
    """The ceilings of the window's engine."""
    if window.limits.sglang is not None:
        return ("kv_cache", "output_reservation", "max_num_seqs")
    return ("kv_cache", "max_num_seqs", "max_num_batched_tokens")


def demand_of(window: ServingWindow, max_tokens: int | None) -> Asked:
    """The full steps of each known ceiling. Raises CannotSay for lengths without an operating point."""
    law = assumed_law(window, max_tokens)
    try:
        if window.limits.sglang is not None:
            return _asked_of_sglang(window, law)
        return _asked_of_vllm(window, law)
    except ValueError as error:
        raise CannotSay(f"no operating point for the lengths of this window: {error}") from error


def _asked_of_vllm(window: ServingWindow, law: Workload) -> Asked:
    limits = window.limits
    point = vllm_point(law, limits, None)
    # The gauges show what is held when those that finished have left: their last step is added.
    last = window.mean_prompt + window.mean_output - 1 + (limits.block_size - 1) / 2
    kv = window.steps * window.kv_tokens + window.finished * last
    full: dict[CeilingName, Floats] = {"kv_cache": kv / limits.pool_tokens}
    if limits.max_num_seqs is not None:
        slots = window.steps * window.running + window.finished
        full["max_num_seqs"] = slots / limits.max_num_seqs
    if limits.max_num_batched_tokens is not None:
        full["max_num_batched_tokens"] = window.tokens / limits.max_num_batched_tokens
    requests = max(float(window.started.sum()), 1.0)
    again = point.operation.recomputed_tokens
    already = window.preemptions * window.mean_prompt / requests
    x = point.operation.requests_per_step
    return Asked(
        full_steps=full,
        law=law,
        point=point,
        stretched={name: point.supply[name].value / x for name in full},
        more_steps=0.0,
        again=max(again - already, 0.0),
    )


def _asked_of_sglang(window: ServingWindow, law: Workload) -> Asked:
    limits = window.limits
    found = reserving(law, limits)
    demand = reserved_demand(law, limits, found.ratio)
    held = window.decoding_kv()
    decoding = max(law.mean(demand.decode_steps), 1.0)
    aside = found.ratio * law.mean(demand.to_come) / decoding * window.decoded
    full: dict[CeilingName, Floats] = {
        "kv_cache": (held + window.decoded) / limits.pool_tokens,
        "output_reservation": (held + aside) / limits.pool_tokens,
    }
    if limits.max_num_seqs is not None:
        full["max_num_seqs"] = window.decoded / limits.max_num_seqs
    return Asked(
        full_steps=full,
        law=law,
        point=sglang_point(law, limits, None),
        stretched={name: found.ceilings[name] / found.requests for name in full},
        more_steps=found.prefill_steps,
        again=0.0,
    )


def fullest(window: ServingWindow, asked: Asked) -> tuple[CeilingName, tuple[CeilingName, ...]]:
    """The fullest ceiling, and those that chance cannot tell from it.

    Compared in pairs, as the same requests fill both.
    """
    full = asked.full_steps
    first = max(full, key=lambda name: float(full[name].sum()))
    rivals = []
    for name in full:
        # What is set aside comes on top of what is held.
        nested = {name, first} == {"kv_cache", "output_reservation"}
        if name != first and not nested:
            ahead = per_second(window, full[first] - full[name]).estimate
            near = CLOSE * float(full[first].sum()) / window.seconds
            if ahead.low <= near:
                rivals.append(name)
    return first, tuple(rivals)


def per_second(window: ServingWindow, totals: Floats) -> Stretch:
    """A quantity that accrued over each interval, as a rate with its autocorrelation."""
    residences = window.seconds / max(window.residence_s, 1e-9)
    edges = np.linspace(0.0, window.seconds, bins_of(residences) + 1)
    at = np.concatenate([[0.0], np.cumsum(window.duration_s)])
    accrued = np.interp(edges, at, np.concatenate([[0.0], np.cumsum(totals)]))
    rates = np.diff(accrued) / np.diff(edges)
    return Stretch(rates, window.seconds, residences, "", "mean over the window, cosine transforms")
