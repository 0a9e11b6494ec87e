"""The scheduler of `analysis.schedulers.engine` on the wall clock: the inside of the mock server.

Every step has a *nominal* start and end. The next step starts, nominally, when the previous one
ends, not when the event loop woke up: the law of the step time holds exactly, whatever the machine
does, and a run of the mock is the run that `analysis.schedulers.simulate` gives for the same
arrivals. When the loop is late, steps run back to back, one per turn of the loop, until they have
caught up.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from analysis.schedulers.engine import Engine, EngineLimits, Request, Step
from analysis.schedulers.scheduler import engine_of
from analysis.schedulers.sglang import SGLangEngine
from analysis.schedulers.step_time import StepTime
from harness.mock.mock_books import Books, Ended, Job
from harness.mock.mock_log import StepLogFile
from harness.mock.mock_sglang_books import SGLangBooks
from harness.mock.mock_vllm_books import VLLMBooks

SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangSettings:
    """What an SGLang server's scheduler does not depend on, but what it shows does."""

    version: str = "0.5.23"
    decode_log_interval: int = 40
    """Decode steps between two refreshes of the gauges; prefill steps refresh them, too."""
    load_snapshot_publish_interval: int = 15
    """The same for the snapshot that /v1/loads reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MockConfig:
    """A mock server: its engine, its step law, and what it tells the outside.

    ``port`` 0 takes a free one. ``stream_interval`` is the number of tokens per streamed chunk
    after the first. ``claimed_num_blocks`` makes the server lie: it is the pool (usable blocks)
    that it shows, while the engine has ``limits.num_blocks`` and the usage it shows refers to these.
    ``seed`` chooses the words of the outputs. Raises ValueError on a combination that no server
    could show. With ``limits.sglang`` it speaks SGLang's dialect, and ``sglang`` counts.
    """

    limits: EngineLimits
    step_time: StepTime
    sglang: SGLangSettings = SGLangSettings()
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
        if self.limits.sglang is None and self.max_model_len > self.limits.pool_tokens:
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


class PacedEngine:
    """`Engine` paced by the event loop's clock (`time.monotonic`).

    A request submitted at instant r joins the first step whose nominal start is not before r, as in
    `analysis.schedulers.simulate`; an abandoned one leaves at the first such step after it was given up.
    ``books`` are told what happens. ``failed`` is done when the engine cannot go on, with the
    exception as its result.
    """

    def __init__(self, config: MockConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine_of(config.limits)
        self.books = _books(config, self.engine)
        self.failed: asyncio.Future[None] = loop.create_future()
        self._step_time = config.step_time
        self._loop = loop
        self._arrivals: deque[Job] = deque()
        self._departures: deque[tuple[int, Job]] = deque()
        self._jobs: dict[int, Job] = {}
        self._submitted = 0
        self._steps = 0
        self._overruns = 0
        self._step: Step | None = None
        self._launched_ns = 0
        self._start_ns = 0
        self._end_ns = 0
        self._timer: asyncio.TimerHandle | None = None
        self._log = None if config.step_log is None else StepLogFile(config.step_log, loop)

    # -- what the server calls -------------------------------------------------------------------

    def submit(
        self,
        prompt_tokens: int,
        output_tokens: int,
        max_tokens: int,
        ignore_eos: bool,
        push: Callable[[int, bool], None],
        streamed: bool = True,
    ) -> Job:
        """Queue a request that was received now. It must fit ``max_model_len`` and the pool.

        It will end after ``output_tokens``; the scheduler knows the declared ``max_tokens``.
        """
        request = Request(self._submitted, prompt_tokens, output_tokens, max_tokens, ignore_eos)
        job = Job(request, time.monotonic_ns(), push, streamed)
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
            self.books.idled(start_ns)
            return
        self._launched_ns = time.monotonic_ns()
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
                self.books.aborted(job)
                engine.abort(job.request)
                if log is not None:
                    log.left(job)
        step = engine.start()
        if step is None:
            return None
        self._note_scheduled(step, start_ns)
        if log is not None:
            log.step(start_ns, step, engine)
        return step

    def _note_scheduled(self, step: Step, start_ns: int) -> None:
        """Who runs for the first time? vLLM puts them at the end, SGLang into steps of their own."""
        for request, _ in reversed(step.scheduled):
            job = self._jobs.get(request.id)
            if job is None:
                continue
            if not job.scheduled_ns:
                job.scheduled_ns = start_ns
            elif not step.prefill:
                break

    def _end(self) -> None:
        now_ns = time.monotonic_ns()
        step = self._step
        assert step is not None
        self._steps += 1
        if now_ns - self._end_ns > self._end_ns - self._start_ns:
            self._overruns += 1
        free_blocks = self.engine.free_blocks
        delivered = self.engine.complete(step)
        for request, finished in delivered:
            job = self._jobs[request.id]
            if finished:
                del self._jobs[request.id]
            self.books.delivered(job, finished, now_ns)
            if not job.abandoned:
                job.push(request.outputs, finished)
        ends = [request for request, finished in delivered if finished]
        counts = self._steps, self._overruns
        self.books.ended(
            Ended(step, ends, self._launched_ns, self._end_ns, now_ns, free_blocks, *counts)
        )
        self._begin(self._end_ns)

    def _guarded(self, call: Callable[..., None], *args: int) -> None:
        """An exception in a callback of the loop would only be logged; make it end the server."""
        try:
            call(*args)
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)


def _books(config: MockConfig, engine: Engine) -> Books:
    if config.limits.sglang is None:
        return VLLMBooks(engine, config.max_model_len)
    assert isinstance(engine, SGLangEngine)
    settings = config.sglang
    return SGLangBooks(
        engine, settings.decode_log_interval, settings.load_snapshot_publish_interval
    )
