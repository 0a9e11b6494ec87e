"""SGLang seen from outside, on what a server of 0.5.23 showed (tests/harness/sglang, shortened)."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from analysis.schedulers.engine import EngineSample, SGLangRules
from harness.configs.config import ConfigError, ExperimentConfig
from harness.live.target import assumptions, engine_limits, require_fitting
from harness.servers.engine_metrics import engine_sample
from harness.servers.engines import SGLANG, MissingMetric
from harness.servers.limits import read_limits
from harness.servers.server_limits import LimitsUnreadable, ServerLimits
from loadgen.workload import fixed
from tests.harness.served import with_pages

SHOWN = Path(__file__).parent / "sglang"
METRICS = (SHOWN / "metrics.txt").read_text()
INFO: dict[str, Any] = json.loads((SHOWN / "server_info.json").read_text())
MODELS = {"data": [{"id": "tiny-llama", "owned_by": "sglang", "max_model_len": 8192}]}
EXPECTED = EngineSample(
    read_ns=1,
    t_ns=2,
    waiting=168,
    running=5,
    kv_usage=0.81591796875,
    preemptions=1,
    prompt_tokens=15202,
    generation_tokens=4519,
    steps=904,
    step_tokens=21301,
    finished=67,
    rejected=0,
    prefix_hit_tokens=0,
    new_token_ratio=0.8473930000000022,
)


def without(name: str) -> str:
    return re.sub(rf"^{name}\{{.*\n", "", METRICS, flags=re.MULTILINE)


# -- metrics ---------------------------------------------------------------------------------------


def test_a_scrape_becomes_a_sample() -> None:
    assert engine_sample(METRICS, 1, 2, SGLANG) == EXPECTED


def test_generated_tokens_by_two_independent_counts() -> None:
    """What left the front end, and what the scheduler computed: decodes, one per prompt, and one per
    resumed prompt. The whole answer of the warm-up, 8 tokens, reached the front end at once."""
    decodes, first_tokens, retracted, warm_up = 4453, 72, 1, 8
    assert EXPECTED.generation_tokens + warm_up - 1 == decodes + first_tokens + retracted


@pytest.mark.parametrize(
    ("absent", "change"),
    [
        ("sglang:num_retracted_requests_total", {"preemptions": 0}),
        ("sglang:inter_token_latency_seconds_count", {"generation_tokens": 72}),
        ("sglang:full_token_usage", {"kv_usage": 0.82}),
    ],
)
def test_what_may_be_absent(absent: str, change: dict[str, float]) -> None:
    """No retraction yet; no second token yet; a version without the exact usage."""
    sample = engine_sample(without(absent), 1, 2, SGLANG)
    assert all(getattr(sample, name) == value for name, value in change.items())


@pytest.mark.parametrize(
    "absent",
    [
        "sglang:num_running_reqs",
        "sglang:num_queue_reqs",
        "sglang:cuda_graph_passes_total",
        "sglang:realtime_tokens_total",
        "sglang:num_requests_total",
        "sglang:time_to_first_token_seconds_count",
        "sglang:new_token_ratio",
    ],
)
def test_a_missing_metric_raises(absent: str) -> None:
    with pytest.raises(MissingMetric, match="--enable-metrics"):
        engine_sample(without(absent), 1, 2, SGLANG, version="0.5.23")


def test_prefix_hits_are_counted_from_all_sources() -> None:
    hits = "".join(
        f'sglang:cached_tokens_total{{cache_source="{source}",model_name="m"}} {tokens}\n'
        for source, tokens in (("device", 5.0), ("host", 2.0))
    )
    assert engine_sample(METRICS + hits, 1, 2, SGLANG).prefix_hit_tokens == 7


# -- limits ----------------------------------------------------------------------------------------


def limits_of(
    info: dict[str, Any] | None, num_blocks: int | None = None, path: str = "/server_info"
) -> ServerLimits:
    pages: dict[str, str | dict[str, object]] = {"/v1/models": dict(MODELS)}
    if info is not None:
        pages[path] = info

    def read(session: aiohttp.ClientSession, url: str) -> Awaitable[ServerLimits]:
        return read_limits(session, url, SGLANG, num_blocks)

    limits: ServerLimits = with_pages(pages, read)
    return limits


SHOWN_LIMITS = ServerLimits(
    engine="sglang",
    version="0.5.23",
    model_id="tiny-llama",
    max_model_len=8192,
    num_blocks=2048,
    block_size=1,
    num_blocks_given=False,
    prefix_caching=False,
    cache_dtype="auto",
    max_num_seqs=1024,
    max_num_batched_tokens=4096,
    long_prefill_token_threshold=0,
    reserve_full_prompt=True,
    watermark=0.0,
    async_scheduling=False,
    sglang=SGLangRules(radix_cache=False),
    decode_log_interval=1,
)


def test_limits_are_read_back() -> None:
    assert limits_of(INFO) == SHOWN_LIMITS
    assert limits_of(INFO, path="/get_server_info") == SHOWN_LIMITS
    assert limits_of(INFO, num_blocks=2048) == SHOWN_LIMITS
    limits = engine_limits(SHOWN_LIMITS, _experiment())
    assert limits.sglang == SHOWN_LIMITS.sglang
    assert (limits.pool_tokens, limits.max_num_seqs) == (2048, 1024)
    assert (limits.max_num_batched_tokens, limits.async_scheduling) == (4096, False)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"chunked_prefill_size": -1}, "max_num_batched_tokens", None),
        ({"disable_overlap_schedule": False}, "async_scheduling", True),
        ({"page_size": 16}, "num_blocks", 128),
        ({"internal_states": [], "max_running_requests": 48}, "max_num_seqs", 48),
        ({"version": "0.5.21"}, "whole_output_of_ignore_eos", False),
        ({"version": "0.5.22.post1"}, "whole_output_of_ignore_eos", True),
        ({"disable_radix_cache": False}, "radix_cache", True),
        ({"schedule_conservativeness": 0.3}, "schedule_conservativeness", 0.3),
        ({"max_prefill_tokens": 512}, "max_prefill_tokens", 512),
    ],
)
def test_what_the_server_was_started_with(change: dict[str, Any], field: str, value: Any) -> None:
    limits = limits_of(INFO | change)
    holder = limits if hasattr(limits, field) else limits.sglang
    assert getattr(holder, field) == value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule_policy": "lpm"}, "schedule_policy 'lpm'.*--schedule-policy fcfs"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"speculative_algorithm": "EAGLE"}, "without speculative decoding"),
        ({"dp_size": 2}, "without data parallelism"),
        ({"internal_states": [{}, {}]}, "2 schedulers behind one port"),
        ({"retraction_policy": "priority"}, "--retraction-policy length"),
        ({"max_queued_requests": 100}, "without --max-queued-requests"),
        ({"disaggregation_mode": "decode"}, "disaggregation_mode 'decode'"),
        ({"internal_states": [{"memory_usage": {"token_capacity_swa": 9}}]}, "kind of KV pool"),
        ({"version": "main"}, "'main' is no release number"),
        ({"max_prefill_tokens": None}, "does not show max_prefill_tokens"),
        ({"page_size": None}, "page_size None"),
    ],
)
def test_what_the_model_does_not_cover_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(LimitsUnreadable, match=words):
        limits_of(INFO | change)


def test_unreadable_limits() -> None:
    with pytest.raises(LimitsUnreadable, match="is this SGLang"):
        limits_of(None)
    with pytest.raises(LimitsUnreadable, match="a pool of 999 pages, the server shows 2048"):
        limits_of(INFO, num_blocks=999)


# -- what follows ----------------------------------------------------------------------------------


def _experiment() -> ExperimentConfig:
    server = {"url": "http://127.0.0.1:30000", "engine": "sglang"}
    workload = {"fixed": {"prompt": 10, "output": 10}}
    return ExperimentConfig.model_validate({"name": "x", "server": server, "workload": workload})


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, []),
        ({"decode_log_interval": 40}, ["up to 40 decode steps old"]),
        ({"disable_radix_cache": False}, ["radix cache is on"]),
    ],
)
def test_what_a_reader_must_know(info: dict[str, Any], words: list[str]) -> None:
    lines = assumptions(limits_of(INFO | info), _experiment())
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_a_request_that_would_be_clipped_is_refused() -> None:
    limits = engine_limits(SHOWN_LIMITS, _experiment())
    require_fitting(fixed(1000, 1045), limits)
    with pytest.raises(ConfigError, match="room for one request of the server is 2045"):
        require_fitting(fixed(1000, 1046), limits)
