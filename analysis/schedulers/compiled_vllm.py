"""`analysis.schedulers.vllm` for numba: the same rules in the same order, see there."""

from __future__ import annotations

from analysis.schedulers.compiled_state import (
    NOBODY,
    UNBOUNDED,
    State,
    add_row,
    jit,
    preempt,
    run,
    wait_first,
)


@jit
def schedule(state: State, slot: int) -> None:
    """Choose the step in ``slot`` and allocate its blocks; it stays empty if there is nothing to run."""
    rules, books = state.rules[0], state.books[0]
    threshold = UNBOUNDED
    if rules.long_prefill_token_threshold > 0 and books.running + books.waiting > 1:
        threshold = rules.long_prefill_token_threshold
    budget = _schedule_running(state, slot, rules.max_num_batched_tokens, threshold)
    if not state.steps[slot].preempted:
        _schedule_waiting(state, slot, budget, threshold)
    _advance(state, slot)


@jit
def _schedule_running(state: State, slot: int, budget: int, threshold: int) -> int:
    """Serve running requests in admission order, preempting the newest when blocks run out."""
    books, requests = state.books[0], state.requests
    block_size = state.rules[0].block_size
    position = 0
    while position < books.running and budget > 0:
        index = state.running[position]
        request = requests[index]
        position += 1
        if request.in_flight and request.outputs + request.in_flight >= request.max_tokens:
            continue
        tokens = request.prompt_tokens + request.outputs + request.in_flight - request.computed
        if tokens <= 0:
            continue
        tokens = min(tokens, budget, threshold)
        needed = 0
        if request.computed + tokens > request.blocks * block_size:
            needed = -(-(request.computed + tokens) // block_size) - request.blocks
        while needed > books.free_blocks:
            victim = state.running[books.running - 1]
            preempt(state, victim)
            wait_first(state, victim)
            state.steps[slot].preempted += 1
            if victim == index:
                return budget
        books.free_blocks -= needed
        request.blocks += needed
        add_row(state, slot, index, tokens)
        budget -= tokens
    return budget


@jit
def _schedule_waiting(state: State, slot: int, budget: int, threshold: int) -> None:
    """Admit from the head of the queue until budget, sequences or blocks run out."""
    rules, books = state.rules[0], state.books[0]
    index = books.first_waiting
    while index != NOBODY and budget > 0 and books.running < rules.max_num_seqs:
        request = state.requests[index]
        behind = request.behind
        if request.stale == 0:
            num_tokens = request.prompt_tokens + request.outputs
            tokens = min(num_tokens, threshold, budget)
            whole = num_tokens if rules.reserve_full_prompt else tokens
            spare = rules.watermark_blocks if books.running else 0
            if -(-whole // rules.block_size) + spare > books.free_blocks:
                return
            run(state, index)
            request.blocks = -(-tokens // rules.block_size)
            books.free_blocks -= request.blocks
            add_row(state, slot, index, tokens)
            budget -= tokens
        index = behind


@jit
def _advance(state: State, slot: int) -> None:
    """Count the step's tokens as computed and note who will sample a token."""
    step = state.steps[slot]
    for k in range(step.scheduled):
        row = state.rows[slot, k]
        request = state.requests[row.request]
        num_tokens = request.prompt_tokens + request.outputs
        if request.preemptions and request.computed < num_tokens - 1:
            step.recomputed_tokens += row.tokens
        request.computed += row.tokens
        request.steps_in_flight += 1
        row.samples = request.computed == num_tokens + request.in_flight
        request.in_flight += row.samples
        step.tokens += row.tokens
        step.kv_tokens += request.computed
    state.books[0].recomputed_tokens += step.recomputed_tokens
