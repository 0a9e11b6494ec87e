"""From evidence to a verdict: confirmed, refuted, or why neither can be said."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.audit import (
    binding_resource,
    client_equals_server,
    conservation,
    token_balance,
)
from analysis.estimate import Estimate, combined, ratio
from analysis.evidence import Evidence, rounding
from analysis.frames import RunFrames
from analysis.identity import Identity, identity
from analysis.premises import premises
from analysis.run_verdict import MIN_BACKLOG_RESIDENCES, Capacity, capacity, judge_run
from analysis.verdict import Check, Outcome, RunJudgement, Verdict
from analysis.verdict_tables import assumed_observed, other_measurements, other_predictions


def judge(evidence: Evidence) -> Verdict:
    """The verdict of an experiment, by the rules of the design page's section 4."""
    predicted = evidence.prediction.critical_rate
    judgements = tuple(judge_run(run, evidence) for run in evidence.runs)
    audit = [check for run in evidence.runs if run.valid for check in _books(run.frames)]
    capacities = [c for run in evidence.runs if (c := capacity(run, evidence)) is not None]
    measured = combined([c.by_work for c in capacities])
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
    held = premises(evidence, best.saturated if best else None)
    share = None
    if measured is not None:
        share = ratio(measured, predicted, "measured over predicted, errors in quadrature")
    outcome, headline, reasons, advice = _decide(
        evidence, judgements, audit, held, measured, share, best, audited
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
        predictions=other_predictions(evidence, best),
        measured=measured,
        measurements=other_measurements(judgements, capacities),
        ratio=share,
        gap=None if measured is None else abs(predicted.value / measured.value - 1.0),
        runs=judgements,
        premises=tuple(held),
        audit=tuple(audit),
        identity=audited.factors if audited else (),
        table=assumed_observed(evidence, held, best, audited),
        warnings=tuple(w for run in evidence.runs for w in run.warnings),
    )


def _books(frames: RunFrames) -> list[Check]:
    return [conservation(frames), client_equals_server(frames), token_balance(frames)]


def _decide(
    evidence: Evidence,
    judgements: Sequence[RunJudgement],
    audit: Sequence[Check],
    held: Sequence[Check],
    measured: Estimate | None,
    share: Estimate | None,
    best: Capacity | None,
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
    unsteady = next((c for c in held if c.name == "steady step time" and c.holds is False), None)
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
    broken = [f"{j.id}: {j.text}" for j in judgements if j.verdict == "invalid"]
    if broken:
        return (
            "invalid",
            "the load is not what it claims",
            broken,
            ["run the generator on an idle machine, or lower the rates, then repeat"],
        )
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
    best: Capacity,
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
