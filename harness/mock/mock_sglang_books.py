"""What the mock keeps in order to show itself as SGLang 0.5.23 does, with its staleness.

The gauges are those of the last prefill step or of the last `decode_log_interval`-th decode step
(`scheduler_components/metrics_reporter.py`): a prefill step shows the batch without the prompts it
computed, a decode step the batch with those that finished in it. Counters of the scheduler move with
every step, those of the front end when a request ends. /v1/loads reads a snapshot that each prefill
step and every `load_snapshot_publish_interval`-th decode step write before they free anything.

With the overlap schedule, prompts that the next step already computes count as running here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from analysis.schedulers.engine import Step
from analysis.schedulers.sglang import SGLangEngine
from harness.mock.exposition import Histogram
from harness.mock.mock_books import Ended, Job

SECOND_NS = 1_000_000_000
FORCED_OUTPUT_TOKENS = 50
"""A request that is not streamed reaches the front end every so many tokens."""
LONGEST_STEP_US = 2_000_000
IDLE_LOG_S = 30.0
FIRST_TOKEN_EDGES = (
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0),
    *(100.0, 200.0, 400.0),
)
QUEUE_EDGES = (
    *(0.0, 0.001, 0.005, 0.010, 0.050, 0.100, 0.200, 0.500, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 15.0),
    *(float(n) for n in (*range(20, 100, 10), *range(100, 1000, 100))),
    *(1000.0, 1200.0, 1400.0, 1600.0, 1800.0, 2000.0, 2500.0, 3000.0),
)
LATENCY_EDGES = (*FIRST_TOKEN_EDGES, 600.0, 1200.0, 1800.0, 2400.0)
INTER_TOKEN_EDGES = (
    *(0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060),
    *(0.080, 0.100, 0.200, 0.400, 0.600, 0.800, 1.0, 2.0, 4.0, 6.0, 8.0),
)
LENGTH_EDGES = (
    *(100.0, 300.0, 500.0, 700.0, 1000.0, 1500.0),
    *(float(n) for n in range(2000, 10001, 1000)),
    *(float(n) for n in range(12500, 30001, 2500)),
    *(35000.0, 40000.0, 60000.0, 80000.0, 100000.0, 200000.0, 300000.0, 400000.0),
    *(600000.0, 800000.0, 1000000.0, 1100000.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What the scheduler logged last."""

    running: int = 0
    waiting: int = 0
    used_tokens: int = 0
    evictable_tokens: int = 0
    new_token_ratio: float = 0.0
    gen_throughput: float = 0.0
    sum_seq_lens: int = 0
    retracted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What /v1/loads shows."""

    timestamp_s: float
    running: int
    waiting: int
    waiting_tokens: int
    used_tokens: int
    gen_throughput: float


class FrontEnd:
    """Counters of the HTTP front end for streamed requests, or for the others."""

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.time_to_first_token = Histogram(FIRST_TOKEN_EDGES)
        self.e2e_latency = Histogram(LATENCY_EDGES)
        self.time_per_output_token = Histogram(INTER_TOKEN_EDGES)


class SGLangBooks:
    """Counters, gauges and the snapshot of one server."""

    def __init__(self, engine: SGLangEngine, log_interval: int, publish_interval: int) -> None:
        self.engine = engine
        self.gauges = Gauges()
        self.steps = 0
        self.overruns = 0
        self.prefill_steps = 0
        self.decode_steps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.prefill_busy_us = 0
        self.decode_moments = [0.0] * 6
        self.streamed, self.whole = FrontEnd(), FrontEnd()
        self.inter_token_latency = Histogram(INTER_TOKEN_EDGES)
        self.queue_time = Histogram(QUEUE_EDGES)
        self.prompt_lengths = Histogram(LENGTH_EDGES)
        self.output_lengths = Histogram(LENGTH_EDGES)
        self._log_interval, self._publish_interval = log_interval, publish_interval
        self._cached_tokens = 0
        """What finished requests left in the radix cache: evictable, so it counts as free."""
        self._since_log = (0, time.monotonic_ns())
        self._retracted = 0
        self._unpublished = 0
        self._decodes = 0
        """Decode steps since the cache was flushed: they pace the log."""
        self._last_step: Step | None = None
        self._last_launch_ns = 0
        self._logged_s = time.monotonic()
        self.snapshot = self._state(len(engine.running), engine.free_blocks)

    # -- the front end ---------------------------------------------------------------------------

    def delivered(self, job: Job, finished: bool, now_ns: int) -> None:
        """Streamed tokens reach the front end one by one."""
        request = job.request
        if not job.first_ns:
            job.first_ns = now_ns
        if not (job.streamed or finished or request.outputs % FORCED_OUTPUT_TOKENS == 0):
            return
        front = self.streamed if job.streamed else self.whole
        if not job.counted:
            if not job.refused:
                front.time_to_first_token.observe((job.first_ns - job.receive_ns) / SECOND_NS)
            self.queue_time.observe((job.scheduled_ns - job.receive_ns) / SECOND_NS)
        else:
            new = request.outputs - job.counted
            self.inter_token_latency.observe((now_ns - job.last_ns) / SECOND_NS / new, new)
        job.counted, job.last_ns = request.outputs, now_ns
        if finished:
            self._count(job)
            if request.outputs > 1:
                decode_s = (job.last_ns - job.first_ns) / SECOND_NS
                front.time_per_output_token.observe(decode_s / (request.outputs - 1))
            self._keep(request.prompt_tokens + request.outputs - 1)

    def aborted(self, job: Job) -> None:
        """A running request that is aborted ends as any other; a waiting one only vanishes."""
        if job.request.state == "running":
            job.last_ns = time.monotonic_ns()
            self._count(job)
            self._keep(job.request.computed)

    def _count(self, job: Job) -> None:
        front, request = self.streamed if job.streamed else self.whole, job.request
        front.requests += 1
        front.prompt_tokens += request.prompt_tokens
        front.generation_tokens += request.outputs
        front.e2e_latency.observe((job.last_ns - job.receive_ns) / SECOND_NS)
        self.prompt_lengths.observe(request.prompt_tokens)
        self.output_lengths.observe(request.outputs)

    # -- the scheduler ---------------------------------------------------------------------------

    def ended(self, end: Ended) -> None:
        """Count the step; refresh the gauges and the snapshot where it is time to."""
        step = end.step
        self.steps, self.overruns = end.steps, end.overruns
        self._moments(end)
        self._last_step, self._last_launch_ns = step, end.launched_ns
        if step.prefill:
            self.prefill_steps += 1
            self.prefill_tokens += step.tokens
        else:
            self.decode_steps += 1
            self._decodes += 1
            self.decode_tokens += len(step.scheduled)
        still_running = sum(r.state == "running" for r, _ in step.scheduled)
        others = len(self.engine.running) - still_running
        running = others if step.prefill else len(step.scheduled)
        self._unpublished += 1
        if step.prefill or self._unpublished >= self._publish_interval:
            self._unpublished = 0
            self.snapshot = self._state(running, end.free_blocks_before)
        if step.prefill or self._decodes % self._log_interval == 0:
            self._log(step, running)

    def idled(self, t_ns: int) -> None:
        """An idle scheduler publishes, and looks after its gauges."""
        self._last_step = None
        if self.engine.running or self.engine.waiting:
            return
        self.log_idle()
        self.snapshot = self._state(0, self.engine.free_blocks)

    def log_idle(self) -> None:
        """An idle scheduler logs at once if it shows somebody running, and else every 30 s.

        All other gauges wait for that: a queue that was given up in one moment is shown till then.
        """
        if self.engine.running or self.engine.waiting:
            return
        if self.gauges.running or time.monotonic() > self._logged_s + IDLE_LOG_S:
            self._logged_s = time.monotonic()
            self.gauges = replace(
                self.gauges,
                running=0,
                waiting=0,
                used_tokens=0,
                evictable_tokens=self._evictable(),
                gen_throughput=0.0,
            )

    def flush(self) -> bool:
        """Empty the radix cache; False, and nothing done, while there are requests."""
        if self.engine.running or self.engine.waiting:
            return False
        self._cached_tokens = 0
        self._decodes = 0
        return True

    def loads(self) -> Snapshot:
        """The last snapshot; an idle scheduler publishes all the time."""
        if self.engine.running or self.engine.waiting:
            return self.snapshot
        return self._state(0, self.engine.free_blocks)

    def _log(self, step: Step, running: int) -> None:
        self._logged_s = time.monotonic()
        gauges, page = self.gauges, self.engine.limits.block_size
        throughput, sum_seq_lens = gauges.gen_throughput, gauges.sum_seq_lens
        if not step.prefill:
            tokens, since_ns = self._since_log
            now_ns = time.monotonic_ns()
            throughput = (self.decode_tokens - tokens) / max(now_ns - since_ns, 1) * SECOND_NS
            self._since_log = self.decode_tokens, now_ns
            sum_seq_lens = step.kv_tokens
        self.gauges = Gauges(
            running=running,
            waiting=len(self.engine.waiting),
            used_tokens=(self.engine.limits.num_blocks - self.engine.free_blocks) * page,
            evictable_tokens=self._evictable(),
            new_token_ratio=self.engine.new_token_ratio if step.prefill else gauges.new_token_ratio,
            gen_throughput=throughput,
            sum_seq_lens=sum_seq_lens,
            retracted=self.engine.preemptions - self._retracted,
        )
        self._retracted = self.engine.preemptions

    def _state(self, running: int, free_blocks: int) -> Snapshot:
        limits = self.engine.limits
        return Snapshot(
            timestamp_s=time.time(),
            running=running,
            waiting=len(self.engine.waiting),
            waiting_tokens=sum(r.num_tokens for r in self.engine.waiting),
            used_tokens=(limits.num_blocks - free_blocks) * limits.block_size,
            gen_throughput=self.gauges.gen_throughput,
        )

    def _moments(self, end: Ended) -> None:
        """Sums over decode steps that followed one another: n, b, t, b*b, b*t and tokens.

        t is the time from one launch to the next in us, as the wall clock saw it.
        """
        step, last = end.step, self._last_step
        if step.prefill:
            self.prefill_busy_us += (end.now_ns - end.launched_ns) // 1000
        elif last is not None and not last.prefill:
            step_us = (end.launched_ns - self._last_launch_ns) // 1000
            b = len(step.scheduled)
            if 0 < step_us < LONGEST_STEP_US:
                for i, term in enumerate((1, b, step_us, b * b, b * step_us, b)):
                    self.decode_moments[i] += term

    def _keep(self, tokens: int) -> None:
        if self.engine.rules.radix_cache:
            page = self.engine.limits.block_size
            self._cached_tokens += tokens // page * page

    def _evictable(self) -> int:
        """Allocation evicts what it needs, so that the cache is never more than what is free."""
        free = self.engine.free_blocks * self.engine.limits.block_size
        self._cached_tokens = min(self._cached_tokens, free)
        return self._cached_tokens
