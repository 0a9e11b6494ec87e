"""The scheduler on a virtual clock: the records that a live run would give, in far less time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from analysis.engine import Engine, EngineLimits, EngineSample, Request, Step
from analysis.scheduler import engine_of
from analysis.step_time import StepTime
from loadgen.records import RequestRecord

SECOND_NS = 1_000_000_000


@dataclass(slots=True)
class StepLog:
    """One row per step, in arrays once `as_arrays` is called."""

    start_s: list[float] = field(default_factory=list)
    duration_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    kv_tokens: list[int] = field(default_factory=list)
    used_blocks: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    recomputed_tokens: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)

    def add(self, start_s: float, duration_s: float, step: Step, engine: Engine) -> None:
        self.start_s.append(start_s)
        self.duration_s.append(duration_s)
        self.tokens.append(step.tokens)
        self.kv_tokens.append(step.kv_tokens)
        self.used_blocks.append(engine.limits.num_blocks - engine.free_blocks)
        self.running.append(len(engine.running))
        self.waiting.append(len(engine.waiting))
        self.recomputed_tokens.append(step.recomputed_tokens)
        self.preempted.append(step.preempted)

    def as_arrays(self) -> dict[str, NDArray[np.float64]]:
        return {name: np.asarray(getattr(self, name), dtype=float) for name in self.__slots__}


@dataclass(slots=True)
class Simulation:
    """What a simulated run gives: records and samples as of a live run, and every step besides."""

    records: list[RequestRecord]
    samples: list[EngineSample]
    steps: StepLog
    engine: Engine


def simulate(
    limits: EngineLimits,
    step_time: StepTime,
    arrival_s: NDArray[np.float64],
    lengths: NDArray[np.int64],
    horizon_s: float,
    sample_interval_s: float = 0.1,
    ignore_eos: bool = True,
) -> Simulation:
    """Run the engine on [0, horizon_s) with the given arrivals and stop there.

    ``arrival_s`` has shape (n,), increasing seconds from the start; ``lengths`` has shape (n, 3):
    prompt tokens, output tokens, declared max_tokens.
    A request arrives at a step boundary at the earliest. Requests without their last token at the
    horizon are ``unfinished``. Raises ValueError when a request can never fit the pool.
    """
    engine = engine_of(limits)
    requests = [
        Request(i, s, o, declared, ignore_eos)
        for i, (s, o, declared) in enumerate(lengths.tolist())
    ]
    first_s = np.full(len(requests), np.nan)
    last_s = np.full(len(requests), np.nan)
    samples: list[EngineSample] = []
    steps = StepLog()
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
            steps.add(now_s, duration_s, step, engine)
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
    records = [
        _record(request, arrivals[request.id], first_s[request.id], last_s[request.id], declared)
        for request, declared in zip(requests, lengths[:, 2], strict=True)
        if arrivals[request.id] < horizon_s
    ]
    return Simulation(records, samples, steps, engine)


def _record(
    request: Request, arrival_s: float, first_s: float, last_s: float, declared: int
) -> RequestRecord:
    finished = request.outputs == request.output_tokens
    return RequestRecord(
        id=request.id,
        scheduled_ns=round(arrival_s * SECOND_NS),
        sent_ns=round(arrival_s * SECOND_NS),
        first_token_ns=None if np.isnan(first_s) else round(first_s * SECOND_NS),
        last_token_ns=None if np.isnan(last_s) else round(last_s * SECOND_NS),
        prompt_tokens=request.prompt_tokens,
        output_tokens_designed=request.output_tokens,
        max_tokens=int(declared),
        output_tokens=request.outputs,
        prompt_tokens_reported=request.prompt_tokens if finished else None,
        outcome="completed" if finished else "unfinished",
        status=200,
    )
