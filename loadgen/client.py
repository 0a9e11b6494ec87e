"""The general client: aiohttp, for TLS and whatever else the lean one does not speak."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp

from loadgen.exchange import (
    CONNECT_TIMEOUT_S,
    ERROR_CHARACTERS,
    KEEPALIVE_S,
    Request,
    TokenStream,
    in_short,
    record_of,
    refusal,
    wants_key,
)
from loadgen.request_record import Outcome, RequestRecord

READ_BUFFER_BYTES = 1 << 20


def open_session(
    headers: Mapping[str, str] | None = None, tls: ssl.SSLContext | None = None
) -> aiohttp.ClientSession:
    """A session without any cap on connections, to be used as an async context manager.

    ``headers`` go with every request, such as an Authorization; ``tls`` says which certificates
    are trusted, this machine's own choice if not given. The only timeout is that of connecting,
    `CONNECT_TIMEOUT_S`.
    """
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_note_sent)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=tls or True),
        headers={
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            **(headers or {}),
        },
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT_TIMEOUT_S),
        read_bufsize=READ_BUFFER_BYTES,
        trace_configs=[trace],
    )


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    *,
    id: int,
    scheduled_ns: int,
    prompt_tokens: int,
    output_tokens_designed: int,
    max_tokens: int,
    timeout_s: float | None = None,
    stream: TokenStream | None = None,
) -> RequestRecord:
    """Send one request now and follow it to its end; ``session`` comes from `open_session`.

    Outcomes: ``completed`` when the server ended the stream with a finish reason (also with a wrong
    length: compare the counts); ``rejected`` for status 429 and 503; ``timed_out`` when
    ``timeout_s`` passed since the *scheduled* arrival; ``failed`` for anything else, with a short
    ``error``, also for a redirection; ``unfinished`` when this task was cancelled, which ends the
    request, closes its connection and still returns what had come until then. Never raises for what
    the server or the network does.

    ``sent_ns`` is taken just before the request is written, after a connection was had. The first
    and last token times are those of the socket reads that brought them. ``output_tokens`` is the
    server's cumulative count in the last usage it sent, or the number of content events where it
    sent none.
    """
    request = Request(
        id=id,
        url=url,
        body=body,
        scheduled_ns=scheduled_ns,
        prompt_tokens=prompt_tokens,
        output_tokens_designed=output_tokens_designed,
        max_tokens=max_tokens,
    )
    return await follow(session, request, TokenStream() if stream is None else stream, timeout_s)


async def follow(
    session: aiohttp.ClientSession, request: Request, stream: TokenStream, timeout_s: float | None
) -> RequestRecord:
    """As `complete`; ``stream`` can be looked at meanwhile."""
    status: int | None = None
    outcome: Outcome = "failed"
    error: str | None = None
    deadline = None if timeout_s is None else request.scheduled_ns / 1e9 + timeout_s
    try:
        async with (
            asyncio.timeout_at(deadline),
            session.post(
                request.url, data=request.body, trace_request_ctx=stream, allow_redirects=False
            ) as response,
        ):
            status = response.status
            if status == 200:
                read = response.content.readany
                while data := await read():
                    stream.feed(data, time.monotonic_ns())
                outcome, error = stream.ending()
            else:
                outcome, error = refusal(status, await _beginning(response))
    except asyncio.CancelledError:
        outcome = "unfinished"
    except TimeoutError as problem:
        # A connect timeout of aiohttp is a TimeoutError too, but no deadline of ours.
        if isinstance(problem, aiohttp.ClientError):
            error = in_short(problem)
        else:
            outcome = "timed_out"
    except (aiohttp.ClientError, OSError) as problem:
        error = in_short(problem)
    return record_of(request, stream, outcome, status, error)


@dataclass(frozen=True, slots=True)
class _TaskFlight:
    stream: TokenStream
    task: asyncio.Task[RequestRecord]

    def stop(self) -> None:
        self.task.cancel()


class SessionClient:
    """`complete` behind the interface that all clients share; the session is not closed with it."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._tasks: set[asyncio.Task[RequestRecord]] = set()

    def send(
        self, request: Request, ended: Callable[[RequestRecord], None], timeout_s: float | None
    ) -> _TaskFlight:
        """See `loadgen.exchange.Client`."""
        stream = TokenStream()

        def over(task: asyncio.Task[RequestRecord]) -> None:
            self._tasks.discard(task)
            # One that is cancelled before its first step never gets to make its record.
            never_began = task.cancelled()
            ended(record_of(request, stream, "unfinished") if never_began else task.result())

        task = asyncio.create_task(follow(self._session, request, stream, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(over)
        return _TaskFlight(stream, task)

    def catch_up(self) -> None:
        """All is read as it comes."""

    async def close(self) -> None:
        """Wait for requests that were stopped."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _note_sent(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    params: aiohttp.TraceRequestHeadersSentParams,
) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.sent_ns = time.monotonic_ns()


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    while not wants_key(response.status) and len(body) < ERROR_CHARACTERS:
        if not (more := await response.content.read(ERROR_CHARACTERS - len(body))):
            break
        body += more
    return body
