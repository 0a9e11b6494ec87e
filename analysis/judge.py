"""From evidence to a verdict: stable or not for each run, confirmed or refuted for the experiment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.audit import (
    STEADY_TOLERANCE,
    Identity,
    Saturation,
    binding_resource,
    client_equals_server,
    conservation,
    identity,
    saturation,
    step_time,
    token_balance,
)
from analysis.engine import EngineLimits
from analysis.estimate import Estimate, ratio
from analysis.frames import RunFrames
from analysis.growth import (
    HingePoint,
    backlogged_window,
    capacity_by_count,
    capacity_by_work,
    critical_excursion,
    drift,
    hinge,
    one_sided_bound,
)
from analysis.kv_demand import kv_demand_blocks, kv_demand_engine
from analysis.prediction import Prediction
from analysis.verdict import (
    AssumedObserved,
    Check,
    NamedEstimate,
    Outcome,
    RunJudgement,
    RunVerdict,
    Verdict,
)
from loadgen.records import LoadFidelity
from loadgen.workload import Workload

OVERRUN_LIMIT = 0.01
MIN_BACKLOG_RESIDENCES = 3.0
"""A capacity is read from at least so many mean residence times of unbroken backlog."""
GROWTH_LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """One finished or interrupted run with the test of its load."""

    frames: RunFrames
    fidelity: LoadFidelity
    overrun: float | None
    """Share of a mock server's steps that ran late; None for a real engine."""
    warnings: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return self.fidelity.valid and (self.overrun is None or self.overrun <= OVERRUN_LIMIT)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything a verdict rests on. ``prediction`` is the claim; it was on disk before any run."""

    name: str
    theta: float
    prediction: Prediction
    paper: Prediction
    engine: Prediction
    simulated: Estimate | None
    limits: EngineLimits
    workload: Workload
    runs: tuple[MeasuredRun, ...]


@dataclass(frozen=True, eq=False)
class _Capacity:
    run: MeasuredRun
    saturated: Saturation
    by_work: Estimate
    by_count: Estimate


def variance_ratio(workload: Workload) -> float:
    """ca2 + cd2 of theory.md 6.1: 1 for Poisson arrivals and CV^2 of the KV demand for departures."""
    demand = _demand(workload)
    mean = workload.mean(demand)
    return 1.0 + workload.mean((demand / mean - 1.0) ** 2)


def _demand(workload: Workload) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """KV demand per support point in the convention of `growth.work_done`, shape (n,)."""
    s, o = workload.prompt_tokens, workload.output_tokens
    return np.asarray(kv_demand_engine(s, o, int(s.max())), dtype=float)


def rounding(workload: Workload, block_size: int) -> float:
    """E[g in whole blocks] / E[g in tokens]."""
    s, o = workload.prompt_tokens, workload.output_tokens
    blocks = np.asarray(kv_demand_blocks(s, o, int(s.max()), block_size), dtype=float)
    return workload.mean(blocks) / workload.mean(_demand(workload))


def judge(evidence: Evidence) -> Verdict:
    """The verdict of an experiment, by the rules of the design page's section 4."""
    predicted = evidence.prediction.critical_rate
    judgements = tuple(judge_run(run, evidence) for run in evidence.runs)
    audit = [check for run in evidence.runs if run.valid for check in _books(run.frames)]
    capacities = [c for run in evidence.runs if (c := _capacity(run, evidence)) is not None]
    measured = _combined([c.by_work for c in capacities])
    best = max(capacities, key=lambda c: c.saturated.window.duration_s, default=None)
    audited: Identity | None = None
    if best is not None:
        audited = identity(
            best.run.frames,
            best.saturated,
            evidence.limits.pool_tokens,
            rounding(evidence.workload, evidence.limits.block_size),
            evidence.prediction.step_time_s.value,
        )
        audit.append(audited.check)
    premises = _premises(evidence, best.saturated if best else None)
    share = None
    if measured is not None:
        share = ratio(measured, predicted, "measured over predicted, errors in quadrature")
    outcome, headline, reasons, advice = _decide(
        evidence, judgements, audit, premises, measured, share, best, audited
    )
    return Verdict(
        name=evidence.name,
        claim=evidence.prediction.claim,
        grade=evidence.prediction.grade,
        theta=evidence.theta,
        outcome=outcome,
        headline=headline,
        reasons=tuple(reasons),
        advice=tuple(advice),
        predicted=predicted,
        binding=evidence.prediction.binding,
        binding_observed=binding_resource(best.saturated, evidence.limits) if best else None,
        predictions=_other_predictions(evidence, best),
        measured=measured,
        measurements=_other_measurements(judgements, capacities),
        ratio=share,
        gap=None if measured is None else abs(predicted.value / measured.value - 1.0),
        runs=judgements,
        premises=tuple(premises),
        audit=tuple(audit),
        identity=audited.factors if audited else (),
        table=_assumed_observed(evidence, best, audited),
        warnings=tuple(w for run in evidence.runs for w in run.warnings),
    )


