"""The record of one request, and nothing that would make a worker's start slow."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

Outcome = Literal["completed", "rejected", "timed_out", "failed", "unfinished"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request of an open-loop run. Times are monotonic nanoseconds of the client's clock.

    ``scheduled_ns`` is the instant the arrival process asked for and the origin of every latency;
    ``sent_ns`` only audits the generator. A request without its last token when the run ended is
    ``unfinished``: it is part of the queue, not an error. Its ``output_tokens`` are those received.
    """

    id: int
    scheduled_ns: int
    sent_ns: int | None
    first_token_ns: int | None
    last_token_ns: int | None
    prompt_tokens: int
    """Prompt length that was sent."""
    output_tokens_designed: int
    """Output length that the workload law drew; the server must produce exactly this many."""
    max_tokens: int
    """Output length that the client declared to the server (at least the designed one)."""
    output_tokens: int
    """Tokens received, by the server's own usage count where it sent one."""
    prompt_tokens_reported: int | None
    """Prompt length by the server's usage count; None when no usage arrived."""
    outcome: Outcome
    status: int | None = None
    """HTTP status; None when no response line arrived."""
    error: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(line: str | bytes) -> RequestRecord:
        data: dict[str, Any] = json.loads(line)
        return RequestRecord(**data)


class TokenRead(NamedTuple):
    """One read of a request's stream: by then so many of its tokens were out."""

    t_ns: int
    tokens: int
