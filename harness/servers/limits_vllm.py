"""What vLLM 0.32.0 shows of its limits.

Read in `config/cache.py` and `entrypoints/serve/dev/server_info`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import aiohttp

from harness.servers.engine_metrics import parse_metrics
from harness.servers.engines import EngineFacts
from harness.servers.server_limits import (
    LimitsUnreadable,
    ServerLimits,
    get_json,
    get_text,
    missing_fields,
    served_model,
)

CACHE_INFO = "vllm:cache_config_info"
"""Info gauge whose labels are the KV cache's configuration."""
_OF_SGLANG = re.compile("^sglang:", re.MULTILINE)
_BOOLEANS = {"True": True, "False": False}
_SCHEDULER_FIELDS = {
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "reserve_full_prompt": "scheduler_reserve_full_isl",
    "watermark": "watermark",
    "async_scheduling": "async_scheduling",
}


async def read_vllm_limits(
    session: aiohttp.ClientSession, url: str, facts: EngineFacts, num_gpu_blocks: int | None = None
) -> ServerLimits:
    """The limits of the vLLM at ``url``.

    Model and length come from /v1/models, the pool from the labels of the cache's info gauge, the
    scheduler's limits from /server_info, which vLLM only has with VLLM_SERVER_DEV_MODE=1; without
    it they stay None. ``num_gpu_blocks``, the null block included, stands in only for a server that
    shows none. Raises LimitsUnreadable with what to do.
    """
    model = await served_model(session, url)
    version = (await get_json(session, f"{url}/version") or {}).get("version")
    metrics_url = url + facts.metrics_path
    status, text = await get_text(session, metrics_url)
    if status != 200:
        raise LimitsUnreadable(f"{metrics_url} answers {status}: {facts.no_metrics_hint}")
    cache = _cache_config(text, facts, version)
    blocks, given = _num_gpu_blocks(cache, num_gpu_blocks, version)
    block_size = cache.get("block_size", "None")
    if not block_size.isdigit():
        raise LimitsUnreadable(f"{facts.name} {version} shows block_size {block_size!r}")
    info = await get_json(session, f"{url}/server_info?config_format=json") or {}
    fields: dict[str, Any] = {
        "version": version,
        "max_model_len": model.get("max_model_len"),
        "prefix_caching": _BOOLEANS.get(cache.get("enable_prefix_caching", "")),
        "cache_dtype": cache.get("cache_dtype"),
        **_scheduler_limits(info.get("vllm_config")),
    }
    return ServerLimits(
        engine=facts.name,
        model_id=model["id"],
        num_blocks=blocks - 1,
        block_size=int(block_size),
        num_blocks_given=given,
        not_shown=missing_fields(fields),
        **fields,
    )


def _cache_config(text: str, facts: EngineFacts, version: str | None) -> dict[str, str]:
    """Labels of the one cache that the server has."""
    caches = parse_metrics(text, frozenset({CACHE_INFO})).get(CACHE_INFO, [])
    if not caches and _OF_SGLANG.search(text):
        raise LimitsUnreadable(
            f"this server is SGLang (names at {facts.metrics_path} begin with sglang:), it was taken "
            "for vLLM: set server.engine: sglang in the configuration"
        )
    if not caches:
        raise LimitsUnreadable(
            f"{facts.name} {version} shows no {CACHE_INFO} at {facts.metrics_path}: "
            f"{facts.no_metrics_hint}"
        )
    if len(caches) > 1:
        # With data parallelism vLLM shows the sum of all ranks' blocks under every rank.
        raise LimitsUnreadable(
            f"{facts.name} runs {len(caches)} engines behind one port: a critical rate is "
            "predicted for one engine; start it without data parallelism, or measure one rank"
        )
    return caches[0][0]


def _num_gpu_blocks(
    cache: Mapping[str, str], given: int | None, version: str | None
) -> tuple[int, bool]:
    shown = cache.get("num_gpu_blocks", "None")
    if shown.isdigit():
        if given is not None and given != int(shown):
            raise LimitsUnreadable(
                f"the configuration says num_gpu_blocks {given}, the server shows {shown}: "
                "remove it from the configuration or correct it"
            )
        return int(shown), False
    if given is None:
        raise LimitsUnreadable(
            f"this server (version {version}) shows num_gpu_blocks {shown!r}: give "
            "limits.pool_tokens and limits.block_size in the configuration (its log says "
            "`GPU KV cache size: N tokens`)"
        )
    return given, True


def _scheduler_limits(config: Any) -> dict[str, Any]:
    """The scheduler's limits from /server_info; all None where it is hidden or only a text."""
    scheduler = config.get("scheduler_config") if isinstance(config, dict) else None
    if not isinstance(scheduler, dict):
        return dict.fromkeys(_SCHEDULER_FIELDS)
    limits = {name: scheduler.get(key) for name, key in _SCHEDULER_FIELDS.items()}
    active = scheduler.get("max_num_active_seqs")
    if active is not None and limits["max_num_seqs"] is not None:
        limits["max_num_seqs"] = min(active, limits["max_num_seqs"])
    return limits