# -- one run -------------------------------------------------------------------------------------


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
    growth = Estimate(math.nan, math.nan, math.nan, 0.95, "req/s", "not measured: run too short")
    mean_step = None
    if enough:
        growth = drift(frames, start_s, end_s)
        mean_step = step_time(frames, start_s, end_s)
        verdict, text = _stability(growth, end_s - start_s, stable_below, evidence)
    if not run.valid:
        verdict, text = "invalid", _why_invalid(run)
    arrived = requests[requests["scheduled_s"] <= end_s]
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
        realised_rate=len(arrived) / end_s if end_s > 0 else math.nan,
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
        ttft_p50_s=float(np.quantile(ttft, 0.50, method="lower")) if len(ttft) else math.nan,
        ttft_p95_s=float(np.quantile(ttft, 0.95, method="lower")) if len(ttft) else math.nan,
        warnings=run.warnings,
        **columns,
    )


def _stability(
    growth: Estimate, duration_s: float, stable_below: float, evidence: Evidence
) -> tuple[RunVerdict, str]:
    if one_sided_bound(growth, 0.95, upper=True) < stable_below:
        return "stable", f"stable (< {stable_below:.2g} req/s over {duration_s:.0f} s)"
    by_chance = critical_excursion(
        evidence.prediction.critical_rate.value,
        duration_s,
        GROWTH_LEVEL,
        variance_ratio(evidence.workload),
    )
    grows = one_sided_bound(growth, 0.95, upper=False) > 0
    if grows and growth.value * duration_s > by_chance:
        return "unstable", "grows"
    return "inconclusive", "cannot say: neither growth nor its absence is certain"


def _why_invalid(run: MeasuredRun) -> str:
    failed = [c.name for c in run.fidelity.checks if c.passed is False]
    if run.overrun is not None and run.overrun > OVERRUN_LIMIT:
        failed.append(f"mock server: {run.overrun:.1%} of its steps ran late")
    return "invalid: " + ", ".join(failed)


def _books(frames: RunFrames) -> list[Check]:
    return [conservation(frames), client_equals_server(frames), token_balance(frames)]


def _capacity(run: MeasuredRun, evidence: Evidence) -> _Capacity | None:
    """Service rate of a run that stayed backlogged long enough; None otherwise."""
    if not run.valid:
        return None
    window = backlogged_window(run.frames, run.frames.run.warmup_s)
    done = run.frames.requests
    residence_s = float((done["last_token_s"] - done["first_token_s"]).mean())
    if window is None or not window.duration_s >= MIN_BACKLOG_RESIDENCES * residence_s:
        return None
    saturated = saturation(run.frames, window)
    if saturated is None:
        return None
    demand = evidence.workload.mean(_demand(evidence.workload))
    return _Capacity(
        run,
        saturated,
        capacity_by_work(run.frames, window, demand),
        capacity_by_count(run.frames, window),
    )


# -- the experiment ------------------------------------------------------------------------------


def _combined(estimates: Sequence[Estimate]) -> Estimate | None:
    """Inverse-variance mean; the error is widened where runs differ by more than their own errors."""
    if not estimates:
        return None
    errors = np.maximum([e.standard_error for e in estimates], 1e-9)
    values = np.array([e.value for e in estimates])
    weights = 1.0 / errors**2
    mean = float(weights @ values / weights.sum())
    if len(estimates) == 1:
        return estimates[0]
    reduced = float(weights @ (values - mean) ** 2) / (len(values) - 1)
    error = math.sqrt(max(1.0, reduced) / float(weights.sum()))
    method = f"{estimates[0].method}; {len(values)} overloaded runs, inverse-variance mean"
    return Estimate.normal(mean, error, "req/s", method)


