"""Do the books balance, which ceiling was hit, and did the premises hold?

Every test here reads limits, counters and occupancy, never the drift of the queue: a premise must not
be found broken because its consequence was disliked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.inference.capacity import Backlog
from analysis.inference.growth import batch_edges, batch_mean
from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import (
    RunFrames,
    number_in_system,
    tokens_received,
)
from analysis.theory.set_aside import RESERVED_SHARE, set_aside, set_aside_ratio, unusable_share
from analysis.verdicts.verdict import Check
from loadgen.workload import Workload

STEP_BATCHES = 10
MIN_SAMPLES = 10
IN_FLIGHT_SHARE = 0.10
FOREIGN_REQUESTS = 3
"""Requests by which a gauge may be ahead of the client: one step's departures on their way back."""
FOREIGN_SHARE = 0.05
BALANCE_TOLERANCE = 0.02
KV_BOUND_USAGE = 0.90
NEARLY_ALL = 0.97
HEAD_ROOM = 1.5
"""The KV cache is what refuses requests when 90 % of it are in use or set aside on average, or 97 %
less one and a half times what the head of the queue cannot use, if that is lower: what is left is
less than the head needs."""
OCCUPANCY_INSTANTS = 100
PINNED_SPREAD = 0.02
FULL_STEP = 0.85
"""A step counts a prompt when it completes and recomputed tokens not at all: full steps read less than
the budget."""


@dataclass(frozen=True, slots=True, eq=False)
class Saturation:
    """What the engine showed while its queue was never empty."""

    window: Backlog
    kv_usage: float
    """Mean share of the pool in use within a step."""
    kv_returned: float
    """Part of it that finished requests return before the gauge is read."""
    running: float
    running_max: int
    running_pinned: bool
    """The number of running requests sat at its maximum in nearly every sample."""
    tokens_per_step: float
    step_time: Estimate
    batch_steps: NDArray[np.float64]
    """Steps in each of `STEP_BATCHES` equal parts of the window."""
    preemptions_per_request: float
    full_at: float
    """Share of the pool in use and set aside from which it counts as full."""
    set_aside: float
    """Mean share of the pool set aside for outputs to come; 0 for an engine that sets none aside."""
    steps_per_decode: float
    """Steps from one token of a request to its next: above 1 where prompts have steps of their own."""


