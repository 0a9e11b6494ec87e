"""`analysis.schedulers.sglang` for numba: the same rules in the same order, see there."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers.compiled_state import (
    NOBODY,
    RUNNING,
    UNBOUNDED,
    State,
    add_row,
    jit,
    preempt,
    record,
    run,
    wait_last,
)
from analysis.schedulers.engine import SGLangRules
from analysis.schedulers.sglang import (
    INITIAL_RATIO,
    LOOK_AHEAD_SPARE,
    MIN_RATIO_FACTOR,
    RATIO_DECAY_STEPS,
    RETRACT_DECODE_STEPS,
)

LONGEST_PROMPT = 1 << 31
"""In tokens."""

BATCH_RULES = record(
    "max_prefill_tokens radix_cache whole_output_of_ignore_eos clip_max_new_tokens ignore_eos"
    " retract_decode_steps look_ahead_spare",
    "initial_ratio ratio_decay least_ratio",
)
BATCH_BOOKS = record(
    "decoding prefilled chunked full available taken input_left chunk_left upcoming", "set_aside"
)
"""How many are in each list, the request whose prompt is partly computed, whether admission is shut; and
the room for prompts in one pass of admission."""


class Batch(NamedTuple):
    """What SGLang keeps beside `State`; ``width`` as there."""

    rules: NDArray[Any]
    """(1,) of BATCH_RULES."""
    books: NDArray[Any]
    """(1,) of BATCH_BOOKS."""
    decoding: NDArray[np.int64]
    """(width,)."""
    prefilled: NDArray[np.int64]
    """(width,): those of the last step if it was a prefill step."""
    left: NDArray[np.float64]
    """(width + 1,): what each request may still generate, as looking ahead sees it."""
    occupied: NDArray[np.int64]
    """(width + 1,): what it gives back at its end."""


def new_batch(rules: SGLangRules, ignore_eos: bool, state: State) -> Batch:
    """The batch of an idle engine."""
    initial_ratio = min(INITIAL_RATIO * rules.schedule_conservativeness, 1.0)
    values = {
        "max_prefill_tokens": rules.max_prefill_tokens,
        "radix_cache": rules.radix_cache,
        "whole_output_of_ignore_eos": rules.whole_output_of_ignore_eos,
        "clip_max_new_tokens": rules.clip_max_new_tokens,
        "ignore_eos": ignore_eos,
        "retract_decode_steps": RETRACT_DECODE_STEPS,
        "look_ahead_spare": LOOK_AHEAD_SPARE,
        "initial_ratio": initial_ratio,
        "ratio_decay": initial_ratio * (1 - MIN_RATIO_FACTOR) / RATIO_DECAY_STEPS,
        "least_ratio": initial_ratio * MIN_RATIO_FACTOR,
    }
    record_of = np.zeros(1, BATCH_RULES)
    for name, value in values.items():
        record_of[name] = value
    books = np.zeros(1, BATCH_BOOKS)
    books["chunked"] = NOBODY
    state.books["new_token_ratio"] = initial_ratio
    width = len(state.running)
    return Batch(
        record_of,
        books,
        np.zeros(width, np.int64),
        np.zeros(width, np.int64),
        np.zeros(width + 1),
        np.zeros(width + 1, np.int64),
    )


@jit
def schedule(state: State, batch: Batch, slot: int) -> None:
    """Choose the step in ``slot`` and allocate its blocks; it stays empty if there is nothing to run."""
    books, step = state.books[0], state.steps[slot]
    _join_batch(state, batch)
    _schedule_prompts(state, batch, slot)
    if step.scheduled:
        step.prefill = True
        for k in range(step.scheduled):
            batch.prefilled[k] = state.rows[slot, k].request
        batch.books[0].prefilled = step.scheduled
    else:
        _schedule_decodes(state, batch, slot)
    if not step.scheduled and not books.running and not books.waiting:
        books.new_token_ratio = batch.rules[0].initial_ratio
    _advance(state, batch, slot)


# -- the batch -----------------------------------------------------------------------------------------


@jit
def _join_batch(state: State, batch: Batch) -> None:
    """Merge the last step's prompts into the batch and drop who has left it."""
    books, requests = batch.books[0], state.requests
    if books.chunked != NOBODY and requests[books.chunked].state != RUNNING:
        books.chunked = NOBODY
    before, stayed, joined = books.decoding, 0, 0
    for k in range(before):
        if requests[batch.decoding[k]].state == RUNNING:
            batch.decoding[stayed] = batch.decoding[k]
            stayed += 1
    for k in range(books.prefilled):
        index = batch.prefilled[k]
        if requests[index].state == RUNNING and index != books.chunked:
            batch.decoding[stayed + joined] = index
            joined += 1
    if stayed < before or joined < books.prefilled or (joined and not before):
        books.full = False
    books.decoding = stayed + joined
    books.prefilled = 0


