"""What the mock server shows at ``/metrics``: the names, labels and bucket edges of vLLM 0.32.0.

Only ``critrate_mock_*`` are not vLLM's: they let a run be refused whose server ran late.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.mock.exposition import Family, HistogramFamily, Labels, Page
from harness.mock.mock_vllm_books import Histograms, Shown

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


_Value = Callable[[Shown], float]
_Rows = list[tuple[str, str, str, list[tuple[Labels, _Value]]]]


def _nothing(_: Shown) -> float:
    return 0.0


def _always(_: Shown) -> float:
    return 1.0


def _finished(reason: str) -> _Value:
    if reason == "length":
        return lambda s: s.sample.finished - s.aborted - s.stopped
    if reason == "stop":
        return lambda s: s.stopped
    return (lambda s: s.aborted) if reason == "abort" else _nothing


_NUMBERS: _Rows = [
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
"""(name, type, help, [(labels, value)]) of every metric that is one number."""


def metrics_page(
    model: str, cache_config: dict[str, str], histograms: Histograms, started_s: float
) -> Page[Shown]:
    """``cache_config`` become the labels of ``vllm:cache_config_info``; ``started_s`` is the wall
    time shown as the birth of every counter."""
    common = {"engine": "0", "model_name": model}
    families: list[Family[Shown] | HistogramFamily] = [
        Family(name, kind, text, [(common | extra, value) for extra, value in children])
        for name, kind, text, children in _NUMBERS
    ]
    families += [
        HistogramFamily(f"vllm:{name}", text, [(common, getattr(histograms, name))])
        for name, text in _HISTOGRAM_HELP.items()
    ]
    info: list[tuple[Labels, _Value]] = [(cache_config | {"engine": "0"}, _always)]
    text = "Information of the LLMEngine CacheConfig"
    families.append(Family("vllm:cache_config_info", "gauge", text, info))
    return Page(families, started_s)
