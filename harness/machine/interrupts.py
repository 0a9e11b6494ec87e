"""Ends like an interrupt for every signal that asks a command to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def until_terminated(work: Coroutine[Any, Any, T]) -> T:
    """SIGTERM and a closed terminal end the work as an interrupt does: servers stopped, runs judged."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task
