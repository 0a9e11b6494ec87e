"""What a run was to be, what came of its requests and of its load: the contract between load, storage
and analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loadgen.processes import POISSON, Process, dispersion, process_from_dict
from loadgen.request_record import OUTCOMES, Outcome, RequestRecord

__all__ = ["OUTCOMES", "FidelityCheck", "LoadFidelity", "Outcome", "RequestRecord", "Run", "Start"]

Start = Literal["empty", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of an experiment as planned: arrivals of one law and mean rate from one seed.

    Statistics use [warmup_s, horizon_s); the load itself covers [0, horizon_s). A run may start full:
    then ``preload`` requests are sent at once at its beginning, before the other arrivals.
    """

    id: str
    arrival_rate: float
    """Requests per second, in the mean."""
    horizon_s: float
    warmup_s: float
    seed: int
    preload: int = 0
    """Requests of the burst at the beginning; 0: the run starts empty."""
    arrivals: Process = POISSON

    @property
    def start(self) -> Start:
        return "full" if self.preload else "empty"

    @property
    def ca2(self) -> float:
        """Variance over mean of the number of arrivals in the long run; NaN for a replay."""
        return dispersion(self.arrivals, self.arrival_rate)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Run:
        """A run as it was written; older ones, without ``arrivals``, are Poisson."""
        law = process_from_dict(data["arrivals"]) if "arrivals" in data else POISSON
        return Run(**{**data, "arrivals": law})


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