def _premises(evidence: Evidence, saturated: Saturation | None) -> list[Check]:
    """The closed list of premises, each with its numeric threshold."""
    checks: list[Check] = []
    limits = evidence.limits
    if saturated is None:
        checks.append(
            Check(
                name="KV cache binds",
                holds=None,
                observed=math.nan,
                threshold=math.nan,
                text="no run kept its queue non-empty long enough to see what binds",
            )
        )
    else:
        binds = binding_resource(saturated, limits)
        checks.append(
            Check(
                name="KV cache binds",
                holds=binds == "kv_cache",
                observed=saturated.kv_usage,
                threshold=0.90,
                text=f"{binds} binds: under backlog the KV cache was {saturated.kv_usage:.1%} full "
                f"with {saturated.running:.1f} requests running",
            )
        )
        checks.append(
            Check(
                name="steady step time",
                holds=abs(saturated.step_time_change) <= STEADY_TOLERANCE,
                observed=saturated.step_time_change,
                threshold=STEADY_TOLERANCE,
                text=f"mean step of the second half over the first: "
                f"{saturated.step_time_change:+.1%} (allowed {STEADY_TOLERANCE:.0%})",
            )
        )
    for name, column, meaning in (
        ("no prefix hits", "prefix_hit_tokens", "prompt tokens served from the prefix cache"),
        ("no rejections", "rejected", "requests that the server refused"),
        ("exact lengths", "truncated", "requests that ended before the asked length"),
    ):
        seen = sum(
            float(run.frames.engine[column].iloc[-1] - run.frames.engine[column].iloc[0])
            for run in evidence.runs
            if len(run.frames.engine)
        )
        checks.append(
            Check(
                name=name, holds=seen == 0, observed=seen, threshold=0, text=f"{seen:.0f} {meaning}"
            )
        )
    return checks


def _decide(
    evidence: Evidence,
    judgements: Sequence[RunJudgement],
    audit: Sequence[Check],
    premises: Sequence[Check],
    measured: Estimate | None,
    share: Estimate | None,
    best: _Capacity | None,
    audited: Identity | None,
) -> tuple[Outcome, str, list[str], list[str]]:
    """Outcome, the words behind it, reasons and advice."""
    theta, band = evidence.theta, f"{evidence.theta:.0%}"
    usable = [j for j in judgements if j.verdict != "invalid"]
    failed_books = [c for c in audit if c.holds is False and c.name != "memory-time identity"]
    if not usable or failed_books:
        reasons = [f"{j.id}: {j.text}" for j in judgements if j.verdict == "invalid"]
        reasons += [f"{c.name}: {c.text}" for c in failed_books]
        return (
            "invalid",
            "the load or the records are not what they claim",
            reasons,
            ["run the generator on an idle machine, or lower the rates, then repeat"],
        )
    if measured is None or share is None or best is None:
        return _one_sided(evidence, judgements)
    wide = evidence.prediction.critical_rate.at_level(0.90)
    reasons = [f"measured / predicted {share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"]
    equivalence = share.at_level(0.90)
    if equivalence.low >= 1 - theta and equivalence.high <= 1 + theta:
        stable = any(j.verdict == "stable" and j.arrival_rate < measured.value for j in usable)
        grows = any(j.verdict == "unstable" and j.arrival_rate > measured.value for j in usable)
        if stable and grows:
            return "confirmed", f"within {band}", reasons, []
        lacking = "no run below it is certainly stable" if not stable else "no run above it grows"
        return (
            "inconclusive",
            f"the rate agrees within {band}, but {lacking}",
            reasons,
            ["lengthen the runs (load.horizon_s), or add a rate farther from the critical one"],
        )
    unsteady = next(
        (c for c in premises if c.name == "steady step time" and c.holds is False), None
    )
    if unsteady is not None:
        return (
            "inconclusive",
            "the engine's speed moved during the run",
            [*reasons, unsteady.text],
            ["keep other work off the machine, lock clocks, or lengthen the runs"],
        )
    if share.low > 1 + theta or share.high < 1 - theta:
        return _refuted(evidence, share, reasons, best, audited)
    if wide.half_width > theta * wide.value:
        return (
            "inconclusive",
            "the prediction's own interval is too wide to test",
            reasons,
            [
                f"predicted {wide.value:.3g} [{wide.low:.3g}, {wide.high:.3g}] at 90 %: calibrate longer"
            ],
        )
    factor = (share.half_width / (theta / 2)) ** 2
    return (
        "inconclusive",
        f"the interval straddles the {band} band",
        reasons,
        [f"lengthen the overloaded runs about {max(factor, 1.5):.1f} times"],
    )


