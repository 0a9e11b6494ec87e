"""One request and its streamed answer, whatever carries them: what every client has in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from loadgen.request_record import Outcome, RequestRecord, TokenRead

ERROR_CHARACTERS = 300
CONNECT_TIMEOUT_S = 60.0
KEEPALIVE_S = 3.0
"""Below the 5 s after which uvicorn closes an idle connection: reusing one at the very moment the
server closes it would fail a request for no fault of the engine."""

# Quotes inside a JSON string are escaped, so these never match generated text.
CONTENT = re.compile(rb'"choices"\s*:\s*\[\s*\{')
COMPACT_CONTENT = b'"choices":[{'
FINISH = re.compile(rb'"finish_reason"\s*:\s*(?:null|"([^"]*)"|([^,]*))')
FINISH_REASON = b'"finish_reason"'
USAGE = b'"completion_tokens"'
COMPLETION_TOKENS = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
DONE = b"[DONE]"
ERROR = b'"error"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One arrival as it is sent; the names are those of its record."""

    id: int
    url: str
    body: bytes
    scheduled_ns: int
    prompt_tokens: int
    output_tokens_designed: int
    max_tokens: int


class Flight(Protocol):
    """A request on its way."""

    @property
    def stream(self) -> TokenStream:
        """What has come so far."""

    def stop(self) -> None:
        """End it now and close its connection: its record comes, ``unfinished``."""


class Client(Protocol):
    """Sends requests; holds the connections."""

    def send(
        self, request: Request, ended: Callable[[RequestRecord], None], timeout_s: float | None
    ) -> Flight:
        """Send now; ``ended`` gets the record once, never before this returns."""

    def catch_up(self) -> None:
        """Take in all that has come; records of what ended with it are handed over meanwhile."""

    async def close(self) -> None:
        """Close every connection."""


@dataclass(slots=True)
class TokenStream:
    """What one event stream has brought so far.

    It searches bytes and parses no JSON; of each kind of event it keeps the last read. Each event is
    one ``data:`` line. Content events are those with a non-empty ``choices``.
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
            self.tail = b""
        if not data.endswith(b"\n"):
            cut = data.rfind(b"\n") + 1
            self.tail = data[cut:]
            if not cut:
                return
            data = data[:cut]
        # A server writes all its JSON in one style, mostly the compact one.
        events = data.count(COMPACT_CONTENT) or len(CONTENT.findall(data))
        if events:
            if self.first_token_ns is None:
                self.first_token_ns = now_ns
            self.last_token_ns = now_ns
            self.content_events += events
            self.content = data
        elif ERROR in data or DONE not in data:
            self.other = data
        # From the right: an event ends with its usage.
        if data.rfind(USAGE) >= 0:
            self.usage = data

    def ending(self) -> tuple[Outcome, str | None]:
        """How a stream that the server closed in good order ended."""
        if not self.content:
            return "failed", self._complaint("no content")
        found = _last(FINISH, FINISH_REASON, self.content)
        reason = None if found is None else found[1] or found[2]
        if reason is None or b"abort" in reason:
            said = None if reason is None else reason.decode(errors="replace")
            return "failed", self._complaint(f"finish_reason {said}")
        return "completed", None

    def usage_counts(self) -> tuple[int | None, int | None]:
        """Output and prompt tokens by the server's last usage; None where it sent none."""
        return _counts(self.usage)

    def _complaint(self, what: str) -> str:
        """With the last line that is no content: where a server reports an error, it is there."""
        lines = (self.content + self.other + self.tail).splitlines()
        words = [line for line in lines if line and DONE not in line and not CONTENT.search(line)]
        said = words[-1].decode(errors="replace") if words else "it said nothing else"
        return f"stream ended early, {what}: {said}"[:ERROR_CHARACTERS]


@dataclass(slots=True)
class TimedStream(TokenStream):
    """One that keeps the time of every read: for a probe, not for a load."""

    _reads: list[tuple[int, bytes]] = field(default_factory=list)

    def feed(self, data: bytes, now_ns: int) -> None:
        before = self.content_events
        TokenStream.feed(self, data, now_ns)
        if self.content_events > before:
            self._reads.append((now_ns, self.usage))

    def token_reads(self) -> tuple[TokenRead, ...]:
        """When how many tokens were there, by the usage that came with them; without it, nothing.

        Parsed here, as the tokens of other requests wait to be read while these come in.
        """
        counts = ((t_ns, _counts(usage)[0]) for t_ns, usage in self._reads)
        return tuple(TokenRead(t_ns=t_ns, tokens=n) for t_ns, n in counts if n is not None)


def record_of(
    request: Request,
    stream: TokenStream,
    outcome: Outcome,
    status: int | None = None,
    error: str | None = None,
) -> RequestRecord:
    """The record of a request that ended so, with what its stream had brought."""
    counted, prompt_reported = stream.usage_counts()
    return RequestRecord(
        id=request.id,
        scheduled_ns=request.scheduled_ns,
        sent_ns=stream.sent_ns,
        first_token_ns=stream.first_token_ns,
        last_token_ns=stream.last_token_ns,
        prompt_tokens=request.prompt_tokens,
        output_tokens_designed=request.output_tokens_designed,
        max_tokens=request.max_tokens,
        output_tokens=stream.content_events if counted is None else counted,
        prompt_tokens_reported=prompt_reported,
        outcome=outcome,
        status=status,
        error=error,
    )


def refusal(status: int, body: bytes) -> tuple[Outcome, str]:
    """Outcome and error of a request that was answered with another status than 200.

    ``body``: the first `ERROR_CHARACTERS` bytes of the answer.
    """
    outcome: Outcome = "rejected" if status in (429, 503) else "failed"
    # A server that refuses a key may repeat it.
    if wants_key(status):
        return outcome, f"HTTP {status}: the server wants a key, or another one"
    return outcome, f"HTTP {status}: {body[:ERROR_CHARACTERS].decode(errors='replace')}"


def wants_key(status: int) -> bool:
    """Is this the status of a key that is missing or wrong? Nothing of the answer is then kept."""
    return status in (401, 403)


def in_short(problem: BaseException) -> str:
    """An exception as the ``error`` of a record."""
    return f"{type(problem).__name__}: {problem}"[:ERROR_CHARACTERS]


def _counts(data: bytes) -> tuple[int | None, int | None]:
    if (found := _last(COMPLETION_TOKENS, USAGE, data)) is None:
        return None, None
    begin, end = data.rfind(b"\n", 0, found.start()) + 1, data.find(b"\n", found.end())
    prompt = PROMPT_TOKENS.search(data, begin, end if end >= 0 else len(data))
    return int(found[1]), None if prompt is None else int(prompt[1])


def _last(pattern: re.Pattern[bytes], mark: bytes, data: bytes) -> re.Match[bytes] | None:
    """The last match of a pattern that begins with ``mark``."""
    at = data.rfind(mark)
    while at >= 0:
        if found := pattern.match(data, at):
            return found
        at = data.rfind(mark, 0, at)
    return None
