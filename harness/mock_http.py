"""The mock server's HTTP side: vLLM 0.32.0's routes, answers and errors around `PacedEngine`.

The output of a request has exactly ``max_tokens`` tokens, with or without ignore_eos. Nothing here
shows the step law, ``max_num_seqs`` or the token budget.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from aiohttp import web

from harness.mock import Job, MockConfig, PacedEngine
from harness.mock_dialect import (
    CHAT,
    COMPLETION,
    VOCABULARY,
    ApiError,
    Asked,
    Shape,
    TokenStream,
    Words,
    asked_for,
    cache_config,
    chunk_head,
    integer,
    is_token_ids,
    messages_text,
    prompt_ids,
    whole_answer,
    words_to_ids,
)
from harness.mock_metrics import MetricsText

VLLM_VERSION = "0.32.0"
MAX_BODY_BYTES = 64 * 1024 * 1024
BACKLOG = 4096
SHUTDOWN_S = 0.1


class Server:
    """The routes."""

    def __init__(self, config: MockConfig, engine: PacedEngine) -> None:
        self.config = config
        self.engine = engine
        self.started_s = int(time.time())
        self._cycle = [b" w%d" % i for i in range(VOCABULARY)]
        Random(config.seed).shuffle(self._cycle)
        self._answers = 0
        self._metrics = MetricsText(
            config.model, cache_config(config), engine.histograms, time.time()
        )

    def app(self) -> web.Application:
        app = web.Application(middlewares=[errors_as_json], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat),
                web.get("/v1/models", self.models),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/metrics", self.metrics),
                web.get("/version", self.version),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.post("/ping", self.health),
            ]
        )
        return app

    # -- generation ------------------------------------------------------------------------------

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        prompt_tokens = len(prompt_ids(body.get("prompt")))
        asked = asked_for(
            body, prompt_tokens, integer(body, "max_tokens", 16), self.config.max_model_len
        )
        return await self._answer(request, COMPLETION, asked)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        prompt_tokens = len(words_to_ids(messages_text(body)))
        rest = max(self.config.max_model_len - prompt_tokens, 1)
        declared = integer(body, "max_completion_tokens", integer(body, "max_tokens", rest))
        asked = asked_for(body, prompt_tokens, declared, self.config.max_model_len)
        return await self._answer(request, CHAT, asked)

    async def _answer(self, request: web.Request, shape: Shape, asked: Asked) -> web.StreamResponse:
        answer_id = shape.id_prefix + uuid.uuid4().hex
        words = Words(self._cycle, self._answers * 7919)
        self._answers += 1
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if asked.stream:
            head = chunk_head(answer_id, shape, int(time.time()), self.config.model)
            return await self._stream(request, shape, asked, head, words, done)

        def push(_: int, finished: bool) -> None:
            if finished and not done.done():
                done.set_result(None)

        await self._wait(self.engine.submit(asked.prompt_tokens, asked.output_tokens, push), done)
        text = words.text(0, asked.output_tokens).decode()
        return web.json_response(whole_answer(answer_id, shape, self.config.model, text, asked))

    async def _stream(
        self,
        request: web.Request,
        shape: Shape,
        asked: Asked,
        head: bytes,
        words: Words,
        done: asyncio.Future[None],
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8"},
        )
        response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client went away before its answer began")
        interval = self.config.stream_interval
        stream = TokenStream(transport, shape, asked, head, words, interval, done)
        job = self.engine.submit(asked.prompt_tokens, asked.output_tokens, stream.push)
        await self._wait(job, done)
        return response

    async def _wait(self, job: Job, done: asyncio.Future[None]) -> None:
        """Wait for the last token; a client that goes away cancels this and frees its blocks."""
        try:
            await done
        except asyncio.CancelledError:
            self.engine.abandon(job)
            raise

    # -- the rest --------------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        card = {
            "id": self.config.model,
            "object": "model",
            "created": self.started_s,
            "owned_by": "vllm",
            "root": self.config.model,
            "parent": None,
            "max_model_len": self.config.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{uuid.uuid4().hex}",
                    "object": "model_permission",
                    "created": self.started_s,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }
        return web.json_response({"object": "list", "data": [card]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        text = messages_text(body) if "messages" in body else body.get("prompt")
        if not isinstance(text, str):
            raise ApiError("prompt must be a string.", "prompt")
        ids = words_to_ids(text)
        strings = text.split() or [""] if body.get("return_token_strs") else None
        return web.json_response(
            {
                "count": len(ids),
                "max_model_len": self.config.max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        tokens = (await self._body(request)).get("tokens")
        if not is_token_ids(tokens):
            raise ApiError("tokens must be a list of token ids.", "tokens")
        return web.json_response({"prompt": " ".join(f"w{token}" for token in tokens or [])})

    async def metrics(self, request: web.Request) -> web.Response:
        page = self._metrics.render(self.engine.shown)
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=page, headers={"Content-Type": kind})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": VLLM_VERSION, "critrate_mock": True})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _body(self, request: web.Request) -> dict[str, Any]:
        """The request's JSON object, for a model that is served here."""
        try:
            body = json.loads(await request.read())
        except ValueError as error:
            raise ApiError(f"The request body is not valid JSON: {error}.", "body") from error
        if not isinstance(body, dict):
            raise ApiError("The request body must be a JSON object.", "body")
        model = body.get("model")
        if model and model != self.config.model:
            raise ApiError(
                f"The model `{model}` does not exist. Valid aliases: {self.config.model}.",
                "model",
                404,
            )
        return body


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error as the JSON object that vLLM answers with."""
    try:
        return await handler(request)
    except ApiError as error:
        return web.json_response(error.body, status=error.code)
    except web.HTTPException as error:
        body = {
            "message": error.reason,
            "type": error.reason,
            "param": None,
            "code": error.status,
        }
        return web.json_response({"error": body}, status=error.status)


# -- running it ------------------------------------------------------------------------------------


async def serve(
    config: MockConfig, ready: Callable[[int], None] | None, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set; call ``ready`` with the port once connections are accepted.

    Raises OSError if the port is taken, and whatever made the engine fail.
    """
    engine = PacedEngine(config, asyncio.get_running_loop())
    runner = web.AppRunner(
        Server(config, engine).app(),
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
