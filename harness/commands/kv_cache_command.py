"""The command ``kv-cache``: what a model's KV cache takes, and what an engine's pool holds of it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from analysis.numbers.formatting import grouped
from analysis.theory.kv_cache import (
    VALUE_BYTES,
    KvBudget,
    KvCache,
    MemoryTerm,
    even_weights,
    kv_budget,
    kv_cache,
)
from analysis.theory.kv_pools import SglangPool, VllmPool, sglang_pool, vllm_pool
from analysis.theory.model_shape import model_shape
from harness.configs.config import ConfigError
from harness.servers.kv_models import UNIT_BYTES, layers_text, markdown, models_table, pools_table

Answer = dict[str, Any]


def kv_cache_command(
    config: Annotated[
        Path | None, typer.Argument(help="a model's config.json; without it the known models")
    ] = None,
    models: Annotated[bool, typer.Option("--models", help="the known models")] = False,
    memory: Annotated[str | None, typer.Option(help="for KV on each GPU, such as 60GiB")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="of each GPU, instead of --memory")] = None,
    utilisation: Annotated[float | None, typer.Option(help="share the engine asks for")] = None,
    weights: Annotated[str | None, typer.Option(help="on each GPU, such as 15GiB")] = None,
    parameters: Annotated[int | None, typer.Option(help="of the model, not --weights")] = None,
    other: Annotated[str | None, typer.Option(help="activations, graphs and the rest")] = None,
    engine: Annotated[Literal["vllm", "sglang"], typer.Option(help="whose count")] = "vllm",
    dtype: Annotated[str, typer.Option(help="of the KV cache")] = "auto",
    tp: Annotated[int, typer.Option(min=1, help="tensor-parallel ranks")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="pipeline stages")] = 1,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="tokens; default vLLM 16, SGLang's page 1")
    ] = None,
    request_tokens: Annotated[
        int | None, typer.Option(min=1, help="of a request, prompt and answer")
    ] = None,
    in_flight_tokens: Annotated[
        int, typer.Option(min=1, help="vLLM: of a request per step; 1 while it decodes")
    ] = 1,
    disable_hybrid: Annotated[
        bool, typer.Option("--disable-hybrid", help="vLLM without its hybrid manager")
    ] = False,
    swa_ratio: Annotated[float, typer.Option(help="SGLang's --swa-full-tokens-ratio")] = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """Bytes of KV cache per token and request from a model's config.json, and what memory holds."""
    if config is None and (memory or gpu_memory):
        raise ConfigError("memory was given, and no config.json of a model to fill it with")
    if models or config is None:
        for table in (models_table(), pools_table()):
            print(markdown(table), end="\n\n")
        return
    text = read_config(config)
    cache = kv_cache(model_shape(text), dtype, tp, pp)
    answer = cache_answer(cache, dtype, request_tokens)
    budget = stated_budget(text, cache, memory, gpu_memory, utilisation, weights, parameters, other)
    if budget is not None:
        answer["memory"] = [asdict(term) for term in budget.terms]
        answer["kv_bytes"] = budget.kv_bytes
        if engine == "vllm":
            pool = vllm_pool(cache, budget.kv_bytes, block_size or 16, not disable_hybrid)
            answer["vllm"] = vllm_answer(pool, request_tokens, in_flight_tokens)
        else:
            tokens = sglang_pool(cache, budget.kv_bytes, block_size or 1, swa_ratio)
            answer["sglang"] = sglang_answer(tokens, request_tokens)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    console = Console()
    for name, line in text_lines(cache, answer):
        console.print(f"{name:<12}{line}", highlight=False, markup=False, soft_wrap=True)


