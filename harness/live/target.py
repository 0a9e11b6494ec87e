"""The server under test, or several alike: attached to or started, with the limits that they show."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass

import aiohttp
import yaml

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.sglang import longest_request
from harness.configs.config import ConfigError, ExperimentConfig, ServerConfig
from harness.configs.launch import PACE_LOG, LaunchConfig, argv, place
from harness.live.connection import connect
from harness.live.gpu_choice import VISIBLE
from harness.machine.environment import redacted
from harness.records.store import Store
from harness.records.streams import of_replica
from harness.servers.engine_environments import ENVIRONMENTS
from harness.servers.engines import ENGINES, MOCKS, EngineFacts, mock_argv
from harness.servers.limits import read_limits
from harness.servers.server import Server, attached, free_port, launched
from harness.servers.server_limits import ServerLimits
from loadgen.workload import Workload

ENGINE_LOG = "engine.log"


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
async def target_servers(
    config: ExperimentConfig, store: Store
) -> AsyncIterator[tuple[Target, ...]]:
    """The servers of the config in the order of its list, attached to or started, with their limits.

    Raises ConfigError where several do not show the same.
    """
    if config.server is None:
        raise ConfigError(
            "server: give a url, a launch or a mock to drive; without one use `critrate predict`"
        )
    server = config.server
    if server.launch is not None and server.launch.data_parallel_size > 1:
        raise ConfigError(
            "server.launch.data_parallel_size: a critical rate is measured of one engine: leave it out "
            "to measure one rank, or start the ranks as server.replicas; `critrate predict` multiplies "
            "by the ranks"
        )
    facts = _facts(server)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(connect(server))
        ready = [
            attached(
                session, server.running[index].rstrip("/"), facts.health_path, server.timeout_s
            )
            if server.running
            else _started(server, facts, store, session, index)
            for index in range(server.count)
        ]
        running = [await stack.enter_async_context(one) for one in ready]
        # A server that is being stopped waits for open connections.
        stack.push_async_callback(session.close)
        given = config.limits
        blocks = None
        if given.pool_tokens is not None and given.block_size is not None:
            blocks = given.pool_tokens // given.block_size
        targets = []
        for one in running:
            shown = await read_limits(session, one.url, facts, blocks)
            if server.launch is not None:
                require_as_asked(server.launch, shown)
            limits = engine_limits(shown, config)
            targets.append(Target(one.url, facts, session, shown, limits, one.poll))
        require_alike(targets)
        yield tuple(targets)


@contextlib.asynccontextmanager
async def target_server(config: ExperimentConfig, store: Store) -> AsyncIterator[Target]:
    """The one server of the config. Raises ConfigError where it lists several."""
    if config.server is not None and config.server.count > 1:
        raise ConfigError(
            f"server: {config.server.count} replicas: only `critrate run` measures several: give one "
            "url, or leave replicas out"
        )
    async with target_servers(config, store) as targets:
        yield targets[0]


def require_alike(targets: Sequence[Target]) -> None:
    """Raise ConfigError unless all servers show the same: N times one rate is said of no others."""
    first, *others = targets
    for other in others:
        for name, value in asdict(first.shown).items():
            theirs = asdict(other.shown)[name]
            if theirs != value:
                raise ConfigError(
                    f"server: {first.url} shows {name} {value}, {other.url} shows {theirs}: servers "
                    "behind one list must be alike: start them with the same flags (a pool of memory "
                    "left over differs: state its size)"
                )


def _facts(server: ServerConfig) -> EngineFacts:
    if server.mock is not None:
        return MOCKS[server.mock.engine]
    if server.launch is not None:
        return ENGINES[server.launch.runs]
    return ENGINES[server.engine or "vllm"]


@contextlib.asynccontextmanager
async def _started(
    server: ServerConfig,
    facts: EngineFacts,
    store: Store,
    session: aiohttp.ClientSession,
    index: int,
) -> AsyncIterator[Server]:
    """The mock or the engine of the config, as a process of ours; its command line is recorded.

    ``index``: which of several it is; each has a port, a log and, on GPUs, cards of its own.
    """
    count = server.count
    port = server.port + index if server.port else free_port()
    env: dict[str, str] = {}
    if server.mock is not None:
        parameters = server.mock.model_dump(mode="json")
        store.write_text("mock.yaml", yaml.safe_dump(parameters, sort_keys=False))
        line = [*mock_argv(store.path / "mock.yaml"), "--port", str(port)]
    else:
        assert server.launch is not None
        pace_log = store.path / of_replica(PACE_LOG, index, count)
        line, env = argv(server.launch, place(server.launch, port, pace_log))
        if count > 1 and server.gpus is not None:
            env |= own_gpus(server.gpus, index, server.launch.gpus)
        record = {
            "command": redacted(line),
            "environment": {k: redacted([v])[0] for k, v in env.items()},
        }
        known = store.read_json("environment.json") if store.has("environment.json") else {}
        name = "engine" if count == 1 else f"engine-{index}"
        store.write_json("environment.json", {**known, name: record})
    url = f"http://127.0.0.1:{port}"
    log = store.path / of_replica(ENGINE_LOG, index, count)
    ready = launched(line, env, url, facts.health_path, server.timeout_s, log, session)
    async with ready as running:
        yield running


def own_gpus(gpus: Sequence[int | str], index: int, each: int) -> dict[str, str]:
    """What an engine's environment needs to use the ``index``-th ``each`` of ``gpus`` alone."""
    own = gpus[index * each : (index + 1) * each]
    # NVML counts as the bus does; CUDA by default does not.
    return {VISIBLE: ",".join(map(str, own)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def require_as_asked(launch: LaunchConfig, shown: ServerLimits) -> None:
    """Raise ConfigError unless an engine that was started shows the limits that it was given."""
    pairs: list[tuple[str, object, object]] = [
        ("pool_tokens", launch.pool_tokens, shown.num_blocks * shown.block_size),
        ("prefix_caching", launch.prefix_caching, shown.prefix_caching),
    ]
    for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        pairs.append((name, getattr(launch, name), getattr(shown, name)))
    for name, asked, has in pairs:
        if asked is not None and asked != has:
            raise ConfigError(
                f"server.launch.{name}: {asked} was asked for, the server shows {has}: correct the "
                "config, or see the server's log (engine.log)"
            )
    made = ENVIRONMENTS.get(launch.environment)
    if made is not None and (shown.version or "").split("+")[0] != made.version:
        raise ConfigError(
            f"server.launch.environment: {made.name} is {made.engine} {made.version}, the server shows "
            f"{shown.version}: make it anew with scripts/engine-env, or give the path of a Python"
        )


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
