"""Facts per engine: what its metrics are called, how its limits are read, how it is launched.

An engine is plain data, `EngineFacts` in `ENGINES`; the functions below know nothing but that data.
Names and shapes are those of vLLM 0.32.0 (`v1/metrics/loggers.py`, `config/cache.py`,
`entrypoints/serve/dev/server_info`), with the names of earlier versions as aliases. A metric that
is not there raises: it is never read as zero.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import aiohttp

from analysis.engine import EngineSample

Series = list[tuple[dict[str, str], float]]
"""All label sets of one metric with their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity as an engine exports it.

    ``names`` are aliases, the newest version's first; the first that is present is read, alone.
    Several label sets (one per data-parallel rank, one per reason) are added up, or averaged with
    equal weights where the quantity is a share. An optional metric that is absent counts 0: only
    where absence means that the thing cannot happen.
    """

    names: tuple[str, ...]
    combine: Literal["sum", "mean"] = "sum"
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What distinguishes one engine from another, seen from outside."""

    name: str
    metrics: Mapping[str, Metric]
    """Quantity of `EngineSample` -> where it is found."""
    cache_info: str
    """Info gauge whose labels are the KV cache's configuration."""
    exact_finish: str
    """Value of ``finished_reason`` for a request that ended at its asked length."""
    metrics_path: str = "/metrics"
    health_path: str = "/health"
    no_metrics_hint: str = ""
    """What to check when a metric is missing."""


def _counter(name: str, *older: str) -> tuple[str, ...]:
    """A counter's names with and without the suffix that exporters add."""
    return tuple(n for base in (name, *older) for n in (f"{base}_total", base))


VLLM = EngineFacts(
    name="vllm",
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
            names=_counter("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits")
        ),
        "external_prefix_hits": Metric(
            names=_counter("vllm:external_prefix_cache_hits"), required=False
        ),
    },
    cache_info="vllm:cache_config_info",
    exact_finish="length",
    no_metrics_hint="was the server started with --disable-log-stats, is there a proxy that hides "
    "/metrics, or is this a version whose names changed?",
)

MOCK = replace(
    VLLM,
    name="mock",
    metrics={
        **VLLM.metrics,
        "overrun_steps": Metric(names=_counter("critrate_mock_overrun_steps")),
    },
    no_metrics_hint="does the URL lead to `critrate mock`, of this version?",
)

ENGINES: Mapping[str, EngineFacts] = {facts.name: facts for facts in (VLLM, MOCK)}


class MissingMetric(Exception):
    """The server's metrics lack a quantity that the measurement needs, or show no finite value."""

    def __init__(self, name: str, facts: EngineFacts, version: str | None = None) -> None:
        self.name, self.engine, self.version = name, facts.name, version
        looked_for = " or ".join(facts.metrics[name].names)
        super().__init__(
            f"{facts.name} {version or '(version not known)'} shows no usable value of {name} at "
            f"{facts.metrics_path} (looked for {looked_for}): {facts.no_metrics_hint}"
        )


class LimitsUnreadable(Exception):
    """The server does not show a limit that the prediction needs."""


# -- metrics -------------------------------------------------------------------------------------

_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_UNESCAPED = {"n": "\n"}


@lru_cache(maxsize=32)
def _line_pattern(wanted: frozenset[str]) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in sorted(wanted, reverse=True))
    # Starting from the line break is nine times as fast as `^` in multiline mode.
    return re.compile(rf"\n({names})(\{{.*\}})?[ \t]+(\S+)")


def parse_metrics(text: str, wanted: frozenset[str]) -> dict[str, Series]:
    """The samples of the ``wanted`` names in a Prometheus text, labels kept, the rest unread.

    A name that does not occur is not in the result. Raises ValueError when the value of a wanted
    sample is no number.
    """
    found: dict[str, Series] = {}
    for name, labels, value in _line_pattern(wanted).findall(f"\n{text}"):
        pairs = {
            key: _ESCAPE.sub(lambda m: _UNESCAPED.get(m[1], m[1]), raw)
            for key, raw in _LABEL.findall(labels)
        }
        found.setdefault(name, []).append((pairs, float(value)))
    return found


@lru_cache(maxsize=8)
def _wanted(names: tuple[tuple[str, ...], ...]) -> frozenset[str]:
    return frozenset(name for aliases in names for name in aliases)


