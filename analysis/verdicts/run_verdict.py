"""Is one run stable, does it grow, and how fast did a backlogged server serve?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.inference.capacity import (
    CAPACITY_BATCHES,
    backlogged_window,
    capacity_by_regression,
    completions,
    work_served,
)
from analysis.inference.growth import (
    GROWTH_LEVEL,
    critical_excursion,
    drift,
    drift_by_end_point,
    drift_by_hac,
    why_no_slope,
)
from analysis.inference.long_run import Stretch
from analysis.inference.warm_up import warm_up_warning
from analysis.numbers.estimate import Estimate
from analysis.schedulers.frames import SHORTEST_S, RunFrames
from analysis.theory.reserved_demand import keeps_its_fill
from analysis.verdicts.audit import Saturation, binding_resource, saturation, step_time
from analysis.verdicts.branches import Judged, judge_from_full
from analysis.verdicts.evidence import (
    OVERRUN_LIMIT,
    Evidence,
    MeasuredRun,
    work_demand,
)
from analysis.verdicts.verdict import NamedEstimate, RunJudgement, RunVerdict
from loadgen.processes import Replay, period_s, swing
from loadgen.records import Run

MIN_BACKLOG_RESIDENCES = 5.0
"""A capacity is read from at least so many mean residence times of unbroken backlog."""
BATCH_RESIDENCES = 2.0
"""A batch lasts at least so many (theory.md 6.3), unless fewer than `MIN_BATCHES` would be left."""
MIN_BATCHES = 5


def judge_run(run: MeasuredRun, evidence: Evidence) -> RunJudgement:
    """Stable, unstable or neither, over the stated horizon.

    Stable: the upper 95 % bound of the drift is below X = theta/2 of the offered rate, half the drift
    of a server whose critical rate lay theta below it. Unstable: the lower 95 % bound is above 0 and
    the growth exceeds what exactly critical load makes in 95 % of runs. A run that started full is
    judged while its backlog lasts: `judge_from_full`. Where the rate follows the clock, whole periods
    are judged and their mean rate is meant; a replayed trace has no rate that lasts: it is not judged.
    """
    frames = run.frames
    start_s, end_s = frames.run.warmup_s, _last_period_s(frames.run, frames.end_s)
    stable_below = evidence.theta / 2 * frames.run.arrival_rate
    seen_s, offered = frames.per_sample("t_s"), len(frames.requests)
    observed = (seen_s >= start_s) & (seen_s <= end_s)
    enough = end_s - start_s > 1.0 and offered > 20 and int(observed.sum()) > 5
    verdict: RunVerdict = "inconclusive"
    text = "too short to say"
    growth = Estimate(math.nan, math.nan, math.nan, 0.90, "req/s", "not measured: run too short")
    mean_step = None

    def judged(from_s: float, until_s: float) -> Judged:
        if (reason := why_no_slope(frames, from_s, until_s)) is not None:
            return growth, "inconclusive", f"too short to say: {reason}"
        seen = drift(frames, from_s, until_s)
        return seen, *_stability(seen, until_s - from_s, stable_below, evidence, frames.run)

    if enough and frames.run.preload:
        start_s, end_s, (growth, verdict, text) = judge_from_full(frames, start_s, end_s, judged)
        observed = (seen_s >= start_s) & (seen_s <= end_s)
    elif enough:
        growth, verdict, text = judged(start_s, end_s)
    if enough:
        mean_step = step_time(frames, start_s, end_s)
    if not run.valid:
        verdict, text = "invalid", _why_invalid(run)
    due_s = frames.per_request("scheduled_s")
    arrived = (due_s >= start_s) & (due_s <= end_s)
    ttft = np.nan_to_num(frames.per_request("first_token_s") - due_s, nan=math.inf)
    gauges = {c: frames.per_sample(c)[observed] for c in ("kv_usage", "running", "waiting")}
    looked, preemptions = bool(observed.any()), frames.per_sample("preemptions")
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
        requests=offered,
        completed=int(frames.completed.sum()),
        unfinished=int((frames.requests["outcome"] == "unfinished").sum()),
        preemptions=int(preemptions[-1] - preemptions[0]) if len(preemptions) else 0,
        backlogged=float((gauges["waiting"] > 0).mean()) if looked else math.nan,
        step_time_s=mean_step,
        pace=run.pace,
        ttft_p50_s=float(np.quantile(ttft, 0.50, method="lower")) if len(ttft) else math.nan,
        ttft_p95_s=float(np.quantile(ttft, 0.95, method="lower")) if len(ttft) else math.nan,
        warnings=(*run.warnings, *_warm_up(frames)),
        drift_checks=drift_checks(frames, start_s, end_s, evidence),
        start=frames.run.start,
        **{c: float(values.mean()) if looked else math.nan for c, values in gauges.items()},
    )


def _stability(
    growth: Estimate, duration_s: float, stable_below: float, evidence: Evidence, run: Run
) -> tuple[RunVerdict, str]:
    if isinstance(run.arrivals, Replay):
        return "inconclusive", "cannot say: a replayed trace has no rate that lasts, see its drift"
    if growth.high < stable_below:
        whole = "" if period_s(run.arrivals) is None else " of whole periods"
        return "stable", f"stable (< {stable_below:.2g} req/s over {duration_s:.0f} s{whole})"
    by_chance = critical_excursion(
        evidence.prediction.critical_rate.value,
        duration_s,
        GROWTH_LEVEL,
        evidence.variance_ratio_of(run),
    ) + swing(run.arrivals, run.arrival_rate)
    if growth.low > 0 and growth.value * duration_s > by_chance:
        return "unstable", "grows"
    return "inconclusive", "cannot say: neither growth nor its absence is certain"


def _last_period_s(run: Run, end_s: float) -> float:
    """Where the last whole period after the warm-up ends; ``end_s`` where no rate follows the clock."""
    period = period_s(run.arrivals)
    if period is None:
        return end_s
    return run.warmup_s + period * max(math.floor((end_s - run.warmup_s) / period + 1e-6), 0)


def drift_checks(
    frames: RunFrames, start_s: float, end_s: float, evidence: Evidence
) -> tuple[NamedEstimate, ...]:
    """The same slope with its error from two other models; none where no slope is taken."""
    if why_no_slope(frames, start_s, end_s) is not None:
        return ()
    hac = NamedEstimate(
        name="HAC",
        estimate=drift_by_hac(frames, start_s, end_s),
        note="beside batch means, which decide",
    )
    if isinstance(frames.run.arrivals, Replay):
        return (hac,)
    spread, ca2 = evidence.variance_ratio_of(frames.run), evidence.ca2(frames.run)
    diffusion = drift_by_end_point(frames, start_s, end_s, spread, ca2)
    return (
        hac,
        NamedEstimate(
            name="end point",
            estimate=diffusion,
            note="too wide for a stable queue",
        ),
    )


def _warm_up(frames: RunFrames) -> tuple[str, ...]:
    """A warm-up that the departures found too short. A burst is a transient of its own: not asked."""
    warning = None if frames.run.preload else warm_up_warning(frames)
    return () if warning is None else (warning,)


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
    work: Stretch
    count: Stretch
    by_regression: Estimate

    @property
    def by_work(self) -> Estimate:
        return self.work.estimate


def independent_batches(residences: float) -> int:
    """How many batches a backlog of so many mean residence times gives.

    A request's work is spread over its residence: shorter batches would not be independent.
    """
    return max(MIN_BATCHES, min(CAPACITY_BATCHES, int(residences / BATCH_RESIDENCES)))


def capacity(run: MeasuredRun, evidence: Evidence) -> Capacity | None:
    """Service rate of a run that stayed backlogged long enough; None otherwise."""
    if not run.valid:
        return None
    window = backlogged_window(run.frames, run.frames.run.warmup_s)
    lived_s = run.frames.per_request("last_token_s") - run.frames.per_request("first_token_s")
    residence_s = math.nan
    if np.isfinite(lived_s).any():
        residence_s = max(float(np.nanmean(lived_s)), SHORTEST_S)
    if window is None or not window.duration_s >= MIN_BACKLOG_RESIDENCES * residence_s:
        return None
    saturated = saturation(run.frames, window, evidence.limits, evidence.workload)
    if saturated is None:
        return None
    # Work is counted in what is short: which that is, occupancy tells, never a rate of service.
    binds = binding_resource(saturated, evidence.limits)
    unit = "kv_cache" if binds == "unknown" else binds
    demand = evidence.workload.mean(work_demand(evidence.workload, unit))
    kv_demand = evidence.workload.mean(work_demand(evidence.workload))
    batches = independent_batches(window.duration_s / residence_s)
    return Capacity(
        run,
        saturated,
        work_served(
            run.frames,
            window,
            demand,
            unit,
            waves_tell=keeps_its_fill(evidence.workload, evidence.limits),
        ),
        completions(run.frames, window),
        capacity_by_regression(run.frames, window, kv_demand, batches),
    )
