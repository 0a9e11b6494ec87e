"""Simulated experiments at nearly the critical rate, whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.inference.long_run import long_run_mean
from analysis.numbers.estimate import Estimate
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.evidence import Evidence, MeasuredRun, variance_ratio
from analysis.verdicts.run_verdict import capacity
from analysis.verdicts.settling import Settling, of_run
from harness.rehearsals.error_rates import Known, Setting, evidence_of, planned, right
from harness.rehearsals.rehearsal import offered

OVERLOAD = 1.3
"""Multiple of the critical rate at which it is measured, as in configs/critical.yaml."""
EXPONENT_SPAN = 64.0
"""The exponent is taken over this factor in time."""
EXPONENT_POINTS = 13


@dataclass(frozen=True, slots=True)
class NearRun:
    """One run at ``rho`` of the true critical rate, and the answer: None where no rate was measured."""

    rho: float
    measured: Estimate | None
    settling: Settling | None
    exponent: float


def near_runs(
    setting: Setting, known: Known, rhos: Sequence[float], theta: float, seed: int
) -> list[NearRun]:
    """One experiment for each rho: a run above, the same for all, and the run in question.

    That one is as long as an experiment plans it for load 1.0. As in a verdict, the measured rate is the
    mean over all runs that kept a backlog.
    """
    claim = right(known)
    plan = planned(setting, claim, (OVERLOAD, 1.0), theta, seed)
    evidence = evidence_of(setting, claim, theta, ())
    above, at = plan.runs
    overloaded = offered(setting.server, setting.workload, above)
    return [
        _near_run(
            evidence,
            overloaded,
            offered(
                setting.server,
                setting.workload,
                replace(at, arrival_rate=rho * known.truth.value),
            ),
            rho,
        )
        for rho in rhos
    ]


def _near_run(evidence: Evidence, overloaded: MeasuredRun, run: MeasuredRun, rho: float) -> NearRun:
    capacities = [capacity(r, evidence) for r in (overloaded, run)]
    stretches = [c.work for c in capacities if c is not None]
    measured = long_run_mean(stretches) if stretches else None
    answer = None
    if measured is not None:
        answer = of_run(run, rho, measured, variance_ratio(evidence.workload))
    return NearRun(rho, measured, answer, highest_exponent(run.frames))


def highest_exponent(frames: RunFrames) -> float:
    """a of t^a that the highest queue so far follows, by least squares of logarithms.

    Over the last factor 64 in time after the warm-up; NaN where nobody waited that early.
    """
    engine = frames.engine[frames.engine["t_s"].between(frames.run.warmup_s, frames.end_s)]
    duration_s = frames.end_s - frames.run.warmup_s
    instants = duration_s * np.geomspace(1 / EXPONENT_SPAN, 1, EXPONENT_POINTS)
    since = engine["t_s"].to_numpy(dtype=float) - frames.run.warmup_s
    highest = np.maximum.accumulate(engine["waiting"].to_numpy(dtype=float))
    seen = highest[np.searchsorted(since, instants, "right") - 1]
    if seen[0] <= 0:
        return math.nan
    return float(np.polyfit(np.log(instants), np.log(seen), 1)[0])
