"""Servers on a free port for the length of a talk: a mock, or pages; and how streams are read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from aiohttp import web

from harness.mock.mock import MockConfig
from harness.mock.mock_http import serve

Talk = Callable[[aiohttp.ClientSession], Awaitable[Any]]
Pages = Mapping[str, str | dict[str, object]]


def with_server(config: MockConfig, talk: Talk) -> Any:
    """Run ``talk`` against a mock on a free port, in one event loop."""

    async def run() -> Any:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        server = asyncio.ensure_future(serve(config, port.set_result, stop))
        try:
            base = f"http://127.0.0.1:{await port}"
            async with aiohttp.ClientSession(base) as session:
                return await talk(session)
        finally:
            stop.set()
            await server

    return asyncio.run(run())


async def events(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a streamed answer, without the closing ``[DONE]``, which must be there."""
    async with session.post(path, json=body) as response:
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = await response.text()
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def with_pages(pages: Pages, read: Callable[[aiohttp.ClientSession, str], Awaitable[Any]]) -> Any:
    """What ``read`` makes of a server that has these pages, texts or JSON, and no others."""

    async def answer(request: web.Request) -> web.Response:
        page = pages.get(request.path)
        if page is None:
            raise web.HTTPNotFound
        return web.Response(text=page if isinstance(page, str) else json.dumps(page))

    async def run() -> Any:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            async with aiohttp.ClientSession() as session:
                return await read(session, f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    return asyncio.run(run())
