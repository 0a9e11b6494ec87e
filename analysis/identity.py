"""The memory-time identity: an audit of pool, lengths and step time against one another (theory.md 2.6).

Over a backlogged window, served * E[g] * b = U * (1 - w): what was served per step is what was occupied,
but for memory-time that preemptions wasted. It holds for any engine, so that a mismatch means a wrong
input, first of all the pool that the server claims.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.audit import STEP_BATCHES, Saturation, counter_at
from analysis.capacity import work_done
from analysis.estimate import Estimate
from analysis.frames import RunFrames
from analysis.growth import batch_edges, batch_mean
from analysis.verdict import Check, NamedEstimate

IDENTITY_TOLERANCE = 0.10
"""Edge effects and the bound on wasted memory-time stay well below it (docs/statistics.md); a wrong pool
shows up in full."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The factors of measured over M / (b E[g]), and the pool that makes both sides equal."""

    factors: tuple[NamedEstimate, ...]
    implied_pool: Estimate
    check: Check
    """Fails where the claimed pool is not the implied one."""


def identity(
    frames: RunFrames,
    saturated: Saturation,
    pool_tokens: int,
    rounding: float,
    predicted_step_s: float,
) -> Identity:
    """Audit M, g and b of a backlogged window.

    ``rounding`` is E[g in blocks] / E[g in tokens] of the workload: occupancy counts whole blocks.
    """
    window = saturated.window
    edges = batch_edges(window.start_s, window.end_s, STEP_BATCHES)
    served = np.diff(work_done(frames, edges)) * rounding
    decode_steps = np.diff(counter_at(frames, "steps", edges)) / saturated.steps_per_decode
    per_step = served / decode_steps
    occupancy = _occupancy(frames, edges) + saturated.kv_returned
    kept = _kept(frames, saturated, float(served.sum()))
    implied = batch_mean(
        per_step / occupancy / kept.value, "tokens", "KV demand served per step over KV usage"
    )
    ratio = implied.value / pool_tokens
    check = Check(
        name="memory-time identity",
        holds=abs(ratio - 1) <= IDENTITY_TOLERANCE if np.isfinite(ratio) else None,
        observed=ratio,
        threshold=IDENTITY_TOLERANCE,
        text=f"KV demand served and occupancy imply a pool of {implied.value:.0f} tokens "
        f"[{implied.low:.0f}, {implied.high:.0f}]; the server claims {pool_tokens} "
        f"({100 * (ratio - 1):+.1f} %, allowed {100 * IDENTITY_TOLERANCE:.0f} %)",
    )
    usage = batch_mean(
        occupancy, "", "gauge of KV usage and what finished requests had returned, 10 batches"
    )
    step = saturated.step_time
    pace = Estimate(
        predicted_step_s / step.value,
        predicted_step_s / step.high,
        predicted_step_s / max(step.low, 1e-9),
        0.95,
        "",
        "predicted over measured mean step",
    )
    share = batch_mean(per_step / pool_tokens, "", "KV demand served per step over the pool")
    return Identity(_named(usage, pace, kept, share), implied, check)


def _occupancy(frames: RunFrames, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the KV usage gauge in each batch, shape (batches,)."""
    times = frames.engine["t_s"]
    return np.array(
        [
            frames.engine.loc[(times >= a) & (times < b), "kv_usage"].mean()
            for a, b in itertools.pairwise(edges)
        ]
    )


def _kept(frames: RunFrames, saturated: Saturation, served: float) -> Estimate:
    """Share of memory-time that was not wasted.

    A preempted request keeps its outputs; it wastes at most one step that holds its context again
    (theory.md 3.5). Half of that is taken, and half is its error.
    """
    requests, window = frames.requests, saturated.window
    context = requests["prompt_tokens"].mean() + requests["output_tokens_designed"].mean() / 2
    ends = np.array([window.start_s, window.end_s])
    preempted = float(np.diff(counter_at(frames, "preemptions", ends))[0])
    most = min(0.5, preempted * float(context) / max(served, 1.0))
    return Estimate(
        1 - most / 2, 1 - most, 1.0, 0.95, "", "half a context-sized step wasted per preemption"
    )


def _named(
    usage: Estimate, pace: Estimate, kept: Estimate, share: Estimate
) -> tuple[NamedEstimate, ...]:
    product = usage.value * pace.value * kept.value
    return (
        NamedEstimate(name="occupancy U/M", estimate=usage, note="how full the pool was"),
        NamedEstimate(
            name="step time b_predicted/b_measured",
            estimate=pace,
            note="1 when the engine steps as fast as predicted",
        ),
        NamedEstimate(
            name="memory-time not wasted 1-w",
            estimate=kept,
            note="lost to prompts computed again after a preemption",
        ),
        NamedEstimate(
            name="product of the three",
            estimate=Estimate.exact(product, "", "the factors above, multiplied"),
            note="what the measured rate over M / (b E[g]) should be",
        ),
        NamedEstimate(
            name="measured rate over M / (b E[g])",
            estimate=share.scaled(pace.value),
            note="claimed pool, predicted step time, E[g] in whole blocks",
        ),
    )
