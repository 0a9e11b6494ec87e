"""The slot model, compiled: `analysis.slot_models.slots` in a fraction of the time, equal slot for slot.

Needs numba (`pip install critrate[fast]`). Requests are rows of arrays, a lane is a linked list of
them, -1 is nobody. The plain loop stays the reference: tests/analysis/test_slots.py holds one against
the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from analysis.slot_models.policies import AFTER_EVICTION
from analysis.slot_models.slots import SLOT, Load

NOBODY = -1
GREEDY, LOOK_AHEAD, RESERVE, CLASS_BUDGETS = range(4)
RULE = {
    "greedy_resume": GREEDY,
    "greedy_restart": GREEDY,
    "flow_control": GREEDY,
    "look_ahead": LOOK_AHEAD,
    "reserve_peak": RESERVE,
    "class_budgets": CLASS_BUDGETS,
}
ADMITS_AFTER_EVICTION = ("greedy_restart",)


BOOKS = np.dtype([(name, np.int64) for name in ("running", "waiting", "used", "reserved")])
"""Who runs and waits, the tokens held in this slot, and those held if everybody were at its end."""


class Rules(NamedTuple):
    """What a policy comes down to."""

    rule: int
    admits_after_eviction: bool
    keeps: bool
    to_front: bool
    memory_tokens: int


class Jobs(NamedTuple):
    """Per request, shape (n,): its lengths and lane; tokens made, evictions, the slot of its end."""

    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    lane: NDArray[np.int64]
    made: NDArray[np.int64]
    evictions: NDArray[np.int64]
    finished: NDArray[np.int64]
    running: NDArray[np.int64]
    """Those that run, in order of admission; the rest is unused."""
    gone: NDArray[np.int64]
    """Those evicted in this slot, newest first; the rest is unused."""


class Queues(NamedTuple):
    """Lanes as linked lists: first and last of each, shape (lanes,), and who stands behind each
    request, shape (n,)."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    behind: NDArray[np.int64]


