"""The mock server as SGLang 0.5.23: its routes, answers and errors around `PacedEngine`.

Nothing here shows the step law. As SGLang does, it shows the limits of its scheduler in /server_info,
and it serves any model's name. Known differences, beside those that the metrics name:

- /health and /health_generate answer at once; the real ones take a second and, of an idle server,
  compute a request of one token;
- a request that is clipped to the pool ends a token (with pages: up to a page) earlier, and where
  the real server would stand still (`ignore_eos`, no radix cache) it is served;
- n above 1, batches in one body and an output of no tokens are refused; stop strings, log
  probabilities and the chat template are missing, so are the routes /abort_request and /slow_down;
- validation errors are other words; /model_info shows no `embedding`, /server_info only the
  arguments that matter to a scheduler; there are no CORS headers.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from harness.mock.mock import MockConfig, PacedEngine
from harness.mock.mock_answers import Answers, ChunkEvents, Events, Shape, as_json, chunk_head
from harness.mock.mock_requests import (
    ApiError,
    Asked,
    MalformedBody,
    ids_to_words,
    integer,
    json_object,
    messages_text,
    prompt_ids,
    text_to_tokenize,
    words_to_ids,
)
from harness.mock.mock_sglang_books import SGLangBooks
from harness.mock.mock_sglang_dialect import (
    CHAT,
    COMPLETION,
    GenerateEvents,
    aborted,
    flat_error,
    generated,
    stream_error,
    whole_answer,
)
from harness.mock.mock_sglang_info import (
    LOADS_SECTIONS,
    as_prometheus,
    loads,
    model_info,
    server_info,
)
from harness.mock.mock_sglang_intake import (
    DEFAULT_NEW_TOKENS,
    TooLongForPool,
    asked_for,
    check_fields,
)
from harness.mock.mock_sglang_metrics import SGLangMetrics

TEXT = "text/plain; version=0.0.4; charset=utf-8"
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. (When there are running or "
    "waiting requests, the operation will not be performed.)\n"
)
NOT_FLUSHED = "Flush cache failed.\n"
NOT_IDLE = "Timed out waiting for idle state."
FLUSH_POLL_S = 0.005


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SGLangServer:
    """The routes."""

    def __init__(self, config: MockConfig, engine: PacedEngine) -> None:
        assert isinstance(engine.books, SGLangBooks)
        self.config = config
        self.books = engine.books
        self.answers = Answers(config, engine)
        self.started_s = int(time.time())
        claimed = config.claimed_num_blocks or config.limits.num_blocks
        self._metrics = SGLangMetrics(
            config.model,
            config.limits,
            claimed * config.limits.block_size,
            config.max_model_len,
        )

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/generate", self.generate),
            web.put("/generate", self.generate),
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat),
            _get("/v1/models", self.models),
            _get("/v1/models/{model:.+}", self.model),
            _get("/v1/loads", self.loads),
            *(web.post(f"{v}/tokenize", self.tokenize) for v in ("", "/v1")),
            *(web.post(f"{v}/detokenize", self.detokenize) for v in ("", "/v1")),
            web.get("/metrics", self.metrics),
            *(_get(path, self.server_info) for path in ("/server_info", "/get_server_info")),
            *(_get(path, self.model_info) for path in ("/model_info", "/get_model_info")),
            *(web.route(method, "/flush_cache", self.flush_cache) for method in ("GET", "POST")),
            *(
                _get(path, self.health)
                for path in ("/health", "/health_generate", "/ping", "/ready")
            ),
        ]

    # -- generation ------------------------------------------------------------------------------

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await json_object(request)
        rid = str(body.get("rid") or uuid.uuid4().hex)
        try:
            asked = self._generation(body)
        except MalformedBody:
            raise
        except TooLongForPool as error:
            return await self._refused_by_scheduler(request, error, body, rid)
        except ApiError as error:
            if not body.get("stream"):
                raise
            return _begun_stream(stream_error(request.path, error))
        words = self.answers.words()
        if asked.stream:
            return await self.answers.streamed(request, asked, GenerateEvents(asked, rid, words))
        job = await self.answers.whole(asked)
        text = words.text(0, asked.shown_tokens)
        answer = generated(job, asked, rid, text, finished=True)
        return web.Response(body=answer, content_type="application/json")

    def _generation(self, body: dict[str, Any]) -> Asked:
        text, ids = body.get("text"), body.get("input_ids")
        sampling = body.get("sampling_params") or {}
        if text is None and ids is None:
            raise ApiError("Either text, input_ids or input_embeds should be provided.")
        several = isinstance(ids, list) and ids and isinstance(ids[0], list)
        if isinstance(text, list) or isinstance(sampling, list) or several:
            raise ApiError("Batches are not served here: send one request per prompt.")
        if not isinstance(sampling, dict):
            raise MalformedBody("sampling_params must be an object.", "sampling_params")
        check_fields(sampling)
        if ids == []:
            raise ApiError("input_ids cannot be empty.")
        prompt_tokens = len(prompt_ids(text if ids is None else ids))
        least = integer(sampling, "min_new_tokens", 0)
        # Null means no limit but that of the server; the default counts only where the key is absent.
        most: int | None = DEFAULT_NEW_TOKENS
        if "max_new_tokens" in sampling:
            most = integer(sampling, "max_new_tokens", -1)
            most = None if sampling["max_new_tokens"] is None else most
        return asked_for(self.config, body, sampling, prompt_tokens, most, least)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._openai_body(request)
        most = integer(body, "max_tokens", 16)
        if most < 1:
            raise MalformedBody("max_tokens must be positive", "max_tokens")
        if body.get("prompt") is None:
            raise MalformedBody("Field required: prompt", "prompt")
        if not body["prompt"]:
            raise ApiError("Prompt cannot be empty")
        prompt_tokens = len(prompt_ids(body["prompt"]))
        return await self._answer(request, COMPLETION, body, prompt_tokens, most)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._openai_body(request)
        prompt_tokens = len(words_to_ids(messages_text(body)))
        most = integer(body, "max_completion_tokens", 0) or integer(body, "max_tokens", 0) or None
        return await self._answer(request, CHAT, body, prompt_tokens, most)

    async def _answer(
        self,
        request: web.Request,
        shape: Shape,
        body: dict[str, Any],
        prompt_tokens: int,
        most: int | None,
    ) -> web.StreamResponse:
        least = integer(body, "min_tokens", 0)
        rid = str(body.get("rid") or uuid.uuid4().hex)
        try:
            asked = asked_for(self.config, body, body, prompt_tokens, most, least)
        except TooLongForPool as error:
            return await self._refused_by_scheduler(request, error, body, rid)
        model = str(body.get("model") or "default")
        words = self.answers.words()
        if asked.stream:
            head = chunk_head(rid, shape, int(time.time()), model)
            events: Events = ChunkEvents(shape, asked, head, words)
            return await self.answers.streamed(request, asked, events)
        await self.answers.whole(asked)
        text = words.text(0, asked.shown_tokens).decode()
        return as_json(whole_answer(rid, shape, model, text, asked))

    async def _refused_by_scheduler(
        self, request: web.Request, error: ApiError, body: dict[str, Any], rid: str
    ) -> web.Response:
        """One token takes the place of the prompt; the refusal follows when it has been computed.

        A stream has begun by then, and brings it.
        """
        asked = Asked(
            prompt_tokens=1,
            output_tokens=1,
            max_tokens=1,
            ignore_eos=False,
            stop_token=None,
            stream=bool(body.get("stream")),
        )
        job = await self.answers.whole(asked, refused=True)
        if not asked.stream:
            raise error
        if request.path == "/generate":
            return _begun_stream(aborted(job, asked, rid, error))
        return _begun_stream(stream_error(request.path, error))

    async def _openai_body(self, request: web.Request) -> dict[str, Any]:
        if request.content_type != "application/json":
            raise MalformedBody("Unsupported Media Type: Only 'application/json' is allowed")
        return await json_object(request)

    # -- the rest --------------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        return as_json({"object": "list", "data": [self._card()]})

    async def model(self, request: web.Request) -> web.Response:
        asked = request.match_info["model"]
        if asked == self.config.model:
            return as_json(self._card())
        error = {
            "message": f"The model '{asked}' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        return as_json({"error": error}, 404)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.config.model,
            "object": "model",
            "created": self.started_s,
            "owned_by": "sglang",
            "root": self.config.model,
            "parent": None,
            "max_model_len": self.config.max_model_len,
        }

    async def loads(self, request: web.Request) -> web.Response:
        asked = request.query.get("include", "all")
        sections = {name.strip() for name in asked.split(",")}
        if not sections <= LOADS_SECTIONS:
            error = (
                f"Invalid include sections: {sections - LOADS_SECTIONS}. Valid options: "
                f"{sorted(LOADS_SECTIONS)}"
            )
            return as_json(flat_error(error, "400", 400), 400)
        load = loads(self.config, self.books, sections)
        if request.query.get("format") == "prometheus":
            return web.Response(body=as_prometheus(load), headers={"Content-Type": TEXT})
        return as_json(
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "version": self.config.sglang.version,
                "accelerator": None,
                "num_accelerators": 1,
                "loads": [load],
            }
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        ids = words_to_ids(text_to_tokenize(await self._openai_body(request)))
        return as_json(
            {"tokens": ids, "count": len(ids), "max_model_len": self.config.max_model_len}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        tokens = (await self._openai_body(request)).get("tokens")
        return as_json({"text": ids_to_words(tokens)})

    async def metrics(self, request: web.Request) -> web.Response:
        self.books.log_idle()
        return web.Response(body=self._metrics.render(self.books), headers={"Content-Type": TEXT})

    async def server_info(self, request: web.Request) -> web.Response:
        return as_json(server_info(self.config, self.books))

    async def model_info(self, request: web.Request) -> web.Response:
        return as_json(model_info(self.config))

    async def flush_cache(self, request: web.Request) -> web.Response:
        timeout_s = _timeout_s(request)
        deadline_s = time.monotonic() + timeout_s
        while not self.books.flush():
            if time.monotonic() >= deadline_s:
                return web.Response(text=NOT_IDLE if timeout_s else NOT_FLUSHED, status=400)
            await asyncio.sleep(FLUSH_POLL_S)
        return web.Response(text=FLUSHED)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()


def _get(path: str, handler: Handler) -> web.RouteDef:
    """A route that answers no HEAD."""
    return web.get(path, handler, allow_head=False)


def _begun_stream(events: bytes) -> web.Response:
    return web.Response(body=events, headers={"Content-Type": "text/event-stream; charset=utf-8"})


def _timeout_s(request: web.Request) -> float:
    """How long /flush_cache may wait for an idle server. Raises MalformedBody on anything odd."""
    try:
        timeout_s = float(request.query.get("timeout", "0"))
    except ValueError as error:
        raise MalformedBody("timeout must be a number of seconds", "timeout") from error
    if not timeout_s >= 0:
        raise MalformedBody("timeout must not be negative", "timeout")
    return timeout_s
