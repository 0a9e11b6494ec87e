"""The limits that a server shows of itself, and how its pages are fetched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp

from analysis.schedulers.engine import SGLangRules
from harness.servers.server import WANTS_KEY, answered
from loadgen.mendable import Mendable


class LimitsUnreadable(Mendable):
    """The server does not show a limit that the prediction needs, or one that it cannot predict."""


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
    sglang: SGLangRules | None = None
    """How SGLang reserves; None for vLLM, which does not."""
    decode_log_interval: int | None = None
    """Decode steps between two refreshes of SGLang's gauges."""
    not_shown: tuple[str, ...] = ()
    """Names of the fields above that are None."""


async def served_model(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The first model of /v1/models, with ``id`` and ``max_model_len``."""
    models = await get_json(session, f"{url}/v1/models")
    if models is None or not models.get("data"):
        raise LimitsUnreadable(f"{url}/v1/models names no model: is this an OpenAI-style server?")
    model: dict[str, Any] = models["data"][0]
    return model


def missing_fields(fields: dict[str, Any]) -> tuple[str, ...]:
    """Names of the fields that the server does not show."""
    return tuple(name for name, value in fields.items() if value is None)


async def get_text(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    """Status and text of the page. Raises LimitsUnreadable when nothing answers or a key is wanted."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=30.0)) as response:
            if response.status in WANTS_KEY:
                raise LimitsUnreadable(f"{url}: the server {answered(response.status)}")
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        # Not its repr: that of aiohttp's own errors may hold the headers that were sent.
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise LimitsUnreadable(f"cannot read {url}: {what}; is the server running?") from error


async def get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    """The JSON object at ``url``; None where the server has none there."""
    status, text = await get_text(session, url)
    if status != 200:
        return None
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None
