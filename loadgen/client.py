"""One streaming completion over HTTP, watched from the client: one `RequestRecord`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp

from loadgen.records import Outcome, RequestRecord

READ_BUFFER_BYTES = 1 << 20
KEEPALIVE_S = 3.0
"""Below the 5 s after which uvicorn closes an idle connection: reusing one at the very moment the
server closes it would fail a request for no fault of the engine."""
CONNECT_TIMEOUT_S = 60.0
ERROR_CHARACTERS = 300

# Quotes inside a JSON string are escaped, so these never match generated text.
CONTENT = re.compile(rb'"choices"\s*:\s*\[\s*\{')
USAGE = b'"completion_tokens"'
DONE = b"[DONE]"
ERROR = b'"error"'


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
    ``error``; ``unfinished`` when this task was cancelled, which ends the request, closes its
    connection and still returns what had come until then. Never raises for what the server or the
    network does.

    ``sent_ns`` is taken just before the request is written, after a connection was had. The first
    and last token times are those of the socket reads that brought them. ``output_tokens`` is the
    server's cumulative count in the last usage it sent, or the number of content events where it
    sent none.
    """
    stream = TokenStream() if stream is None else stream
    status: int | None = None
    outcome: Outcome = "failed"
    error: str | None = None
    deadline = None if timeout_s is None else scheduled_ns / 1e9 + timeout_s
    try:
        async with (
            asyncio.timeout_at(deadline),
            session.post(url, data=body, trace_request_ctx=stream) as response,
        ):
            status = response.status
            if status == 200:
                read = response.content.readany
                while data := await read():
                    stream.feed(data, time.monotonic_ns())
                outcome, error = stream.ending()
            else:
                outcome = "rejected" if status in (429, 503) else "failed"
                error = f"HTTP {status}: {await _complaint(response)}"
    except asyncio.CancelledError:
        outcome = "unfinished"
    except TimeoutError as problem:
        # A connect timeout of aiohttp is a TimeoutError too, but no deadline of ours.
        if isinstance(problem, aiohttp.ClientError):
            error = _short(problem)
        else:
            outcome = "timed_out"
    except (aiohttp.ClientError, OSError) as problem:
        error = _short(problem)
    counted, prompt_reported = stream.usage_counts()
    return RequestRecord(
        id=id,
        scheduled_ns=scheduled_ns,
        sent_ns=stream.sent_ns,
        first_token_ns=stream.first_token_ns,
        last_token_ns=stream.last_token_ns,
        prompt_tokens=prompt_tokens,
        output_tokens_designed=output_tokens_designed,
        max_tokens=max_tokens,
        output_tokens=stream.content_events if counted is None else counted,
        prompt_tokens_reported=prompt_reported,
        outcome=outcome,
        status=status,
        error=error,
    )


@dataclass(slots=True)
class TokenStream:
    """What one event stream has brought so far.

    Per read it only searches bytes and keeps the last read of each kind; JSON is parsed once, at
    the end. Each event is one ``data:`` line. Content events are those with a non-empty
    ``choices``.
    """

    sent_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    content_events: int = 0
    tail: bytes = b""
    content: bytes = b""
    usage: bytes = b""
    other: bytes = b""

    def feed(self, data: bytes, now_ns: int) -> None:
        """Take in the bytes of one socket read."""
        if self.tail:
            data = self.tail + data
        cut = data.rfind(b"\n") + 1
        self.tail = data[cut:]
        if not cut:
            return
        if self.tail:
            data = data[:cut]
        events = len(CONTENT.findall(data))
        if events:
            if self.first_token_ns is None:
                self.first_token_ns = now_ns
            self.last_token_ns = now_ns
            self.content_events += events
            self.content = data
        elif ERROR in data or DONE not in data:
            self.other = data
        if USAGE in data:
            self.usage = data

    def ending(self) -> tuple[Outcome, str | None]:
        """How a stream that the server closed in good order ended."""
        for event in reversed(_events(self.content)):
            for choice in event.get("choices") or ():
                reason = choice.get("finish_reason")
                if reason is not None and "abort" not in str(reason):
                    return "completed", None
                return "failed", self._complaint(f"finish_reason {reason}")
        return "failed", self._complaint("no content")

    def usage_counts(self) -> tuple[int | None, int | None]:
        """Output and prompt tokens by the server's last usage; None where it sent none."""
        for event in reversed(_events(self.usage)):
            usage = event.get("usage")
            if isinstance(usage, dict):
                return usage.get("completion_tokens"), usage.get("prompt_tokens")
        return None, None

    def _complaint(self, what: str) -> str:
        """With the last line that is no content: where a server reports an error, it is there."""
        lines = (self.content + self.other + self.tail).splitlines()
        words = [line for line in lines if line and DONE not in line and not CONTENT.search(line)]
        said = words[-1].decode(errors="replace") if words else "it said nothing else"
        return f"stream ended early, {what}: {said}"[:ERROR_CHARACTERS]


async def _note_sent(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    params: aiohttp.TraceRequestHeadersSentParams,
) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.sent_ns = time.monotonic_ns()


def _events(data: bytes) -> list[dict[str, Any]]:
    """Parsed events without damaged ones: their finish reason or counts will then be missing."""
    events = []
    for line in data.splitlines():
        payload = line.removeprefix(b"data:").strip()
        if payload.startswith(b"{"):
            with contextlib.suppress(ValueError):
                events.append(json.loads(payload))
    return events


async def _complaint(response: aiohttp.ClientResponse) -> str:
    # A server that refuses a key may repeat it.
    if response.status in (401, 403):
        return "the server wants a key, or another one"
    return (await response.content.read(ERROR_CHARACTERS)).decode(errors="replace")


def _short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:ERROR_CHARACTERS]
