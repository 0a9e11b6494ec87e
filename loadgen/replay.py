"""Recorded traces as loads: their instants together with the pairs of lengths that belong to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadgen.processes import Replay
from loadgen.records import Run
from loadgen.traces import read_requests
from loadgen.workload import Workload


@dataclass(frozen=True, eq=False)
class Replayed:
    """A trace in order of time: arrays of shape (n,)."""

    instants_s: NDArray[np.float64]
    row: NDArray[np.int64]
    """Where each request stands in the law of lengths that is read from the same file."""
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]


def replay_of(
    file: Path, format: str, from_s: float = 0.0, max_total_tokens: int | None = None
) -> Replay:
    """The load that a trace holds from ``from_s`` seconds after its first request on.

    Requests of more than ``max_total_tokens`` are left out. Raises ValueError when the file cannot be
    read, or when fewer than two different instants are left.
    """
    digest = _digest(file)
    kept = _requests(str(file), format, digest, from_s, max_total_tokens)
    if not len(kept.instants_s) or kept.instants_s[-1] <= kept.instants_s[0]:
        raise ValueError(f"{file}: nothing is left to replay from {from_s:g} s on")
    duration_s = float(kept.instants_s[-1])
    return Replay(
        file=str(file),
        format=format,
        sha256=digest,
        own_rate=float((kept.instants_s < duration_s).sum()) / duration_s,
        duration_s=duration_s,
        from_s=from_s,
        max_total_tokens=max_total_tokens,
    )


def replayed(replay: Replay, rate_per_s: float, horizon_s: float) -> Replayed:
    """The requests of the first ``horizon_s`` seconds, the trace's clock so fast that its mean rate is
    ``rate_per_s``.

    Raises ValueError when the trace ends before, and when the file is not the one that was recorded.
    """
    speed = rate_per_s / replay.own_rate
    if horizon_s * speed > replay.duration_s * (1.0 + 1e-9):
        raise ValueError(
            f"{replay.file} lasts {replay.duration_s / speed:.4g} s at {rate_per_s:.4g} req/s, shorter "
            f"than a run of {horizon_s:.4g} s, and is not begun anew: lower load.horizon_s"
        )
    found = _requests(
        replay.file, replay.format, replay.sha256, replay.from_s, replay.max_total_tokens
    )
    instants_s = found.instants_s / speed
    count = int(np.searchsorted(instants_s, horizon_s))
    return Replayed(
        instants_s[:count],
        found.row[:count],
        found.prompt_tokens[:count],
        found.output_tokens[:count],
    )


def run_lengths(run: Run, workload: Workload, count: int) -> NDArray[np.int64]:
    """Lengths of the ``count`` requests of a run in their order, shape (count, 3), as `Workload.sample`.

    Independent of the instants, from the run's seed; those of a replay are the trace's own, with what
    the law declares, behind a burst of drawn ones. Raises ValueError when the law is not that of the
    trace.
    """
    rng = np.random.default_rng([run.seed, 1])
    if not isinstance(run.arrivals, Replay):
        return workload.sample(rng, count)
    found = replayed(run.arrivals, run.arrival_rate, run.horizon_s)
    law = np.column_stack([workload.prompt_tokens, workload.output_tokens, workload.max_tokens])
    own = np.column_stack([found.prompt_tokens, found.output_tokens])
    fits = found.row.max(initial=0) < len(law)
    if not (fits and np.array_equal(law[found.row, :2], own)):
        raise ValueError(
            f"the lengths of {workload.name} are not those of {run.arrivals.file}: give "
            "workload.trace the file that is replayed"
        )
    return np.concatenate([workload.sample(rng, count - len(own)), law[found.row]])


@lru_cache(maxsize=4)
def _requests(
    file: str, format: str, sha256: str, from_s: float, max_total_tokens: int | None
) -> Replayed:
    """All of a trace from ``from_s`` on, which is its new 0."""
    path = Path(file)
    if _digest(path) != sha256:
        raise ValueError(f"{file} is not the trace that was replayed: restore it")
    found = read_requests(path, format)
    assert found.instants_ns is not None
    # The law of lengths has left these out in the same way.
    total = found.prompt_tokens + found.output_tokens
    kept = np.flatnonzero(total <= (max_total_tokens or total.max()))
    instants_ns = found.instants_ns[kept]
    order = np.argsort(instants_ns, kind="stable")
    order = order[instants_ns[order] >= round(from_s * 1e9)]
    return Replayed(
        (instants_ns[order] - round(from_s * 1e9)) / 1e9,
        order,
        found.prompt_tokens[kept][order],
        found.output_tokens[kept][order],
    )


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(
            f"{file}: the trace that is replayed cannot be read: {error.strerror}"
        ) from error
