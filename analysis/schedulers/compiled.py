"""The scheduler on a virtual clock, compiled: `analysis.schedulers.simulate` in a fraction of the time.

Needs numba (`pip install critrate[fast]`). What comes back equals the plain engine's, step for step and
bit for bit; `analysis.schedulers.simulate.simulate` decides which of the two runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.schedulers import compiled_sglang, compiled_vllm
from analysis.schedulers.compiled_sglang import Batch, new_batch
from analysis.schedulers.compiled_state import (
    FINISHED,
    LOGGED,
    NOBODY,
    REQUEST,
    RULES,
    RUNNING,
    SAMPLE,
    UNBOUNDED,
    WAITING,
    State,
    jit,
    jit_cached,
    leave_queue,
    new_state,
    stop,
    wait_last,
)
from analysis.schedulers.engine import EngineLimits, Request
from analysis.schedulers.scheduler import engine_of
from analysis.schedulers.sglang import longest_request
from analysis.schedulers.step_time import StepTime

FIRST_ROWS = 1024


class CompiledRun(NamedTuple):
    """One record for each request (REQUEST), step (LOGGED) and sample (SAMPLE) of a run."""

    requests: NDArray[Any]
    steps: NDArray[Any]
    samples: NDArray[Any]


def run_compiled(
    limits: EngineLimits,
    law: StepTime,
    step_factors: NDArray[np.float64],
    slowdown: NDArray[np.float64],
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    horizon_s: float,
    sample_interval_s: float,
    ignore_eos: bool,
) -> CompiledRun:
    """What `analysis.schedulers.simulate.simulate` does with the same arguments, and the errors
    that it raises."""
    if type(law) is not StepTime:
        raise TypeError(f"the compiled engine knows StepTime alone, not {type(law).__name__}")
    requests = _requests(limits, lengths)
    state = new_state(_rules(limits), requests)
    refused, steps, samples = _run(
        state,
        None if limits.sglang is None else new_batch(limits.sglang, ignore_eos, state),
        np.ascontiguousarray(arrival_s, dtype=np.float64),
        law.coefficients(),
        step_factors,
        slowdown,
        float(horizon_s),
        float(sample_interval_s),
        np.zeros(FIRST_ROWS, LOGGED),
        np.zeros(FIRST_ROWS, SAMPLE),
    )
    if refused != NOBODY:
        # The plain engine says why.
        prompt, output, declared = lengths[refused].tolist()
        engine_of(limits).submit(Request(refused, prompt, output, declared, ignore_eos))
        raise AssertionError(f"the plain engine takes request {refused}")
    return CompiledRun(requests, steps, samples)


def _requests(limits: EngineLimits, lengths: NDArray[np.int64]) -> NDArray[Any]:
    prompt, output, declared = np.asarray(lengths, dtype=np.int64).reshape(-1, 3).T
    requests = np.zeros(len(prompt), REQUEST)
    requests["prompt_tokens"], requests["output_tokens"] = prompt, output
    requests["max_tokens"] = np.where(declared == 0, output, declared)
    longest = limits.pool_tokens
    if limits.max_model_len is not None:
        longest = min(longest, limits.max_model_len)
    refused = (prompt < 1) | (output < 1) | (prompt + output > longest)
    if limits.sglang is not None:
        refused |= prompt + requests["max_tokens"] > longest_request(limits)
    requests["refused"] = refused
    requests["first_s"] = requests["last_s"] = np.nan
    return requests


def _rules(limits: EngineLimits) -> NDArray[Any]:
    rules = np.zeros(1, RULES)
    rules["num_blocks"] = limits.num_blocks
    rules["block_size"] = limits.block_size
    rules["max_num_seqs"] = limits.max_num_seqs or UNBOUNDED
    rules["max_num_batched_tokens"] = limits.max_num_batched_tokens or UNBOUNDED
    rules["watermark_blocks"] = limits.watermark_blocks
    rules["reserve_full_prompt"] = limits.reserve_full_prompt
    rules["long_prefill_token_threshold"] = limits.long_prefill_token_threshold
    rules["async_scheduling"] = limits.async_scheduling
    return rules


@jit_cached
def _run(
    state: State,
    batch: Batch | None,
    arrival_s: NDArray[np.float64],
    law: NDArray[np.float64],
    step_factors: NDArray[np.float64],
    slowdown: NDArray[np.float64],
    horizon_s: float,
    sample_interval_s: float,
    steps: NDArray[Any],
    samples: NDArray[Any],
) -> tuple[int, NDArray[Any], NDArray[Any]]:
    """Who was refused, the steps and the samples; the two arrays are grown as needed."""
    requests = state.requests
    shown = np.zeros(1, samples.dtype)
    _show(state, shown[0])
    num_steps = num_samples = arrived = 0
    now_s = next_sample_s = 0.0
    while now_s < horizon_s:
        while arrived < len(requests) and arrival_s[arrived] <= now_s:
            if requests[arrived].refused:
                return arrived, steps[:num_steps], samples[:num_samples]
            wait_last(state, arrived)
            arrived += 1
        slot = _start(state, batch)
        if slot == NOBODY:
            end_s = arrival_s[arrived] if arrived < len(requests) else horizon_s
        else:
            step = state.steps[slot]
            duration_s = (
                law[0] + law[1] * step.tokens + law[2] * step.kv_tokens + law[3] * step.scheduled
            )
            duration_s *= step_factors[num_steps % len(step_factors)]
            duration_s *= slowdown[int(now_s / horizon_s * len(slowdown))]
            if num_steps == len(steps):
                steps = _grown(steps)
            _log(state, slot, steps[num_steps], now_s, duration_s)
            num_steps += 1
            end_s = now_s + duration_s
        while next_sample_s < min(end_s, horizon_s):
            if num_samples == len(samples):
                samples = _grown(samples)
            samples[num_samples] = shown[0]
            samples[num_samples].t_s = next_sample_s
            num_samples += 1
            next_sample_s += sample_interval_s
        now_s = end_s
        if slot != NOBODY and now_s < horizon_s:
            _complete(state, slot, now_s, batch is None)
            _show(state, shown[0])
    return NOBODY, steps[:num_steps], samples[:num_samples]


@jit
def _start(state: State, batch: Batch | None) -> int:
    """The slot of the step that runs now; -1 if the engine is idle."""
    books = state.books[0]
    slot = books.ahead
    books.ahead = NOBODY
    missing = 1 + state.rules[0].async_scheduling - (slot != NOBODY)
    for _ in range(missing):
        empty = 0 if slot == NOBODY else 1 - slot
        if not _schedule(state, batch, empty):
            break
        if slot == NOBODY:
            slot = empty
        else:
            books.ahead = empty
    return int(slot)


@jit
def _schedule(state: State, batch: Batch | None, slot: int) -> bool:
    step = state.steps[slot]
    step.scheduled = step.tokens = step.kv_tokens = 0
    step.recomputed_tokens = step.preempted = step.prefill = 0
    # Only one branch is compiled: which one follows from the type.
    if batch is None:
        compiled_vllm.schedule(state, slot)
    else:
        compiled_sglang.schedule(state, batch, slot)
    return bool(step.scheduled > 0)


@jit
def _complete(state: State, slot: int, now_s: float, keeps_late_tokens: bool) -> None:
    """Deliver a step's output tokens, and free the blocks of who got its last."""
    books, delivered, prompt_tokens = state.books[0], 0, 0
    for k in range(state.steps[slot].scheduled):
        row = state.rows[slot, k]
        request = state.requests[row.request]
        request.steps_in_flight -= 1
        late = request.stale > 0
        if late:
            request.stale -= 1
        if not row.samples or request.state == FINISHED or (late and not keeps_late_tokens):
            continue
        if not late:
            request.in_flight -= 1
        request.outputs += 1
        if request.outputs == 1:
            request.first_s = now_s
        request.last_s = now_s
        if not request.prefilled_once:
            request.prefilled_once = True
            prompt_tokens += request.prompt_tokens
        if request.outputs == request.output_tokens:
            if request.state == RUNNING:
                stop(state, row.request)
            elif request.state == WAITING:
                leave_queue(state, row.request)
            request.state = FINISHED
            books.finished += 1
        delivered += 1
    if delivered:
        books.steps_with_output += 1
        books.step_tokens += delivered + prompt_tokens
        books.prompt_tokens += prompt_tokens
        books.generation_tokens += delivered


