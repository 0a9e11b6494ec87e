"""The scheduler on a virtual clock: the records that a live run would give, in far less time."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from itertools import repeat
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.schedulers.engine import Engine, EngineLimits, EngineSample, Request, Step
from analysis.schedulers.frames import RunFrames
from analysis.schedulers.scheduler import engine_of
from analysis.schedulers.step_time import StepTime
from loadgen.records import RequestRecord, Run

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
    """Requests, since the step before started: by whatever pass chose what to run."""


ROW = np.dtype(
    [(f.name, np.float64 if f.name.endswith("_s") else np.int64) for f in fields(StepLog)]
)


REQUEST = np.dtype(
    [
        *(
            (name, np.int64)
            for name in ("id", "prompt_tokens", "designed", "max_tokens", "outputs")
        ),
        *((name, np.float64) for name in ("arrival_s", "first_s", "last_s")),
    ]
)
"""A request that arrived; NaN: it did not happen."""
SAMPLED = (
    *("waiting", "running", "preemptions", "prompt_tokens", "generation_tokens", "steps"),
    *("step_tokens", "finished", "kv_usage"),
)
"""What a scheduler changes of an `EngineSample`, beside the ratio of SGLang."""
SAMPLE = np.dtype(
    [
        *((name, np.int64) for name in SAMPLED[:-1]),
        *((name, np.float64) for name in (SAMPLED[-1], "t_s", "new_token_ratio")),
    ]
)


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a simulated run gives: records and samples as of a live run, and every step besides.

    ``rows`` are of REQUEST, ``gauges`` of SAMPLE. ``compiled`` says which engine ran: both give the
    same.
    """

    limits: EngineLimits
    rows: NDArray[np.void]
    gauges: NDArray[np.void]
    steps: StepLog
    compiled: bool

    @cached_property
    def records(self) -> list[RequestRecord]:
        """One for each request that arrived before the horizon."""
        return _records(self.rows)

    @cached_property
    def samples(self) -> list[EngineSample]:
        """One for each sampling interval."""
        return _samples(self.limits, self.gauges)

    def frames(self, run: Run) -> RunFrames:
        """`analysis.schedulers.frames.run_frames` of records and samples, in less time."""
        rows, done = self.rows, self.rows["outputs"] == self.rows["designed"]
        scheduled_s = _whole_ns(rows["arrival_s"])
        requests = pd.DataFrame(
            {
                "id": rows["id"],
                "prompt_tokens": rows["prompt_tokens"],
                "output_tokens_designed": rows["designed"],
                "max_tokens": rows["max_tokens"],
                "output_tokens": rows["outputs"],
                "prompt_tokens_reported": np.where(done, rows["prompt_tokens"], np.nan),
                "outcome": np.where(done, "completed", "unfinished").astype(object),
                "status": 200,
                "error": None,
                "scheduled_s": scheduled_s,
                "sent_s": scheduled_s,
                "first_token_s": _whole_ns(rows["first_s"]),
                "last_token_s": _whole_ns(rows["last_s"]),
            }
        )
        idle = engine_of(self.limits).sample(0)
        gauges = {f.name: getattr(idle, f.name) for f in fields(idle)}
        gauges |= {name: self.gauges[name] for name in SAMPLED}
        if self.limits.sglang is not None:
            gauges["new_token_ratio"] = self.gauges["new_token_ratio"]
        del gauges["t_ns"], gauges["read_ns"]
        t_s = _whole_ns(self.gauges["t_s"])
        engine = pd.DataFrame(gauges | {"t_s": t_s, "read_s": t_s})
        return RunFrames(run, run.horizon_s, requests, engine, pd.DataFrame([]))


def simulate(
    limits: EngineLimits,
    step_time: StepTime,
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    horizon_s: float,
    sample_interval_s: float = 0.1,
    ignore_eos: bool = True,
    compiled: bool | None = None,
    step_factors: NDArray[np.float64] | None = None,
    slowdown: NDArray[np.float64] | None = None,
) -> Simulation:
    """Run the engine on [0, horizon_s) with the given arrivals and stop there.

    ``arrival_s`` has shape (n,), increasing seconds from the start; ``lengths`` has shape (n, 3):
    prompt tokens, output tokens, declared max_tokens.
    A request arrives at a step boundary at the earliest. Requests without their last token at the
    horizon are ``unfinished``. ``compiled`` chooses between the engine of
    `analysis.schedulers.compiled` and the plain one; None takes the compiled one where numba is
    installed. Both give the same, bit for bit.

    A step takes what ``step_time`` says, times two factors; None: 1. ``step_factors``, shape (m,): one
    for each step, begun anew after the m-th: noise, drawn by the caller. ``slowdown``, shape (k,): one
    for each k-th part of the horizon, taken where the step starts: a server whose speed drifts.

    Raises ValueError when a request can never fit the pool or a factor is not positive and finite,
    TypeError when the compiled engine is asked for a step time that is no `StepTime`.
    """
    if compiled is None:
        compiled = find_spec("numba") is not None and type(step_time) is StepTime
    factors = _factors("step_factors", step_factors), _factors("slowdown", slowdown)
    run = _compiled if compiled else _plain
    return run(
        limits, step_time, *factors, arrival_s, lengths, horizon_s, sample_interval_s, ignore_eos
    )


