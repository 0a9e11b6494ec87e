"""What SGLang 0.5.23 shows of its limits: /server_info, which is always there.

Its clipping of the outputs it sets aside (an environment variable) is not shown, the default is taken.
"""

from __future__ import annotations

import re
from typing import Any

import aiohttp

from analysis.schedulers.engine import SGLangRules
from harness.servers.engines import EngineFacts
from harness.servers.server_limits import (
    LimitsUnreadable,
    ServerLimits,
    get_json,
    missing_fields,
    served_model,
)

WHOLE_OUTPUT_SINCE = (0, 5, 22)
NOT_MODELLED: dict[str, tuple[tuple[Any, ...], str]] = {
    "schedule_policy": (("fcfs",), "start it with --schedule-policy fcfs"),
    "enable_priority_scheduling": ((False,), "start it without --enable-priority-scheduling"),
    "enable_mixed_chunk": ((False,), "start it without --enable-mixed-chunk"),
    "enable_dynamic_chunking": ((False,), "start it without --enable-dynamic-chunking"),
    "speculative_algorithm": ((None,), "start it without speculative decoding"),
    "retraction_policy": (("length",), "start it with --retraction-policy length"),
    "dp_size": ((1,), "start it without data parallelism, or measure one rank"),
    "pp_size": ((1,), "start it without pipeline parallelism"),
    "disaggregation_mode": (("null", None), "measure a server that computes prompts and outputs"),
    "max_queued_requests": (
        (None,),
        "start it without --max-queued-requests: a refused request caps the queue that has to be "
        "seen growing",
    ),
    "prefill_max_requests": ((None,), "start it without --prefill-max-requests"),
    "prefill_decode_interval": ((0,), "start it without --prefill-decode-interval"),
    "num_continuous_decode_steps": ((1,), "start it with --num-continuous-decode-steps 1"),
    "enable_prefill_delayer": ((False,), "start it without --enable-prefill-delayer"),
    "min_free_slots_delay": ((None,), "start it without --min-free-slots-delay"),
    "enable_hierarchical_cache": ((False,), "start it without --enable-hierarchical-cache"),
    "dllm_algorithm": ((None,), "serve a model that generates token by token"),
}
"""Argument -> values that the scheduler model covers, and what to do about others."""


async def read_sglang_limits(
    session: aiohttp.ClientSession, url: str, facts: EngineFacts, num_blocks: int | None = None
) -> ServerLimits:
    """The limits of the SGLang at ``url``; a block is a page.

    ``num_blocks`` are pages that the configuration states: they must be those that the server shows.
    Raises LimitsUnreadable with what to do, also for a scheduler that the model does not cover.
    """
    model = await served_model(session, url)
    info = await get_json(session, f"{url}/server_info")
    info = info or await get_json(session, f"{url}/get_server_info")
    if info is None or "max_total_num_tokens" not in info:
        raise LimitsUnreadable(f"{url}/server_info shows no max_total_num_tokens: is this SGLang?")
    state = _state(info)
    _require_modelled(info, state)
    page, pool = info.get("page_size"), info["max_total_num_tokens"]
    if type(page) is not int or type(pool) is not int:
        raise LimitsUnreadable(f"{url}/server_info shows page_size {page!r}, a pool of {pool!r}")
    if num_blocks is not None and num_blocks != pool // page:
        raise LimitsUnreadable(
            f"the configuration says a pool of {num_blocks} pages, the server shows {pool // page}: "
            "remove it from the configuration or correct it"
        )
    chunk, overlap_off = info.get("chunked_prefill_size"), info.get("disable_overlap_schedule")
    radix_off, version = info.get("disable_radix_cache"), info.get("version")
    running = state.get("effective_max_running_requests_per_dp") or info.get("max_running_requests")
    fields: dict[str, Any] = {
        "version": version,
        "max_model_len": model.get("max_model_len"),
        "prefix_caching": None if radix_off is None else not radix_off,
        "cache_dtype": info.get("kv_cache_dtype"),
        "max_num_seqs": running,
        "async_scheduling": None if overlap_off is None else not overlap_off,
        "decode_log_interval": info.get("decode_log_interval"),
    }
    return ServerLimits(
        engine=facts.name,
        model_id=model["id"],
        num_blocks=pool // page,
        block_size=page,
        num_blocks_given=False,
        # A chunk size of -1, or none, means that prompts are not cut: not a limit that is hidden.
        max_num_batched_tokens=chunk if chunk is not None and chunk > 0 else None,
        watermark=0.0,
        reserve_full_prompt=True,
        long_prefill_token_threshold=0,
        sglang=_rules(info, url),
        not_shown=missing_fields(fields),
        **fields,
    )


def keeps_whole_output(version: str) -> bool:
    """Does this version set the whole output of a running request with ignore_eos aside?"""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None:
        raise LimitsUnreadable(
            f"SGLang's version {version!r} is no release number, so that its admission rule is not "
            "known: measure a release"
        )
    return tuple(map(int, numbers.groups())) >= WHOLE_OUTPUT_SINCE


def _rules(info: dict[str, Any], url: str) -> SGLangRules:
    needed = ("max_prefill_tokens", "schedule_conservativeness", "disable_radix_cache", "version")
    hidden = [name for name in needed if info.get(name) is None]
    if hidden:
        raise LimitsUnreadable(
            f"{url}/server_info does not show {', '.join(hidden)}: is this an SGLang of 0.5.21 or "
            "later?"
        )
    return SGLangRules(
        max_prefill_tokens=info["max_prefill_tokens"],
        schedule_conservativeness=info["schedule_conservativeness"],
        radix_cache=not info["disable_radix_cache"],
        whole_output_of_ignore_eos=keeps_whole_output(info["version"]),
    )


def _state(info: dict[str, Any]) -> dict[str, Any]:
    """The live state of the one scheduler; empty where the server shows none."""
    states = info.get("internal_states") or [{}]
    if len(states) > 1:
        raise LimitsUnreadable(
            f"SGLang runs {len(states)} schedulers behind one port: a critical rate is predicted for "
            "one engine; start it without data parallelism, or measure one rank"
        )
    state: dict[str, Any] = states[0]
    return state


def _require_modelled(info: dict[str, Any], state: dict[str, Any]) -> None:
    for name, (covered, mend) in NOT_MODELLED.items():
        if name in info and info[name] not in covered:
            raise LimitsUnreadable(
                f"SGLang runs with {name} {info[name]!r}, which the scheduler model does not cover: "
                f"{mend}"
            )
    memory = state.get("memory_usage") or {}
    if memory.get("token_capacity_swa") is not None or info.get("uses_mamba_radix_cache"):
        raise LimitsUnreadable(
            "SGLang keeps more than one kind of KV pool for this model (sliding windows or states), "
            "which the scheduler model does not cover: measure a model with full attention alone"
        )
