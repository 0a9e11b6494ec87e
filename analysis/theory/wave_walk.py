"""Equal outputs under SGLang: how the batch was filled decides what is served.

Requests that are admitted in one pass share its prefill steps, and equal outputs let them leave
together, so that they admit the next ones together: a wave. Under saturation the waves stay as they
are, and the fewer they are, the fewer steps go to prompts. So there is no operating point: each time
that the batch fills anew, chance forms other waves. Here it is filled again and again, with the same
draws every time, by Poisson arrivals for long enough that the waves settle; then the queue is kept
from running dry and what is served is counted.

The faster a batch is filled, the larger are its waves. The critical rate is taken as the one at which a
fill serves, in the mean, just what is offered: offered less, most fills keep up with it; offered more,
most have a queue that grows. What one server then serves differs from it by `Waves.scatter`.

Every step takes the same time here; admission is charged as in `analysis.theory.room_walk`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.theory.room_walk import Charges
from loadgen.workload import Workload

Floats = NDArray[np.float64]

FILLS = 16
"""Servers that are filled from empty, each with draws of its own."""
FILL_RESIDENCES, WINDOW_RESIDENCES = 160, 12
"""Longest residence times for which a server is filled, and for which it is then counted: whenever the
queue empties the waves form anew, and a few are still at it after 40."""
FILL_ROUNDS = 6
"""Of the offered rate, at most: each comes nearer to what is served by a half or so."""
UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True)
class Waves:
    """What equal outputs are served at the critical rate, of one engine; means over the fills."""

    requests: float
    """Completions per decode step."""
    prefill_steps: float
    """Prefill steps per request."""
    scatter: float
    """Relative standard deviation, from one fill to the next, of requests per step of either kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """What a waiting request is admitted by."""

    charges: Charges
    """``kept`` counts from the first decode step on, and grows by equal parts to ``released``."""
    room_tokens: float
    rows: int | None
    prefill_tokens: int | None
    """Of one step: what is over is computed in the next one."""
    page: int
    """Tokens by which room is taken; ``kept`` and ``released`` hold the mean of what is not filled."""
    lags: bool
    """A step is chosen when the one before it starts, and so before the room of who leaves is back."""


def waves(law: Workload, admission: Admission, requests_per_step: float, seed: int = 0) -> Waves:
    """The rate at which what is offered is served, sought from ``requests_per_step`` on.

    Every output of ``law`` is two tokens or more.
    """
    offered = requests_per_step
    seeds = np.random.SeedSequence(seed).spawn(FILLS)
    for _ in range(FILL_ROUNDS):
        counted = [_filled(law, admission, offered, own) for own in seeds]
        completed, decodes, prefills = np.array(counted, dtype=float).T
        served = completed / (decodes + prefills)
        mean, spread = float(served.mean()), float(served.std(ddof=1))
        if abs(mean - offered) < spread / np.sqrt(FILLS):
            break
        offered = mean
    return Waves(
        requests=float(completed.sum() / decodes.sum()),
        prefill_steps=float(prefills.sum() / completed.sum()),
        scatter=spread / mean,
    )


def _filled(
    law: Workload, admission: Admission, offered: float, seed: np.random.SeedSequence
) -> tuple[int, int, int]:
    """Completions, decode steps and prefill steps of one server, counted once it has been filled."""
    rng = np.random.default_rng(seed)
    residence = int(law.output_tokens.max())
    settled = FILL_RESIDENCES * residence
    arriving = rng.poisson(offered, settled).tolist()
    # While it is counted, more than can be served is waiting.
    reserve = 4 * WINDOW_RESIDENCES * residence * offered
    most = sum(arriving) + int(reserve + 4 * np.sqrt(reserve)) + 100
    drawn = rng.choice(len(law.weight), most, p=law.weight / law.weight.sum())
    asked, charged, kept, growth, released, prompts, decoded_for, first_page = (
        column[drawn].tolist() for column in _columns(law, admission)
    )
    page, rows = admission.page, admission.rows or UNBOUNDED
    most_prefilled = admission.prefill_tokens or UNBOUNDED
    leaving: dict[int, list[int]] = {}
    pages_begun: dict[int, int] = {}
    room, growing, returning = admission.room_tokens, 0.0, 0.0
    arrived = head = running = carried = 0
    completed = decodes = prefills = 0
    before = (0, 0, 0)
    shut = in_flight = False
    for step in range(settled + WINDOW_RESIDENCES * residence):
        if step < settled:
            arrived += arriving[step]
        elif step == settled:
            arrived, before = most, (completed, decodes, prefills)
        # The output of a step in flight holds its room and is still counted among those to come.
        first, left = head, room - (running if in_flight else 0)
        budget = most_prefilled - carried
        while not shut and head < arrived and budget > 0:
            # A request that fits an empty pool always finds one.
            if running >= rows or (asked[head] > left and running):
                shut = True
                break
            left -= charged[head]
            budget -= prompts[head]
            room -= kept[head]
            growing += growth[head]
            running += 1
            last = decodes + decoded_for[head]
            leaving.setdefault(last, []).append(head)
            if page > 1:
                for at in range(decodes + first_page[head], last + 1, page):
                    pages_begun[at] = pages_begun.get(at, 0) + 1
            head += 1
        back, returning = returning, 0.0
        if head > first or carried:
            prefills += 1
            carried, in_flight = max(-budget, 0), False
        elif running:
            decodes, in_flight = decodes + 1, admission.lags
            room -= growing
            if page > 1:
                room += running - page * pages_begun.pop(decodes, 0)
            gone = leaving.pop(decodes, ())
            completed += len(gone)
            running -= len(gone)
            for request in gone:
                returning += released[request]
                growing -= growth[request]
            if not admission.lags:
                back, returning = returning, 0.0
        if back:
            room, shut = room + back, False
    return completed - before[0], decodes - before[1], prefills - before[2]


def _columns(law: Workload, admission: Admission) -> tuple[NDArray[np.generic], ...]:
    """What `_filled` knows of a request, per support point: its charges, lengths and pages.

    The last one is the decode step that begins its first page; what of a page is empty is taken out of
    the room as it is, not in the mean.
    """
    charges, page = admission.charges, admission.page
    prompts, steps = law.prompt_tokens, law.output_tokens - 1
    mean_empty = np.array(
        [
            np.mean(-np.arange(s, s + k) % page)
            for s, k in zip(prompts.tolist(), steps.tolist(), strict=True)
        ]
    )
    return (
        charges.asked,
        charges.charged,
        charges.kept + (-prompts % page - mean_empty),
        (charges.released - charges.kept) / steps,
        charges.released + (-(prompts + steps) % page - mean_empty),
        prompts,
        steps,
        -prompts % page + 1,
    )
