"""The record of one request: the contract between load, storage and analysis."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Outcome = Literal["completed", "rejected", "timed_out", "failed", "unfinished"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
Start = Literal["empty", "full"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of an experiment as planned: Poisson arrivals at one rate from one seed.

    Statistics use [warmup_s, horizon_s); the load itself covers [0, horizon_s). A run may start full:
    then ``preload`` requests are sent at once at its beginning, before the Poisson arrivals.
    """

    id: str
    arrival_rate: float
    """Requests per second."""
    horizon_s: float
    warmup_s: float
    seed: int
    preload: int = 0
    """Requests of the burst at the beginning; 0: the run starts empty."""

    @property
    def start(self) -> Start:
        return "full" if self.preload else "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFidelity:
    """Did we offer what we claim? Every check carries its statistic, its threshold and its answer."""

    valid: bool
    checks: tuple[FidelityCheck, ...]
    achieved_rate: float
    """Requests actually sent, per second of horizon."""
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityCheck:
    """One check: ``passed`` is None when there were too few requests to make it."""

    name: str
    passed: bool | None
    statistic: float
    threshold: float
    meaning: str
    """One sentence: what was measured, against what, and what to do if it failed."""