def counter_at(frames: RunFrames, column: str, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """A counter of the engine, interpolated between samples, shape of ``at_s``."""
    times, values = frames.per_sample("t_s"), frames.per_sample(column)
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
    # Batches are equal in time: their mean of steps per second is total steps over total time, while
    # their mean of seconds per step gives slow stretches too much weight.
    cadence = batch_mean(steps / np.diff(edges), "1/s", "steps per second")
    value = 1.0 / cadence.value
    half = value * cadence.half_width / cadence.value
    method = "time over output-producing steps, 10 batches"
    return Estimate(value, value - half, value + half, cadence.level, "s", method)


def saturation(
    frames: RunFrames, window: Backlog, limits: EngineLimits, workload: Workload
) -> Saturation | None:
    """Occupancy and cadence under backlog; None when the engine hardly stepped.

    The gauge of KV usage is read after a step's finished requests have returned their blocks: these,
    the requests finished per step times the blocks of a finished request, are added back.
    """
    mean_step = step_time(frames, window.start_s, window.end_s)
    if mean_step is None:
        return None
    times = frames.per_sample("t_s")
    inside = (times >= window.start_s) & (times <= window.end_s)
    running = frames.per_sample("running")[inside]
    edges = batch_edges(window.start_s, window.end_s, STEP_BATCHES)
    steps = np.diff(counter_at(frames, "steps", edges))
    tokens, finished, preempted = (
        np.diff(counter_at(frames, column, edges[[0, -1]]))[0]
        for column in ("step_tokens", "finished", "preemptions")
    )
    prompts, outputs = frames.per_request("prompt_tokens"), frames.per_request("output_tokens")
    held = (prompts + outputs - 1)[frames.completed]
    blocks = float(np.ceil(held / limits.block_size).mean()) if len(held) else 0.0
    returned = float(finished / steps.sum()) * blocks / limits.num_blocks
    at_s = np.linspace(window.start_s, window.end_s, OCCUPANCY_INSTANTS)
    ratio = set_aside_ratio(frames, at_s, limits, workload.ignore_eos)
    aside = set_aside(frames, at_s, limits, ratio)
    left = unusable_share(workload, limits, float(ratio.mean()))
    return Saturation(
        window=window,
        kv_usage=min(float(frames.per_sample("kv_usage")[inside].mean()) + returned, 1.0),
        kv_returned=returned,
        running=float(running.mean()),
        running_max=int(running.max()),
        running_pinned=bool(np.quantile(running, 0.1) >= (1 - PINNED_SPREAD) * running.max() - 1),
        tokens_per_step=float(tokens / steps.sum()),
        step_time=mean_step,
        batch_steps=steps,
        preemptions_per_request=float(preempted / max(finished, 1.0)),
        set_aside=float(aside.mean()),
        full_at=min(KV_BOUND_USAGE, NEARLY_ALL - HEAD_ROOM * left),
        steps_per_decode=_token_gap_s(frames, window) / mean_step.value if limits.sglang else 1.0,
    )


def _token_gap_s(frames: RunFrames, window: Backlog) -> float:
    """Mean seconds from one token to the next, of the requests that ended in the window."""
    first, last, tokens = (
        frames.per_request(column) for column in ("first_token_s", "last_token_s", "output_tokens")
    )
    inside = frames.completed & (first >= window.start_s) & (last <= window.end_s)
    gaps = (tokens[inside] - 1).sum()
    return float((last - first)[inside].sum() / max(gaps, 1))


def binding_resource(saturated: Saturation, limits: EngineLimits) -> str:
    """Which ceiling refused requests under backlog, from occupancy and limits.

    The KV cache binds when it is full, with tokens (``kv_cache``) or with tokens and room that the
    engine sets aside for outputs to come (``output_reservation``). Otherwise `max_num_seqs` binds when
    the number running stays at the limit (at its maximum, where no limit is known), and the token
    budget when steps are as full as it allows. "unknown" when none of them explains the queue: a
    front end, or a limit nobody named.
    """
    if saturated.kv_usage + saturated.set_aside >= saturated.full_at:
        return "output_reservation" if saturated.set_aside > RESERVED_SHARE else "kv_cache"
    limit, budget = limits.max_num_seqs, limits.max_num_batched_tokens
    if limit is None and saturated.running_pinned:
        return "max_num_seqs"
    if limit is not None and saturated.running >= (1 - PINNED_SPREAD) * limit - 1:
        return "max_num_seqs"
    if budget is not None and saturated.tokens_per_step >= FULL_STEP * budget:
        return "max_num_batched_tokens"
    return "unknown"


def conservation(frames: RunFrames) -> Check:
    """Each arrival is recorded once, and the server finished as many requests as left the client."""
    arrivals = len(frames.requests)
    duplicated = arrivals - len(np.unique(frames.per_request("id")))
    no_end = int(np.isnan(frames.per_request("last_token_s")[frames.completed]).sum())
    times = frames.per_sample("t_s")
    times = times[(times >= 0) & (times <= frames.end_s)]
    if len(times) < MIN_SAMPLES:
        text = f"fewer than {MIN_SAMPLES} engine samples"
        return Check(
            name=f"{frames.run.id}: departures", holds=None, observed=0.0, threshold=0.0, text=text
        )
    ends = times[[0, -1]]
    server = float(np.diff(counter_at(frames, "finished", ends))[0])
    client = float(np.diff(np.searchsorted(frames.departures_s, ends))[0])
    allowed = (
        FOREIGN_REQUESTS
        + BALANCE_TOLERANCE * server
        + IN_FLIGHT_SHARE * float(frames.per_sample("running").max())
    )
    return Check(
        name=f"{frames.run.id}: departures",
        holds=duplicated + no_end == 0 and abs(client - server) <= allowed,
        observed=client - server,
        threshold=allowed,
        text=f"{client:.0f} departures by the client, {server:.0f} finished by the server's counter "
        f"(allowed to differ by {allowed:.0f}: in flight and {100 * BALANCE_TOLERANCE:.0f} %); of "
        f"{arrivals} arrivals {duplicated} were recorded twice, {no_end} completed without end",
    )


def client_equals_server(frames: RunFrames) -> Check:
    """Client N(t) = waiting + running + in flight, where in flight is small and does not grow.

    In flight is on the wire or in the server's HTTP front end, before the engine knows a request or
    after it has let it go: the rate times the time spent there (Little's law). It fails when the
    engine holds requests that we did not send, when more than a tenth of N is in flight, or when that
    grows: then the front end, not the engine, is the bottleneck, or a gauge is wrong.
    """
    times = frames.per_sample("t_s")
    inside = (times >= 0) & (times <= frames.end_s)
    name = f"{frames.run.id}: client N = waiting + running + in flight"
    if inside.sum() < MIN_SAMPLES:
        text = f"fewer than {MIN_SAMPLES} engine samples"
        return Check(name=name, holds=None, observed=0.0, threshold=IN_FLIGHT_SHARE, text=text)
    read, seen = frames.per_sample("read_s")[inside], times[inside]
    server = (frames.per_sample("waiting") + frames.per_sample("running"))[inside]
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
        text=f"in flight {mean:.1f} requests, {100 * share:.1f} % of N (allowed "
        f"{100 * allowed:.1f} %) or "
        f"{transit_s * 1e3:.0f} ms of each request's life; growing by {growth:+.2g} req/s (allowed "
        f"{most_growth:.2g}); the engine held more than we sent in {100 * foreign:.1f} % of samples "
        f"(allowed {100 * FOREIGN_SHARE:.0f} %)",
    )


def token_balance(frames: RunFrames) -> Check:
    """Tokens generated by the server's counter against tokens received by the client."""
    times = frames.per_sample("t_s")
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
    running = float(frames.per_sample("running").max())
    allowed = BALANCE_TOLERANCE + 2 * running / max(server, 1.0)
    difference = client / max(server, 1.0) - 1.0
    return Check(
        name=name,
        holds=abs(difference) <= allowed,
        observed=difference,
        threshold=allowed,
        text=f"{client:.0f} received, {server:.0f} generated "
        f"({100 * difference:+.2f} %, allowed {100 * allowed:.2f} %: two steps' tokens and "
        f"{100 * BALANCE_TOLERANCE:.0f} %)",
    )
