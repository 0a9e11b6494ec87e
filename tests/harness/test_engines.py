from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable

import aiohttp
import pytest

from analysis.schedulers.engine import EngineSample
from harness.servers.engine_metrics import engine_sample, parse_metrics
from harness.servers.engines import ENGINES, MOCK, MOCK_SGLANG, SGLANG, VLLM, MissingMetric
from harness.servers.limits_vllm import read_vllm_limits
from harness.servers.server_limits import LimitsUnreadable, ServerLimits
from tests.harness.served import Pages, with_pages

# As vLLM 0.32.0 writes it, most families left out.
METRICS = r"""# HELP python_info Python platform information
# TYPE python_info gauge
python_info{implementation="CPython",major="3",version="3.11.7"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}b \"q\""} 36.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
# HELP vllm:num_requests_waiting_by_reason Number of waiting requests by reason.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="deferred"} 0.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.9453125
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 64000.0
# HELP vllm:prefix_cache_queries_created Prefix cache queries.
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7631e+09
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 32.0
# HELP vllm:external_prefix_cache_hits_total External prefix cache hits.
# TYPE vllm:external_prefix_cache_hits_total counter
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 8.0
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 330.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.28e+06
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 64128.0
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 2.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 990.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 7.0
vllm:request_success_total{engine="0",finished_reason="error",model_name="m"} 1.0
vllm:request_success_total{engine="0",finished_reason="repetition",model_name="m"} 0.0
# HELP vllm:admission_rejections_total Number of admission attempts rejected by a queue limit.
# TYPE vllm:admission_rejections_total counter
vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"} 3.0
vllm:admission_rejections_total{model_name="m",reason="max_num_queued_tokens"} 1.0
# HELP vllm:iteration_tokens_total Histogram of number of tokens per engine_step.
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 10.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="m"} 1760.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 1760.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 128128.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",enable_prefix_caching="False",engine="0",gpu_memory_utilization="0.92",num_gpu_blocks="129",num_gpu_blocks_override="129",sliding_window="None"} 1.0
"""  # noqa: E501
EXPECTED = EngineSample(
    read_ns=1,
    t_ns=2,
    waiting=5,
    running=36,
    kv_usage=0.9453125,
    preemptions=330,
    prompt_tokens=1_280_000,
    generation_tokens=64128,
    steps=1760,
    step_tokens=128128,
    finished=1000,
    rejected=4,
    prefix_hit_tokens=40,
)
MOCK_LINE = "critrate_mock_overrun_steps_total 4.0\n"
FAMILIES = {name: m for name, m in VLLM.metrics.items() if m.required}


def without(name: str) -> str:
    return re.sub(rf"^{re.escape(name)}\{{.*\n", "", METRICS, flags=re.MULTILINE)


def test_a_scrape_becomes_a_sample() -> None:
    assert engine_sample(METRICS, 1, 2, VLLM) == EXPECTED


def test_several_ranks_are_summed_and_usage_is_averaged() -> None:
    doubled = METRICS + METRICS.replace('engine="0"', 'engine="1"').replace(
        "0.9453125", "0.0546875"
    )
    sample = engine_sample(doubled, 1, 2, VLLM)
    assert sample.kv_usage == 0.5
    assert (sample.running, sample.steps, sample.finished) == (72, 3520, 2000)


@pytest.mark.parametrize(
    ("today", "earlier"),
    [
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
        ("vllm:num_preemptions_total", "vllm:num_preemptions"),
        ("vllm:request_success_total", "vllm:request_success"),
    ],
)
def test_names_of_other_versions(today: str, earlier: str) -> None:
    assert engine_sample(METRICS.replace(f"{today}{{", f"{earlier}{{"), 1, 2, VLLM) == EXPECTED
    # A version that shows both names counts once.
    both = METRICS + METRICS.replace(f"{today}{{", f"{earlier}{{").split("python_info")[-1]
    lines = [x for x in both.splitlines() if x.startswith(f"{earlier}{{")]
    assert engine_sample(METRICS + "\n".join(lines), 1, 2, VLLM) == EXPECTED


@pytest.mark.parametrize("quantity", sorted(FAMILIES))
def test_a_missing_metric_raises(quantity: str) -> None:
    metric = FAMILIES[quantity]
    present = next(n for n in metric.names if f"\n{n}{{" in METRICS)
    with pytest.raises(MissingMetric, match="disable-log-stats") as caught:
        engine_sample(without(present), 1, 2, VLLM, version="0.99")
    assert caught.value.name == quantity
    assert "vllm 0.99" in str(caught.value)
    assert present in str(caught.value)


def test_a_value_that_is_not_finite_is_missing() -> None:
    with pytest.raises(MissingMetric, match="kv_usage"):
        engine_sample(METRICS.replace("0.9453125", "NaN"), 1, 2, VLLM)


def test_optional_metrics_may_be_absent() -> None:
    text = without("vllm:admission_rejections_total")
    assert engine_sample(text, 1, 2, VLLM).rejected == 0


def test_overrun_steps_belong_to_the_mock_alone() -> None:
    assert engine_sample(METRICS + MOCK_LINE, 1, 2, VLLM).overrun_steps == 0
    assert engine_sample(METRICS + MOCK_LINE, 1, 2, MOCK).overrun_steps == 4
    with pytest.raises(MissingMetric, match="overrun_steps"):
        engine_sample(METRICS, 1, 2, MOCK)


