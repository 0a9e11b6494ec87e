"""The scheduler of `analysis.engine` on the wall clock: the inside of the mock server.

Every step has a *nominal* start and end. The next step starts, nominally, when the previous one
ends, not when the event loop woke up: the law of the step time holds exactly, whatever the machine
does, and a run of the mock is the run that `analysis.simulate` gives for the same arrivals. When
the loop is late, steps run back to back, one per turn of the loop, until they have caught up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from analysis.engine import Engine, EngineLimits, Request, Step
from analysis.step_time import StepTime
from harness.mock_metrics import Histograms, Shown

SECOND_NS = 1_000_000_000
LOG_FLUSH_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MockConfig:
    """A mock server: its engine, its step law, and what it tells the outside.

    ``port`` 0 takes a free one. ``stream_interval`` is the number of tokens per streamed chunk
    after the first. ``claimed_num_blocks`` makes the server lie: it is the pool (usable blocks)
    that ``cache_config_info`` shows, while the engine has ``limits.num_blocks`` and
    ``kv_cache_usage_perc`` refers to these. ``seed`` chooses the words of the outputs. Raises
    ValueError on a combination that no vLLM server could show.
    """

    limits: EngineLimits
    step_time: StepTime
    host: str = "127.0.0.1"
    port: int = 0
    model: str = "critrate-mock"
    stream_interval: int = 1
    claimed_num_blocks: int | None = None
    step_log: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.step_time.b0_s <= 0:
            raise ValueError(f"step_time.b0_s must be positive, got {self.step_time.b0_s}")
        if self.stream_interval < 1:
            raise ValueError(f"stream_interval must be at least 1, got {self.stream_interval}")
        if self.max_model_len > self.limits.pool_tokens:
            raise ValueError(
                f"max_model_len {self.max_model_len} does not fit the pool of "
                f"{self.limits.pool_tokens} tokens: raise num_blocks or lower max_model_len"
            )
        if self.claimed_num_blocks is not None:
            if self.claimed_num_blocks < 1:
                raise ValueError(
                    f"claimed_num_blocks must be at least 1: {self.claimed_num_blocks}"
                )
            if self.limits.max_model_len is None:
                raise ValueError(
                    "claimed_num_blocks needs limits.max_model_len: without it /v1/models would "
                    "show the true pool"
                )

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens; the whole pool where the limits do not say."""
        return self.limits.max_model_len or self.limits.pool_tokens


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the engine. Times are monotonic ns; 0 means not yet."""

    request: Request
    receive_ns: int
    push: Callable[[int, bool], None]
    """Called once per output token: tokens so far, and whether it was the last."""
    scheduled_ns: int = 0
    first_ns: int = 0
    last_ns: int = 0
    abandoned: bool = False


class PacedEngine:
    """`Engine` paced by the event loop's clock (`time.monotonic`).

    A request submitted at instant r joins the first step whose nominal start is not before r, as in
    `analysis.simulate`; an abandoned one leaves at the first such step after it was given up.
    ``shown`` is the state after the last completed step. ``failed`` is done when the engine cannot
    go on, with the exception as its result.
    """

    def __init__(self, config: MockConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = Engine(config.limits)
        self.histograms = Histograms(config.max_model_len)
        self.steps = 0
        self.overruns = 0
        self.shown = self._state(0)
        self.failed: asyncio.Future[None] = loop.create_future()
        self._step_time = config.step_time
        self._loop = loop
        self._arrivals: deque[Job] = deque()
        self._departures: deque[tuple[int, Job]] = deque()
        self._jobs: dict[int, Job] = {}
        self._submitted = 0
        self._step: Step | None = None
        self._start_ns = 0
        self._end_ns = 0
        self._timer: asyncio.TimerHandle | None = None
        self._log = None if config.step_log is None else StepLogFile(config.step_log, loop)

    # -- what the server calls -------------------------------------------------------------------

    def submit(
        self, prompt_tokens: int, output_tokens: int, push: Callable[[int, bool], None]
    ) -> Job:
        """Queue a request that was received now. It must fit ``max_model_len`` and the pool."""
        request = Request(self._submitted, prompt_tokens, output_tokens)
        job = Job(request, time.monotonic_ns(), push)
        self._submitted += 1
        self._arrivals.append(job)
        if self._step is None:
            self._guarded(self._begin, job.receive_ns)
        return job

    def abandon(self, job: Job) -> None:
        """The client of a request has gone: nothing is pushed any more."""
        job.abandoned = True
        self._departures.append((time.monotonic_ns(), job))

    def close(self) -> None:
        """Stop stepping and write the rest of the step log."""
        if self._timer is not None:
            self._timer.cancel()
        if self._log is not None:
            self._log.close()

    # -- steps -----------------------------------------------------------------------------------

    def _begin(self, start_ns: int) -> None:
        """Start the step at this boundary; without work, the one at the next arrival."""
        step = self._schedule(start_ns)
        while step is None and self._arrivals:
            start_ns = self._arrivals[0].receive_ns
            step = self._schedule(start_ns)
        self._step = step
        if step is None:
            self.shown = self._state(start_ns)
            return
        law_s = self._step_time(step.tokens, step.kv_tokens, len(step.scheduled))
        self._start_ns = start_ns
        self._end_ns = start_ns + round(law_s * SECOND_NS)
        self._timer = self._loop.call_at(self._end_ns / SECOND_NS, self._guarded, self._end)

    def _schedule(self, start_ns: int) -> Step | None:
        """Let in and out who came and went until ``start_ns``, then choose the step."""
        engine, log = self.engine, self._log
        while self._arrivals and self._arrivals[0].receive_ns <= start_ns:
            job = self._arrivals.popleft()
            self._jobs[job.request.id] = job
            engine.submit(job.request)
            if log is not None:
                log.joined(job)
        while self._departures and self._departures[0][0] <= start_ns:
            job = self._departures.popleft()[1]
            if self._jobs.pop(job.request.id, None) is not None:
                engine.abort(job.request)
                if log is not None:
                    log.left(job)
        step = engine.start()
        if step is None:
            return None
        # New requests stand at the end of the batch, behind running and resumed ones.
        for request, _ in reversed(step.scheduled):
            if request.state == "aborted":
                continue
            job = self._jobs[request.id]
            if job.scheduled_ns:
                break
            job.scheduled_ns = start_ns
        if log is not None:
            log.step(start_ns, step, engine)
        return step

    def _end(self) -> None:
        now_ns = time.monotonic_ns()
        assert self._step is not None
        self.steps += 1
        if now_ns - self._end_ns > self._end_ns - self._start_ns:
            self.overruns += 1
        step_tokens = self.engine.step_tokens
        delivered = self.engine.complete(self._step)
        if delivered:
            self.histograms.iteration_tokens_total.observe(self.engine.step_tokens - step_tokens)
        for request, finished in delivered:
            self._deliver(self._jobs[request.id], finished, now_ns)
        self.shown = self._state(self._end_ns)
        self._begin(self._end_ns)

    def _deliver(self, job: Job, finished: bool, now_ns: int) -> None:
        if job.first_ns:
            gap_s = (now_ns - job.last_ns) / SECOND_NS
            self.histograms.inter_token_latency_seconds.observe(gap_s)
        else:
            job.first_ns = now_ns
            wait_s = (now_ns - job.receive_ns) / SECOND_NS
            self.histograms.time_to_first_token_seconds.observe(wait_s)
        job.last_ns = now_ns
        if finished:
            del self._jobs[job.request.id]
            self._observe_finished(job)
        if not job.abandoned:
            job.push(job.request.outputs, finished)

    def _observe_finished(self, job: Job) -> None:
        shown, request = self.histograms, job.request
        decode_s = (job.last_ns - job.first_ns) / SECOND_NS
        shown.e2e_request_latency_seconds.observe((job.last_ns - job.receive_ns) / SECOND_NS)
        shown.request_queue_time_seconds.observe((job.scheduled_ns - job.receive_ns) / SECOND_NS)
        shown.request_inference_time_seconds.observe((job.last_ns - job.scheduled_ns) / SECOND_NS)
        shown.request_prefill_time_seconds.observe((job.first_ns - job.scheduled_ns) / SECOND_NS)
        shown.request_decode_time_seconds.observe(decode_s)
        per_token_s = decode_s / max(request.outputs - 1, 1)
        shown.request_time_per_output_token_seconds.observe(per_token_s)
        shown.request_num_preemptions.observe(request.preemptions)
        shown.request_prompt_tokens.observe(request.prompt_tokens)
        shown.request_generation_tokens.observe(request.outputs)
        shown.request_params_max_tokens.observe(request.output_tokens)

    def _state(self, t_ns: int) -> Shown:
        engine = self.engine
        return Shown(engine.sample(t_ns), engine.aborted, self.steps, self.overruns)

    def _guarded(self, call: Callable[..., None], *args: int) -> None:
        """An exception in a callback of the loop would only be logged; make it end the server."""
        try:
            call(*args)
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)


class StepLogFile:
    """One JSON line per step, written once a second.

    ``submissions`` ([id, prompt_tokens, output_tokens, receive_ns]) and ``aborts`` (ids) are those
    that took effect at the step's nominal start ``start_ns``, in this order; ``waiting``,
    ``running``, ``free_blocks`` and ``preemptions`` (since the start of the engine) hold once the
    step has been scheduled. Given each submission's step, a replay through `Engine` is exact.
    """

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._file: IO[str] = path.open("w")
        self._loop = loop
        self._lines: list[str] = []
        self._submissions: list[list[int]] = []
        self._aborts: list[int] = []
        self._timer = loop.call_later(LOG_FLUSH_S, self._flush)

    def joined(self, job: Job) -> None:
        request = job.request
        self._submissions.append(
            [request.id, request.prompt_tokens, request.output_tokens, job.receive_ns]
        )

    def left(self, job: Job) -> None:
        self._aborts.append(job.request.id)

    def step(self, start_ns: int, step: Step, engine: Engine) -> None:
        row = {
            "step": step.index,
            "start_ns": start_ns,
            "submissions": self._submissions,
            "aborts": self._aborts,
            "waiting": len(engine.waiting),
            "running": len(engine.running),
            "free_blocks": engine.free_blocks,
            "preemptions": engine.preemptions,
            "tokens": step.tokens,
            "kv_tokens": step.kv_tokens,
        }
        self._lines.append(json.dumps(row, separators=(",", ":")) + "\n")
        self._submissions, self._aborts = [], []

    def close(self) -> None:
        self._timer.cancel()
        self._file.writelines(self._lines)
        self._file.close()

    def _flush(self) -> None:
        self._file.writelines(self._lines)
        self._file.flush()
        self._lines.clear()
        self._timer = self._loop.call_later(LOG_FLUSH_S, self._flush)
