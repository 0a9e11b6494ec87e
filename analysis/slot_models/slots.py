"""The slot model: requests of given lengths under an admission policy and a KV limit, slot by slot.

In a slot, in this order: arrivals join their lane; the policy evicts and admits; every running request
makes one token; those with their last token leave. What is drawn at random, arrivals, lengths and
budgets, is drawn by the caller.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from analysis.slot_models.policies import AFTER_EVICTION, POLICIES, UNBOUNDED, Decision, Job, State

SLOT = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("arrived", "used_tokens", "running", "waiting", "admitted", "evicted", "completed"),
            *("overflow", "made_tokens", "lost_tokens", "lost_token_slots", "recomputed_tokens"),
        )
    ]
)
"""One slot. ``used_tokens`` and ``running`` after the decision, ``waiting`` too. ``overflow``: memory,
and not the budget, decided: somebody was evicted, or stayed out for want of room, or, where the policy
never looks, more was used than there is. ``lost_tokens``: outputs thrown away by evictions;
``lost_token_slots``: the memory-time that they had cost; ``recomputed_tokens``: prompts and outputs that
a readmission has to compute again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """Requests in order of arrival, arrays of shape (n,)."""

    arrival_slot: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    lane: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.lane) and (
            (np.diff(self.arrival_slot) < 0).any()
            or min(x.min() for x in (self.arrival_slot, self.prompt_tokens, self.lane)) < 0
            or self.output_tokens.min() < 1
        ):
            raise ValueError(
                "requests stand in order of arrival and have an output of a token or more"
            )

    @property
    def work_token_slots(self) -> NDArray[np.int64]:
        """Memory-time of each request: l o + o (o + 1) / 2 (arXiv 2604.11001, w)."""
        return memory_time(self.prompt_tokens, self.output_tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotRun:
    """``slots`` of SLOT, shape (slots,); per request, shape (n,): the slot in which it got its last
    token (-1: not yet), and how often it was evicted."""

    load: Load
    slots: NDArray[np.void]
    finished_slot: NDArray[np.int64]
    evictions: NDArray[np.int64]
    compiled: bool

    @property
    def number_in_system(self) -> NDArray[np.int64]:
        """At the end of each slot, shape (slots,)."""
        result: NDArray[np.int64] = np.cumsum(self.slots["arrived"] - self.slots["completed"])
        return result


def memory_time(
    prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Token-slots that requests hold until they have made these many tokens."""
    work: NDArray[np.int64] = (
        prompt_tokens * output_tokens + output_tokens * (output_tokens + 1) // 2
    )
    return work


def evenly(rate: float, slots: int) -> NDArray[np.int64]:
    """Budgets of ``rate`` admissions per slot on average, spread evenly, shape (slots, 1)."""
    steps = np.floor(np.arange(slots + 1) * rate + 1e-9).astype(np.int64)
    budgets: NDArray[np.int64] = np.diff(steps)[:, None]
    return budgets


def unlimited() -> NDArray[np.int64]:
    """Budgets that never bind, shape (1, 1)."""
    return np.full((1, 1), UNBOUNDED, np.int64)


def run_slots(
    policy: str,
    memory_tokens: int,
    load: Load,
    slots: int,
    budgets: NDArray[np.int64] | None = None,
    compiled: bool | None = None,
) -> SlotRun:
    """Run a policy (a key of `analysis.slot_models.policies.POLICIES`) over so many slots, from empty.

    ``budgets`` has shape (period, 1), for class_budgets (period, lanes), and begins anew after its
    period; None: nothing but memory limits admission. ``compiled`` chooses between this module's plain
    loop and `analysis.slot_models.slots_compiled`; None takes the latter where numba is installed.
    Both give the same, slot for slot.

    Raises ValueError for an unknown policy, budgets of another shape, or a request that never fits.
    """
    if policy not in POLICIES:
        raise ValueError(f"there is no policy {policy!r}: take one of {', '.join(POLICIES)}")
    budgets = unlimited() if budgets is None else np.ascontiguousarray(budgets, dtype=np.int64)
    lanes = int(load.lane.max(initial=0)) + 1
    width = lanes if policy == "class_budgets" else 1
    if budgets.ndim != 2 or not len(budgets) or budgets.shape[1] < width or budgets.min() < 0:
        raise ValueError(f"{policy} takes budgets of shape (period, {width}), 0 or more each")
    longest = int((load.prompt_tokens + load.output_tokens).max(initial=0))
    if longest > memory_tokens:
        raise ValueError(f"a request of {longest} tokens never fits into {memory_tokens}")
    if find_spec("numba") is not None if compiled is None else compiled:
        # Here, so that the plain loop needs no numba.
        from analysis.slot_models.slots_compiled import run_compiled

        log, finished, evictions = run_compiled(policy, memory_tokens, load, slots, budgets)
        return SlotRun(
            load=load, slots=log, finished_slot=finished, evictions=evictions, compiled=True
        )
    return _plain(policy, memory_tokens, load, slots, budgets)


def _plain(
    policy: str, memory_tokens: int, load: Load, slots: int, budgets: NDArray[np.int64]
) -> SlotRun:
    """The reference."""
    jobs = [
        Job(i, prompt, output, lane)
        for i, (prompt, output, lane) in enumerate(
            zip(
                load.prompt_tokens.tolist(),
                load.output_tokens.tolist(),
                load.lane.tolist(),
                strict=True,
            )
        )
    ]
    lanes = max(budgets.shape[1], int(load.lane.max(initial=0)) + 1)
    state = State(memory_tokens, [deque() for _ in range(lanes)])
    arrivals = load.arrival_slot.tolist()
    log = np.zeros(slots, SLOT)
    finished = np.full(len(jobs), -1, np.int64)
    arrived = 0
    for t in range(slots):
        state.slot, before = t, arrived
        while arrived < len(jobs) and arrivals[arrived] <= t:
            state.waiting[jobs[arrived].lane].append(jobs[arrived])
            arrived += 1
        decision = POLICIES[policy](state, budgets[t % len(budgets)].tolist())
        row = log[t]
        row["arrived"] = arrived - before
        apply(state, policy, decision, row)
        for job in complete(state):
            finished[job.index] = t
            row["completed"] += 1
    evictions = np.array([job.evictions for job in jobs], np.int64)
    return SlotRun(
        load=load, slots=log, finished_slot=finished, evictions=evictions, compiled=False
    )


def apply(state: State, policy: str, decision: Decision, row: np.void) -> None:
    """Evict and admit, and write down what that left."""
    keeps, first = AFTER_EVICTION.get(policy, (True, True))
    gone = [state.running.pop() for _ in range(decision.evicted)]
    for job in decision.admitted:
        state.waiting[job.lane].remove(job)
        state.running.append(job)
        if job.evictions:
            row["recomputed_tokens"] += job.prompt_tokens + job.made
    for job in gone:
        job.evictions += 1
        if not keeps:
            row["lost_tokens"] += job.made
            row["lost_token_slots"] += job.prompt_tokens * job.made + job.made * (job.made + 1) // 2
            job.made = 0
        lane = state.waiting[job.lane]
        # The newest went first: the oldest of them ends up in front.
        lane.appendleft(job) if first else lane.append(job)
    row["used_tokens"] = state.used_tokens
    row["running"] = row["made_tokens"] = len(state.running)
    row["waiting"] = sum(map(len, state.waiting))
    row["admitted"] = len(decision.admitted)
    row["evicted"] = decision.evicted
    row["overflow"] = decision.memory_stopped or state.used_tokens > state.memory_tokens


def complete(state: State) -> list[Job]:
    """Every running request makes a token; those that made their last one leave and come back."""
    for job in state.running:
        job.made += 1
    done = [job for job in state.running if not job.remaining]
    state.running = [job for job in state.running if job.remaining]
    return done


def check_conservation(run: SlotRun, never_over: int | None = None) -> None:
    """Raise AssertionError where a run has lost or made up requests, tokens or memory-time.

    In every slot: arrived = completed + waiting + running. In all: tokens made are those of the
    completed, of those who run or wait, and those lost; memory-time likewise. ``never_over``: no slot
    used more.
    """
    log = run.slots
    ended = np.cumsum(log["completed"]) - log["completed"]
    assert (np.cumsum(log["arrived"]) == ended + log["waiting"] + log["running"]).all()
    assert (np.cumsum(log["admitted"] - log["evicted"]) == ended + log["running"]).all()
    assert (log["made_tokens"] == log["running"]).all()
    if never_over is not None:
        assert log["used_tokens"].max(initial=0) <= never_over
    done = run.finished_slot >= 0
    assert done.sum() == log["completed"].sum()
    under_way = int(log["made_tokens"].sum() - log["lost_tokens"].sum())
    under_way -= int(run.load.output_tokens[done].sum())
    area = int(log["used_tokens"].sum() - log["lost_token_slots"].sum())
    area -= int(run.load.work_token_slots[done].sum())
    # What is under way belongs to requests that have not ended, and is nobody's where all have.
    assert 0 <= under_way <= int((run.load.output_tokens[~done] - 1).sum())
    assert area >= under_way
    assert log["evicted"].sum() == run.evictions.sum()
