"""``new_token_ratio`` of SGLang under saturation: it falls, and jumps when the pool overflows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.integrate import cumulative_trapezoid

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.sglang import (
    INITIAL_RATIO,
    MIN_RATIO_FACTOR,
    RATIO_DECAY_STEPS,
    RETRACT_DECODE_STEPS,
)
from analysis.theory.reserved_demand import decoding, reserved_demand
from analysis.theory.reserved_room import charges_of, in_rows, walked
from analysis.theory.room_walk import COMPLETIONS, ruin_exponent
from loadgen.workload import Workload

BELOW_ALL = 0.99
"""Of the outputs to come: with all of them set aside nothing grows into free room."""
TOOTH_WALKS, TOOTH_POINTS = 5, 200
"""Ratios between floor and jump at which the room is walked, and over which one tooth is summed: the
overflows fall exponentially."""
LEAST_CHANCE, LONGEST = 1e-300, 300.0
"""An overflow that never comes; logarithm of the decode steps until it does."""


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
    law, rules = decoding(workload), limits.sglang
    assert rules is not None
    initial = min(INITIAL_RATIO * rules.schedule_conservativeness, 1.0)
    least = initial * MIN_RATIO_FACTOR
    fall = (initial - least) / RATIO_DECAY_STEPS
    to_come = law.mean(reserved_demand(law, limits, least).to_come)

    def at(ratio: float) -> tuple[float, float, float]:
        """Requests, passes and the logarithm of overflows, per decode step."""
        demand = reserved_demand(law, limits, min(ratio, BELOW_ALL))
        x, room = walked(law, limits, demand)
        admitted, share = in_rows(law, limits, demand, x)
        # Rows that are all taken leave the room to those who have them.
        overdrawn = share * max(room.overdrawn, x / COMPLETIONS)
        falls = ruin_exponent(law, charges_of(demand)) * ratio * admitted * to_come
        return x, room.passes, math.log(max(overdrawn, LEAST_CHANCE)) - falls

    floor = at(least)
    jump = max(_ratio_after_overflow(law, least * to_come), least)
    few = np.linspace(least, jump, TOOTH_WALKS)
    found = np.array([floor, *(at(float(ratio)) for ratio in few[1:])])
    ratios = np.linspace(least, jump, TOOTH_POINTS)
    x, passes, overflows = (np.interp(ratios, few, column) for column in found.T)
    # From the jump down: the chance that no overflow came before.
    risk = cumulative_trapezoid(np.exp(overflows[::-1]) / fall, -ratios[::-1], initial=0)[::-1]
    weight = np.exp(-risk) * np.gradient(ratios) / fall
    weight[[0, -1]] /= 2
    weight[0] += math.exp(min(-float(overflows[0]), LONGEST) - float(risk[0]))
    weight /= weight.sum()
    mean_x = float(weight @ x)
    return SawTooth(float(weight @ ratios), mean_x, float(weight @ (x * passes)) / mean_x)


def _ratio_after_overflow(workload: Workload, outgrown_tokens: float) -> float:
    """(generated + 20 per request) / declared over the batch, at its mean.

    Before it overflows it grows by ``outgrown_tokens`` per completion of a decode step.
    """
    o, d = workload.output_tokens, workload.max_tokens
    generated = workload.mean(o * (o - 1) / 2) + RETRACT_DECODE_STEPS * workload.mean(o - 1)
    return min((generated + outgrown_tokens) / workload.mean((o - 1) * d), 1.0)
