"""The batching rules of `analysis.slot_models.batching`, compiled: equal batch for batch, in a
fraction of the time.

Needs numba (`pip install critrate[fast]`). Every rule works prompts off in order of arrival, so that
those whose prompt is not done are the last to have come: from ``books.prefilling`` on. Those that decode
stand in a list in the same order.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from analysis.slot_models.batching import BATCH, Limits, Staircase

FASTER_TRANSFORMER, VANILLA_VLLM, ORCA, SARATHI = range(4)
RULE = {
    "faster_transformer": FASTER_TRANSFORMER,
    "vanilla_vllm": VANILLA_VLLM,
    "orca": ORCA,
    "sarathi": SARATHI,
}
BOOKS = np.dtype(
    [(name, np.int64) for name in ("arrived", "prefilling", "decoding", "backlog", "tokens")]
    + [(name, np.int64) for name in ("requests", "prefill_tokens", "decodes", "was_decoding")]
)
FIRST_ROWS = 4096


def run_compiled(
    rule: str,
    limits: Limits,
    step_time: Staircase,
    arrival_ms: NDArray[np.float64],
    prefill: NDArray[np.int64],
    decode: NDArray[np.int64],
    horizon_ms: float,
) -> tuple[NDArray[np.void], NDArray[np.float64]]:
    """Rows of BATCH, and when each request ended, NaN where it did not."""
    prompts, outputs = (np.array(x, dtype=np.int64) for x in (prefill, decode))
    finished = np.full(len(prompts), np.nan)
    batches = _run(
        RULE[rule],
        (limits.budget, limits.most),
        (step_time.c_ms, step_time.a_ms, step_time.step_tokens),
        np.ascontiguousarray(arrival_ms, dtype=np.float64),
        prompts,
        outputs,
        np.empty(len(prompts), np.int64),
        np.zeros(1, BOOKS),
        finished,
        float(horizon_ms),
        np.zeros(FIRST_ROWS, BATCH),
    )
    return batches, finished


@numba.njit(cache=True)
def _run(rule, limits, law, arrival, prompts, outputs, decoding, books, finished, horizon, rows):  # type: ignore[no-untyped-def]
    now, count, done = 0.0, 0, 0
    while now < horizon:
        while books[0].arrived < len(arrival) and arrival[books[0].arrived] <= now:
            books[0].backlog += prompts[books[0].arrived] + outputs[books[0].arrived]
            books[0].arrived += 1
        present, backlog = books[0].arrived - done, books[0].backlog
        _fill(rule, limits, prompts, outputs, decoding, books[0])
        tokens = books[0].tokens
        if tokens == 0:
            now = arrival[books[0].arrived] if books[0].arrived < len(arrival) else horizon
            continue
        if count == len(rows):
            rows = _grown(rows)
        row = rows[count]
        row.start_ms = now
        row.duration_ms = law[0] + law[1] * np.ceil(tokens / law[2])
        now += row.duration_ms
        row.prefill_tokens = books[0].prefill_tokens
        row.decode_tokens = books[0].decodes
        row.requests = books[0].requests
        row.present = present
        row.backlog_tokens = backlog
        row.completed = _leave(outputs, decoding, books[0], finished, now)
        books[0].backlog -= tokens
        done += row.completed
        count += 1
    return rows[:count]


@numba.njit
def _grown(rows):  # type: ignore[no-untyped-def]
    """The same rows in an array of twice the length."""
    grown = np.empty(2 * len(rows), rows.dtype)
    for k in range(len(rows)):
        grown[k] = rows[k]
    return grown


@numba.njit
def _fill(rule, limits, prompts, outputs, decoding, books):  # type: ignore[no-untyped-def]
    """Take the next batch's tokens off the work."""
    books.tokens = books.requests = books.prefill_tokens = books.decodes = 0
    books.was_decoding = books.decoding
    pending = books.prefilling < books.arrived
    if rule == FASTER_TRANSFORMER:
        if books.decoding > 0:
            _decodes(limits, outputs, decoding, books)
        else:
            _prompts(limits, prompts, decoding, books, True)
    elif rule == VANILLA_VLLM:
        if pending:
            _prompts(limits, prompts, decoding, books, True)
        else:
            _decodes(limits, outputs, decoding, books)
    elif rule == ORCA:
        _prompts(limits, prompts, decoding, books, False)
        _decodes(limits, outputs, decoding, books)
    else:
        _decodes(limits, outputs, decoding, books)
        _prompts(limits, prompts, decoding, books, False)


@numba.njit
def _decodes(limits, outputs, decoding, books):  # type: ignore[no-untyped-def]
    """A token of each that decoded when the batch was begun, while there is room."""
    room = min(limits[0] - books.tokens, limits[1] - books.requests)
    taken = max(0, min(books.was_decoding, room))
    for k in range(taken):
        outputs[decoding[k]] -= 1
    books.decodes = taken
    books.tokens += taken
    books.requests += taken


@numba.njit
def _prompts(limits, prompts, decoding, books, whole):  # type: ignore[no-untyped-def]
    """Prompts in order of arrival, whole or cut; whose prompt is done decodes from the next batch on."""
    while books.prefilling < books.arrived and books.requests < limits[1]:
        i = books.prefilling
        room = limits[0] - books.tokens
        if room == 0 or (whole and prompts[i] > room):
            break
        taken = min(prompts[i], room)
        prompts[i] -= taken
        books.prefill_tokens += taken
        books.tokens += taken
        books.requests += 1
        if prompts[i] > 0:
            break
        decoding[books.decoding] = i
        books.decoding += 1
        books.prefilling += 1


@numba.njit
def _leave(outputs, decoding, books, finished, now):  # type: ignore[no-untyped-def]
    """Those without work leave; how many they were."""
    if books.decodes == 0:
        return 0
    ended = 0
    for k in range(books.decodes):
        ended += outputs[decoding[k]] == 0
    if ended == 0:
        return 0
    left = 0
    for k in range(books.decoding):
        i = decoding[k]
        if outputs[i] == 0:
            finished[i] = now
        else:
            decoding[left] = i
            left += 1
    books.decoding = left
    return ended
