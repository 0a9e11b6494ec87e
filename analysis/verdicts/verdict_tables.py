"""Tables of a verdict: other predictors, other estimators, and what was assumed beside what was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.inference.capacity import HingePoint, hinge
from analysis.inference.long_run import long_run_mean
from analysis.numbers.estimate import Estimate, combined, ratio
from analysis.theory.prediction import Prediction
from analysis.verdicts.audit import binding_resource
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.identity import Identity
from analysis.verdicts.run_verdict import Capacity
from analysis.verdicts.verdict import AssumedObserved, Check, NamedEstimate, RunJudgement


def other_predictions(evidence: Evidence, best: Capacity | None) -> tuple[NamedEstimate, ...]:
    """Every predictor beside the claim, the P3 audit included, with what each assumes."""
    others = [
        NamedEstimate(
            name="paper M / (b E[g])",
            estimate=evidence.paper.critical_rate,
            note="the premises of the paper: the KV cache binds, tokens not blocks",
        ),
        NamedEstimate(
            name="engine",
            estimate=evidence.engine.critical_rate,
            note=_engine_note(evidence.engine),
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


def from_paper(evidence: Evidence, measured: Estimate | None) -> tuple[NamedEstimate, ...]:
    """The paper's rate times these factors is the measured rate; none where none were predicted.

    Each mechanism as the engine model predicts it, then measured over the engine's prediction, which
    is what they leave; that one is missing where nothing was measured.
    """
    if not evidence.mechanisms:
        return ()
    factors = [
        NamedEstimate(
            name=m.name,
            estimate=Estimate.exact(m.factor, "", "engine model"),
            note="predicted before the first run",
        )
        for m in evidence.mechanisms
    ]
    if measured is not None:
        left = ratio(
            measured, evidence.engine.critical_rate, "measured over the engine's prediction"
        )
        factors.append(NamedEstimate(name="unexplained", estimate=left, note="what they leave"))
    return tuple(factors)


def _engine_note(prediction: Prediction) -> str:
    low, high = prediction.bracket
    note = (
        f"blocks, ceilings, recompute; {prediction.binding} binds; the paper's theorems leave "
        f"[{low:.4g}, {high:.4g}] req/s open"
    )
    onset = prediction.onset_rate
    if onset is not None:
        note += f"; the KV cache is full 5 % of the time, and queueing starts, at {onset.value:.3g}"
    return note


def other_measurements(
    judgements: Sequence[RunJudgement], capacities: Sequence[Capacity]
) -> tuple[NamedEstimate, ...]:
    """The critical rate by counting, by regression, and by the hinge over all valid runs."""
    found: list[NamedEstimate] = []
    if capacities:
        counted = long_run_mean([c.count for c in capacities])
        found.append(
            NamedEstimate(name="by count", estimate=counted, note="completions under backlog")
        )
    regressed = combined([c.by_regression for c in capacities])
    if regressed is not None:
        found.append(
            NamedEstimate(
                name="by regression",
                estimate=regressed,
                note="counting, with the lengths served and the realised arrivals as control variates",
            )
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


def assumed_observed(
    evidence: Evidence,
    held: Sequence[Check],
    best: Capacity | None,
    audited: Identity | None,
) -> tuple[AssumedObserved, ...]:
    """What the prediction assumed beside what the runs showed, row by row."""
    hits = next(check for check in held if check.name == "no prefix hits")
    rows = [
        *_offered_rows(evidence),
        AssumedObserved(
            quantity="prefix hits",
            assumed="0 tokens",
            observed=f"{hits.observed:.0f} tokens",
            agrees=hits.holds,
        ),
    ]
    if best is not None:
        rows += _saturated_rows(evidence, best)
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


def _offered_rows(evidence: Evidence) -> list[AssumedObserved]:
    """Arrivals and lengths, over all runs."""
    runs = [r for r in evidence.runs if len(r.frames.requests)]
    passed = [c.passed for r in runs for c in r.fidelity.checks if c.passed is not None]
    rows = [
        AssumedObserved(
            quantity="arrivals",
            assumed=f"{evidence.runs[0].frames.run.arrivals.text}, open loop",
            observed=f"{sum(passed)} of {len(passed)} load checks passed",
            agrees=all(passed),
        )
    ]
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
    return rows


def _saturated_rows(evidence: Evidence, best: Capacity) -> list[AssumedObserved]:
    """Eviction, step time and what binds, in the longest backlog."""
    seen = best.saturated
    step = seen.step_time.scaled(1e3, "ms")
    expected = evidence.prediction.step_time_s.scaled(1e3, "ms")
    binds = binding_resource(seen, evidence.limits)
    return [
        AssumedObserved(
            quantity="eviction",
            assumed=f"{evidence.engine.recomputed_tokens:.0f} tokens recomputed per request",
            observed=f"{seen.preemptions_per_request:.2f} preemptions per request",
            agrees=None,
        ),
        AssumedObserved(
            quantity="step time b at saturation",
            assumed=f"{expected.value:.2f} ms [{expected.low:.2f}, {expected.high:.2f}]",
            observed=f"{step.value:.2f} ms [{step.low:.2f}, {step.high:.2f}]",
            agrees=abs(step.value / expected.value - 1) <= evidence.theta / 2,
        ),
        AssumedObserved(
            quantity="what binds",
            assumed=evidence.prediction.binding,
            observed=binds,
            agrees=binds == evidence.prediction.binding,
        ),
    ]
