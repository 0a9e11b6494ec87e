"""Facts per engine: what its metrics are called, how it is launched.

An engine is plain data, `EngineFacts` in `ENGINES`. Names are those of vLLM 0.32.0
(`v1/metrics/loggers.py`) and SGLang 0.5.23 (`srt/observability/metrics_collector.py`), with the names
of earlier versions as aliases. A metric that is not there raises: it is never read as zero.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loadgen.mendable import Mendable


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity as an engine exports it.

    ``names`` are aliases, the newest version's first; the first that is present is read, alone.
    Several label sets (one per data-parallel rank, one per reason) are added up, or averaged with
    equal weights where the quantity is a share. An optional metric that is absent counts 0: only
    where absence means that the thing did not or cannot happen.
    """

    names: tuple[str, ...]
    combine: Literal["sum", "mean"] = "sum"
    required: bool = True
    only: tuple[str, frozenset[str]] | None = None
    """A label, and its values that count."""
    also: tuple[Metric, ...] = ()
    """Metrics that are added to this one."""

    @property
    def parts(self) -> tuple[Metric, ...]:
        return (self, *self.also)

    @property
    def all_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def wants(self, labels: Mapping[str, str]) -> bool:
        """Does the series with these labels count?"""
        return self.only is None or labels.get(self.only[0]) in self.only[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What distinguishes one engine from another, seen from outside."""

    name: str
    dialect: Literal["vllm", "sglang"]
    """How its limits are read."""
    metrics: Mapping[str, Metric]
    """Quantity of `EngineSample` -> where it is found."""
    metrics_path: str = "/metrics"
    health_path: str = "/health"
    no_metrics_hint: str = ""
    """What to check when a metric is missing."""


def _counter(name: str, *older: str) -> tuple[str, ...]:
    """A counter's names with and without the suffix that exporters add."""
    return tuple(n for base in (name, *older) for n in (f"{base}_total", base))


VLLM = EngineFacts(
    name="vllm",
    dialect="vllm",
    metrics={
        "waiting": Metric(names=("vllm:num_requests_waiting",)),
        "running": Metric(names=("vllm:num_requests_running",)),
        "kv_usage": Metric(
            names=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), combine="mean"
        ),
        "preemptions": Metric(names=_counter("vllm:num_preemptions")),
        "prompt_tokens": Metric(names=_counter("vllm:prompt_tokens")),
        "generation_tokens": Metric(names=_counter("vllm:generation_tokens")),
        # A histogram that is called _total; it observes the steps that produced output.
        "steps": Metric(names=("vllm:iteration_tokens_total_count",)),
        "step_tokens": Metric(names=("vllm:iteration_tokens_total_sum",)),
        "finished": Metric(names=_counter("vllm:request_success")),
        # Older versions have no queue limit, so that they reject nothing and do not count it.
        "rejected": Metric(names=_counter("vllm:admission_rejections"), required=False),
        # Hits of requests that resume after a preemption are not in here (v1/metrics/stats.py).
        "prefix_hits": Metric(
            names=_counter("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"),
            also=(Metric(names=_counter("vllm:external_prefix_cache_hits"), required=False),),
        ),
    },
    no_metrics_hint="was the server started with --disable-log-stats, is there a proxy that hides "
    "/metrics, or is this a version whose names changed?",
)

SGLANG = EngineFacts(
    name="sglang",
    dialect="sglang",
    metrics={
        "waiting": Metric(names=("sglang:num_queue_reqs",)),
        "running": Metric(names=("sglang:num_running_reqs",)),
        # token_usage is rounded to two digits.
        "kv_usage": Metric(names=("sglang:full_token_usage", "sglang:token_usage"), combine="mean"),
        # Exists from the first retraction on.
        "preemptions": Metric(names=_counter("sglang:num_retracted_requests"), required=False),
        "prompt_tokens": Metric(names=_counter("sglang:prompt_tokens")),
        # generation_tokens_total moves at the end of a request, realtime_tokens_total leaves the
        # tokens out that prefill steps sample. These two count every token of a stream as it leaves:
        # its first, and from the first second token on all others.
        "generation_tokens": Metric(
            names=("sglang:time_to_first_token_seconds_count",),
            also=(Metric(names=("sglang:inter_token_latency_seconds_count",), required=False),),
        ),
        # One per forward pass, prefill or decode, whether a graph was used or not.
        "steps": Metric(names=_counter("sglang:cuda_graph_passes")),
        "step_tokens": Metric(
            names=_counter("sglang:realtime_tokens"),
            only=("mode", frozenset({"prefill_compute", "decode"})),
        ),
        "finished": Metric(names=_counter("sglang:num_requests")),
        # Exists from the first hit on.
        "prefix_hits": Metric(names=_counter("sglang:cached_tokens"), required=False),
        "new_token_ratio": Metric(names=("sglang:new_token_ratio",), combine="mean"),
    },
    no_metrics_hint="was the server started without --enable-metrics, or with --skip-server-warmup "
    "and has answered nothing yet, is there a proxy that hides /metrics, or is this a version whose "
    "names changed?",
)


def _mock_of(facts: EngineFacts, name: str) -> EngineFacts:
    overruns = Metric(names=_counter("critrate_mock_overrun_steps"))
    return replace(
        facts,
        name=name,
        metrics={**facts.metrics, "overrun_steps": overruns},
        no_metrics_hint="does the URL lead to `critrate mock`, of this version?",
    )


MOCK = _mock_of(VLLM, "mock")
MOCK_SGLANG = _mock_of(SGLANG, "mock_sglang")

ENGINES: Mapping[str, EngineFacts] = {
    facts.name: facts for facts in (VLLM, SGLANG, MOCK, MOCK_SGLANG)
}
MOCKS: Mapping[str, EngineFacts] = {facts.dialect: facts for facts in (MOCK, MOCK_SGLANG)}
"""The mock of an engine, by the engine's name."""


class MissingMetric(Mendable):
    """The server's metrics lack a quantity that the measurement needs, or show no finite value."""

    def __init__(self, name: str, facts: EngineFacts, version: str | None = None) -> None:
        self.name, self.engine, self.version = name, facts.name, version
        looked_for = " or ".join(facts.metrics[name].names)
        super().__init__(
            f"{facts.name} {version or '(version not known)'} shows no usable value of {name} at "
            f"{facts.metrics_path} (looked for {looked_for}): {facts.no_metrics_hint}"
        )


def mock_argv(config_file: Path) -> list[str]:
    """Command line of the mock server that ``config_file`` describes."""
    return [sys.executable, "-m", "harness.cli", "mock", str(config_file)]
