"""Record streams as tidy frames on one clock: seconds since the start of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.schedulers.engine import EngineSample
from loadgen.records import RequestRecord, Run

SHORTEST_S = 1e-3
"""No residence counts as shorter, that lengths in residences are numbers."""
REQUEST_TIMES = ("scheduled", "sent", "first_token", "last_token")


@dataclass(frozen=True, eq=False)
class RunFrames:
    """One run, ready for analysis.

    ``requests``: one row per request, in order of arrival; columns ``id``, ``scheduled_s``, ``sent_s``,
    ``first_token_s``, ``last_token_s`` (NaN where it did not happen), the token columns of
    `RequestRecord` and ``outcome``. ``engine``: one row per sample; ``t_s``, ``read_s`` and the gauges
    and counters of `EngineSample`. ``gpu``: one row per sample and GPU, empty where there is none.
    ``end_s`` is when the load and the observation ended, at most ``run.horizon_s``.
    """

    run: Run
    end_s: float
    requests: pd.DataFrame
    engine: pd.DataFrame
    gpu: pd.DataFrame

    @cached_property
    def _columns(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        return {}

    def per_request(self, column: str) -> NDArray[np.float64]:
        """A column of ``requests`` as numbers, shape (requests,)."""
        return self._as_numbers("requests", column)

    def per_sample(self, column: str) -> NDArray[np.float64]:
        """A column of ``engine`` as numbers, shape (samples,)."""
        return self._as_numbers("engine", column)

    def _as_numbers(self, frame: str, column: str) -> NDArray[np.float64]:
        kept = self._columns
        if (frame, column) not in kept:
            kept[frame, column] = getattr(self, frame)[column].to_numpy(dtype=float)
        return kept[frame, column]

    @cached_property
    def completed(self) -> NDArray[np.bool_]:
        """Which requests came to their end, shape (requests,)."""
        return np.asarray(self.requests["outcome"] == "completed", dtype=bool)

    @cached_property
    def departures_s(self) -> NDArray[np.float64]:
        """Sorted instants at which requests left the system before the end of the run, shape (k,).

        Completed requests leave with their last token; a rejected or failed one is counted out at its
        arrival, so that it never stands in N(t).
        """
        outcome = self.requests["outcome"].to_numpy()
        last, due = self.per_request("last_token_s"), self.per_request("scheduled_s")
        gone = np.isin(outcome, ["rejected", "failed", "timed_out"])
        instants = np.where(gone, due, np.where(self.completed, last, np.nan))
        return np.sort(instants[instants <= self.end_s])

    @cached_property
    def started(self) -> NDArray[np.bool_]:
        """Which requests received at least one token, shape (requests,)."""
        first, tokens = self.per_request("first_token_s"), self.per_request("output_tokens")
        return np.asarray(~np.isnan(first) & (tokens > 0))

    @cached_property
    def mean_residence_s(self) -> float:
        """Mean time of a request in service, first to last token, in seconds; inf before one left.

        Little's law: all time spent in service until the end of the run over all that completed, so that
        the short ones, which are the first to complete, do not stand for all. Outputs of one token have
        none: at least `SHORTEST_S`.
        """
        first, last = self.per_request("first_token_s"), self.per_request("last_token_s")
        done = self.completed & (last <= self.end_s)
        if not done.any():
            return math.inf
        in_service_s = np.where(done, last, self.end_s) - first
        mean_s = float(np.nansum(np.maximum(in_service_s, 0.0)) / done.sum())
        return max(mean_s, SHORTEST_S)


def run_frames(
    run: Run,
    start_ns: int,
    end_ns: int,
    records: Sequence[RequestRecord],
    samples: Sequence[EngineSample],
    gpu: Sequence[Mapping[str, Any]] = (),
) -> RunFrames:
    """Put one run's records on a clock that starts at ``start_ns``."""
    names = [f.name for f in fields(RequestRecord)]
    requests = pd.DataFrame({name: [getattr(r, name) for r in records] for name in names})
    for name in REQUEST_TIMES:
        column = pd.to_numeric(requests.pop(f"{name}_ns"))
        requests[f"{name}_s"] = (column - start_ns) / 1e9
    requests = requests.sort_values("scheduled_s", kind="stable", ignore_index=True)
    gauges = [f.name for f in fields(EngineSample)]
    engine = pd.DataFrame({name: [getattr(s, name) for s in samples] for name in gauges})
    engine["t_s"] = (engine.pop("t_ns") - start_ns) / 1e9
    engine["read_s"] = (engine.pop("read_ns") - start_ns) / 1e9
    gpu_frame = pd.DataFrame(list(gpu))
    if len(gpu_frame):
        gpu_frame["t_s"] = (gpu_frame.pop("t_ns") - start_ns) / 1e9
    end_s = min((end_ns - start_ns) / 1e9, run.horizon_s)
    return RunFrames(run, end_s, requests, engine, gpu_frame)


def number_in_system(frames: RunFrames, at_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """N(t) = scheduled minus departed at each instant, seen from the client; shape of ``at_s``."""
    arrived = np.searchsorted(frames.per_request("scheduled_s"), at_s, "right")
    departed = np.searchsorted(frames.departures_s, at_s, "right")
    result: NDArray[np.int64] = arrived - departed
    return result


def tokens_received(frames: RunFrames, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Output tokens that each started request has received until each instant.

    Shape (started requests, instants), rows in the order of ``started``. Between its first and its last
    token a request is taken to progress evenly.
    """
    first, last, got = (
        frames.per_request(column)[frames.started, None]
        for column in ("first_token_s", "last_token_s", "output_tokens")
    )
    progress = np.clip((at_s[None, :] - first) / np.maximum(last - first, 1e-9), 0.0, 1.0)
    result: NDArray[np.float64] = np.where(
        at_s[None, :] >= first, 1.0 + (got - 1.0) * progress, 0.0
    )
    return result