def _one_sided(
    evidence: Evidence, judgements: Sequence[RunJudgement]
) -> tuple[Outcome, str, list[str], list[str]]:
    highest = max(j.arrival_rate for j in judgements)
    reason = (
        f"no valid run kept its queue non-empty for {MIN_BACKLOG_RESIDENCES:.0f} residence times; "
        f"the highest rate offered was {highest:.3g} req/s"
    )
    return (
        "inconclusive",
        "the critical rate was not reached",
        [reason],
        [f"add a rate above {1.3 * highest:.3g} req/s (load.rates)"],
    )


def _refuted(
    evidence: Evidence,
    share: Estimate,
    reasons: list[str],
    best: _Capacity,
    audited: Identity | None,
) -> tuple[Outcome, str, list[str], list[str]]:
    """Refuted, or a premise of the paper failed and the model with that mechanism explains it."""
    theta = evidence.theta
    binds = binding_resource(best.saturated, evidence.limits)
    advice: list[str] = []
    if evidence.prediction.claim == "paper" and binds != "kv_cache":
        explained = ratio(best.by_work, evidence.engine.critical_rate, "measured over engine model")
        inside = explained.at_level(0.90)
        reasons.append(
            f"with {binds} in the model, measured / predicted {explained.value:.3f} "
            f"[{explained.low:.3f}, {explained.high:.3f}]"
        )
        same = evidence.engine.binding == binds
        if same and inside.low >= 1 - theta and inside.high <= 1 + theta:
            return (
                "premise_violated",
                f"{binds} binds before the KV cache",
                reasons,
                [f"raise {binds} until the KV cache binds, or test claim: engine"],
            )
    if audited is not None and audited.check.holds is False:
        reasons.append(f"pool: {audited.check.text}")
        advice.append("check the KV capacity that the server reports against its log")
    step = best.saturated.step_time
    pace = step.value / evidence.prediction.step_time_s.value - 1
    if abs(pace) > theta / 2:
        reasons.append(
            f"step time: {step.value * 1e3:.2f} ms measured under backlog, "
            f"{evidence.prediction.step_time_s.value * 1e3:.2f} ms predicted ({pace:+.1%})"
        )
        advice.append("calibrate again: the step-time law does not hold at saturation")
    if binds != evidence.prediction.binding:
        reasons.append(f"{binds} bound, {evidence.prediction.binding} was predicted to")
    if share.low > 1:
        reasons.append(
            "the measured rate lies above an upper bound: the pool, the step time or the lengths "
            "that went into the prediction are wrong"
        )
    side = "faster" if share.value > 1 else "slower"
    return "refuted", f"{abs(share.value - 1):.0%} {side} than predicted", reasons, advice


# -- tables --------------------------------------------------------------------------------------


def _other_predictions(evidence: Evidence, best: _Capacity | None) -> tuple[NamedEstimate, ...]:
    others = [
        NamedEstimate(
            name="paper M / (b E[g])",
            estimate=evidence.paper.critical_rate,
            note="the premises of the paper: the KV cache binds, tokens not blocks",
        ),
        NamedEstimate(
            name="engine",
            estimate=evidence.engine.critical_rate,
            note=f"blocks, ceilings, recompute; {evidence.engine.binding} binds",
        ),
    ]
    if evidence.simulated is not None:
        others.append(
            NamedEstimate(
                name="simulated",
                estimate=evidence.simulated,
                note="the scheduler model under saturated Poisson load",
            )
        )
    if best is not None:
        step = best.saturated.step_time
        value = evidence.paper.kv_demand.value * step.value
        audit_rate = Estimate.exact(evidence.limits.pool_tokens, "tokens", "").value / value
        spread = step.half_width / step.value
        others.append(
            NamedEstimate(
                name="P3 audit",
                estimate=Estimate(
                    audit_rate,
                    audit_rate * (1 - spread),
                    audit_rate * (1 + spread),
                    0.95,
                    "req/s",
                    "paper's formula with the saturated run's own b",
                ),
                note="close to an identity: it audits the inputs and decides nothing",
            )
        )
    return tuple(others)


