"""The server under test: attached to or started, with the limits that it shows."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp
import yaml

from analysis.engine import EngineLimits
from analysis.sglang import longest_request
from harness.config import ConfigError, ExperimentConfig
from harness.engines import ENGINES, MOCKS, EngineFacts, mock_argv
from harness.limits import read_limits
from harness.server import attached, free_port, launched
from harness.server_limits import ServerLimits
from harness.store import Store
from loadgen.client import open_session
from loadgen.workload import Workload


@dataclass(frozen=True, eq=False)
class Target:
    """A server that answers, and what it shows of itself."""

    url: str
    facts: EngineFacts
    session: aiohttp.ClientSession
    shown: ServerLimits
    limits: EngineLimits
    poll: Callable[[], str | None]


@contextlib.asynccontextmanager
async def target_server(config: ExperimentConfig, store: Store) -> AsyncIterator[Target]:
    """The server of the config, attached to or started as a mock, with its limits read back."""
    if config.server is None:
        raise ConfigError(
            "server: give a url or a mock to drive; without one use `critrate predict`"
        )
    server = config.server
    facts = ENGINES[server.engine or "vllm"] if server.mock is None else MOCKS[server.mock.engine]
    async with contextlib.AsyncExitStack() as stack:
        if server.mock is not None:
            mock_file = store.path / "mock.yaml"
            parameters = server.mock.model_dump(mode="json")
            store.write_text("mock.yaml", yaml.safe_dump(parameters, sort_keys=False))
            url = f"http://127.0.0.1:{server.port or free_port()}"
            argv = [*mock_argv(mock_file), "--port", url.rsplit(":", 1)[1]]
            running = await stack.enter_async_context(
                launched(
                    argv,
                    {},
                    url,
                    facts.health_path,
                    server.ready_timeout_s,
                    store.path / "engine.log",
                )
            )
        else:
            assert server.url is not None
            url = server.url.rstrip("/")
            running = await stack.enter_async_context(
                attached(url, facts.health_path, server.ready_timeout_s, server.headers)
            )
        session = await stack.enter_async_context(open_session(server.headers))
        given = config.limits
        blocks = None
        if given.pool_tokens is not None and given.block_size is not None:
            blocks = given.pool_tokens // given.block_size
        shown = await read_limits(session, url, facts, blocks)
        yield Target(url, facts, session, shown, engine_limits(shown, config), running.poll)


def engine_limits(shown: ServerLimits, config: ExperimentConfig) -> EngineLimits:
    """Limits that the server shows, completed by those that the config states.

    Raises ConfigError where the two contradict each other.
    """
    given = config.limits
    for name in ("max_num_seqs", "max_num_batched_tokens", "async_scheduling", "watermark"):
        theirs, ours = getattr(shown, name), getattr(given, name)
        if theirs is not None and ours is not None and theirs != ours:
            raise ConfigError(
                f"limits.{name}: the config says {ours}, the server shows {theirs}: correct one of "
                "them, or leave it out of the config"
            )
    watermark = given.watermark if shown.watermark is None else shown.watermark
    ahead = given.async_scheduling if shown.async_scheduling is None else shown.async_scheduling
    return EngineLimits(
        num_blocks=shown.num_blocks,
        block_size=shown.block_size,
        max_num_seqs=shown.max_num_seqs or given.max_num_seqs,
        max_num_batched_tokens=shown.max_num_batched_tokens or given.max_num_batched_tokens,
        max_model_len=shown.max_model_len,
        watermark=watermark or 0.0,
        reserve_full_prompt=shown.reserve_full_prompt is not False,
        long_prefill_token_threshold=shown.long_prefill_token_threshold or 0,
        async_scheduling=bool(ahead),
        sglang=shown.sglang,
    )


def assumptions(shown: ServerLimits, config: ExperimentConfig) -> list[str]:
    """What a reader of the prediction must know of what nobody stated, one line each."""
    lines = []
    if shown.sglang is not None:
        lines += _assumptions_of_sglang(shown)
    elif shown.prefix_caching:
        lines.append(
            "prefix caching is on: hits beyond 2 % of the prompts break a premise; start the server "
            "with --no-enable-prefix-caching"
        )
    if shown.async_scheduling is None and config.limits.async_scheduling is None:
        lines.append(
            "asynchronous scheduling is taken as off; if the server has it on (vLLM's default on a "
            "GPU), set limits.async_scheduling: true"
        )
    return lines


def _assumptions_of_sglang(shown: ServerLimits) -> list[str]:
    lines = []
    if shown.prefix_caching:
        lines.append(
            "the radix cache is on: hits beyond 2 % of the prompts break a premise; empty it before "
            "the run (POST /flush_cache)"
        )
    if shown.decode_log_interval is None or shown.decode_log_interval > 1:
        lines.append(
            f"the gauges are up to {shown.decode_log_interval or 'an unknown number of'} decode steps "
            "old: start the server with --decode-log-interval 1"
        )
    return lines


def require_fitting(workload: Workload, limits: EngineLimits) -> None:
    """Raise ConfigError unless every request fits the pool, and all it declares the model length."""
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    declared = int((workload.prompt_tokens + workload.max_tokens).max())
    bounds = [
        ("prompt + output", longest, "the KV pool", limits.pool_tokens),
        ("prompt + declared max_tokens", declared, "max_model_len", limits.max_model_len),
    ]
    if limits.sglang is not None:
        # It clips what it cannot set aside whole: the outputs would be shorter than designed.
        what = "prompt + declared max_tokens"
        room = longest_request(limits)
        context = None if limits.max_model_len is None else limits.max_model_len - 2
        bounds = [
            (what, declared, "the room for one request", room),
            (what, declared, "the context (less two tokens)", context),
        ]
    for what, tokens, name, bound in bounds:
        if bound is not None and tokens > bound:
            raise ConfigError(
                f"workload: {what} reach {tokens} tokens, {name} of the server is {bound}: "
                f"shorten the lengths or set workload.max_total_tokens: {bound}"
            )
