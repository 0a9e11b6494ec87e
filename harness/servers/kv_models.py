"""Well-known models with the figures that others publish for them, and our own derived anew.

The data in ``data/kv_models.json`` are the config keys of each model, the published bytes per token
and the pools that engines logged at start, each with its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from typing import Any

from analysis.numbers.formatting import grouped
from analysis.theory.kv_cache import KvCache, kv_cache
from analysis.theory.kv_pools import sglang_pool, vllm_pool
from analysis.theory.model_shape import ModelShape, model_shape

UNIT_BYTES = {
    **{"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
Interval = tuple[Decimal, Decimal]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model of the table: its cache as derived here, and what others say it is."""

    name: str
    cache: KvCache
    published: tuple[Mapping[str, Any], ...]
    config_source: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KnownPool:
    """A pool that an engine logged; ``derived`` is ours over the rounding of the logged memory."""

    model: str
    row: Mapping[str, Any]
    derived: Mapping[str, Interval]


def known_models() -> list[KnownModel]:
    """The models of the table in its order."""
    return [
        KnownModel(
            row["model"],
            kv_cache(model_shape(row["config"]), row["dtype"]),
            tuple(row["published"]),
            row["config_source"],
        )
        for row in _data()["models"]
    ]


def known_pools() -> list[KnownPool]:
    """The logged pools; ``derived`` names the same figures as the row's ``logged``."""
    models = {model.name: model.cache for model in known_models()}
    return [
        KnownPool(row["model"], row, _derived(row, models[row["model"]]))
        for row in _data()["pools"]
    ]


def published_bytes(figure: Mapping[str, Any]) -> Interval:
    """Bytes per token that a published figure may stand for, given the digits it is written with."""
    value = Decimal(figure["value"])
    half = Decimal(1).scaleb(int(value.as_tuple().exponent)) / 2
    factor = Decimal(UNIT_BYTES[figure["unit"]]) / figure["per_tokens"]
    return (value - half) * factor, (value + half) * factor


def layers_text(shape: ModelShape) -> str:
    """The layers in words: "10 full + 52 sliding (1 024)"."""
    parts = [
        f"{shape.layers.count(kind)} {kind}"
        + ("" if kind == "full" else f" ({grouped(shape.window_tokens or 0)})")
        for kind in shape.kinds
    ]
    return " + ".join(parts)


def models_table() -> list[tuple[str, ...]]:
    """Heading and rows: model, layers, KV heads, bytes per token, published, its source."""
    rows: list[tuple[str, ...]] = [
        ("model", "layers (window)", "KV heads x values", "bytes per token", "published", "config")
    ]
    for model in known_models():
        shape = model.cache.shape
        said = [f"{_figure(one)}, {_link(one)}" for one in model.published]
        rows.append(
            (
                model.name,
                layers_text(shape),
                "latent x " * shape.latent
                + ("" if shape.latent else f"{shape.kv_heads} x ")
                + str(shape.values_per_head),
                grouped(model.cache.token_bytes()),
                "; ".join(said) or "none found: own calculation",
                _link(model.config_source),
            )
        )
    return rows


def pools_table() -> list[tuple[str, ...]]:
    """Heading and rows: model, engine and layout, memory for KV, logged, derived, source."""
    rows: list[tuple[str, ...]] = [
        ("model", "layout", "KV memory per GPU", "logged", "derived", "source")
    ]
    for pool in known_pools():
        row = pool.row
        layout = [row["engine"], f"tensor {row['tensor_parallel']}", row["dtype"] or "bf16"]
        if "max_model_len_tokens" in row:
            layout.append(f"max_model_len {grouped(row['max_model_len_tokens'])}")
        rows.append(
            (
                pool.model,
                ", ".join(layout),
                f"{row['kv_gib']} GiB",
                "; ".join(f"{grouped_text(text)} {name}" for name, text in row["logged"].items()),
                "; ".join(_interval(*pool.derived[name]) for name in row["logged"]),
                _link(row),
            )
        )
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows as a Markdown table, the first one its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def grouped_text(text: str) -> str:
    """A number kept as text, thousands set apart, its digits kept."""
    return grouped(float(text), len(text.partition(".")[2]))


def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        (files("harness.servers") / "data" / "kv_models.json").read_text()
    )
    return data


def _derived(row: Mapping[str, Any], model: KvCache) -> dict[str, Interval]:
    cache = kv_cache(model.shape, row["dtype"] or model.dtype, row["tensor_parallel"])
    ends = [
        _pool_figures(row, cache, int((Decimal(row["kv_gib"]) + sign * half) * UNIT_BYTES["GiB"]))
        for half in [Decimal(row["tolerance_gib"])]
        for sign in (-1, 1)
    ]
    return {name: (ends[0][name], ends[1][name]) for name in row["logged"]}


def _pool_figures(row: Mapping[str, Any], cache: KvCache, kv_bytes: int) -> dict[str, Decimal]:
    if row["engine"] == "sglang":
        tokens = sglang_pool(cache, kv_bytes, row["block_tokens"]).full_pool_tokens
        return {"tokens": Decimal(tokens)}
    pool = vllm_pool(cache, kv_bytes, row["block_tokens"])
    figures = {"blocks": Decimal(pool.num_blocks), "tokens": Decimal(pool.logged_tokens)}
    if "max_model_len_tokens" in row:
        at = pool.logged_concurrency(row["max_model_len_tokens"], row["in_flight_tokens"])
        figures["concurrency"] = Decimal(at)
    return figures


def _figure(figure: Mapping[str, Any]) -> str:
    tokens = figure["per_tokens"]
    per = "" if tokens == 1 else f" per {grouped(tokens)} tokens"
    return f"{figure['value']} {figure['unit']}{per}"


def _interval(low: Decimal, high: Decimal) -> str:
    whole = low == low.to_integral_value() and high == high.to_integral_value()
    digits = 0 if whole else 3
    return f"{grouped(float(low), digits)} to {grouped(float(high), digits)}"


def _link(source: Mapping[str, Any]) -> str:
    return f"[{source['name']}]({source['url']})"
