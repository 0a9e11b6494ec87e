"""Do the books balance, which ceiling was hit, and did the premises hold?

Every test here reads limits, counters and occupancy, never the drift of the queue: a premise must not
be found broken because its consequence was disliked.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.engine import EngineLimits
from analysis.estimate import Estimate
from analysis.frames import RunFrames, number_in_system, tokens_received
from analysis.growth import Backlog, batch_edges, batch_mean, work_done
from analysis.verdict import Check, NamedEstimate

STEP_BATCHES = 10
MIN_SAMPLES = 10
IN_FLIGHT_SHARE = 0.10
FOREIGN_REQUESTS = 3
"""Requests by which a gauge may be ahead of the client: one step's departures on their way back."""
FOREIGN_SHARE = 0.05
BALANCE_TOLERANCE = 0.02
IDENTITY_TOLERANCE = 0.10
"""Edge effects, the gauge's instant within a step and wasted memory-time stay below 6 % in 200
simulated runs; a wrong pool shows up in full."""
KV_BOUND_USAGE = 0.90
"""Mean KV usage above which the KV cache is what refuses requests. Blocks of finished requests are
returned before the gauge is read, so a full pool reads 0.94-0.99 (engines.md 8.1)."""
PINNED_SPREAD = 0.02
STEADY_TOLERANCE = 0.10


@dataclass(frozen=True, slots=True)
class Saturation:
    """What the engine showed while its queue was never empty."""

    window: Backlog
    kv_usage: float
    running: float
    running_max: int
    running_pinned: bool
    """The number of running requests sat at its maximum in nearly every sample."""
    tokens_per_step: float
    step_time: Estimate
    step_time_change: float
    """Mean step of the second half over that of the first, minus 1."""
    preemptions_per_request: float