@jit
def _schedule_decodes(state: State, batch: Batch, slot: int) -> None:
    """One token for every request of the batch, retracting some when the pool is too small."""
    rules, books, page = batch.rules[0], batch.books[0], state.rules[0].block_size
    before = books.decoding
    _drop_finishing(state, batch)
    short = _pages_needed(state, batch) > state.books[0].free_blocks
    if short and books.decoding < before:
        books.full = False
        return
    if short:
        _retract(state, batch, slot)
    elif books.decoding:
        decayed = state.books[0].new_token_ratio - rules.ratio_decay
        state.books[0].new_token_ratio = max(decayed, rules.least_ratio)
    if books.decoding < before:
        books.full = False
    for k in range(books.decoding):
        index = batch.decoding[k]
        request = state.requests[index]
        if request.computed % page == 0:
            state.books[0].free_blocks -= 1
            request.blocks += 1
        add_row(state, slot, index, 1)


@jit
def _drop_finishing(state: State, batch: Batch) -> None:
    """Out of the batch: those that the step in flight ends at their declared length."""
    books, kept = batch.books[0], 0
    for k in range(books.decoding):
        request = state.requests[batch.decoding[k]]
        if not request.in_flight or request.outputs + request.in_flight < request.max_tokens:
            batch.decoding[kept] = batch.decoding[k]
            kept += 1
    books.decoding = kept


@jit
def _pages_needed(state: State, batch: Batch) -> int:
    page, needed = state.rules[0].block_size, 0
    for k in range(batch.books[0].decoding):
        needed += state.requests[batch.decoding[k]].computed % page == 0
    return needed


@jit
def _retract(state: State, batch: Batch, slot: int) -> None:
    """Take requests with the fewest outputs out until the next step of the others fits."""
    books, requests = batch.books[0], state.requests
    for k in range(books.decoding):
        request = requests[batch.decoding[k]]
        # Most outputs first, then the shortest prompt; both are exact in one float.
        batch.left[k] = request.prompt_tokens - LONGEST_PROMPT * request.outputs
    _sort(batch.left, batch.decoding, books.decoding)
    while books.decoding > 1:
        books.decoding -= 1
        victim = batch.decoding[books.decoding]
        preempt(state, victim)
        wait_last(state, victim)
        state.steps[slot].preempted += 1
        if _pages_needed(state, batch) <= state.books[0].free_blocks:
            break
    generated, declared = 0, 1
    for k in range(books.decoding):
        request = requests[batch.decoding[k]]
        generated += request.outputs + batch.rules[0].retract_decode_steps
        declared += request.max_tokens
    state.books[0].new_token_ratio = min(generated / declared, 1.0)


@jit
def _sort(keys: NDArray[np.float64], values: NDArray[np.int64], count: int) -> None:
    """The first ``count`` of both by rising key; equal keys keep their order."""
    for k in range(1, count):
        key, value = keys[k], values[k]
        at = k
        while at > 0 and keys[at - 1] > key:
            keys[at], values[at] = keys[at - 1], values[at - 1]
            at -= 1
        keys[at], values[at] = key, value