def run_compiled(
    policy: str, memory_tokens: int, load: Load, slots: int, budgets: NDArray[np.int64]
) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of SLOT, the slot in which each request ended (-1: not yet), and its evictions."""
    count = len(load.lane)
    lanes = max(budgets.shape[1], int(load.lane.max(initial=0)) + 1)
    queues = Queues(*(np.full(n, NOBODY, np.int64) for n in (lanes, lanes, count)))
    rules = Rules(
        RULE[policy],
        policy in ADMITS_AFTER_EVICTION,
        *AFTER_EVICTION.get(policy, (True, True)),
        memory_tokens,
    )
    given = (load.prompt_tokens, load.output_tokens, load.lane)
    jobs = Jobs(
        *(np.ascontiguousarray(x, dtype=np.int64) for x in given),
        *(np.full(count, value, np.int64) for value in (0, 0, -1, NOBODY, NOBODY)),
    )
    log = np.zeros(slots, SLOT)
    arrival = np.ascontiguousarray(load.arrival_slot, dtype=np.int64)
    to_come = np.zeros(int(load.output_tokens.max(initial=1)), np.int64)
    _run(rules, jobs, queues, np.zeros(1, BOOKS), arrival, budgets, to_come, log)
    return log, jobs.finished, jobs.evictions


@numba.njit(cache=True)
def _run(rules, jobs, queues, books, arrival, budgets, to_come, log):  # type: ignore[no-untyped-def]
    """``to_come[t % n]``: tokens that the running requests will hold in slot t, nobody else admitted;
    kept for look_ahead alone, whose requests are never evicted."""
    arrived = 0
    for t in range(len(log)):
        row = log[t]
        while arrived < len(arrival) and arrival[arrived] <= t:
            _to_back(queues, jobs.lane[arrived], arrived)
            arrived += 1
            books[0].waiting += 1
            row.arrived += 1
        gone = _evict(rules, jobs, books[0])
        stopped = gone > 0
        if gone == 0 or rules.admits_after_eviction:
            budget = budgets[t % len(budgets)]
            stopped |= _admit(rules, jobs, queues, books[0], budget, to_come, t, row)
        _wait_again(rules, jobs, queues, books[0], gone, row)
        row.used_tokens = books[0].used
        row.running = row.made_tokens = books[0].running
        row.waiting = books[0].waiting
        row.evicted = gone
        row.overflow = stopped or books[0].used > rules.memory_tokens
        to_come[t % len(to_come)] = 0
        row.completed = _make_tokens(jobs, books[0], t)


@numba.njit
def _evict(rules, jobs, books):  # type: ignore[no-untyped-def]
    """The newest go, until the others fit; how many."""
    gone = 0
    while rules.rule == GREEDY and books.used > rules.memory_tokens:
        books.running -= 1
        i = jobs.running[books.running]
        books.used -= jobs.prompt[i] + jobs.made[i] + 1
        jobs.gone[gone] = i
        gone += 1
    return gone


@numba.njit
def _admit(rules, jobs, queues, books, budget, to_come, t, row):  # type: ignore[no-untyped-def]
    """Take from the lanes in order; True if memory, and not the budget, ended it."""
    for lane in range(len(queues.first)):
        most = budget[lane] + row.admitted if rules.rule == CLASS_BUDGETS else budget[0]
        while queues.first[lane] != NOBODY and row.admitted < most:
            i = queues.first[lane]
            if not _fits(rules, jobs, books, to_come, t, i):
                return True
            queues.first[lane] = queues.behind[i]
            jobs.running[books.running] = i
            books.running += 1
            books.waiting -= 1
            books.used += jobs.prompt[i] + jobs.made[i] + 1
            books.reserved += jobs.prompt[i] + jobs.output[i]
            row.admitted += 1
            if jobs.evictions[i] > 0:
                row.recomputed_tokens += jobs.prompt[i] + jobs.made[i]
            if rules.rule == LOOK_AHEAD:
                for ahead in range(jobs.output[i]):
                    to_come[(t + ahead) % len(to_come)] += jobs.prompt[i] + 1 + ahead
    return False


@numba.njit
def _fits(rules, jobs, books, to_come, t, i):  # type: ignore[no-untyped-def]
    if rules.rule == GREEDY:
        return books.used + jobs.prompt[i] + jobs.made[i] + 1 <= rules.memory_tokens
    if rules.rule == RESERVE:
        return books.reserved + jobs.prompt[i] + jobs.output[i] <= rules.memory_tokens
    if rules.rule == LOOK_AHEAD:
        free = rules.memory_tokens - jobs.prompt[i] - 1
        for ahead in range(jobs.output[i]):
            if to_come[(t + ahead) % len(to_come)] + ahead > free:
                return False
    return True


@numba.njit
def _wait_again(rules, jobs, queues, books, gone, row):  # type: ignore[no-untyped-def]
    """The evicted wait again, newest first: the oldest of them ends up in front."""
    for k in range(gone):
        i = jobs.gone[k]
        jobs.evictions[i] += 1
        books.waiting += 1
        books.reserved -= jobs.prompt[i] + jobs.output[i]
        if not rules.keeps:
            made = jobs.made[i]
            row.lost_tokens += made
            row.lost_token_slots += jobs.prompt[i] * made + made * (made + 1) // 2
            jobs.made[i] = 0
        if rules.to_front:
            _to_front(queues, jobs.lane[i], i)
        else:
            _to_back(queues, jobs.lane[i], i)


@numba.njit
def _make_tokens(jobs, books, t):  # type: ignore[no-untyped-def]
    """A token for each that runs; whoever has its last leaves. How many left."""
    running, left = books.running, 0
    books.used += running
    for k in range(running):
        i = jobs.running[k]
        jobs.made[i] += 1
        if jobs.made[i] == jobs.output[i]:
            jobs.finished[i] = t
            books.used -= jobs.prompt[i] + jobs.made[i] + 1
            books.reserved -= jobs.prompt[i] + jobs.output[i]
        else:
            jobs.running[left] = i
            left += 1
    books.running = left
    return running - left


@numba.njit
def _to_back(queues, lane, i):  # type: ignore[no-untyped-def]
    queues.behind[i] = NOBODY
    if queues.first[lane] == NOBODY:
        queues.first[lane] = i
    else:
        queues.behind[queues.last[lane]] = i
    queues.last[lane] = i


@numba.njit
def _to_front(queues, lane, i):  # type: ignore[no-untyped-def]
    queues.behind[i] = queues.first[lane]
    if queues.first[lane] == NOBODY:
        queues.last[lane] = i
    queues.first[lane] = i
