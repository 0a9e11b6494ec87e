"""The scheduler of vLLM v1 as a pure state machine: no clock, no I/O, no randomness.

One object, three verbs: ``submit`` a request, ``start`` the next step, ``complete`` it when it has run.
`analysis.simulate` calls them on a virtual clock, `harness.mock` on the wall clock.

The rules are those of vLLM 0.32.0 (`v1/core/sched/scheduler.py`, `v1/core/kv_cache_manager.py`) for
first-come-first-served order, prefix caching off, no speculation, no adapters:

* running requests are served first, in order of admission, from one token budget;
* when blocks run out the newest running request is preempted: its blocks are freed, its outputs are
  kept, it returns to the front of the queue and later recomputes prompt and outputs;
* nothing is admitted in a step that preempted; otherwise the queue is admitted from its head until
  budget, sequences or blocks run out;
* outputs are not reserved, the whole prompt is (``reserve_full_prompt``).

With ``async_scheduling`` step k+1 is scheduled when step k starts, before the tokens of step k are
known: an arrival waits one step more, and a finished request holds its blocks one step longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What bounds an engine. ``num_blocks`` are usable blocks: vLLM's null block is not among them.

    ``max_num_seqs`` and ``max_num_batched_tokens`` may be None: unknown, treated as not binding.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    watermark: float = 0.0
    reserve_full_prompt: bool = True
    long_prefill_token_threshold: int = 0
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark must lie in [0, 1), got {self.watermark}")

    @property
    def pool_tokens(self) -> int:
        """M: tokens of KV cache that requests can hold together."""
        return self.num_blocks * self.block_size

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * (self.num_blocks + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSample:
    """Gauges and counters of an engine at one instant, as its metrics endpoint would show them.

    ``read_ns`` is when the read began, ``t_ns`` when it ended: the true instant lies between.
    Counters count from the start of the engine. ``steps`` and ``step_tokens`` are vLLM's histogram
    ``iteration_tokens_total``: only steps that produced output are counted, and a prompt's tokens in
    the step that completes it.
    """

    read_ns: int
    t_ns: int
    waiting: int
    running: int
    kv_usage: float
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    step_tokens: int
    finished: int
    """Requests that ended for any reason, aborts included."""
    truncated: int
    """Finished requests whose end was not the asked length."""
    rejected: int
    prefix_hit_tokens: int
    overrun_steps: int = 0
    """Steps of a mock server that ran late; always 0 for a real engine, which has no set time."""


@dataclass(slots=True, eq=False)
class Request:
    """One request inside the engine. ``output_tokens`` is the length it will have at its end."""

    id: int
    prompt_tokens: int
    output_tokens: int
    computed: int = 0
    """Tokens whose KV is written, those of the steps in flight included."""
    outputs: int = 0
    """Output tokens delivered."""
    in_flight: int = 0
    """Output tokens that a scheduled, uncompleted step will sample."""
    steps_in_flight: int = 0
    """Scheduled steps that have not been completed."""
    stale: int = 0
    """Those of the steps in flight that were scheduled before a preemption."""
    blocks: int = 0
    preemptions: int = 0
    state: str = "new"
    prefilled_once: bool = False

    @property
    def num_tokens(self) -> int:
        """Prompt and delivered outputs: what a recompute has to compute."""
        return self.prompt_tokens + self.outputs


@dataclass(slots=True)
class Step:
    """One forward pass: which requests, how many tokens of each, and what the batch holds."""

    index: int
    scheduled: list[tuple[Request, int]] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    """For each scheduled request: does it sample an output token in this step?"""
    tokens: int = 0
    kv_tokens: int = 0
    """KV tokens of the scheduled requests after the step."""
    recomputed_tokens: int = 0
    """Scheduled tokens that had been computed before a preemption."""
    preempted: int = 0


class Engine:
    """State of the scheduler; see the module's docstring for its rules."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_blocks = limits.num_blocks
        self.steps_scheduled = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.recomputed_tokens = 0
        self.steps_with_output = 0
        self.step_tokens = 0
        self.finished = 0
        self.aborted = 0
        self._ahead: Step | None = None

    # -- verbs -----------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it could never run."""
        limits = self.limits
        total = request.prompt_tokens + request.output_tokens
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError("a request needs at least one prompt and one output token")
        if limits.max_model_len is not None and total > limits.max_model_len:
            raise ValueError(f"{total} tokens exceed max_model_len {limits.max_model_len}")
        if -(-total // limits.block_size) > limits.num_blocks:
            raise ValueError(f"{total} tokens do not fit the pool of {limits.pool_tokens}")
        request.state = "waiting"
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Drop a request that its client gave up."""
        if request.state == "running":
            self.running.remove(request)
            self._free(request)
        elif request.state == "waiting":
            self.waiting.remove(request)
        if request.state in ("running", "waiting"):
            request.state = "aborted"
            self.aborted += 1

    def start(self) -> Step | None:
        """The step that runs now; None if the engine is idle. Pass it to `complete` at its end."""
        if not self.limits.async_scheduling:
            return self._schedule()
        step = self._ahead or self._schedule()
        self._ahead = self._schedule() if step is not None else None
        return step

    def _schedule(self) -> Step | None:
        """Choose a step and allocate its blocks; None if there is nothing to run."""
        step = Step(self.steps_scheduled)
        budget = self.limits.max_num_batched_tokens or (1 << 62)
        threshold = self._prefill_threshold()
        budget = self._schedule_running(step, budget, threshold)
        if not step.preempted:
            self._schedule_waiting(step, budget, threshold)
        if not step.scheduled:
            return None
        self.steps_scheduled += 1
        self._advance(step)
        return step

    def complete(self, step: Step) -> list[tuple[Request, bool]]:
        """Deliver a step's output tokens: ``(request, finished)`` for each token, blocks freed."""
        delivered: list[tuple[Request, bool]] = []
        prompt_tokens = 0
        for (request, _), samples in zip(step.scheduled, step.samples, strict=True):
            request.steps_in_flight -= 1
            was_stale = request.stale > 0
            if was_stale:
                request.stale -= 1
            if not samples or request.state in ("finished", "aborted"):
                continue
            if not was_stale:
                request.in_flight -= 1
            request.outputs += 1
            if not request.prefilled_once:
                request.prefilled_once = True
                prompt_tokens += request.prompt_tokens
            finished = request.outputs == request.output_tokens
            if finished:
                self._finish(request)
            delivered.append((request, finished))
        if delivered:
            self.steps_with_output += 1
            self.step_tokens += len(delivered) + prompt_tokens
            self.prompt_tokens += prompt_tokens
            self.generation_tokens += len(delivered)
        return delivered

    def sample(self, t_ns: int) -> EngineSample:
        """What the metrics endpoint would show now."""
        return EngineSample(
            read_ns=t_ns,
            t_ns=t_ns,
            waiting=len(self.waiting),
            running=len(self.running),
            kv_usage=1.0 - self.free_blocks / self.limits.num_blocks,
            preemptions=self.preemptions,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            steps=self.steps_with_output,
            step_tokens=self.step_tokens,
            finished=self.finished + self.aborted,
            truncated=0,
            rejected=0,
            prefix_hit_tokens=0,
        )

    # -- the two halves of a step ----------------------------------------------------------------

    def _schedule_running(self, step: Step, budget: int, threshold: int) -> int:
        """Serve running requests in admission order, preempting the newest when blocks run out."""
        block_size = self.limits.block_size
        running = self.running
        position = 0
        while position < len(running) and budget > 0:
            request = running[position]
            position += 1
            # A request whose steps in flight reach its length is not run again.
            if request.in_flight and request.outputs + request.in_flight >= request.output_tokens:
                continue
            tokens = request.num_tokens + request.in_flight - request.computed
            if tokens <= 0:
                continue
            tokens = min(tokens, budget, threshold)
            needed = -(-(request.computed + tokens) // block_size) - request.blocks
            while needed > self.free_blocks:
                victim = running.pop()
                self._preempt(victim)
                step.preempted += 1
                if victim is request:
                    return budget
            self.free_blocks -= needed
            request.blocks += needed
            step.scheduled.append((request, tokens))
            budget -= tokens
        return budget

    def _schedule_waiting(self, step: Step, budget: int, threshold: int) -> None:
        """Admit from the head of the queue until budget, sequences or blocks run out."""
        limits = self.limits
        max_num_seqs = limits.max_num_seqs or (1 << 62)
        draining: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < max_num_seqs:
            request = self.waiting[0]
            if request.stale:
                # Its last token is still in flight; it is passed over for this step.
                draining.append(self.waiting.popleft())
                continue
            tokens = min(request.num_tokens, threshold, budget)
            whole = request.num_tokens if limits.reserve_full_prompt else tokens
            spare = limits.watermark_blocks if step.scheduled else 0
            if -(-whole // limits.block_size) + spare > self.free_blocks:
                break
            self.waiting.popleft()
            needed = -(-tokens // limits.block_size)
            self.free_blocks -= needed
            request.blocks = needed
            request.state = "running"
            self.running.append(request)
            step.scheduled.append((request, tokens))
            budget -= tokens
        self.waiting.extendleft(reversed(draining))

    def _advance(self, step: Step) -> None:
        """Count the step's tokens as computed and note who will sample a token."""
        for request, tokens in step.scheduled:
            if request.preemptions and request.computed < request.num_tokens - 1:
                step.recomputed_tokens += tokens
            request.computed += tokens
            request.steps_in_flight += 1
            samples = request.computed == request.num_tokens + request.in_flight
            if samples:
                request.in_flight += 1
            step.samples.append(samples)
            step.tokens += tokens
            step.kv_tokens += request.computed
        self.recomputed_tokens += step.recomputed_tokens

    # -- small moves -----------------------------------------------------------------------------

    def _prefill_threshold(self) -> int:
        threshold = self.limits.long_prefill_token_threshold
        if threshold > 0 and len(self.running) + len(self.waiting) > 1:
            return threshold
        return 1 << 62

    def _preempt(self, request: Request) -> None:
        self._free(request)
        request.computed = 0
        # A synchronous engine has nothing in flight here; an asynchronous one delivers it late.
        request.stale = request.steps_in_flight
        request.in_flight = 0
        request.preemptions += 1
        request.state = "waiting"
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _finish(self, request: Request) -> None:
        if request.state == "running":
            self.running.remove(request)
            self._free(request)
        else:
            self.waiting.remove(request)
        request.state = "finished"
        self.finished += 1

    def _free(self, request: Request) -> None:
        self.free_blocks += request.blocks
        request.blocks = 0


def check_conservation(engine: Engine, requests: Iterable[Request]) -> None:
    """Raise AssertionError unless every block and every request is in exactly one place.

    Free and allocated blocks make up the pool; each request is in one of waiting, running, ended.
    """
    held = 0
    running, waiting = set(map(id, engine.running)), set(map(id, engine.waiting))
    assert len(running) == len(engine.running) and len(waiting) == len(engine.waiting)
    assert not running & waiting
    for request in requests:
        held += request.blocks
        assert (id(request) in running) == (request.state == "running"), request
        assert (id(request) in waiting) == (request.state == "waiting"), request
        assert request.outputs <= request.output_tokens, request
        if request.state != "running":
            assert request.blocks == 0, request
    assert held + engine.free_blocks == engine.limits.num_blocks
