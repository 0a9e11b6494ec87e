"""Equal outputs under SGLang: how the batch was filled decides what is served.

Requests that are admitted in one pass share its prefill steps, and equal outputs let them leave
together, so that they admit the next ones together: a wave. Under saturation the waves stay as they
are, and the fewer they are, the fewer steps go to prompts. So there is no operating point: each time
that the batch fills anew, chance forms other waves. Here it is filled again and again, with the same
draws every time, by Poisson arrivals for long enough that the waves settle; then the queue is kept
from running dry and what is served is counted.

Above what is served, the faster a batch is filled, the larger are its waves. The critical rate is taken
as the one at which a fill serves, in the mean, just what is offered: offered less, most fills keep up
with it; offered more, most have a queue that grows. It is sought from above, where the batch is full
when counting begins. What one server then serves differs from it by `Waves.scatter`.

Every step takes the same time here; admission is charged as in `analysis.theory.room_walk`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.theory.kv_demand import rounded_sum
from analysis.theory.room_walk import Charges
from loadgen.workload import Workload

Floats = NDArray[np.float64]

FILLS = 16
"""Servers that are filled from empty, each with draws of its own."""
FILL_RESIDENCES, WINDOW_RESIDENCES = 160, 12
"""Longest residence times for which a server is filled, and for which it is then counted: whenever the
queue empties the waves form anew, and a few are still at it after 40."""
FROM_ABOVE, FILL_ROUNDS = (1.35, 1.15), 8
"""Of a first guess: the rates from which the meeting of offered and served is sought; rates tried at
most."""
STEEPEST_STEP, STEEPEST = 0.8, 0.95
"""Of what is offered more, so much may be served more: taken for the next rate to try, and for what is
known of the one found. Beyond, the two hardly part."""
INNER = 0.15, 0.85
"""Of what lies between two rates: where the next one is tried."""
GENTLE_LOAD = 1.06
"""Of the critical rate: an overload up to this one hardly feeds the waves that it meets."""
UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True)
class Waves:
    """What equal outputs are served at the critical rate, of one engine; means over the fills."""

    requests: float
    """Completions per decode step."""
    prefill_steps: float
    """Prefill steps per request."""
    scatter: float
    """Relative standard deviation of what one server serves about the critical rate: from one fill to
    the next, and by how well the rate itself is known."""


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """What a waiting request is admitted by."""

    charges: Charges
    """``kept`` counts from the first decode step on, and grows by equal parts to ``released``."""
    room_tokens: float
    rows: int | None
    chunk: int | None
    """Prompt tokens of one step: what is over is computed in the next one. None: prompts are not cut."""
    max_prefill_tokens: int
    """... after which no further prompt is begun in it."""
    page: int
    """Tokens by which room is taken; ``kept`` and ``released`` hold the mean of what is not filled."""
    lags: bool
    """A step is chosen when the one before it starts, and so before the room of who leaves is back."""


def waves(
    law: Workload,
    admission: Admission,
    requests_per_step: float,
    residence_steps: int,
    seed: int = 0,
) -> Waves:
    """Where offered and served meet, sought from above ``requests_per_step``.

    Every output of ``law`` is two tokens or more; ``residence_steps``, of either kind, is the longest
    residence. Raises ValueError where nothing was served.
    """
    columns = _columns(law, admission)
    seeds = np.random.SeedSequence(seed).spawn(FILLS)
    counted = np.empty((0, 3))

    def served(offered: float) -> Floats:
        nonlocal counted
        counted = np.array(
            [_filled(law, admission, columns, offered, residence_steps, own) for own in seeds],
            dtype=float,
        )
        if not counted[:, 0].all():
            raise ValueError(f"{law.name}: no request was served in {WINDOW_RESIDENCES} residences")
        return np.asarray(counted[:, 0] / counted[:, 1:].sum(axis=1))

    fills, known_to = meeting(served, requests_per_step)
    completed, decodes, prefills = counted.sum(axis=0)
    return Waves(
        requests=float(completed / decodes),
        prefill_steps=float(prefills / completed),
        scatter=math.hypot(float(fills.std(ddof=1)), known_to) / float(fills.mean()),
    )


def meeting(served: Callable[[float], Floats], guess: float) -> tuple[Floats, float]:
    """What fills serve where it is, in the mean, what they are offered; and to what that rate is known,
    as a standard error.

    Sought from above ``guess``, between the rates of which more and of which less than all was served.
    Where more is served the more is offered, an error of the mean counts for more: over one less the
    slope, that of all rates tried.
    """
    far, offered = (factor * guess for factor in FROM_ABOVE)
    tried = [(far, float(served(far).mean()))]
    for _ in range(FILL_ROUNDS):
        fills = served(offered)
        mean, error = float(fills.mean()), float(fills.std(ddof=1)) / math.sqrt(len(fills))
        tried.append((offered, mean))
        kept_up, grew = ([t for t in tried if (t[1] > t[0]) is up] for up in (True, False))
        slope = _slope(tried)
        apart = abs(mean - offered)
        if apart <= error * (1 - slope):
            break
        if kept_up and grew:
            (low, more), (high, less) = max(kept_up), min(grew)
            share = (more - low) / (more - low + high - less)
            offered = low + float(np.clip(share, *INNER)) * (high - low)
        else:
            offered += (mean - offered) / (1 - min(slope, STEEPEST_STEP))
    return fills, max(error, apart) / (1 - slope)


def _slope(tried: Sequence[tuple[float, float]]) -> float:
    rates, means = np.array(tried).T
    return float(np.clip(np.cov(rates, means)[0, 1] / np.var(rates, ddof=1), 0.0, STEEPEST))


def _filled(
    law: Workload,
    admission: Admission,
    columns: tuple[NDArray[np.generic], ...],
    offered: float,
    residence_steps: int,
    seed: np.random.SeedSequence,
) -> tuple[int, int, int]:
    """Completions, decode steps and prefill steps of one server, counted once it has been filled."""
    rng = np.random.default_rng(seed)
    settled = FILL_RESIDENCES * residence_steps
    arriving = rng.poisson(offered, settled).tolist()
    # While it is counted, more than can be served is waiting.
    reserve = 4 * WINDOW_RESIDENCES * residence_steps * offered
    most = sum(arriving) + int(reserve + 4 * np.sqrt(reserve)) + 100
    drawn = rng.choice(len(law.weight), most, p=law.weight / law.weight.sum())
    asked, charged, kept, growth, released, prompts, decoded_for, first_page = (
        column[drawn].tolist() for column in columns
    )
    page, rows = admission.page, admission.rows or UNBOUNDED
    cut, chunk = admission.chunk is not None, admission.chunk or UNBOUNDED
    leaving: dict[int, list[int]] = {}
    pages_begun: dict[int, int] = {}
    room, growing, returning = admission.room_tokens, 0.0, 0.0
    arrived = head = running = carried = 0
    completed = decodes = prefills = 0
    before = (0, 0, 0)
    shut = in_flight = False
    for step in range(settled + WINDOW_RESIDENCES * residence_steps):
        if step < settled:
            arrived += arriving[step]
        elif step == settled:
            arrived, before = most, (completed, decodes, prefills)
        # The output of a step in flight holds its room and is still counted among those to come.
        first, left = head, room - (running if in_flight else 0)
        resumed = min(carried, chunk)
        carried -= resumed
        paged = -(-resumed // page) * page
        whole_left, chunk_left = admission.max_prefill_tokens - paged, chunk - paged
        while not shut and head < arrived and whole_left > 0 and chunk_left > 0:
            # A request that fits an empty pool always finds one.
            if running >= rows or (asked[head] >= left and running):
                shut = True
                break
            tokens = prompts[head]
            paged = -(-tokens // page) * page
            if not cut and head > first and paged >= whole_left:
                break
            if paged > chunk_left:
                carried = tokens - chunk_left // page * page
                if carried == tokens:
                    carried = 0
                    break
                paged = chunk_left
            left -= charged[head]
            whole_left -= paged
            chunk_left -= paged
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
        if head > first or resumed:
            prefills += 1
            in_flight = False
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
    held = rounded_sum(prompts + steps - 1, page) - rounded_sum(prompts - 1, page)
    mean_empty = held / steps - prompts - (steps - 1) / 2
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