@jit
def _show(state: State, sample: Any) -> None:
    books = state.books[0]
    sample.waiting = books.waiting
    sample.running = books.running
    sample.kv_usage = 1.0 - books.free_blocks / state.rules[0].num_blocks
    sample.preemptions = books.preemptions
    sample.prompt_tokens = books.prompt_tokens
    sample.generation_tokens = books.generation_tokens
    sample.steps = books.steps_with_output
    sample.step_tokens = books.step_tokens
    sample.finished = books.finished
    sample.new_token_ratio = books.new_token_ratio


@jit
def _log(state: State, slot: int, row: Any, start_s: float, duration_s: float) -> None:
    books, step = state.books[0], state.steps[slot]
    row.start_s = start_s
    row.duration_s = duration_s
    row.tokens = step.tokens
    row.kv_tokens = step.kv_tokens
    row.used_blocks = state.rules[0].num_blocks - books.free_blocks
    row.running = books.running
    row.waiting = books.waiting
    row.recomputed_tokens = step.recomputed_tokens
    # Also of a pass that then had nothing to run.
    row.preempted = books.preemptions - books.preempted_logged
    books.preempted_logged = books.preemptions


@jit
def _grown(rows: NDArray[Any]) -> NDArray[Any]:
    """The same rows in an array of twice the length."""
    grown = np.empty(2 * len(rows), rows.dtype)
    for k in range(len(rows)):
        grown[k] = rows[k]
    return grown