def engine_sample(
    text: str, read_ns: int, t_ns: int, facts: EngineFacts, version: str | None = None
) -> EngineSample:
    """Gauges and counters of the engine in one scrape.

    Counts are summed over label sets, KV usage is their plain mean: with several data-parallel
    ranks the sample describes all of them as one server. ``finished`` counts every reason,
    ``truncated`` those that are neither the asked length nor an abort. Raises MissingMetric.
    """
    found = parse_metrics(text, _wanted(tuple(m.names for m in facts.metrics.values())))

    def series(quantity: str) -> Series:
        metric = facts.metrics[quantity]
        for name in metric.names:
            if name in found:
                return found[name]
        if metric.required:
            raise MissingMetric(quantity, facts, version)
        return []

    def value(quantity: str) -> float:
        values = [v for _, v in series(quantity)]
        total = math.fsum(values)
        if not math.isfinite(total):
            raise MissingMetric(quantity, facts, version)
        return total / len(values) if facts.metrics[quantity].combine == "mean" else total

    def count(quantity: str) -> int:
        return round(value(quantity))

    as_asked = (facts.exact_finish, "abort")
    finished = [(labels.get("finished_reason"), n) for labels, n in series("finished")]
    return EngineSample(
        read_ns=read_ns,
        t_ns=t_ns,
        waiting=count("waiting"),
        running=count("running"),
        kv_usage=value("kv_usage"),
        preemptions=count("preemptions"),
        prompt_tokens=count("prompt_tokens"),
        generation_tokens=count("generation_tokens"),
        steps=count("steps"),
        step_tokens=count("step_tokens"),
        finished=count("finished"),
        truncated=round(math.fsum(n for reason, n in finished if reason not in as_asked)),
        rejected=count("rejected"),
        prefix_hit_tokens=count("prefix_hits") + count("external_prefix_hits"),
        overrun_steps=count("overrun_steps") if "overrun_steps" in facts.metrics else 0,
    )


# -- limits --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The limits that a server shows of itself. None: it does not show it (see ``not_shown``)."""

    engine: str
    version: str | None
    model_id: str
    max_model_len: int | None
    num_blocks: int
    """Usable blocks: vLLM's null block is not among them."""
    block_size: int
    num_blocks_given: bool
    """True when the configuration supplied the number of blocks because the server hides it."""
    prefix_caching: bool | None
    cache_dtype: str | None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int | None = None
    reserve_full_prompt: bool | None = None
    watermark: float | None = None
    async_scheduling: bool | None = None
    not_shown: tuple[str, ...] = ()
    """Names of the fields above that are None."""


_BOOLEANS = {"True": True, "False": False}
_SCHEDULER_FIELDS = {
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "reserve_full_prompt": "scheduler_reserve_full_isl",
    "watermark": "watermark",
    "async_scheduling": "async_scheduling",
}


async def read_limits(
    session: aiohttp.ClientSession, url: str, facts: EngineFacts, num_gpu_blocks: int | None = None
) -> ServerLimits:
    """Read back what bounds the server at ``url`` (``http://host:port``, nothing behind it).

    Model and length come from /v1/models, the pool from the labels of the cache's info gauge, the
    scheduler's limits from /server_info, which vLLM only has with VLLM_SERVER_DEV_MODE=1; without
    it they stay None. ``num_gpu_blocks``, the null block included, stands in only for a server that
    shows none. Raises LimitsUnreadable with what to do.
    """
    models = await _json(session, f"{url}/v1/models")
    if models is None or not models.get("data"):
        raise LimitsUnreadable(f"{url}/v1/models names no model: is this an OpenAI-style server?")
    model = models["data"][0]
    version = (await _json(session, f"{url}/version") or {}).get("version")
    metrics_url = url + facts.metrics_path
    status, text = await _get(session, metrics_url)
    if status != 200:
        raise LimitsUnreadable(f"{metrics_url} answers {status}: {facts.no_metrics_hint}")
    cache = _cache_config(text, facts, version)
    blocks, given = _num_gpu_blocks(cache, num_gpu_blocks, version)
    block_size = cache.get("block_size", "None")
    if not block_size.isdigit():
        raise LimitsUnreadable(f"{facts.name} {version} shows block_size {block_size!r}")
    info = await _json(session, f"{url}/server_info?config_format=json") or {}
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
        not_shown=tuple(name for name, value in fields.items() if value is None),
        **fields,
    )


def _cache_config(text: str, facts: EngineFacts, version: str | None) -> dict[str, str]:
    """Labels of the one cache that the server has."""
    caches = parse_metrics(text, frozenset({facts.cache_info})).get(facts.cache_info, [])
    if not caches:
        raise LimitsUnreadable(
            f"{facts.name} {version} shows no {facts.cache_info} at {facts.metrics_path}: "
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


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=30.0)) as response:
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LimitsUnreadable(f"cannot read {url}: {error!r}; is the server running?") from error


async def _json(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """The JSON object at ``url``; None where the server has none there."""
    status, text = await _get(session, url)
    if status in (401, 403):
        raise LimitsUnreadable(f"{url} answers {status}: the server wants an API key")
    if status != 200:
        return None
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


# -- launch --------------------------------------------------------------------------------------


def mock_argv(config_file: Path) -> list[str]:
    """Command line of the mock server that ``config_file`` describes."""
    return [sys.executable, "-m", "harness.cli", "mock", str(config_file)]