# -- admission -----------------------------------------------------------------------------------------


@jit
def _schedule_prompts(state: State, batch: Batch, slot: int) -> None:
    """Go on with the chunked prompt, then admit from the head of the queue until one is refused."""
    books, step, rows = batch.books[0], state.steps[slot], state.rules[0].max_num_seqs
    if not books.decoding:
        books.full = False
    if (books.full or not state.books[0].waiting) and books.chunked == NOBODY:
        return
    free_rows = rows - state.books[0].running
    if books.chunked == NOBODY and free_rows <= 0:
        books.full = True
        return
    _open_budget(state, batch)
    if books.chunked != NOBODY:
        _resume(state, batch, slot)
        free_rows += 1
    most = min(free_rows, rows - books.decoding)
    while state.books[0].waiting:
        room = _has_room(books)
        if room and (books.input_left <= 0 or books.chunk_left <= 0):
            return
        if books.full or step.scheduled >= most:
            books.full = True
            return
        index = state.books[0].first_waiting
        tokens = _admissible(state, batch, slot, index)
        if tokens == NOBODY:
            books.full = step.scheduled > 0 or books.decoding > 0
            return
        if tokens == 0:
            return
        run(state, index)
        _take(state, batch, slot, index, tokens)
        if not _has_room(books):
            books.full = True
            return


@jit
def _resume(state: State, batch: Batch, slot: int) -> None:
    """Go on with a prompt that is partly computed."""
    books = batch.books[0]
    index = books.chunked
    request = state.requests[index]
    most = books.chunk_left
    room = int(books.available - books.set_aside)
    if room > 0:
        most = min(most, room)
    books.chunked = NOBODY
    rest = request.prompt_tokens + request.outputs - request.computed
    _take(state, batch, slot, index, min(rest, most))


@jit
def _take(state: State, batch: Batch, slot: int, index: int, tokens: int) -> None:
    """Compute some of a prompt in this step; outputs are set aside once it is whole."""
    books, page = batch.books[0], state.rules[0].block_size
    request = state.requests[index]
    whole = request.computed + tokens == request.prompt_tokens + request.outputs
    paged = _paged(tokens, page)
    new_tokens = _clipped(batch, request.max_tokens) if whole else 0
    books.set_aside += paged + page + new_tokens
    books.taken += paged + page
    books.input_left -= paged
    books.chunk_left -= paged
    if not whole:
        books.chunked = index
    pages = _paged(request.computed + tokens, page) // page
    state.books[0].free_blocks -= pages - request.blocks
    request.blocks = pages
    add_row(state, slot, index, tokens)


@jit
def _advance(state: State, batch: Batch, slot: int) -> None:
    """Count the step's tokens as computed and note who will sample a token."""
    step, chunked = state.steps[slot], batch.books[0].chunked
    for k in range(step.scheduled):
        row = state.rows[slot, k]
        request = state.requests[row.request]
        if step.prefill and request.preemptions:
            step.recomputed_tokens += row.tokens
        request.computed += row.tokens
        request.steps_in_flight += 1
        row.samples = not step.prefill or row.request != chunked
        request.in_flight += row.samples
        step.tokens += row.tokens
        step.kv_tokens += request.computed
    state.books[0].recomputed_tokens += step.recomputed_tokens


# -- room for prompts in one pass of admission ---------------------------------------------------------


@jit
def _open_budget(state: State, batch: Batch) -> None:
    rules, books = batch.rules[0], batch.books[0]
    books.available = state.books[0].free_blocks * state.rules[0].block_size
    books.set_aside = 0.0
    books.taken = 0
    books.input_left = rules.max_prefill_tokens
    books.chunk_left = state.rules[0].max_num_batched_tokens
    books.upcoming = NOBODY
    ratio = state.books[0].new_token_ratio
    if rules.ignore_eos and rules.whole_output_of_ignore_eos:
        ratio = 1.0
    for k in range(books.decoding):
        request = state.requests[batch.decoding[k]]
        books.set_aside += _clipped(batch, request.max_tokens - request.outputs) * ratio


