"""Room in the pool without tokens: set aside for outputs to come, or too small for the next one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import RunFrames, tokens_received
from analysis.theory.operating_point import head_room_tokens
from analysis.theory.reserved_demand import reserved_demand
from analysis.theory.reserved_room import usable_tokens
from loadgen.workload import Workload

Floats = NDArray[np.float64]

RESERVED_SHARE = 0.05
"""Share of the pool set aside for outputs to come that moves the critical rate by as much."""


def set_aside_ratio(
    frames: RunFrames, at_s: Floats, limits: EngineLimits, ignore_eos: bool
) -> Floats:
    """Share of the outputs to come that the engine sets room aside for, at each instant.

    0 for an engine that sets none aside, 1 for requests that ignore the end of text from the version
    on that sets their whole output aside, and else the ratio that the engine shows.
    """
    rules = limits.sglang
    if rules is None:
        return np.zeros_like(at_s)
    if ignore_eos and rules.whole_output_of_ignore_eos:
        return np.ones_like(at_s)
    shown = frames.per_sample("new_token_ratio")
    return np.asarray(np.interp(at_s, frames.per_sample("t_s"), shown))


def set_aside(frames: RunFrames, at_s: Floats, limits: EngineLimits, ratio: Floats) -> Floats:
    """Share of the pool that the engine has set aside for outputs to come, at each instant.

    By the rule that it states (`analysis.schedulers.sglang`), for the requests that the client saw
    running: ``ratio`` of what each declared and has not yet received.
    """
    rules = limits.sglang
    if rules is None:
        return np.zeros_like(at_s)
    first, last, declared = (
        frames.per_request(column)[frames.started, None]
        for column in ("first_token_s", "last_token_s", "max_tokens")
    )
    to_come = np.clip(declared - tokens_received(frames, at_s), 0, rules.clip_max_new_tokens)
    ended = frames.completed[frames.started, None] & (at_s[None, :] >= last)
    running = (at_s[None, :] >= first) & ~ended
    tokens = np.where(running, to_come, 0.0).sum(axis=0)
    return np.asarray(ratio * tokens / limits.pool_tokens)


def unusable_share(workload: Workload, limits: EngineLimits, ratio: float) -> float:
    """Mean share of the pool that the head of the queue leaves, as it needs more than that."""
    if limits.sglang is None:
        return head_room_tokens(workload, limits) / limits.pool_tokens
    if int(workload.output_tokens.max()) < 2:
        return 0.0
    demand = reserved_demand(workload, limits, ratio)
    return 1 - usable_tokens(workload, limits, demand) / limits.pool_tokens
