"""What the mock tells of itself as SGLang 0.5.23: /server_info, /model_info and /v1/loads."""

from __future__ import annotations

from typing import Any

from harness.mock.mock import MockConfig
from harness.mock.mock_sglang_books import SGLangBooks
from harness.mock.mock_sglang_intake import longest_input

LOADS_SECTIONS = frozenset({"core", "memory", "spec", "lora", "disagg", "queues", "all"})
GRAPH_PHASES = (
    *("prefill", "decode", "target_verify"),
    *("draft_prefill", "draft_decode", "draft_extend"),
)


def server_info(config: MockConfig, books: SGLangBooks) -> dict[str, Any]:
    """The arguments that matter to a scheduler, flat, and its state, as /server_info shows them."""
    arguments = _arguments(config)
    state: dict[str, Any] = {
        "world_size": 1,
        "effective_max_running_requests_per_dp": config.limits.max_num_seqs,
        "last_gen_throughput": books.gauges.gen_throughput,
        "memory_usage": {
            "weight": 0.0,
            "kvcache": 0.0,
            "startup_available": 0.0,
            "token_capacity": _claimed_tokens(config),
            "token_capacity_swa": None,
            "graph": dict.fromkeys(GRAPH_PHASES, 0.0),
        },
        "decode_cuda_graph_bs": [],
        "decode_cuda_graph_memory_gb": 0.0,
    }
    return {
        **arguments,
        "status": "ready",
        "max_total_num_tokens": _claimed_tokens(config),
        "max_req_input_len": longest_input(config),
        "kv_events": None,
        "internal_states": [arguments | state],
        "version": config.sglang.version,
        "frontend": "python",
        "critrate_mock": True,
    }


def _arguments(config: MockConfig) -> dict[str, Any]:
    limits, rules = config.limits, config.limits.sglang
    assert rules is not None
    return {
        "model_path": config.model,
        "tokenizer_path": config.model,
        "served_model_name": config.model,
        "load_format": "dummy",
        "context_length": limits.max_model_len,
        "kv_cache_dtype": "auto",
        "max_running_requests": limits.max_num_seqs,
        "max_queued_requests": None,
        "max_total_tokens": _claimed_tokens(config),
        "chunked_prefill_size": limits.max_num_batched_tokens or -1,
        "prefill_decode_interval": 0,
        "enable_dynamic_chunking": False,
        "max_prefill_tokens": rules.max_prefill_tokens,
        "prefill_max_requests": None,
        "schedule_policy": "fcfs",
        "enable_priority_scheduling": False,
        "retraction_policy": "length",
        "schedule_conservativeness": rules.schedule_conservativeness,
        "page_size": limits.block_size,
        "disable_radix_cache": not rules.radix_cache,
        "disable_overlap_schedule": not limits.async_scheduling,
        "num_continuous_decode_steps": 1,
        "scheduler_recv_interval": 1,
        "enable_mixed_chunk": False,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
        "device": "cpu",
        "host": config.host,
        "stream_interval": config.stream_interval,
        "enable_metrics": True,
        "load_snapshot_publish_interval": config.sglang.load_snapshot_publish_interval,
        "decode_log_interval": config.sglang.decode_log_interval,
        "speculative_algorithm": None,
        "enable_hierarchical_cache": False,
        "enable_lora": None,
        "disaggregation_mode": "null",
        "enable_prefill_delayer": False,
        "min_free_slots_delay": None,
        "dllm_algorithm": None,
    }


def model_info(config: MockConfig) -> dict[str, Any]:
    """What /model_info shows."""
    return {
        "model_path": config.model,
        "served_model_name": config.model,
        "tokenizer_path": config.model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "dummy",
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }


def loads(config: MockConfig, books: SGLangBooks, sections: set[str]) -> dict[str, Any]:
    """One rank's load from the last snapshot, with the sections that are asked for."""
    seen, tokens = books.loads(), config.limits.pool_tokens
    moments = books.decode_moments
    load: dict[str, Any] = {
        "timestamp": seen.timestamp_s,
        "dp_rank": 0,
        "num_running_reqs": seen.running,
        "num_waiting_reqs": seen.waiting,
        "num_waiting_uncached_tokens": seen.waiting_tokens,
        "num_used_tokens": seen.used_tokens,
        "num_total_tokens": seen.used_tokens + seen.waiting_tokens,
        "num_active_tokens": seen.used_tokens + seen.waiting_tokens,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": _claimed_tokens(config),
        "max_running_requests": config.limits.max_num_seqs,
        "token_usage": round(seen.used_tokens / tokens, 4),
        "gen_throughput": round(seen.gen_throughput, 2),
        "cache_hit_rate": 0.0,
        "utilization": 0.0,
        "total_prefill_uncached_tokens": books.prefill_tokens,
        "total_prefill_busy_us": books.prefill_busy_us,
        "decode_moments": list(moments) if moments[0] else None,
    }
    if sections & {"memory", "all"}:
        load["memory"] = {
            "weight_gb": 0.0,
            "kv_cache_gb": 0.0,
            "graph_gb": 0.0,
            "token_capacity": _claimed_tokens(config),
        }
    if sections & {"disagg", "all"}:
        load["disaggregation"] = {
            "mode": "null",
            "prefill_bootstrap_queue_reqs": 0,
            "prefill_inflight_queue_reqs": 0,
            "decode_prealloc_queue_reqs": 0,
            "decode_transfer_queue_reqs": 0,
            "decode_retracted_queue_reqs": 0,
            "kv_transfer_speed_gb_s": 0.0,
            "kv_transfer_latency_ms": 0.0,
        }
    if sections & {"queues", "all"}:
        load["queues"] = {
            "waiting": seen.waiting,
            "grammar": 0,
            "paused": 0,
            "retracted": books.gauges.retracted,
            "prealloc_ready": 0,
        }
    return load


def as_prometheus(load: dict[str, Any]) -> bytes:
    """A rank's load as gauges; sections become prefixes."""
    lines: list[str] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, int | float):
            lines.append(f"# TYPE sglang_{name} gauge")
            lines.append(f'sglang_{name}{{dp_rank="{load["dp_rank"]}"}} {value}')

    for key, value in load.items():
        if isinstance(value, dict):
            prefix = {"disaggregation": "disagg"}.get(key, key)
            for sub_key, sub_value in value.items():
                add(f"{prefix}_{sub_key}", sub_value)
        elif key != "dp_rank":
            add(key, value)
    return ("\n".join(lines) + "\n").encode()


def _claimed_tokens(config: MockConfig) -> int:
    blocks = config.claimed_num_blocks or config.limits.num_blocks
    return blocks * config.limits.block_size
