"""The scheduler on a virtual clock: the records that a live run would give, in far less time."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from analysis.engine import Engine, EngineLimits, EngineSample, Request, Step
from analysis.scheduler import engine_of
from analysis.step_time import StepTime
from loadgen.records import RequestRecord

SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class StepLog:
    """One row per step: arrays of shape (steps,), as the step stood when it started."""

    start_s: NDArray[np.float64]
    duration_s: NDArray[np.float64]
    tokens: NDArray[np.int64]
    kv_tokens: NDArray[np.int64]
    used_blocks: NDArray[np.int64]
    running: NDArray[np.int64]
    waiting: NDArray[np.int64]
    recomputed_tokens: NDArray[np.int64]
    preempted: NDArray[np.int64]


ROW = np.dtype(
    [(f.name, np.float64 if f.name.endswith("_s") else np.int64) for f in fields(StepLog)]
)


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What a simulated run gives: records and samples as of a live run, and every step besides.

    ``compiled`` says which engine ran; both give the same.
    """

    records: list[RequestRecord]
    samples: list[EngineSample]
    steps: StepLog
    compiled: bool


def simulate(
    limits: EngineLimits,
    step_time: StepTime,
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    horizon_s: float,
    sample_interval_s: float = 0.1,
    ignore_eos: bool = True,
    compiled: bool | None = None,
) -> Simulation:
    """Run the engine on [0, horizon_s) with the given arrivals and stop there.

    ``arrival_s`` has shape (n,), increasing seconds from the start; ``lengths`` has shape (n, 3):
    prompt tokens, output tokens, declared max_tokens.
    A request arrives at a step boundary at the earliest. Requests without their last token at the
    horizon are ``unfinished``. ``compiled`` chooses between the engine of `analysis.compiled` and the
    plain one; None takes the compiled one where numba is installed. Both give the same, bit for bit.

    Raises ValueError when a request can never fit the pool, TypeError when the compiled engine is
    asked for a step time that is no `StepTime`.
    """
    if compiled is None:
        compiled = find_spec("numba") is not None and type(step_time) is StepTime
    run = _compiled if compiled else _plain
    return run(limits, step_time, arrival_s, lengths, horizon_s, sample_interval_s, ignore_eos)


def _plain(
    limits: EngineLimits,
    step_time: StepTime,
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    horizon_s: float,
    sample_interval_s: float,
    ignore_eos: bool,
) -> Simulation:
    """The reference."""
    engine = engine_of(limits)
    requests = [
        Request(i, s, o, declared, ignore_eos)
        for i, (s, o, declared) in enumerate(lengths.tolist())
    ]
    first_s = np.full(len(requests), np.nan)
    last_s = np.full(len(requests), np.nan)
    samples: list[EngineSample] = []
    steps: list[tuple[float | int, ...]] = []
    next_sample_s = 0.0
    now_s = 0.0
    arrived = 0
    arrivals = arrival_s.tolist()
    shown = engine.sample(0)
    while now_s < horizon_s:
        while arrived < len(requests) and arrivals[arrived] <= now_s:
            engine.submit(requests[arrived])
            arrived += 1
        step = engine.start()
        if step is None:
            end_s = arrivals[arrived] if arrived < len(requests) else horizon_s
        else:
            duration_s = step_time(step.tokens, step.kv_tokens, len(step.scheduled))
            steps.append((now_s, duration_s, *_row(step, engine)))
            end_s = now_s + duration_s
        while next_sample_s < min(end_s, horizon_s):
            t_ns = round(next_sample_s * SECOND_NS)
            samples.append(replace(shown, read_ns=t_ns, t_ns=t_ns))
            next_sample_s += sample_interval_s
        now_s = end_s
        if step is not None and now_s < horizon_s:
            for request, _ in engine.complete(step):
                if request.outputs == 1:
                    first_s[request.id] = now_s
                last_s[request.id] = now_s
            # Gauges show what the last step left, as a real engine's do.
            shown = engine.sample(0)
    outputs = np.array([request.outputs for request in requests], dtype=np.int64)
    records = _records(arrival_s, lengths, outputs, first_s, last_s, horizon_s)
    return Simulation(records, samples, _log(np.array(steps, dtype=ROW)), compiled=False)


def _log(rows: NDArray[np.void]) -> StepLog:
    return StepLog(**{f.name: np.ascontiguousarray(rows[f.name]) for f in fields(StepLog)})


def _row(step: Step, engine: Engine) -> tuple[int, ...]:
    """A row of StepLog after its two times."""
    return (
        step.tokens,
        step.kv_tokens,
        engine.limits.num_blocks - engine.free_blocks,
        len(engine.running),
        len(engine.waiting),
        step.recomputed_tokens,
        step.preempted,
    )


def _compiled(
    limits: EngineLimits,
    step_time: StepTime,
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    horizon_s: float,
    sample_interval_s: float,
    ignore_eos: bool,
) -> Simulation:
    """The same, compiled."""
    # Here, so that the plain engine needs no numba, and nobody waits for an import of a second in vain.
    from analysis.compiled import run_compiled

    run = run_compiled(
        limits, step_time, arrival_s, lengths, horizon_s, sample_interval_s, ignore_eos
    )
    requests = run.requests
    records = _records(
        arrival_s, lengths, requests["outputs"], requests["first_s"], requests["last_s"], horizon_s
    )
    return Simulation(records, _samples(limits, run.samples), _log(run.steps), compiled=True)


def _samples(limits: EngineLimits, rows: NDArray[np.void]) -> list[EngineSample]:
    """Records of `analysis.compiled_state.SAMPLE` as samples."""
    idle = engine_of(limits).sample(0)
    columns = {name: rows[name].tolist() for name in rows.dtype.names or () if name != "t_s"}
    columns["t_ns"] = columns["read_ns"] = _nanoseconds(rows["t_s"])
    if limits.sglang is None:
        del columns["new_token_ratio"]
    names = [field.name for field in fields(idle)]
    # What no scheduler changes stays as it is in an idle engine.
    values = (columns.get(name, repeat(getattr(idle, name), len(rows))) for name in names)
    return [EngineSample(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]


def _records(
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    outputs: NDArray[np.int64],
    first_s: NDArray[np.float64],
    last_s: NDArray[np.float64],
    horizon_s: float,
) -> list[RequestRecord]:
    """One record for each request that arrived before the horizon; NaN: it did not happen."""
    arrived = arrival_s < horizon_s
    columns = (
        np.flatnonzero(arrived).tolist(),
        *lengths[arrived].T.tolist(),
        outputs[arrived].tolist(),
        *(_nanoseconds(times[arrived]) for times in (arrival_s, first_s, last_s)),
    )
    return [
        RequestRecord(
            id=index,
            scheduled_ns=arrival_ns,
            sent_ns=arrival_ns,
            first_token_ns=first_ns,
            last_token_ns=last_ns,
            prompt_tokens=prompt,
            output_tokens_designed=designed,
            max_tokens=declared,
            output_tokens=received,
            prompt_tokens_reported=prompt if received == designed else None,
            outcome="completed" if received == designed else "unfinished",
            status=200,
        )
        for index, prompt, designed, declared, received, arrival_ns, first_ns, last_ns in zip(
            *columns, strict=True
        )
    ]


def _nanoseconds(times_s: NDArray[np.float64]) -> list[int | None]:
    """Rounded half to even, as `round` does; None for NaN."""
    known = ~np.isnan(times_s)
    whole = np.rint(np.where(known, times_s, 0.0) * SECOND_NS).astype(np.int64).astype(object)
    whole[~known] = None
    result: list[int | None] = whole.tolist()
    return result
