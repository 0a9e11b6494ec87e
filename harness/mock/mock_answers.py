"""Turns what the mock's engine delivers into answers: whole, or as server-sent events.

The two dialects differ in bytes alone: a `Shape` holds those of one OpenAI route.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from aiohttp import web

from harness.mock.mock import MockConfig, PacedEngine
from harness.mock.mock_books import Job
from harness.mock.mock_requests import VOCABULARY, Asked

Events = Callable[[Job, int, int, bool], bytes]
"""The event that brings a job's output tokens ``first`` to ``outputs`` - 1, the last ones or not."""
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The JSON around the text of an answer, from the choices on, with holes for what varies."""

    object: str
    chunk_object: str
    choice: bytes
    """Holes: text, finish reason, what stopped it."""
    no_usage: bytes
    """End of a chunk without usage."""
    usage: bytes
    """End of a chunk with usage. Holes: prompt, total and output tokens."""
    final_usage: bytes
    """The same for the last chunk, which has no choices."""
    first_choice: bytes | None = None
    """The choice of a chunk that precedes the first token; None where there is none."""
    last_choice: bytes | None = None
    """That of a chunk which brings the finish reason after the text. Holes: the reason, the stop."""
    usage_from_the_first: bool = True
    """Do the chunks without text carry usage?"""


class Words:
    """The words of one output: a stretch of a fixed cycle of words."""

    __slots__ = ("_cycle", "_start")

    def __init__(self, cycle: list[bytes], start: int) -> None:
        self._cycle = cycle
        self._start = start

    def text(self, first: int, end: int) -> bytes:
        """Words ``first`` to ``end`` - 1, each with a leading blank."""
        cycle, start = self._cycle, self._start
        if end - first == 1:
            return cycle[(start + first) % VOCABULARY]
        return b"".join(cycle[(start + i) % VOCABULARY] for i in range(first, end))


class ChunkEvents:
    """The chunks of one streamed answer of an OpenAI route."""

    __slots__ = ("_asked", "_head", "_shape", "_words")

    def __init__(self, shape: Shape, asked: Asked, head: bytes, words: Words) -> None:
        self._shape, self._asked, self._head, self._words = shape, asked, head, words

    def __call__(self, _: Job, first: int, outputs: int, finished: bool) -> bytes:
        shape, head, asked = self._shape, self._head, self._asked
        end = asked.shown_tokens if finished else outputs
        text = self._words.text(first, end)
        reason, stop = _ending(asked) if finished else (b"null", b"null")
        event = b""
        if first == 0 and shape.first_choice is not None:
            event = head + shape.first_choice + self._usage(0, shape.usage_from_the_first)
        if shape.last_choice is None:
            event += head + shape.choice % (text, reason, stop) + self._usage(outputs)
        else:
            if text:
                event += head + shape.choice % (text, b"null", b"null") + self._usage(outputs)
            if finished:
                event += head + shape.last_choice % (reason, stop)
                event += self._usage(outputs, shape.usage_from_the_first)
        if not finished:
            return event
        if asked.include_usage:
            event += head + b"]" + shape.final_usage % self._counts(outputs)
        return event + DONE

    def _usage(self, outputs: int, carried: bool = True) -> bytes:
        if carried and self._asked.continuous_usage:
            return self._shape.usage % self._counts(outputs)
        return self._shape.no_usage

    def _counts(self, outputs: int) -> tuple[int, int, int]:
        prompt_tokens = self._asked.prompt_tokens
        return prompt_tokens, prompt_tokens + outputs, outputs


def as_json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer without blanks and with a bare content type, as both engines' frameworks give it."""
    return web.Response(
        body=json.dumps(data, separators=(",", ":")).encode(),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def _ending(asked: Asked) -> tuple[bytes, bytes]:
    stop = b"null" if asked.stop_token is None else b"%d" % asked.stop_token
    return b'"%b"' % asked.finish_reason.encode(), stop


def chunk_head(answer_id: str, shape: Shape, created: int, model: str) -> bytes:
    """A chunk from its start to the opening bracket of its choices."""
    fields = {"id": answer_id, "object": shape.chunk_object, "created": created, "model": model}
    return b"data: " + json.dumps(fields, separators=(",", ":"))[:-1].encode() + b',"choices":['


class TokenStream:
    """Turns delivered tokens into server-sent events on one connection.

    The events go straight to the transport, framed as HTTP chunks: the step loop writes without
    waking a task per token. A client that does not read is buffered, up to its own output.
    """

    __slots__ = ("_done", "_events", "_interval", "_sent", "_transport", "job")

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        events: Events,
        interval: int,
        done: asyncio.Future[None],
    ) -> None:
        self._transport, self._events, self._interval = transport, events, interval
        self._done = done
        self._sent = 0
        self.job: Job | None = None

    def push(self, outputs: int, finished: bool) -> None:
        """One more token: the first and the last go out at once, others every ``interval``."""
        if not finished and (outputs - 1) % self._interval:
            return
        assert self.job is not None
        event = self._events(self.job, self._sent, outputs, finished)
        self._sent = outputs
        if finished and not self._done.done():
            self._done.set_result(None)
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))


class Answers:
    """Hands requests to the engine and follows them to their end."""

    def __init__(self, config: MockConfig, engine: PacedEngine) -> None:
        self._engine = engine
        self._interval = config.stream_interval
        self._cycle = [b" w%d" % i for i in range(VOCABULARY)]
        Random(config.seed).shuffle(self._cycle)
        self._given = 0

    def words(self) -> Words:
        """The words of the next answer."""
        self._given += 1
        return Words(self._cycle, (self._given - 1) * 7919)

    async def whole(self, asked: Asked, refused: bool = False) -> Job:
        """Wait until the request has its last token, which no client sees if it is ``refused``."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def push(_: int, finished: bool) -> None:
            if finished and not done.done():
                done.set_result(None)

        job = self._submitted(asked, push)
        job.refused = refused
        await self._wait(job, done)
        return job

    async def streamed(
        self, request: web.Request, asked: Asked, events: Events
    ) -> web.StreamResponse:
        """Write the request's events as its tokens come."""
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8"},
        )
        response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client went away before its answer began")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stream = TokenStream(transport, events, self._interval, done)
        stream.job = self._submitted(asked, stream.push)
        await self._wait(stream.job, done)
        return response

    def _submitted(self, asked: Asked, push: Callable[[int, bool], None]) -> Job:
        return self._engine.submit(
            asked.prompt_tokens,
            asked.output_tokens,
            asked.max_tokens,
            asked.ignore_eos,
            push,
            streamed=asked.stream,
        )

    async def _wait(self, job: Job, done: asyncio.Future[None]) -> None:
        """Wait for the last token; a client that goes away cancels this and frees its blocks."""
        try:
            await done
        except asyncio.CancelledError:
            self._engine.abandon(job)
            raise
