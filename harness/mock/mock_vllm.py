"""The mock server as vLLM 0.32.0: its routes, answers and errors around `PacedEngine`.

The output of a request has exactly the length that it asks for, with or without ignore_eos. Nothing
here shows the step law, ``max_num_seqs`` or the token budget.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from aiohttp import web

from harness.mock.mock import MockConfig, PacedEngine
from harness.mock.mock_answers import Answers, ChunkEvents, Shape, chunk_head
from harness.mock.mock_requests import (
    ApiError,
    Asked,
    ids_to_words,
    integer,
    json_object,
    messages_text,
    prompt_ids,
    text_to_tokenize,
    words_to_ids,
)
from harness.mock.mock_vllm_books import VLLMBooks
from harness.mock.mock_vllm_dialect import (
    CHAT,
    COMPLETION,
    ID_PREFIX,
    asked_for,
    cache_config,
    whole_answer,
)
from harness.mock.mock_vllm_metrics import metrics_page

VLLM_VERSION = "0.32.0"


class VLLMServer:
    """The routes."""

    def __init__(self, config: MockConfig, engine: PacedEngine) -> None:
        assert isinstance(engine.books, VLLMBooks)
        self.config = config
        self.books = engine.books
        self.answers = Answers(config, engine)
        self.started_s = int(time.time())
        self._metrics = metrics_page(
            config.model, cache_config(config), self.books.histograms, time.time()
        )

    def routes(self) -> list[web.RouteDef]:
        return [
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
        answer_id = ID_PREFIX[shape.object] + uuid.uuid4().hex
        words = self.answers.words()
        if asked.stream:
            head = chunk_head(answer_id, shape, int(time.time()), self.config.model)
            events = ChunkEvents(shape, asked, head, words)
            return await self.answers.streamed(request, asked, events)
        await self.answers.whole(asked)
        text = words.text(0, asked.shown_tokens).decode()
        return web.json_response(whole_answer(answer_id, shape, self.config.model, text, asked))

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
        text = text_to_tokenize(body)
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
        return web.json_response(
            {"prompt": ids_to_words((await self._body(request)).get("tokens"))}
        )

    async def metrics(self, request: web.Request) -> web.Response:
        page = self._metrics.render(self.books.shown)
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=page, headers={"Content-Type": kind})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": VLLM_VERSION, "critrate_mock": True})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _body(self, request: web.Request) -> dict[str, Any]:
        """The request's JSON object, for a model that is served here."""
        body = await json_object(request)
        model = body.get("model")
        if model and model != self.config.model:
            raise ApiError(
                f"The model `{model}` does not exist. Valid aliases: {self.config.model}.",
                "model",
                404,
            )
        return body
