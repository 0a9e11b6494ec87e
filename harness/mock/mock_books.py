"""What the mock's engine tells the dialect that shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from analysis.schedulers.engine import Request, Step


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the engine. Times are monotonic ns; 0 means not yet."""

    request: Request
    receive_ns: int
    push: Callable[[int, bool], None]
    """Called once per output token: tokens so far, and whether it was the last."""
    streamed: bool = True
    scheduled_ns: int = 0
    first_ns: int = 0
    last_ns: int = 0
    counted: int = 0
    """Output tokens that the front end has seen."""
    abandoned: bool = False
    refused: bool = False
    """Its one token is computed in place of a prompt that the scheduler refuses."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A step that has just been completed. ``steps`` and ``overruns`` count from the start."""

    step: Step
    finished: list[Request]
    launched_ns: int
    """When it was started, by the clock and not by the law of its duration."""
    end_ns: int
    """Its nominal end."""
    now_ns: int
    free_blocks_before: int
    """Free blocks while it ran."""
    steps: int
    overruns: int


class Books(Protocol):
    """What a dialect keeps of the engine's life."""

    def delivered(self, job: Job, finished: bool, now_ns: int) -> None:
        """A job has one output token more."""

    def aborted(self, job: Job) -> None:
        """A job that its client gave up leaves the engine now."""

    def ended(self, end: Ended) -> None:
        """A step is over and its tokens are delivered."""

    def idled(self, t_ns: int) -> None:
        """There is nothing to run."""