@jit
def _has_room(books: Any) -> bool:
    return bool(books.available > books.set_aside and books.available > books.taken)


@jit
def _admissible(state: State, batch: Batch, slot: int, index: int) -> int:
    """Prompt tokens to compute of a waiting request; 0: not in this pass; -1: no room."""
    rules, books, page = batch.rules[0], batch.books[0], state.rules[0].block_size
    request = state.requests[index]
    tokens = request.prompt_tokens + request.outputs
    if rules.ignore_eos and not rules.radix_cache:
        if not _fits_ahead(state, batch, slot, index):
            return NOBODY
        return int(min(tokens, max(books.chunk_left, 0)))
    new_tokens = _clipped(batch, request.max_tokens - request.outputs)
    if tokens + new_tokens + page >= books.available - books.set_aside:
        return NOBODY
    paged = _paged(tokens, page)
    if state.rules[0].max_num_batched_tokens == UNBOUNDED:
        refused = state.steps[slot].scheduled > 0 and paged >= books.input_left
        return 0 if refused else int(tokens)
    return int(books.chunk_left // page * page) if paged > books.chunk_left else int(tokens)


@jit
def _fits_ahead(state: State, batch: Batch, slot: int, index: int) -> bool:
    """Does the pool hold everybody at each of the coming completions, in order of completion?"""
    books, page, candidate = batch.books[0], state.rules[0].block_size, state.requests[index]
    needed = _paged(candidate.prompt_tokens + candidate.outputs, page) + page
    if needed > books.available - max(books.taken, books.set_aside):
        return False
    _foresee(state, batch, slot, index)
    free = books.available - books.taken - needed
    present = books.upcoming
    for k in range(books.upcoming):
        if free - batch.left[k] * present <= batch.rules[0].look_ahead_spare * present:
            return False
        free += batch.occupied[k]
        present -= 1
    return True


@jit
def _foresee(state: State, batch: Batch, slot: int, index: int) -> None:
    """Put the candidate among those whose completion is foreseen, the first time with all others."""
    books, step = batch.books[0], state.steps[slot]
    if books.upcoming == NOBODY:
        books.upcoming = 0
        _append_upcoming(state, batch, index)
        for k in range(books.decoding):
            _append_upcoming(state, batch, batch.decoding[k])
        for k in range(step.scheduled):
            _append_upcoming(state, batch, state.rows[slot, k].request)
        _sort(batch.left, batch.occupied, books.upcoming)
        return
    last = books.upcoming
    _append_upcoming(state, batch, index)
    if books.upcoming == last:
        return
    left, occupied, at = batch.left[last], batch.occupied[last], last
    # The one that would come last is put before the last one.
    while at > 0 and (at == last or batch.left[at - 1] >= left):
        batch.left[at], batch.occupied[at] = batch.left[at - 1], batch.occupied[at - 1]
        at -= 1
    batch.left[at], batch.occupied[at] = left, occupied


@jit
def _append_upcoming(state: State, batch: Batch, index: int) -> None:
    books, request = batch.books[0], state.requests[index]
    ratio = 1.0 if batch.rules[0].ignore_eos else state.books[0].new_token_ratio
    left = request.max_tokens * ratio - request.outputs
    if left > 0:
        batch.left[books.upcoming] = left
        batch.occupied[books.upcoming] = request.prompt_tokens + request.outputs
        books.upcoming += 1


@jit
def _clipped(batch: Batch, tokens: int) -> int:
    return int(min(max(tokens, 0), batch.rules[0].clip_max_new_tokens))


@jit
def _paged(tokens: int, page: int) -> int:
    return -(-tokens // page) * page