def _factors(name: str, factors: NDArray[np.float64] | None) -> NDArray[np.float64]:
    if factors is None:
        return np.ones(1)
    result = np.ascontiguousarray(factors, dtype=np.float64)
    if result.ndim != 1 or not len(result) or not (np.isfinite(result) & (result > 0)).all():
        raise ValueError(f"{name} must be a row of positive, finite factors")
    return result


def _plain(
    limits: EngineLimits,
    step_time: StepTime,
    step_factors: NDArray[np.float64],
    slowdown: NDArray[np.float64],
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
    samples: list[tuple[float | int, ...]] = []
    steps: list[tuple[float | int, ...]] = []
    next_sample_s = 0.0
    now_s = 0.0
    arrived = preempted = 0
    arrivals = arrival_s.tolist()
    noise, slower = step_factors.tolist(), slowdown.tolist()
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
            duration_s *= noise[len(steps) % len(noise)]
            duration_s *= slower[int(now_s / horizon_s * len(slower))]
            steps.append((now_s, duration_s, *_row(step, engine), engine.preemptions - preempted))
            preempted = engine.preemptions
            end_s = now_s + duration_s
        while next_sample_s < min(end_s, horizon_s):
            samples.append(
                (*(getattr(shown, name) for name in SAMPLED), next_sample_s, _ratio(shown))
            )
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
    rows = _rows(arrival_s, lengths, outputs, first_s, last_s, horizon_s)
    log = _log(np.array(steps, dtype=ROW))
    return Simulation(limits, rows, np.array(samples, dtype=SAMPLE), log, compiled=False)


def _ratio(shown: EngineSample) -> float:
    return np.nan if shown.new_token_ratio is None else shown.new_token_ratio


def _log(rows: NDArray[np.void]) -> StepLog:
    return StepLog(**{f.name: np.ascontiguousarray(rows[f.name]) for f in fields(StepLog)})


def _row(step: Step, engine: Engine) -> tuple[int, ...]:
    """A row of StepLog between its two times and who was preempted."""
    return (
        step.tokens,
        step.kv_tokens,
        engine.limits.num_blocks - engine.free_blocks,
        len(engine.running),
        len(engine.waiting),
        step.recomputed_tokens,
    )


def _compiled(
    limits: EngineLimits,
    step_time: StepTime,
    step_factors: NDArray[np.float64],
    slowdown: NDArray[np.float64],
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    horizon_s: float,
    sample_interval_s: float,
    ignore_eos: bool,
) -> Simulation:
    """The same, compiled."""
    # Here, so that the plain engine needs no numba, and nobody waits for an import of a second in vain.
    from analysis.schedulers.compiled import run_compiled

    run = run_compiled(
        limits,
        step_time,
        step_factors,
        slowdown,
        arrival_s,
        lengths,
        horizon_s,
        sample_interval_s,
        ignore_eos,
    )
    requests = run.requests
    rows = _rows(
        arrival_s, lengths, requests["outputs"], requests["first_s"], requests["last_s"], horizon_s
    )
    return Simulation(limits, rows, run.samples, _log(run.steps), compiled=True)


def _samples(limits: EngineLimits, rows: NDArray[np.void]) -> list[EngineSample]:
    idle = engine_of(limits).sample(0)
    columns: dict[str, list[Any]] = {name: rows[name].tolist() for name in SAMPLED}
    columns["t_ns"] = columns["read_ns"] = _nanoseconds(rows["t_s"])
    if limits.sglang is not None:
        columns["new_token_ratio"] = rows["new_token_ratio"].tolist()
    names = [field.name for field in fields(idle)]
    # What no scheduler changes stays as it is in an idle engine.
    values = (columns.get(name, repeat(getattr(idle, name), len(rows))) for name in names)
    return [EngineSample(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]


def _rows(
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    outputs: NDArray[np.int64],
    first_s: NDArray[np.float64],
    last_s: NDArray[np.float64],
    horizon_s: float,
) -> NDArray[np.void]:
    """REQUEST of each request that arrived before the horizon."""
    arrived = np.flatnonzero(arrival_s < horizon_s)
    rows = np.empty(len(arrived), dtype=REQUEST)
    times = {"arrival_s": arrival_s, "first_s": first_s, "last_s": last_s}
    for name, column in ({"outputs": outputs} | times).items():
        rows[name] = column[arrived]
    rows["id"] = arrived
    for name, column in zip(
        ("prompt_tokens", "designed", "max_tokens"), lengths[arrived].T, strict=True
    ):
        rows[name] = column
    return rows


def _records(rows: NDArray[np.void]) -> list[RequestRecord]:
    names = ("id", "prompt_tokens", "designed", "max_tokens", "outputs")
    columns = (
        *(rows[name].tolist() for name in names),
        *(_nanoseconds(rows[name]) for name in ("arrival_s", "first_s", "last_s")),
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


def _whole_ns(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds as a clock of whole nanoseconds shows them."""
    result: NDArray[np.float64] = np.rint(times_s * SECOND_NS) / 1e9
    return result


def _nanoseconds(times_s: NDArray[np.float64]) -> list[int | None]:
    """Rounded half to even, as `round` does; None for NaN."""
    known = ~np.isnan(times_s)
    whole = np.rint(np.where(known, times_s, 0.0) * SECOND_NS).astype(np.int64).astype(object)
    whole[~known] = None
    result: list[int | None] = whole.tolist()
    return result
