"""What the mock keeps in order to show itself as vLLM 0.32.0 does."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.schedulers.engine import Engine, EngineSample
from harness.mock.exposition import Histogram
from harness.mock.mock_books import Ended, Job

SECOND_NS = 1_000_000_000
LATENCY_EDGES = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FIRST_TOKEN_EDGES = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_EDGES = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
ITERATION_EDGES = tuple(float(2**k) for k in (0, *range(3, 15)))
PREEMPTION_EDGES = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)


class Histograms:
    """One histogram per attribute, shown as ``vllm:<attribute>``."""

    def __init__(self, max_model_len: int) -> None:
        lengths = [m * 10.0**k for k in range(9) for m in (1, 2, 5) if m * 10**k <= max_model_len]
        self.iteration_tokens_total = Histogram(ITERATION_EDGES)
        self.time_to_first_token_seconds = Histogram(FIRST_TOKEN_EDGES)
        self.inter_token_latency_seconds = Histogram(INTER_TOKEN_EDGES)
        self.request_time_per_output_token_seconds = Histogram(INTER_TOKEN_EDGES)
        self.e2e_request_latency_seconds = Histogram(LATENCY_EDGES)
        self.request_queue_time_seconds = Histogram(LATENCY_EDGES)
        self.request_inference_time_seconds = Histogram(LATENCY_EDGES)
        self.request_prefill_time_seconds = Histogram(LATENCY_EDGES)
        self.request_decode_time_seconds = Histogram(LATENCY_EDGES)
        self.request_num_preemptions = Histogram(PREEMPTION_EDGES)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.request_params_max_tokens = Histogram(lengths)


@dataclass(frozen=True, slots=True)
class Shown:
    """State of the engine after its last completed step: what the endpoint shows until the next."""

    sample: EngineSample
    aborted: int
    stopped: int
    steps: int
    overruns: int


class VLLMBooks:
    """``shown`` is the state after the last completed step; the histograms are always up to date."""

    def __init__(self, engine: Engine, max_model_len: int) -> None:
        self.histograms = Histograms(max_model_len)
        self._engine = engine
        self._step_tokens = 0
        self._stopped = 0
        self.shown = Shown(engine.sample(0), 0, 0, 0, 0)

    def delivered(self, job: Job, finished: bool, now_ns: int) -> None:
        """A token is a gap; the first one ends the wait for it."""
        if job.first_ns:
            gap_s = (now_ns - job.last_ns) / SECOND_NS
            self.histograms.inter_token_latency_seconds.observe(gap_s)
        else:
            job.first_ns = now_ns
            wait_s = (now_ns - job.receive_ns) / SECOND_NS
            self.histograms.time_to_first_token_seconds.observe(wait_s)
        job.last_ns = now_ns
        if finished:
            self._stopped += job.request.outputs < job.request.max_tokens
            self._finished(job)

    def aborted(self, job: Job) -> None:
        """Counted by the engine."""

    def ended(self, end: Ended) -> None:
        """A step that produced output is observed, and the state shown anew."""
        tokens = self._engine.step_tokens - self._step_tokens
        if tokens:
            self.histograms.iteration_tokens_total.observe(tokens)
        self._step_tokens += tokens
        self._show(end.end_ns, end.steps, end.overruns)

    def idled(self, t_ns: int) -> None:
        """Those who left without a step are shown, too."""
        self._show(t_ns, self.shown.steps, self.shown.overruns)

    def _show(self, t_ns: int, steps: int, overruns: int) -> None:
        engine = self._engine
        self.shown = Shown(engine.sample(t_ns), engine.aborted, self._stopped, steps, overruns)

    def _finished(self, job: Job) -> None:
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
        shown.request_params_max_tokens.observe(request.max_tokens)
