"""Reads back what bounds the server under test."""

from __future__ import annotations

import aiohttp

from harness.servers.engines import EngineFacts
from harness.servers.limits_sglang import read_sglang_limits
from harness.servers.limits_vllm import read_vllm_limits
from harness.servers.server_limits import ServerLimits


async def read_limits(
    session: aiohttp.ClientSession, url: str, facts: EngineFacts, num_blocks: int | None = None
) -> ServerLimits:
    """The limits that the server at ``url`` (``http://host:port``, nothing behind it) shows.

    ``num_blocks`` are the usable blocks that the configuration states, for a server that hides its
    own. Raises LimitsUnreadable with what to do.
    """
    if facts.dialect == "sglang":
        return await read_sglang_limits(session, url, facts, num_blocks)
    # vLLM counts its null block.
    blocks = None if num_blocks is None else num_blocks + 1
    return await read_vllm_limits(session, url, facts, blocks)