def counter_at(frames: RunFrames, column: str, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """A counter of the engine, interpolated between samples, shape of ``at_s``."""
    times = frames.engine["t_s"].to_numpy(dtype=float)
    values = frames.engine[column].to_numpy(dtype=float)
    result: NDArray[np.float64] = np.interp(at_s, times, values)
    return result


def step_time(frames: RunFrames, start_s: float, end_s: float) -> Estimate | None:
    """Mean seconds per step, from the count of steps that produced output; None if there were few.

    A step without output (a lone prefill chunk) is not counted by the engine and makes this too long.
    """
    edges = batch_edges(start_s, end_s, STEP_BATCHES)
    steps = np.diff(counter_at(frames, "steps", edges))
    if steps.min() < 3:
        return None
    return batch_mean(np.diff(edges) / steps, "s", "time over output-producing steps, 10 batches")


def saturation(frames: RunFrames, window: Backlog) -> Saturation | None:
    """Occupancy and cadence under backlog; None when the engine hardly stepped."""
    mean_step = step_time(frames, window.start_s, window.end_s)
    if mean_step is None:
        return None
    engine = frames.engine
    inside = engine[(engine["t_s"] >= window.start_s) & (engine["t_s"] <= window.end_s)]
    running = inside["running"].to_numpy(dtype=float)
    edges = np.array([window.start_s, (window.start_s + window.end_s) / 2, window.end_s])
    steps = np.diff(counter_at(frames, "steps", edges))
    tokens = np.diff(counter_at(frames, "step_tokens", edges[[0, 2]]))[0]
    finished = np.diff(counter_at(frames, "finished", edges[[0, 2]]))[0]
    preempted = np.diff(counter_at(frames, "preemptions", edges[[0, 2]]))[0]
    return Saturation(
        window=window,
        kv_usage=float(inside["kv_usage"].mean()),
        running=float(running.mean()),
        running_max=int(running.max()),
        running_pinned=bool(np.quantile(running, 0.1) >= (1 - PINNED_SPREAD) * running.max() - 1),
        tokens_per_step=float(tokens / steps.sum()),
        step_time=mean_step,
        step_time_change=float(steps[0] / steps[1] - 1.0),
        preemptions_per_request=float(preempted / max(finished, 1.0)),
    )


def binding_resource(saturated: Saturation, limits: EngineLimits) -> str:
    """Which ceiling refused requests under backlog, from occupancy and limits.

    The KV cache binds when it is full. Otherwise `max_num_seqs` binds when the number running stays at
    its maximum (and at the limit, where that is known); otherwise the token budget.
    """
    if saturated.kv_usage >= KV_BOUND_USAGE:
        return "kv_cache"
    limit = limits.max_num_seqs
    if limit is not None:
        at_limit = saturated.running >= (1 - PINNED_SPREAD) * limit - 1
        return "max_num_seqs" if at_limit else "max_num_batched_tokens"
    return "max_num_seqs" if saturated.running_pinned else "max_num_batched_tokens"


def conservation(frames: RunFrames) -> Check:
    """Arrivals = departures + in system, request by request."""
    requests = frames.requests
    duplicated = int(requests["id"].duplicated().sum())
    completed = requests["outcome"] == "completed"
    no_end = int(requests.loc[completed, "last_token_s"].isna().sum())
    wrong = duplicated + no_end
    return Check(
        name=f"{frames.run.id}: every request once",
        holds=wrong == 0,
        observed=float(wrong),
        threshold=0.0,
        text=f"{len(requests)} arrivals; {duplicated} recorded twice, {no_end} completed without end",
    )


def client_equals_server(frames: RunFrames) -> Check:
    """Client N(t) = waiting + running + in flight, where in flight is small and does not grow.

    In flight is on the wire or in the server's HTTP front end, before the engine knows a request or
    after it has let it go: the rate times the time spent there (Little's law). It fails when the
    engine holds requests that we did not send, when more than a tenth of N is in flight, or when that
    grows: then the front end, not the engine, is the bottleneck, or a gauge is wrong.
    """
    engine = frames.engine
    inside = engine[(engine["t_s"] >= 0) & (engine["t_s"] <= frames.end_s)]
    name = f"{frames.run.id}: client N = waiting + running + in flight"
    if len(inside) < MIN_SAMPLES:
        text = f"fewer than {MIN_SAMPLES} engine samples"
        return Check(name=name, holds=None, observed=0.0, threshold=IN_FLIGHT_SHARE, text=text)
    read, seen = (inside[column].to_numpy(dtype=float) for column in ("read_s", "t_s"))
    server = (inside["waiting"] + inside["running"]).to_numpy(dtype=float)
    client = (number_in_system(frames, read) + number_in_system(frames, seen)) / 2
    flying = client - server
    foreign = float((flying < -(FOREIGN_REQUESTS + 0.02 * client)).mean())
    mean = float(flying.mean())
    share = mean / max(float(client.mean()), 1.0)
    allowed = IN_FLIGHT_SHARE + FOREIGN_REQUESTS / max(float(client.mean()), 1.0)
    third = len(flying) // 3
    growth = float(flying[-third:].mean() - flying[:third].mean()) / (seen[-1] - seen[0]) * 1.5
    most_growth = max(0.01 * frames.run.arrival_rate, FOREIGN_REQUESTS / (seen[-1] - seen[0]))
    transit_s = max(mean, 0.0) / frames.run.arrival_rate
    return Check(
        name=name,
        holds=foreign <= FOREIGN_SHARE and share <= allowed and growth <= most_growth,
        observed=share,
        threshold=allowed,
        text=f"in flight {mean:.1f} requests, {share:.1%} of N (allowed {allowed:.1%}) or "
        f"{transit_s * 1e3:.0f} ms of each request's life; growing by {growth:+.2g} req/s (allowed "
        f"{most_growth:.2g}); the engine held more than we sent in {foreign:.1%} of samples "
        f"(allowed {FOREIGN_SHARE:.0%})",
    )


def token_balance(frames: RunFrames) -> Check:
    """Tokens generated by the server's counter against tokens received by the client."""
    times = frames.engine["t_s"].to_numpy(dtype=float)
    name = f"{frames.run.id}: tokens sent = tokens received"
    times = times[(times >= 0) & (times <= frames.end_s)]
    if len(times) < 2:
        return Check(
            name=name,
            holds=None,
            observed=0.0,
            threshold=BALANCE_TOLERANCE,
            text="fewer than two engine samples",
        )
    ends = times[[0, -1]]
    server = float(np.diff(counter_at(frames, "generation_tokens", ends))[0])
    client = float(np.diff(tokens_received(frames, ends).sum(axis=0))[0])
    running = float(frames.engine["running"].max())
    allowed = BALANCE_TOLERANCE + 2 * running / max(server, 1.0)
    difference = client / max(server, 1.0) - 1.0
    return Check(
        name=name,
        holds=abs(difference) <= allowed,
        observed=difference,
        threshold=allowed,
        text=f"{client:.0f} received, {server:.0f} generated "
        f"({difference:+.2%}, allowed {allowed:.2%}: two steps' tokens and {BALANCE_TOLERANCE:.0%})",
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """The memory-time identity of theory.md 2.6 in a backlogged window.

    served * E[g] * b = U * (1 - w): the three factors of measured over M / (b E[g]), and the pool that
    would make both sides equal. ``check`` fails where the claimed pool does not.
    """

    factors: tuple[NamedEstimate, ...]
    implied_pool: Estimate
    check: Check


def identity(
    frames: RunFrames,
    saturated: Saturation,
    pool_tokens: int,
    rounding: float,
    predicted_step_s: float,
) -> Identity:
    """Audit M, g and b against one another.

    ``rounding`` is E[g in blocks] / E[g in tokens] of the workload: occupancy counts whole blocks.
    Memory-time wasted by preemptions is bounded by one prompt-sized step for each (theory.md 3.5);
    half of that is taken, and half is its error.
    """
    window = saturated.window
    edges = batch_edges(window.start_s, window.end_s, STEP_BATCHES)
    served = np.diff(work_done(frames, edges)) * rounding
    steps = np.diff(counter_at(frames, "steps", edges))
    engine = frames.engine
    occupancy = np.array(
        [
            engine.loc[(engine["t_s"] >= a) & (engine["t_s"] < b), "kv_usage"].mean()
            for a, b in itertools.pairwise(edges)
        ]
    )
    useful = served / steps
    per_request = float(
        frames.requests["prompt_tokens"].mean()
        + frames.requests["output_tokens_designed"].mean() / 2
    )
    waste_most = min(
        0.5,
        saturated.preemptions_per_request
        * per_request
        * float(np.diff(counter_at(frames, "finished", edges[[0, -1]]))[0])
        / max(float(served.sum()), 1.0),
    )
    kept = Estimate(
        1 - waste_most / 2,
        1 - waste_most,
        1.0,
        0.95,
        "",
        "half a prompt-sized step wasted for each preemption",
    )
    usage = batch_mean(occupancy, "", "gauge kv_cache_usage, 10 batches")
    implied_values = useful / occupancy / kept.value
    implied = batch_mean(implied_values, "tokens", "KV demand served per step over KV usage")
    ratio = implied.value / pool_tokens
    factor = predicted_step_s / saturated.step_time.value
    step_factor = Estimate(
        factor,
        predicted_step_s / saturated.step_time.high,
        predicted_step_s / max(saturated.step_time.low, 1e-9),
        0.95,
        "",
        "predicted over measured mean step",
    )
    factors = (
        NamedEstimate(name="occupancy U/M", estimate=usage, note="how full the pool was"),
        NamedEstimate(
            name="step time b_predicted/b_measured",
            estimate=step_factor,
            note="1 when the engine steps as fast as predicted",
        ),
        NamedEstimate(
            name="memory-time not wasted 1-w",
            estimate=kept,
            note="lost to prompts computed again after a preemption",
        ),
    )
    check = Check(
        name="memory-time identity",
        holds=abs(ratio - 1) <= IDENTITY_TOLERANCE,
        observed=ratio,
        threshold=IDENTITY_TOLERANCE,
        text=f"KV demand served and occupancy imply a pool of {implied.value:.0f} tokens "
        f"[{implied.low:.0f}, {implied.high:.0f}]; the server claims {pool_tokens} "
        f"({ratio - 1:+.1%}, allowed {IDENTITY_TOLERANCE:.0%})",
    )
    return Identity(factors, implied, check)
