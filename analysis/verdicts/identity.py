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

from analysis.inference.growth import batch_edges, batch_mean
from analysis.inference.work import work_done
from analysis.numbers.estimate import Estimate
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.audit import STEP_BATCHES, Saturation, counter_at
from analysis.verdicts.verdict import Check, NamedEstimate

IDENTITY_TOLERANCE = 0.10
"""Edge effects and the bound on wasted memory-time stay well below it (docs/statistics.md); a wrong pool
shows up in full."""
WASTED = 0.1
"""Of the most that preemptions can waste, what they do: 0.00 to 0.08 in the steps of four simulated
servers with 0.4 to 3.6 preemptions per request (`harness.rehearsals.error_rates.SETTINGS`)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The factors of measured over M / (b E[g]), and the pool that makes both sides equal."""

    factors: tuple[NamedEstimate, ...]
    implied_pool: Estimate
    check: Check
    """Fails where the claimed pool is not the implied one."""


@dataclass(frozen=True, slots=True, eq=False)
class Books:
    """What was held and served in equal parts of a backlogged window; arrays have shape (parts,)."""

    edges_s: NDArray[np.float64]
    """Where the parts begin and end, shape (parts + 1,)."""
    work: NDArray[np.float64]
    """KV demand served, token-steps in the convention of `work.kv_work`."""
    steps: NDArray[np.float64]
    usage: NDArray[np.float64]
    """Mean share of the pool in use, with what finished requests had returned before the gauge."""
    completed: NDArray[np.float64]
    context_tokens: float
    """Mean prompt and half the output."""
    preempted: float

    def most_wasted(self, served: float) -> float:
        """Largest share of ``served`` token-steps that preemptions can have wasted.

        A preempted request keeps its outputs; it wastes at most one step that holds its context again
        (theory.md 3.5), and nothing where that step computes all of it and gives the next output.
        """
        return min(0.5, self.preempted * self.context_tokens / max(served, 1.0))


def books(frames: RunFrames, saturated: Saturation, parts: int, refill_s: float = 0.0) -> Books:
    """The books of a backlogged window in so many parts.

    Samples are taken in time, and the identity counts steps. A gauge that shows room is followed by a
    step with the prompts that fill it: ``refill_s`` is what a poolful of prompts adds to a step, and
    samples count by one over the step that they stand for. 0 leaves that out.
    """
    window = saturated.window
    edges = batch_edges(window.start_s, window.end_s, parts)
    ends_s = frames.per_request("last_token_s")[frames.completed]
    half = frames.per_request("output_tokens_designed").mean() / 2
    return Books(
        edges_s=edges,
        work=np.diff(work_done(frames, edges)),
        steps=np.diff(counter_at(frames, "steps", edges)),
        usage=_occupancy(frames, edges, saturated.step_time.value, refill_s)
        + saturated.kv_returned,
        completed=np.histogram(ends_s, edges)[0].astype(float),
        context_tokens=float(frames.per_request("prompt_tokens").mean() + half),
        preempted=float(np.diff(counter_at(frames, "preemptions", edges[[0, -1]]))[0]),
    )


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
    seen = books(frames, saturated, STEP_BATCHES)
    served = seen.work * rounding
    per_step = served / (seen.steps / saturated.steps_per_decode)
    most = seen.most_wasted(float(served.sum()))
    method = "part of a context-sized step wasted per preemption; all of it is the bound"
    kept = Estimate(1 - WASTED * most, 1 - most, 1.0, 0.95, "", method)
    implied = batch_mean(
        per_step / seen.usage / kept.value, "tokens", "KV demand served per step over KV usage"
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
        seen.usage, "", "gauge of KV usage and what finished requests had returned, 10 batches"
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


def _occupancy(
    frames: RunFrames, edges: NDArray[np.float64], step_s: float, refill_s: float
) -> NDArray[np.float64]:
    """Mean of the KV usage gauge over the steps of each batch, shape (batches,)."""
    times, usage = frames.per_sample("t_s"), frames.per_sample("kv_usage")
    inside = (times >= edges[0]) & (times < edges[-1])
    times, usage = times[inside], usage[inside]
    next_step_s = np.maximum(step_s + refill_s * (usage.mean() - usage), step_s / 2)
    found = []
    for a, b in itertools.pairwise(edges):
        part = (times >= a) & (times < b)
        found.append(
            np.average(usage[part], weights=1 / next_step_s[part]) if part.any() else np.nan
        )
    return np.array(found)


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
