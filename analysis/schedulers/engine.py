"""What every scheduler model shares: limits, requests, steps, samples and the verbs of an engine.

A scheduler is a pure state machine: no clock, no I/O, no randomness. ``submit`` a request, ``start``
the next step, ``complete`` it when it has run. `analysis.schedulers.simulate` calls the verbs on a
virtual clock, `harness.mock.mock` on the wall clock. The rules are in `analysis.schedulers.vllm` and
`analysis.schedulers.sglang`; `analysis.schedulers.scheduler` picks the ones that the limits name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangRules:
    """How SGLang sets room aside for outputs that do not exist yet; see `analysis.schedulers.sglang`."""

    max_prefill_tokens: int = 16384
    """Prompt tokens that one prefill step admits, beside the chunk of one long prompt."""
    schedule_conservativeness: float = 1.0
    radix_cache: bool = True
    """Without it, requests that ignore the end of text are admitted by looking ahead."""
    whole_output_of_ignore_eos: bool = True
    """0.5.22 and later set the whole output of a running request aside that ignores the end of text;
    earlier ones only the share ``new_token_ratio`` of it, and over-commit."""
    clip_max_new_tokens: int = 4096
    """No more output than this is set aside for one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What bounds an engine. ``num_blocks`` are usable blocks: vLLM's null block is not among them.

    ``max_num_seqs`` and ``max_num_batched_tokens`` may be None: unknown, treated as not binding.
    With ``sglang`` the scheduler is SGLang's: a block is a page, ``max_num_seqs`` is its
    ``max_running_requests``, ``max_num_batched_tokens`` its ``chunked_prefill_size`` (None: prompts
    are not cut) and ``async_scheduling`` its overlap schedule.
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
    sglang: SGLangRules | None = None

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

    @property
    def prefill_chunk(self) -> int | None:
        """Most tokens of one prompt in a step of its own; None where decodes run beside them."""
        if self.sglang is None:
            return None
        return self.max_num_batched_tokens or self.pool_tokens

    @property
    def mixed_budget(self) -> int | None:
        """Tokens of a step that decodes and prompts share; None where they do not, or if unknown."""
        return self.max_num_batched_tokens if self.sglang is None else None

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> EngineLimits:
        """The inverse of `dataclasses.asdict`."""
        rules = data.get("sglang")
        return EngineLimits(**{**data, "sglang": None if rules is None else SGLangRules(**rules)})


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
    rejected: int
    prefix_hit_tokens: int
    new_token_ratio: float | None = None
    """Share of the outputs to come that the engine sets room aside for; None if it sets none aside."""
    overrun_steps: int = 0
    """Steps of a mock server that ran late; always 0 for a real engine, which has no set time."""


@dataclass(slots=True, eq=False)
class Request:
    """One request inside the engine.

    ``output_tokens`` is the length it will have at its end, which a scheduler cannot know;
    ``max_tokens`` is what its client declared (0: the output length), which it can.
    """

    id: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int = 0
    ignore_eos: bool = True
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

    def __post_init__(self) -> None:
        self.max_tokens = self.max_tokens or self.output_tokens

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
    prefill: bool = False
    """The step computes prompts alone (SGLang); vLLM mixes prompts and decodes."""


class Engine:
    """State and verbs that the schedulers share; the rules are in `_schedule`."""

    new_token_ratio: float | None = None
    keeps_late_tokens = True
    """Whether a preempted request keeps the token of a step that was in flight."""

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
        if request.state in ("running", "waiting"):
            self._remove(request)
            request.state = "aborted"
            self.aborted += 1

    def start(self) -> Step | None:
        """The step that runs now; None if the engine is idle. Pass it to `complete` at its end."""
        if not self.limits.async_scheduling:
            return self._schedule()
        step = self._ahead or self._schedule()
        self._ahead = self._schedule() if step is not None else None
        return step

    def complete(self, step: Step) -> list[tuple[Request, bool]]:
        """Deliver a step's output tokens: ``(request, finished)`` for each token, blocks freed."""
        delivered: list[tuple[Request, bool]] = []
        prompt_tokens = 0
        for (request, _), samples in zip(step.scheduled, step.samples, strict=True):
            request.steps_in_flight -= 1
            late = request.stale > 0
            if late:
                request.stale -= 1
            if not samples or request.state in ("finished", "aborted"):
                continue
            if late and not self.keeps_late_tokens:
                continue
            if not late:
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
            rejected=0,
            prefix_hit_tokens=0,
            new_token_ratio=self.new_token_ratio,
        )

    # -- what the rules use ----------------------------------------------------------------------

    def _schedule(self) -> Step | None:
        """Choose a step and allocate its blocks; None if there is nothing to run."""
        raise NotImplementedError

    def _finish(self, request: Request) -> None:
        self._remove(request)
        request.state = "finished"
        self.finished += 1

    def _remove(self, request: Request) -> None:
        """Take a waiting or running request out, with all that it holds."""
        if request.state == "running":
            self.running.remove(request)
            self._free(request)
        else:
            self.waiting.remove(request)

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