def _other_measurements(
    judgements: Sequence[RunJudgement], capacities: Sequence[_Capacity]
) -> tuple[NamedEstimate, ...]:
    found: list[NamedEstimate] = []
    counted = _combined([c.by_count for c in capacities])
    if counted is not None:
        found.append(
            NamedEstimate(name="by count", estimate=counted, note="completions under backlog")
        )
    points = [
        HingePoint(j.realised_rate, j.drift.value, j.drift.standard_error)
        for j in judgements
        if j.verdict != "invalid" and not math.isnan(j.drift.value)
    ]
    fitted = hinge(points) if len(points) >= 2 else None
    if fitted is not None:
        found.append(NamedEstimate(name="hinge", estimate=fitted, note="drift against rate"))
    return tuple(found)


def _assumed_observed(
    evidence: Evidence, best: _Capacity | None, audited: Identity | None
) -> tuple[AssumedObserved, ...]:
    runs = [r for r in evidence.runs if len(r.frames.requests)]
    rows: list[AssumedObserved] = []
    gaps_ok = [c.passed for r in runs for c in r.fidelity.checks if c.passed is not None]
    rows.append(
        AssumedObserved(
            quantity="arrivals",
            assumed="Poisson, open loop",
            observed=f"{sum(gaps_ok)} of {len(gaps_ok)} load checks passed",
            agrees=all(gaps_ok),
        )
    )
    for label, column, designed in (
        ("mean prompt", "prompt_tokens", evidence.workload.prompt_tokens),
        ("mean output", "output_tokens_designed", evidence.workload.output_tokens),
    ):
        values = np.concatenate([r.frames.requests[column].to_numpy(dtype=float) for r in runs])
        mean = evidence.workload.mean(designed)
        error = float(np.std(values) / math.sqrt(len(values)))
        rows.append(
            AssumedObserved(
                quantity=f"{label} length",
                assumed=f"{mean:.2f} tokens",
                observed=f"{values.mean():.2f} +- {1.96 * error:.2f} tokens",
                agrees=bool(abs(values.mean() - mean) <= 4 * error + 1e-9),
            )
        )
    premises = {c.name: c for c in _premises(evidence, best.saturated if best else None)}
    rows.append(
        AssumedObserved(
            quantity="prefix hits",
            assumed="0 tokens",
            observed=f"{premises['no prefix hits'].observed:.0f} tokens",
            agrees=premises["no prefix hits"].holds,
        )
    )
    if best is not None:
        seen = best.saturated
        rows.append(
            AssumedObserved(
                quantity="eviction",
                assumed=f"{evidence.engine.recomputed_tokens:.0f} tokens recomputed per request",
                observed=f"{seen.preemptions_per_request:.2f} preemptions per request",
                agrees=None,
            )
        )
        step = seen.step_time.scaled(1e3, "ms")
        expected = evidence.prediction.step_time_s.scaled(1e3, "ms")
        rows.append(
            AssumedObserved(
                quantity="step time b at saturation",
                assumed=f"{expected.value:.2f} ms [{expected.low:.2f}, {expected.high:.2f}]",
                observed=f"{step.value:.2f} ms [{step.low:.2f}, {step.high:.2f}]",
                agrees=abs(step.value / expected.value - 1) <= evidence.theta / 2,
            )
        )
        rows.append(
            AssumedObserved(
                quantity="what binds",
                assumed=evidence.prediction.binding,
                observed=binding_resource(seen, evidence.limits),
                agrees=binding_resource(seen, evidence.limits) == evidence.prediction.binding,
            )
        )
    if audited is not None:
        pool = audited.implied_pool
        rows.append(
            AssumedObserved(
                quantity="KV pool M",
                assumed=f"{evidence.limits.pool_tokens} tokens",
                observed=f"{pool.value:.0f} tokens [{pool.low:.0f}, {pool.high:.0f}]",
                agrees=audited.check.holds,
            )
        )
    return tuple(rows)
