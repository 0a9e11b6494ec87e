"""Is one run stable, does it grow, and how fast did a backlogged server serve?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.audit import Saturation, saturation, step_time
from analysis.estimate import Estimate
from analysis.evidence import (
    OVERRUN_LIMIT,
    Evidence,
    MeasuredRun,
    variance_ratio,
    work_demand,
)
from analysis.growth import (
    CAPACITY_BATCHES,
    backlogged_window,
    capacity_by_count,
    capacity_by_work,
    critical_excursion,
    drift,
)
from analysis.verdict import RunJudgement, RunVerdict

MIN_BACKLOG_RESIDENCES = 5.0
"""A capacity is read from at least so many mean residence times of unbroken backlog."""
GROWTH_LEVEL = 0.95


def judge_run(run: MeasuredRun, evidence: Evidence) -> RunJudgement:
    """Stable, unstable or neither, over the stated horizon.

    Stable: the upper 95 % bound of the drift is below X = theta/2 of the offered rate, half the drift
    of a server whose critical rate lay theta below it. Unstable: the lower 95 % bound is above 0 and
    the growth exceeds what exactly critical load makes in 95 % of runs.
    """
    frames = run.frames
    start_s, end_s = frames.run.warmup_s, frames.end_s
    stable_below = evidence.theta / 2 * frames.run.arrival_rate
    requests, engine = frames.requests, frames.engine
    observed = engine[(engine["t_s"] >= start_s) & (engine["t_s"] <= end_s)]
    enough = end_s - start_s > 1.0 and len(requests) > 20 and len(observed) > 5
    verdict: RunVerdict = "inconclusive"
    text = "too short to say"
    growth = Estimate(math.nan, math.nan, math.nan, 0.90, "req/s", "not measured: run too short")
    mean_step = None
    if enough:
        growth = drift(frames, start_s, end_s)
        mean_step = step_time(frames, start_s, end_s)
        verdict, text = _stability(growth, end_s - start_s, stable_below, evidence)
    if not run.valid:
        verdict, text = "invalid", _why_invalid(run)
    arrived = requests["scheduled_s"].between(start_s, end_s)
    ttft = (requests["first_token_s"] - requests["scheduled_s"]).fillna(math.inf).to_numpy()
    columns = {c: float(observed[c].mean()) for c in ("kv_usage", "running", "waiting")}
    return RunJudgement(
        id=frames.run.id,
        arrival_rate=frames.run.arrival_rate,
        load=frames.run.arrival_rate / evidence.prediction.critical_rate.value,
        warmup_s=start_s,
        end_s=end_s,
        verdict=verdict,
        text=text,
        realised_rate=float(arrived.sum()) / (end_s - start_s) if enough else math.nan,
        drift=growth,
        stable_below=stable_below,
        fidelity=run.fidelity,
        requests=len(requests),
        completed=int((requests["outcome"] == "completed").sum()),
        unfinished=int((requests["outcome"] == "unfinished").sum()),
        preemptions=int(engine["preemptions"].iloc[-1] - engine["preemptions"].iloc[0])
        if len(engine)
        else 0,
        backlogged=float((observed["waiting"] > 0).mean()) if len(observed) else math.nan,
        step_time_s=mean_step,
        pace=run.pace,
        ttft_p50_s=float(np.quantile(ttft, 0.50, method="lower")) if len(ttft) else math.nan,
        ttft_p95_s=float(np.quantile(ttft, 0.95, method="lower")) if len(ttft) else math.nan,
        warnings=run.warnings,
        **columns,
    )


def _stability(
    growth: Estimate, duration_s: float, stable_below: float, evidence: Evidence
) -> tuple[RunVerdict, str]:
    if growth.high < stable_below:
        return "stable", f"stable (< {stable_below:.2g} req/s over {duration_s:.0f} s)"
    by_chance = critical_excursion(
        evidence.prediction.critical_rate.value,
        duration_s,
        GROWTH_LEVEL,
        variance_ratio(evidence.workload),
    )
    if growth.low > 0 and growth.value * duration_s > by_chance:
        return "unstable", "grows"
    return "inconclusive", "cannot say: neither growth nor its absence is certain"


def _why_invalid(run: MeasuredRun) -> str:
    failed = [c.name for c in run.fidelity.checks if c.passed is False]
    if run.overrun is not None and run.overrun > OVERRUN_LIMIT:
        failed.append(f"mock server: {100 * run.overrun:.1f} % of its steps ran late")
    if run.pace is not None and not run.pace.kept:
        failed.append(run.pace.complaint())
    return "invalid: " + ", ".join(failed)


@dataclass(frozen=True, eq=False)
class Capacity:
    """What a run says of the service rate while its queue was never empty."""

    run: MeasuredRun
    saturated: Saturation
    by_work: Estimate
    by_count: Estimate


def capacity(run: MeasuredRun, evidence: Evidence) -> Capacity | None:
    """Service rate of a run that stayed backlogged long enough; None otherwise."""
    if not run.valid:
        return None
    window = backlogged_window(run.frames, run.frames.run.warmup_s)
    done = run.frames.requests
    residence_s = float((done["last_token_s"] - done["first_token_s"]).mean())
    if window is None or not window.duration_s >= MIN_BACKLOG_RESIDENCES * residence_s:
        return None
    saturated = saturation(run.frames, window, evidence.limits, evidence.workload)
    if saturated is None:
        return None
    demand = evidence.workload.mean(work_demand(evidence.workload))
    # A request's work is spread over its residence: shorter batches would not be independent.
    batches = min(CAPACITY_BATCHES, int(window.duration_s / residence_s))
    return Capacity(
        run,
        saturated,
        capacity_by_work(run.frames, window, demand, batches),
        capacity_by_count(run.frames, window, batches),
    )
