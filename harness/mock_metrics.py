"""What the mock server shows at ``/metrics``: the names, labels and bucket edges of vLLM 0.32.0.

Only ``critrate_mock_*`` are not vLLM's: they let a run be refused whose server ran late.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from analysis.engine import EngineSample

_LATENCY_EDGES = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FIRST_TOKEN_EDGES = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_EDGES = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_ITERATION_EDGES = tuple(float(2**k) for k in (0, *range(3, 15)))
_PREEMPTION_EDGES = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)


class Histogram:
    """Counts of observations below each edge, and their sum."""

    __slots__ = ("counts", "edges", "sum")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value


class Histograms:
    """One histogram per attribute, shown as ``vllm:<attribute>``."""

    def __init__(self, max_model_len: int) -> None:
        lengths = [m * 10.0**k for k in range(9) for m in (1, 2, 5) if m * 10**k <= max_model_len]
        self.iteration_tokens_total = Histogram(_ITERATION_EDGES)
        self.time_to_first_token_seconds = Histogram(_FIRST_TOKEN_EDGES)
        self.inter_token_latency_seconds = Histogram(_INTER_TOKEN_EDGES)
        self.request_time_per_output_token_seconds = Histogram(_INTER_TOKEN_EDGES)
        self.e2e_request_latency_seconds = Histogram(_LATENCY_EDGES)
        self.request_queue_time_seconds = Histogram(_LATENCY_EDGES)
        self.request_inference_time_seconds = Histogram(_LATENCY_EDGES)
        self.request_prefill_time_seconds = Histogram(_LATENCY_EDGES)
        self.request_decode_time_seconds = Histogram(_LATENCY_EDGES)
        self.request_num_preemptions = Histogram(_PREEMPTION_EDGES)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.request_params_max_tokens = Histogram(lengths)


_HISTOGRAM_HELP = {
    "iteration_tokens_total": "Histogram of number of tokens per engine_step.",
    "time_to_first_token_seconds": "Histogram of time to first token in seconds.",
    "inter_token_latency_seconds": "Histogram of inter-token latency in seconds.",
    "request_time_per_output_token_seconds": (
        "Histogram of time_per_output_token_seconds per request."
    ),
    "e2e_request_latency_seconds": "Histogram of e2e request latency in seconds.",
    "request_queue_time_seconds": "Histogram of time spent in WAITING phase for request.",
    "request_inference_time_seconds": "Histogram of time spent in RUNNING phase for request.",
    "request_prefill_time_seconds": "Histogram of time spent in PREFILL phase for request.",
    "request_decode_time_seconds": "Histogram of time spent in DECODE phase for request.",
    "request_num_preemptions": "Histogram of the number of times a request was preempted.",
    "request_prompt_tokens": "Number of prefill tokens processed.",
    "request_generation_tokens": "Number of generation tokens processed.",
    "request_params_max_tokens": "Histogram of the max_tokens request parameter.",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """State of the engine after its last completed step: what the endpoint shows until the next."""

    sample: EngineSample
    aborted: int
    steps: int
    overruns: int


_Value = Callable[[Shown], float]
_Family = tuple[str, str, str, list[tuple[dict[str, str], _Value]]]


def _nothing(_: Shown) -> float:
    return 0.0


def _always(_: Shown) -> float:
    return 1.0


def _finished(reason: str) -> _Value:
    if reason == "length":
        return lambda s: s.sample.finished - s.aborted
    return (lambda s: s.aborted) if reason == "abort" else _nothing


def _families() -> list[_Family]:
    """(name, type, help, [(labels, value)]) of every metric that is one number."""
    return [
        (
            "vllm:num_requests_running",
            "gauge",
            "Number of requests in model execution batches.",
            [({}, lambda s: s.sample.running)],
        ),
        (
            "vllm:num_requests_waiting",
            "gauge",
            "Number of requests waiting to be processed.",
            [({}, lambda s: s.sample.waiting)],
        ),
        (
            "vllm:num_requests_waiting_by_reason",
            "gauge",
            "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for "
            "scheduling capacity; 'deferred' = deferred by transient constraints (LoRA budget, KV "
            "transfer, blocked status). Sum of all reasons equals vllm:num_requests_waiting.",
            [
                ({"reason": "capacity"}, lambda s: s.sample.waiting),
                ({"reason": "deferred"}, _nothing),
            ],
        ),
        (
            "vllm:engine_sleep_state",
            "gauge",
            "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is "
            "awake; weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level "
            "2.",
            [
                ({"sleep_state": "awake"}, _always),
                ({"sleep_state": "weights_offloaded"}, _nothing),
                ({"sleep_state": "discard_all"}, _nothing),
            ],
        ),
        (
            "vllm:kv_cache_usage_perc",
            "gauge",
            "KV-cache usage. 1 means 100 percent usage.",
            [({}, lambda s: s.sample.kv_usage)],
        ),
        (
            "vllm:prefix_cache_queries",
            "counter",
            "Prefix cache queries, in terms of number of queried tokens.",
            [({}, _nothing)],
        ),
        (
            "vllm:prefix_cache_hits",
            "counter",
            "Prefix cache hits, in terms of number of cached tokens.",
            [({}, lambda s: s.sample.prefix_hit_tokens)],
        ),
        (
            "vllm:num_preemptions",
            "counter",
            "Cumulative number of preemption from the engine.",
            [({}, lambda s: s.sample.preemptions)],
        ),
        (
            "vllm:prompt_tokens",
            "counter",
            "Number of prefill tokens processed.",
            [({}, lambda s: s.sample.prompt_tokens)],
        ),
        (
            "vllm:prompt_tokens_by_source",
            "counter",
            "Number of prompt tokens by source.",
            [
                ({"source": "local_compute"}, lambda s: s.sample.prompt_tokens),
                ({"source": "local_cache_hit"}, _nothing),
                ({"source": "external_kv_transfer"}, _nothing),
            ],
        ),
        (
            "vllm:prompt_tokens_cached",
            "counter",
            "Number of cached prompt tokens (local + external).",
            [({}, _nothing)],
        ),
        (
            "vllm:generation_tokens",
            "counter",
            "Number of generation tokens processed.",
            [({}, lambda s: s.sample.generation_tokens)],
        ),
        (
            "vllm:request_success",
            "counter",
            "Count of successfully processed requests.",
            [
                ({"finished_reason": reason}, _finished(reason))
                for reason in ("stop", "length", "abort", "error", "repetition")
            ],
        ),
        (
            "vllm:admission_rejections",
            "counter",
            "Number of admission attempts rejected by a queue limit, by reason.",
            [
                ({"engine": "", "reason": "max_num_queued_reqs"}, _nothing),
                ({"engine": "", "reason": "max_num_queued_tokens"}, _nothing),
            ],
        ),
        (
            "critrate_mock_steps",
            "counter",
            "Steps that the mock engine completed.",
            [({}, lambda s: s.steps)],
        ),
        (
            "critrate_mock_overrun_steps",
            "counter",
            "Steps that were completed later than their set end by more than their duration.",
            [({}, lambda s: s.overruns)],
        ),
    ]


def _line(name: str, labels: dict[str, str], value: str = "%r") -> str:
    """One sample line as a template; an empty label value leaves the label out."""
    inner = ",".join(
        f'{key}="{_escape(label)}"' for key, label in sorted(labels.items()) if label != ""
    )
    return f"{name}{{{inner}}} {value}\n"


def _escape(value: str) -> str:
    value = value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    return value.replace("%", "%%")


def _head(name: str, kind: str, text: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


class MetricsText:
    """Renders the page from one template, so that a scrape costs a fraction of a millisecond."""

    def __init__(
        self, model: str, cache_config: dict[str, str], histograms: Histograms, started_s: float
    ) -> None:
        """``cache_config`` become the labels of ``vllm:cache_config_info``; ``started_s`` is the
        wall time shown as the birth of every counter."""
        labels = {"engine": "0", "model_name": model}
        self._values: list[_Value] = []
        self._histograms = [getattr(histograms, name) for name in _HISTOGRAM_HELP]
        born = repr(started_s)
        parts: list[str] = []
        for name, kind, text, children in _families():
            shown = f"{name}_total" if kind == "counter" else name
            parts.append(_head(shown, kind, text))
            for extra, value in children:
                parts.append(_line(shown, labels | extra))
                self._values.append(value)
            if kind == "counter":
                parts.append(_head(f"{name}_created", "gauge", text))
                for extra, _ in children:
                    parts.append(_line(f"{name}_created", labels | extra, born))
        for name, text in _HISTOGRAM_HELP.items():
            full = f"vllm:{name}"
            parts.append(_head(full, "histogram", text))
            edges = [*map(repr, map(float, getattr(histograms, name).edges)), "+Inf"]
            parts += [_line(f"{full}_bucket", labels | {"le": edge}) for edge in edges]
            parts += [_line(f"{full}_count", labels), _line(f"{full}_sum", labels)]
            parts.append(_head(f"{full}_created", "gauge", text))
            parts.append(_line(f"{full}_created", labels, born))
        info = "vllm:cache_config_info"
        parts.append(_head(info, "gauge", "Information of the LLMEngine CacheConfig"))
        parts.append(_line(info, cache_config | {"engine": "0"}, "1.0"))
        self._template = "".join(parts)

    def render(self, shown: Shown) -> bytes:
        """The page as bytes, in the Prometheus text format 0.0.4."""
        values = [float(value(shown)) for value in self._values]
        for histogram in self._histograms:
            values.extend(map(float, accumulate(histogram.counts)))
            values.append(values[-1])
            values.append(float(histogram.sum))
        return (self._template % tuple(values)).encode()