def test_labels_are_unescaped_and_unwanted_names_unread() -> None:
    text = 'a{x="1\\"}\\\\",y="l\\nm"} 2 1700000000\nab 3\nb nonsense\nc 1e-3'
    parsed = parse_metrics(text, frozenset({"a", "c", "d"}))
    assert parsed == {"a": [({"x": '1"}\\', "y": "l\nm"}, 2.0)], "c": [({}, 1e-3)]}


def test_a_large_page_is_scanned_within_milliseconds() -> None:
    buckets = "".join(
        f'vllm:h{i}_seconds_bucket{{engine="0",le="{j}.0",model_name="m"}} {j}.0\n'
        for i in range(30)
        for j in range(60)
    )
    page = buckets + METRICS
    start = time.perf_counter()
    for _ in range(20):
        engine_sample(page, 1, 2, VLLM)
    assert (time.perf_counter() - start) / 20 < 0.02


# -- limits --------------------------------------------------------------------------------------

MODELS = {"object": "list", "data": [{"id": "m", "root": "/models/m", "max_model_len": 2048}]}
SCHEDULER = {
    "max_num_seqs": 256,
    "max_num_active_seqs": None,
    "max_num_batched_tokens": 2048,
    "long_prefill_token_threshold": 0,
    "scheduler_reserve_full_isl": True,
    "watermark": 0.01,
    "async_scheduling": True,
}
HIDDEN = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "long_prefill_token_threshold",
    "reserve_full_prompt",
    "watermark",
    "async_scheduling",
)


def limits_of(pages: Pages, num_gpu_blocks: int | None = None) -> ServerLimits:
    def read(session: aiohttp.ClientSession, url: str) -> Awaitable[ServerLimits]:
        return read_vllm_limits(session, url, VLLM, num_gpu_blocks)

    limits: ServerLimits = with_pages(pages, read)
    return limits


PAGES: dict[str, str | dict[str, object]] = {
    "/v1/models": dict(MODELS),
    "/version": {"version": "0.32.0"},
    "/metrics": METRICS,
}


def test_limits_of_a_server_without_developer_mode() -> None:
    assert limits_of(PAGES) == ServerLimits(
        engine="vllm",
        version="0.32.0",
        model_id="m",
        max_model_len=2048,
        num_blocks=128,
        block_size=32,
        num_blocks_given=False,
        prefix_caching=False,
        cache_dtype="auto",
        not_shown=HIDDEN,
    )


def test_limits_of_a_server_in_developer_mode() -> None:
    info: dict[str, object] = {"vllm_config": {"scheduler_config": SCHEDULER}, "vllm_env": {}}
    limits = limits_of({**PAGES, "/server_info": info})
    assert limits.not_shown == ()
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (256, 2048)
    assert (limits.watermark, limits.async_scheduling) == (0.01, True)
    active: dict[str, object] = {"scheduler_config": {**SCHEDULER, "max_num_active_seqs": 64}}
    assert limits_of({**PAGES, "/server_info": {"vllm_config": active}}).max_num_seqs == 64


@pytest.mark.parametrize("info", ["<html>", {"vllm_config": "SchedulerConfig(...)"}, "[1]"])
def test_an_unusable_server_info_counts_as_not_shown(info: str | dict[str, object]) -> None:
    assert limits_of({**PAGES, "/server_info": info}).not_shown == HIDDEN


def test_a_server_that_hides_its_blocks_needs_them_given() -> None:
    pages = {**PAGES, "/metrics": METRICS.replace('num_gpu_blocks="129"', 'num_gpu_blocks="None"')}
    with pytest.raises(LimitsUnreadable, match=r"give limits\.pool_tokens and limits\.block_size"):
        limits_of(pages)
    limits = limits_of(pages, num_gpu_blocks=65)
    assert (limits.num_blocks, limits.num_blocks_given) == (64, True)
    with pytest.raises(LimitsUnreadable, match="says num_gpu_blocks 65, the server shows 129"):
        limits_of(PAGES, num_gpu_blocks=65)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"/v1/models": {"data": []}}, "names no model"),
        ({"/metrics": "nothing 1\n"}, "shows no vllm:cache_config_info"),
        (
            {"/metrics": "# TYPE sglang:num_queue_reqs gauge\nsglang:num_queue_reqs 0.0\n"},
            r"^this server is SGLang .* set server\.engine: sglang",
        ),
        ({"/metrics": 'x{a="sglang:"} 1\n'}, "shows no vllm:cache_config_info"),
        ({"/metrics": METRICS + METRICS.replace('engine="0"', 'engine="1"')}, "2 engines behind"),
        (
            {"/metrics": METRICS.replace('block_size="32"', 'block_size="None"')},
            "block_size 'None'",
        ),
    ],
)
def test_unreadable_limits(change: dict[str, str | dict[str, object]], message: str) -> None:
    with pytest.raises(LimitsUnreadable, match=message):
        limits_of({**PAGES, **change})


def test_a_server_that_is_not_there() -> None:
    async def read() -> None:
        async with aiohttp.ClientSession() as session:
            await read_vllm_limits(session, "http://127.0.0.1:1", VLLM)

    with pytest.raises(LimitsUnreadable, match="is the server running"):
        asyncio.run(read())


def test_engines_by_name() -> None:
    assert ENGINES == {
        "vllm": VLLM,
        "sglang": SGLANG,
        "mock": MOCK,
        "mock_sglang": MOCK_SGLANG,
    }
