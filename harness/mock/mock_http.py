"""Serving the mock over HTTP, in the dialect of the engine that its limits name."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from harness.mock.mock import MockConfig, PacedEngine
from harness.mock.mock_answers import as_json
from harness.mock.mock_requests import ApiError, NoSuchRoute
from harness.mock.mock_sglang import SGLangServer
from harness.mock.mock_sglang_dialect import error_body as sglang_error
from harness.mock.mock_vllm import VLLMServer
from harness.mock.mock_vllm_dialect import error_body as vllm_error

MAX_BODY_BYTES = 64 * 1024 * 1024
BACKLOG = 4096
SHUTDOWN_S = 0.1

ErrorBody = Callable[[str, ApiError], dict[str, Any]]
"""The JSON of a refusal on the route of this path."""


def application(config: MockConfig, engine: PacedEngine) -> web.Application:
    """The routes of the dialect, its errors included."""
    sglang = config.limits.sglang is not None
    shown = errors_as_json(sglang_error if sglang else vllm_error)
    app = web.Application(middlewares=[shown], client_max_size=MAX_BODY_BYTES)
    server = SGLangServer(config, engine) if sglang else VLLMServer(config, engine)
    app.add_routes(server.routes())
    return app


def errors_as_json(error_body: ErrorBody) -> Middleware:
    """Every error as the JSON object that the dialect answers with."""

    @web.middleware
    async def answer(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return as_json(error_body(request.path, error), error.code)
        except web.HTTPException as error:
            unknown = NoSuchRoute(error.reason, code=error.status)
            allowed = {k: v for k, v in error.headers.items() if k == "Allow"}
            return as_json(error_body(request.path, unknown), error.status, allowed)

    return answer


async def serve(
    config: MockConfig, ready: Callable[[int], None] | None, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set; call ``ready`` with the port once connections are accepted.

    Raises OSError if the port is taken, and whatever made the engine fail.
    """
    engine = PacedEngine(config, asyncio.get_running_loop())
    runner = web.AppRunner(
        application(config, engine),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S,
    )
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await runner.setup()
        await web.TCPSite(runner, config.host, config.port, backlog=BACKLOG).start()
        if ready is not None:
            ready(runner.addresses[0][1])
        ends: set[asyncio.Future[Any]] = {stopped, engine.failed}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if engine.failed.done():
            engine.failed.result()
    finally:
        stopped.cancel()
        await runner.cleanup()
        engine.close()


def run_mock(config: MockConfig) -> None:
    """Serve in this process until SIGTERM or SIGINT.

    Prints one line, ``listening on http://HOST:PORT``, once connections are accepted.
    """
    # One connection per waiting request: an overloaded server needs thousands of them.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve_until_signal(config))


async def _serve_until_signal(config: MockConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready(port: int) -> None:
        gc.collect()
        gc.freeze()
        print(f"listening on http://{config.host}:{port}", flush=True)

    await serve(config, ready, stop)