def size_bytes(text: str) -> int:
    """Bytes of "60GiB", "24 GB" or a plain number; ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in UNIT_BYTES:
        raise ConfigError(f"{text!r} is no amount of memory: write it as 60GiB")
    return int(Decimal(found[1]) * UNIT_BYTES[found[2]])


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ConfigError where there is none."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a model's config.json: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return config


def stated_budget(
    config: dict[str, Any],
    cache: KvCache,
    memory: str | None,
    gpu_memory: str | None,
    utilisation: float | None,
    weights: str | None,
    parameters: int | None,
    other: str | None,
) -> KvBudget | None:
    """Memory for KV per GPU from what was stated; None where nothing was.

    Raises ConfigError where a term is missing, doubled, or not to be had from the config.
    """
    if (memory is None) == (gpu_memory is None):
        if memory is None:
            return None
        raise ConfigError("--memory is for KV alone, --gpu-memory of the whole GPU: give one")
    if memory is not None:
        return KvBudget((MemoryTerm("for KV", size_bytes(memory), f"given: {memory}"),))
    assert gpu_memory is not None
    if utilisation is None or other is None or (weights is None) == (parameters is None):
        raise ConfigError(
            "--gpu-memory needs --utilisation, --other, and --weights or --parameters: the "
            "engine's start-up log has all of them"
        )
    if weights is not None:
        taken = MemoryTerm("weights", size_bytes(weights), f"given: {weights}")
    else:
        assert parameters is not None
        own = cache.shape.dtype
        if own not in VALUE_BYTES or config.get("quantization_config"):
            raise ConfigError("bytes per parameter are open or quantised: give --weights")
        taken = even_weights(
            parameters, VALUE_BYTES[own], cache.tensor_parallel * cache.pipeline_parallel
        )
    rest = MemoryTerm("other", size_bytes(other), f"given: {other}")
    return kv_budget(size_bytes(gpu_memory), utilisation, taken, rest)


def cache_answer(cache: KvCache, dtype: str, request_tokens: int | None) -> Answer:
    """What holds of the model whatever the memory, as one JSON object."""
    shape = cache.shape
    answer: Answer = {
        "model_type": shape.model_type,
        "layers": {kind: shape.layers.count(kind) for kind in shape.kinds},
        "window_tokens": shape.window_tokens,
        "kv_heads": shape.kv_heads,
        "values_per_head": shape.values_per_head,
        "latent": shape.latent,
        "dtype": cache.dtype,
        "bytes_per_token": cache.token_bytes(),
        "bytes_per_token_of": {kind: cache.token_bytes(kind) for kind in shape.kinds},
        "tensor_parallel": cache.tensor_parallel,
        "pipeline_parallel": cache.pipeline_parallel,
        "kv_heads_per_rank": cache.rank_heads,
        "copies": cache.copies,
        "rests_on": [
            *shape.read,
            f"{cache.dtype}: {'dtype of the model' if dtype == 'auto' else 'given'}",
        ],
    }
    if request_tokens:
        answer["request_tokens"] = request_tokens
        answer["request_bytes"] = cache.request_bytes(request_tokens)
    return answer


def vllm_answer(pool: VllmPool, request_tokens: int | None, in_flight_tokens: int) -> Answer:
    """vLLM's pool, and what it holds of requests of one length."""
    answer = asdict(pool) | {"logged_tokens": pool.logged_tokens}
    if request_tokens:
        answer |= {
            "in_flight_tokens": in_flight_tokens,
            "request_blocks": pool.request_blocks(request_tokens, in_flight_tokens),
            "requests": pool.requests(request_tokens, in_flight_tokens),
            "capacity_tokens": pool.capacity_tokens(request_tokens, in_flight_tokens),
        }
    return answer


def sglang_answer(pool: SglangPool, request_tokens: int | None) -> Answer:
    """SGLang's pool, and what it holds of requests of one length."""
    answer = asdict(pool)
    if request_tokens:
        answer["capacity_tokens"] = pool.capacity_tokens(request_tokens)
    return answer


def text_lines(cache: KvCache, answer: Answer) -> list[tuple[str, str]]:
    """The answer as a reader sees it: a name and a sentence per line."""
    heads = "one latent" if answer["latent"] else f"{answer['kv_heads']} KV heads"
    parts = " + ".join(f"{grouped(b)} {kind}" for kind, b in answer["bytes_per_token_of"].items())
    lines = [
        ("model", f"{answer['model_type']}: {layers_text(cache.shape)} layers"),
        ("per layer", f"{heads} x {answer['values_per_head']} values in {answer['dtype']}"),
        ("per token", f"{grouped(answer['bytes_per_token'])} bytes = {parts}"),
    ]
    if answer["tensor_parallel"] > 1:
        copies = f", each kept on {answer['copies']} ranks" if answer["copies"] > 1 else ""
        lines.append(("per rank", f"{answer['kv_heads_per_rank']} of them{copies}"))
    if "request_bytes" in answer:
        request = grouped(answer["request_tokens"])
        lines.append(("request", f"{grouped(answer['request_bytes'])} bytes for {request} tokens"))
    for term in answer.get("memory", []):
        lines.append(
            ("memory", f"{grouped(term['bytes'])} bytes {term['name']} ({term['source']})")
        )
    if len(answer.get("memory", [])) > 1:
        lines.append(("memory", f"{grouped(answer['kv_bytes'])} bytes left for KV per GPU"))
    lines += _pool_lines(answer)
    return lines + [("rests on", sentence) for sentence in answer["rests_on"]]


def _pool_lines(answer: Answer) -> list[tuple[str, str]]:
    if pool := answer.get("vllm"):
        kinds = {kind: pool["groups"].count(kind) for kind in pool["groups"]}
        groups = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines = [
            (
                "vLLM",
                f"{grouped(pool['num_blocks'])} blocks of {pool['block_tokens']} tokens and "
                f"{grouped(pool['block_bytes'])} bytes, one never given out; layer groups: {groups} "
                "(counted as vLLM 0.32 does)",
            ),
            ("tokens", f"{grouped(pool['logged_tokens'])} if every layer keeps every token"),
        ]
        if "requests" in pool:
            lines.append(
                (
                    "capacity",
                    f"{grouped(pool['requests'])} requests of {grouped(answer['request_tokens'])} "
                    f"tokens at {grouped(pool['request_blocks'])} blocks each, or "
                    f"{grouped(pool['capacity_tokens'])} tokens",
                )
            )
        return lines
    if pool := answer.get("sglang"):
        window = pool["window_pool_tokens"]
        second = "" if window is None else f", window layers {grouped(window)}"
        lines = [
            (
                "SGLang",
                f"{grouped(pool['full_pool_tokens'])} tokens{second} (counted as SGLang 0.5.23 does)",
            )
        ]
        if "capacity_tokens" in pool:
            held = grouped(pool["capacity_tokens"])
            lines.append(("capacity", f"{held} tokens in requests of that length"))
        return lines
    return []
