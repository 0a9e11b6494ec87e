"""From evidence to a verdict: confirmed, refuted, or why neither can be said."""

from __future__ import annotations

from analysis.inference.long_run import long_run_mean
from analysis.numbers.estimate import ratio
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.audit import (
    binding_resource,
    client_equals_server,
    conservation,
    token_balance,
)
from analysis.verdicts.branches import branch_checks, branch_warnings, two_branches
from analysis.verdicts.evidence import Evidence, rounding
from analysis.verdicts.identity import Identity, identity
from analysis.verdicts.premises import premises
from analysis.verdicts.ruling import Findings, decide
from analysis.verdicts.run_verdict import capacity, judge_run
from analysis.verdicts.settling import near_critical
from analysis.verdicts.verdict import Check, Verdict
from analysis.verdicts.verdict_tables import (
    assumed_observed,
    from_paper,
    other_measurements,
    other_predictions,
)
from analysis.verdicts.wave_advice import wave_warnings, words_about_runs


def judge(evidence: Evidence) -> Verdict:
    """The verdict of an experiment, by the rules of the design page's section 4."""
    predicted = evidence.prediction.critical_rate
    judgements = tuple(judge_run(run, evidence) for run in evidence.runs)
    audit = [check for run in evidence.runs if run.valid for check in _books(run.frames)]
    seen = [c for run in evidence.runs if (c := capacity(run, evidence)) is not None]
    # A burst may start waves that serve faster or slower than sustained arrivals do.
    poisson = [c for c in seen if c.run.frames.run.start == "empty"]
    capacities = poisson or seen
    measured = long_run_mean([c.work for c in capacities]) if capacities else None
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
    longest = best.saturated if best else None
    held = tuple(
        premises(evidence, longest, {c.run.frames.run.id: c.saturated for c in capacities})
    )
    pairs = two_branches(judgements, {c.run.frames.run.id: c.by_work for c in seen})
    share = None
    if measured is not None:
        share = ratio(measured, predicted, "measured over predicted, errors in quadrature")
    waves = words_about_runs(evidence)
    found = Findings(evidence, judgements, tuple(audit), held, best, audited)
    ruling = decide(found, measured, share)
    return Verdict(
        name=evidence.name,
        mode=evidence.mode,
        claim=evidence.prediction.claim,
        grade=evidence.prediction.grade,
        theta=evidence.theta,
        outcome=ruling.outcome,
        headline=ruling.headline,
        reasons=(*ruling.reasons, *(pair.text for pair in pairs)),
        advice=ruling.advice,
        predicted=predicted,
        binding=evidence.prediction.binding,
        binding_observed=binding_resource(best.saturated, evidence.limits) if best else None,
        predictions=other_predictions(evidence, best),
        measured=measured,
        measurements=other_measurements(
            [j for j in judgements if j.start == "empty" or not poisson], capacities
        ),
        ratio=share,
        gap=None if measured is None else abs(predicted.value / measured.value - 1.0),
        runs=judgements,
        premises=(*held, *branch_checks(pairs)),
        audit=tuple(audit),
        from_paper=from_paper(evidence, measured),
        identity=audited.factors if audited else (),
        table=assumed_observed(evidence, held, best, audited),
        near_critical=near_critical(
            evidence,
            measured,
            steady=all(c.holds is not False for c in held if c.name == "steady step time"),
        ),
        synchrony=waves,
        waves=wave_warnings(waves, capacities, evidence),
        warnings=branch_warnings(
            pairs,
            predicted.value,
            [c.work for c in poisson],
            [c.work for c in seen if c.run.frames.run.start == "full"],
        ),
    )


def _books(frames: RunFrames) -> list[Check]:
    return [conservation(frames), client_equals_server(frames), token_balance(frames)]
