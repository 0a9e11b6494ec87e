"""Admission policies under a KV limit, each a plain function of the state.

The model is that of arXiv 2606.15555 and 2604.11001: time goes in slots, one decode iteration each. A
request of ``prompt`` tokens that has made g tokens holds prompt + g + 1 tokens in the slot in which it
makes the next one; a prompt takes memory and no time. `analysis.slot_models.slots` runs a policy
slot by slot.

A policy says, of the state at the start of a slot, how many of the newest running requests are evicted
and which waiting ones are admitted, at most ``budget`` of them. It never changes the state. What
becomes of an evicted request is in `AFTER_EVICTION`. Waiting requests stand in lanes: earlier lanes go
first, each first come, first served. One lane is the plain queue; a lane for each length of output is
shortest first; a lane for each class is what `class_budgets` needs.

With restarts, newest first is least progressed first, the order of arXiv 2606.15555: every running
request has made a token in each slot since its admission.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

UNBOUNDED = 1 << 62
"""A budget that never binds."""


@dataclass(slots=True, eq=False)
class Job:
    """One request in the slot model."""

    index: int
    prompt_tokens: int
    output_tokens: int
    lane: int
    made: int = 0
    """Output tokens since it was last started."""
    evictions: int = 0

    @property
    def held_tokens(self) -> int:
        """KV tokens in a slot in which it makes its next token."""
        return self.prompt_tokens + self.made + 1

    @property
    def remaining(self) -> int:
        """Slots until its last token."""
        return self.output_tokens - self.made


@dataclass(slots=True, eq=False)
class State:
    """At the start of a slot: who waits, in lanes, and who runs, in order of admission."""

    memory_tokens: int
    waiting: list[deque[Job]]
    running: list[Job] = field(default_factory=list)
    slot: int = 0

    @property
    def used_tokens(self) -> int:
        """KV tokens that the running requests hold in this slot."""
        return sum(job.held_tokens for job in self.running)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy does with a slot; ``memory_stopped``: it would have taken more, had they fitted."""

    evicted: int
    admitted: Sequence[Job]
    memory_stopped: bool


Policy = Callable[[State, Sequence[int]], Decision]
"""State and budgets of the slot: one number, for `class_budgets` one for each lane."""


def greedy_restart(state: State, budget: Sequence[int]) -> Decision:
    """Evict while the running ones do not fit, then admit whoever fits now.

    The policy whose congestion arXiv 2606.15555 describes; an evicted request starts again. With a
    budget at or below the eviction-free rate it is their rate-limited admission. Stable below
    M / (l1 (l0 + l1)) from every start, fixed lengths: `analysis.theory.policy_rates.worst_cycle`,
    `capped`.
    """
    evicted, used = _evictions(state)
    admitted, stopped = _first_that_fit(state, budget[0], state.memory_tokens - used)
    return Decision(evicted, admitted, stopped or evicted > 0)


def greedy_resume(state: State, budget: Sequence[int]) -> Decision:
    """As vLLM: who is evicted keeps its tokens, and a slot that evicts admits nobody.

    Stable below the eviction-free rate less what one request may leave unused:
    `analysis.theory.policy_rates.work_conserving_bracket`, the theorem of arXiv 2605.04595.
    """
    evicted, used = _evictions(state)
    if evicted:
        return Decision(evicted, (), True)
    admitted, stopped = _first_that_fit(state, budget[0], state.memory_tokens - used)
    return Decision(0, admitted, stopped)


def flow_control(state: State, budget: Sequence[int]) -> Decision:
    """Algorithm 2 of arXiv 2604.11001, unknown output lengths: admit up to B first come, first served,
    then evict newest first while they do not fit. Who is evicted starts again, at the back.

    The newest are those that were only just admitted, so that these merely stay where they stood; a
    slot that evicts a running one therefore admits nobody. An unbounded B is greedy admission.
    Stable where the mean budget exceeds the arrival rate and overflows are rare:
    `analysis.theory.flow_control.overflow`.
    """
    return greedy_resume(state, budget)


def look_ahead(state: State, budget: Sequence[int]) -> Decision:
    """Admit only who fits until the end of everybody, output lengths being known; never evict.

    MC-SF of arXiv 2502.07115 with a lane for each output length: shortest first, up to the first that
    does not fit. Fixed lengths lock into one cohort after a burst, at the rate of `greedy_restart`.
    """
    running, admitted = list(state.running), list[Job]()
    for job in _in_order(state):
        if len(admitted) == budget[0]:
            return Decision(0, admitted, False)
        if _peak([*running, job]) > state.memory_tokens:
            return Decision(0, admitted, True)
        running.append(job)
        admitted.append(job)
    return Decision(0, admitted, False)


def reserve_peak(state: State, budget: Sequence[int]) -> Decision:
    """Admit while prompts and whole outputs of all who run fit; never evict.

    Capacity M / E[(l + o) o] per slot: `analysis.theory.policy_rates.reserved_rate`.
    """
    free = state.memory_tokens - sum(j.prompt_tokens + j.output_tokens for j in state.running)
    admitted: list[Job] = []
    for job in _in_order(state):
        if len(admitted) == budget[0]:
            return Decision(0, admitted, False)
        free -= job.prompt_tokens + job.output_tokens
        if free < 0:
            return Decision(0, admitted, True)
        admitted.append(job)
    return Decision(0, admitted, False)


def class_budgets(state: State, budget: Sequence[int]) -> Decision:
    """Algorithm 1 of arXiv 2604.11001, known output lengths: up to b_k of class k, whatever memory says.

    Memory never overflows if sum b_k w_k <= M, and the queues are stable if b_k > lambda_k:
    `analysis.theory.flow_control.class_budgets_hold`.
    """
    admitted: list[Job] = []
    for lane, most in zip(state.waiting, budget, strict=True):
        admitted += [job for job, _ in zip(lane, range(most), strict=False)]
    return Decision(0, admitted, False)


POLICIES: dict[str, Policy] = {
    "greedy_resume": greedy_resume,
    "greedy_restart": greedy_restart,
    "look_ahead": look_ahead,
    "reserve_peak": reserve_peak,
    "class_budgets": class_budgets,
    "flow_control": flow_control,
}
AFTER_EVICTION: dict[str, tuple[bool, bool]] = {
    "greedy_resume": (True, True),
    "greedy_restart": (False, True),
    "flow_control": (False, False),
}
"""Of policies that evict: does an evicted request keep its tokens, and does it wait at the front?"""


def _evictions(state: State) -> tuple[int, int]:
    """How many of the newest must go until the others fit, and what these hold."""
    used, evicted = state.used_tokens, 0
    while used > state.memory_tokens:
        evicted += 1
        used -= state.running[-evicted].held_tokens
    return evicted, used


def _in_order(state: State) -> Iterator[Job]:
    for lane in state.waiting:
        yield from lane


def _first_that_fit(state: State, most: int, free: int) -> tuple[list[Job], bool]:
    """Waiting requests in order, up to the first that does not fit; whether memory ended it."""
    admitted: list[Job] = []
    for job in _in_order(state):
        if len(admitted) == most:
            return admitted, False
        free -= job.held_tokens
        if free < 0:
            return admitted, True
        admitted.append(job)
    return admitted, False


def _peak(jobs: Sequence[Job]) -> int:
    """Most tokens that these will hold in any slot to come. It is reached just before somebody ends."""
    return max(
        sum(job.held_tokens + ahead for job in jobs if job.remaining > ahead)
        for ahead in {job.remaining - 1 for job in jobs}
    )
