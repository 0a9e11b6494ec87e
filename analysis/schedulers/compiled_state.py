"""The state of a compiled engine: what `analysis.schedulers.engine` keeps in objects, in arrays of
records.

The compiled engine is the plain one once more, rule for rule, for numba (`critrate[fast]`): the names
are those of `analysis.schedulers.engine`, `analysis.schedulers.vllm` and
`analysis.schedulers.sglang`; requests are rows of an array, a request is the index of its row, and
-1 is nobody. The plain engine stays the reference: tests/analysis/test_compiled.py holds every step
of the one against the other. A rule that changes there changes here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])

NOBODY = -1
UNBOUNDED = 1 << 62
NEW, WAITING, RUNNING, FINISHED = range(4)


def jit(function: Function) -> Function:
    """Compiled into its callers."""
    return cast(Function, numba.njit(function))


def jit_cached(function: Function) -> Function:
    """Compiled once and kept beside the source, with all that it calls."""
    return cast(Function, numba.njit(cache=True)(function))


def _digest() -> str:
    """Of the compiled sources. numba keeps machine code until the file of the *calling* function
    changes; a digest in the state's type makes it compile again when any of them does."""
    sources = sorted(Path(__file__).parent.glob("compiled*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def record(integers: str, floats: str = "") -> np.dtype[np.void]:
    """A record of these integers and floats, named in one string each."""
    fields = [(name, np.int64) for name in integers.split()]
    return np.dtype([*fields, *((name, np.float64) for name in floats.split())])


RULES = record(
    "num_blocks block_size max_num_seqs max_num_batched_tokens watermark_blocks reserve_full_prompt"
    " long_prefill_token_threshold async_scheduling sources_" + _digest()
)
"""What bounds the engine; nothing here changes in a run."""

REQUEST = record(
    "prompt_tokens output_tokens max_tokens refused"
    " computed outputs in_flight steps_in_flight stale blocks preemptions state prefilled_once"
    " before behind",
    "first_s last_s",
)
"""A request; ``before`` and ``behind`` are its neighbours while it waits. ``refused``: the plain engine
would not take it. ``first_s`` and ``last_s`` are when it got its tokens, NaN before."""

BOOKS = record(
    "free_blocks preemptions prompt_tokens generation_tokens recomputed_tokens steps_with_output"
    " step_tokens finished running waiting first_waiting last_waiting ahead preempted_logged",
    "new_token_ratio",
)
"""Counters of the engine, the two ends of the queue, and the slot of the step scheduled ahead."""

STEP = record("scheduled tokens kv_tokens recomputed_tokens preempted prefill")
ROW = record("request tokens samples")
"""One request of a step."""

LOGGED = record(
    "tokens kv_tokens used_blocks running waiting recomputed_tokens preempted", "start_s duration_s"
)
SAMPLE = record(
    "waiting running preemptions prompt_tokens generation_tokens steps step_tokens finished",
    "t_s kv_usage new_token_ratio",
)


class State(NamedTuple):
    """An engine and its requests; ``width`` is how many of them can hold blocks at once."""

    rules: NDArray[Any]
    """(1,) of RULES."""
    books: NDArray[Any]
    """(1,) of BOOKS."""
    requests: NDArray[Any]
    """(n,) of REQUEST."""
    running: NDArray[np.int64]
    """(width,): in order of admission."""
    steps: NDArray[Any]
    """(2,) of STEP: the one that runs and, scheduled asynchronously, the next."""
    rows: NDArray[Any]
    """(2, width) of ROW: their requests."""


def new_state(rules: NDArray[Any], requests: NDArray[Any]) -> State:
    """An idle engine."""
    width = max(1, min(len(requests), int(rules["num_blocks"][0])))
    books = np.zeros(1, BOOKS)
    books["free_blocks"] = rules["num_blocks"]
    for name in ("first_waiting", "last_waiting", "ahead"):
        books[name] = NOBODY
    running = np.zeros(width, np.int64)
    return State(rules, books, requests, running, np.zeros(2, STEP), np.zeros((2, width), ROW))


# -- the queue -----------------------------------------------------------------------------------------


@jit
def wait_last(state: State, index: int) -> None:
    """To the back of the queue."""
    books, requests = state.books[0], state.requests
    request = requests[index]
    request.state = WAITING
    request.before = books.last_waiting
    request.behind = NOBODY
    if books.last_waiting == NOBODY:
        books.first_waiting = index
    else:
        requests[books.last_waiting].behind = index
    books.last_waiting = index
    books.waiting += 1


@jit
def wait_first(state: State, index: int) -> None:
    """To the front of the queue."""
    books, requests = state.books[0], state.requests
    request = requests[index]
    request.state = WAITING
    request.before = NOBODY
    request.behind = books.first_waiting
    if books.first_waiting == NOBODY:
        books.last_waiting = index
    else:
        requests[books.first_waiting].before = index
    books.first_waiting = index
    books.waiting += 1


@jit
def leave_queue(state: State, index: int) -> None:
    """From wherever it stands in the queue."""
    books, requests = state.books[0], state.requests
    request = requests[index]
    if request.before == NOBODY:
        books.first_waiting = request.behind
    else:
        requests[request.before].behind = request.behind
    if request.behind == NOBODY:
        books.last_waiting = request.before
    else:
        requests[request.behind].before = request.before
    books.waiting -= 1


# -- those that run ------------------------------------------------------------------------------------


@jit
def run(state: State, index: int) -> None:
    """From the queue to the running ones."""
    leave_queue(state, index)
    books = state.books[0]
    state.requests[index].state = RUNNING
    state.running[books.running] = index
    books.running += 1


@jit
def stop(state: State, index: int) -> None:
    """Out of the running ones, its blocks freed."""
    books, running = state.books[0], state.running
    position = books.running - 1
    while running[position] != index:
        position -= 1
    books.running -= 1
    for k in range(position, books.running):
        running[k] = running[k + 1]
    books.free_blocks += state.requests[index].blocks
    state.requests[index].blocks = 0


@jit
def preempt(state: State, index: int) -> None:
    """Take all that it has computed from a running request; the caller puts it into the queue."""
    stop(state, index)
    request = state.requests[index]
    request.computed = 0
    request.stale = request.steps_in_flight
    request.in_flight = 0
    request.preemptions += 1
    state.books[0].preemptions += 1


@jit
def add_row(state: State, slot: int, index: int, tokens: int) -> None:
    """Schedule some tokens of a request in a step."""
    step = state.steps[slot]
    row = state.rows[slot, step.scheduled]
    row.request = index
    row.tokens = tokens
    step.scheduled += 1
