"""The verdict on N servers behind one list of URLs, from the verdicts on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.inference.imbalance import Imbalance, imbalance
from analysis.inference.long_run import Stretch
from analysis.numbers.estimate import Estimate, ratio
from analysis.verdicts.audit import binding_resource
from analysis.verdicts.evidence import Evidence, Replicas, rounding
from analysis.verdicts.identity import identity
from analysis.verdicts.judge import judge
from analysis.verdicts.replicas import APART, added_up, backlogs, slowest, whole_rate
from analysis.verdicts.ruling import Findings, decide
from analysis.verdicts.run_verdict import Capacity, judge_run
from analysis.verdicts.verdict import Check, NamedEstimate, ReplicaRate, RunJudgement, Verdict
from analysis.verdicts.verdict_tables import (
    assumed_observed,
    from_paper,
    other_measurements,
    other_predictions,
)

BALANCED = "a balancer that looks at the queues"
IDENTITY = "memory-time identity"
ALIKE = "replicas alike"
P3 = "P3 audit"


def verdict_of(evidence: Evidence) -> Verdict:
    """The verdict of an experiment, with one server or several behind one list of URLs."""
    return judge(evidence) if evidence.replicas is None else _judge_all(evidence, evidence.replicas)


def _judge_all(evidence: Evidence, group: Replicas) -> Verdict:
    """Rates are of all together; occupancy, steps and identity of the replica that was backlogged
    longest. Premises and books are asked of each."""
    predicted, count = evidence.prediction.critical_rate, len(group.each)
    verdicts = [judge(one) for one in group.each]
    seen = backlogs(evidence)
    by_work = [[c.work for c in own] for own in seen]
    measured, bounding = whole_rate(by_work, evidence.theta)
    judgements = tuple(_judged(evidence, verdicts, i) for i in range(len(evidence.runs)))
    # What decides is asked of those that bound the whole, their rates taken to all.
    capacities = [_as_whole(c, count) for i in bounding for c in seen[i]]
    best = max(capacities, key=lambda c: c.saturated.window.duration_s, default=None)
    audited = None
    if best is not None:
        audited = identity(
            best.run.frames,
            best.saturated,
            evidence.limits.pool_tokens,
            rounding(evidence.workload, evidence.limits.block_size),
            evidence.prediction.step_time_s.value,
        )
    audit = tuple(c for i, v in enumerate(verdicts) for c in _named(v.audit, i))
    books = tuple(c for v in verdicts for c in v.audit if c.name != IDENTITY)
    alike = _alike(by_work, evidence.theta)
    held = (*_premises(verdicts), alike)
    share = None
    if measured is not None:
        share = ratio(measured, predicted, "measured over predicted, errors in quadrature")
    ruling = decide(Findings(evidence, judgements, books, held, best, audited), measured, share)
    return Verdict(
        name=evidence.name,
        mode=f"{count} replicas, request i to number i mod {count}: {evidence.mode}",
        claim=evidence.prediction.claim,
        grade=evidence.prediction.grade,
        theta=evidence.theta,
        outcome=ruling.outcome,
        headline=ruling.headline,
        reasons=(*ruling.reasons, *_unlike(evidence, group, alike)),
        advice=ruling.advice,
        predicted=predicted,
        binding=evidence.prediction.binding,
        binding_observed=binding_resource(best.saturated, evidence.limits) if best else None,
        predictions=_predictions(evidence, group, best),
        measured=measured,
        measurements=(*_added(by_work, bounding), *other_measurements(judgements, capacities)),
        ratio=share,
        gap=None if measured is None else abs(predicted.value / measured.value - 1.0),
        runs=judgements,
        premises=held,
        audit=audit,
        from_paper=from_paper(evidence, measured),
        identity=audited.factors if audited else (),
        table=assumed_observed(evidence, held, best, audited),
        near_critical=tuple(
            replace(near, run=f"{near.run}, replica {i}", text=f"replica {i}: {near.text}")
            for i, v in enumerate(verdicts)
            for near in v.near_critical
        ),
        synchrony=tuple(
            replace(found, run=f"{found.run}, replica {i}")
            for i, v in enumerate(verdicts)
            for found in v.synchrony
        ),
        waves=tuple(f"replica {i}: {text}" for i, v in enumerate(verdicts) for text in v.waves),
        replicas=_rates(group, by_work, bounding),
        imbalance=tuple(
            _imbalance(evidence, group, verdicts, seen, i) for i in range(len(evidence.runs))
        ),
    )


def _judged(evidence: Evidence, verdicts: Sequence[Verdict], run: int) -> RunJudgement:
    """A run by its N(t) over all, and by those replicas that grow: one queue that grows is enough.

    The sum tells growth as soon as one replica's does where they are alike; where one was predicted
    slower than the rest, its own queue tells it sooner.
    """
    found = judge_run(evidence.runs[run], evidence)
    assert evidence.replicas is not None
    rates = [one.prediction.critical_rate for one in evidence.replicas.each]
    bounding = slowest(rates, evidence.theta)
    growing = [i for i in bounding if verdicts[i].runs[run].verdict == "unstable"]
    if found.verdict in ("invalid", "unstable") or not growing:
        return found
    names = " and ".join(map(str, growing))
    if found.verdict == "inconclusive" and len(bounding) < len(rates):
        return replace(found, verdict="unstable", text=f"replica {names} grows")
    text = f"cannot say: N(t) of all is {found.verdict}, replica {names} grows"
    return replace(found, verdict="inconclusive", text=text)


def _as_whole(one: Capacity, count: int) -> Capacity:
    """What ``count`` servers like this one serve."""

    def scaled(stretch: Stretch) -> Stretch:
        return replace(stretch, rates=stretch.rates * count)

    return replace(
        one,
        work=scaled(one.work),
        count=scaled(one.count),
        by_regression=one.by_regression.scaled(count),
    )


def _named(checks: Sequence[Check], index: int) -> list[Check]:
    return [replace(check, name=f"replica {index}: {check.name}") for check in checks]


def _premises(verdicts: Sequence[Verdict]) -> list[Check]:
    """One check for each premise; that of a steady step is only asked where a queue lasted."""
    by_name: dict[str, list[Check]] = {}
    for index, verdict in enumerate(verdicts):
        for check in verdict.premises:
            told = replace(check, text=f"replica {index}: {check.text}")
            by_name.setdefault(check.name, []).append(told)
    return [_worst(checks) for checks in by_name.values()]


def _worst(checks: Sequence[Check]) -> Check:
    """What the one says in which a premise holds least."""
    order = {False: 0, None: 1, True: 2}
    return min(checks, key=lambda check: order[check.holds])


def _alike(by_work: Sequence[Sequence[Stretch]], theta: float) -> Check:
    """Do the replicas serve alike under backlog? Only then is N times one's rate that of all."""
    rates = [added_up([own]) for own in by_work if own]
    allowed = APART * theta
    if len(rates) < len(by_work):
        text = "not every replica kept its queue non-empty long enough"
        return Check(name=ALIKE, holds=None, observed=float("nan"), threshold=allowed, text=text)
    apart = max(r.value for r in rates) / min(r.value for r in rates) - 1
    said = ", ".join(f"{r.value:.3g} [{r.low:.3g}, {r.high:.3g}]" for r in rates)
    return Check(
        name=ALIKE,
        holds=len(slowest(rates, theta)) == len(rates),
        observed=apart,
        threshold=allowed,
        text=f"they served {said} req/s under backlog; told apart where {100 * allowed:.3g} % lie "
        "between them beyond chance, at 99 %",
    )


def _unlike(evidence: Evidence, group: Replicas, alike: Check) -> tuple[str, ...]:
    """What a reader must know where the slowest replica bounds the rest."""
    reasons = []
    rates = [one.prediction.critical_rate for one in group.each]
    bounding = slowest(rates, evidence.theta)
    if len(bounding) < len(rates):
        names = " and ".join(map(str, bounding))
        reasons.append(
            f"replica {names} was predicted to be slower: under round-robin it bounds all at "
            f"{evidence.prediction.critical_rate.value:.3g} req/s; behind {BALANCED} they would "
            f"serve {group.balanced.value:.3g} [{group.balanced.low:.3g}, {group.balanced.high:.3g}]"
        )
    if alike.holds is False:
        reasons.append(f"the replicas do not serve alike: {alike.text}")
    return tuple(reasons)


def _predictions(
    evidence: Evidence, group: Replicas, best: Capacity | None
) -> tuple[NamedEstimate, ...]:
    """The other predictors, of all replicas together."""
    count = len(group.each)
    found = tuple(
        replace(other, estimate=other.estimate.scaled(count)) if other.name == P3 else other
        for other in other_predictions(evidence, best)
    )
    if group.balanced.value == evidence.prediction.critical_rate.value:
        return found
    balanced = NamedEstimate(
        name="balanced", estimate=group.balanced, note=f"each one's own rate, behind {BALANCED}"
    )
    return (*found, balanced)


def _added(
    by_work: Sequence[Sequence[Stretch]], bounding: Sequence[int]
) -> tuple[NamedEstimate, ...]:
    """What the replicas served together, where the slowest bounds the rest."""
    if len(bounding) == len(by_work) or not all(by_work):
        return ()
    return (
        NamedEstimate(
            name="added up", estimate=added_up(by_work), note=f"what {BALANCED} could reach"
        ),
    )


def _rates(
    group: Replicas, by_work: Sequence[Sequence[Stretch]], bounding: Sequence[int]
) -> tuple[ReplicaRate, ...]:
    return tuple(
        ReplicaRate(
            replica=i,
            predicted=one.prediction.critical_rate,
            measured=added_up([own]) if own else None,
            bounds=i in bounding,
        )
        for i, (one, own) in enumerate(zip(group.each, by_work, strict=True))
    )


def _imbalance(
    evidence: Evidence,
    group: Replicas,
    verdicts: Sequence[Verdict],
    seen: Sequence[Sequence[Capacity]],
    run: int,
) -> Imbalance:
    whole = evidence.runs[run].frames.run
    served: list[Estimate | None] = []
    for own in seen:
        here = [c.work for c in own if c.run.frames.run.id == whole.id]
        served.append(added_up([here]) if here else None)
    return imbalance(
        [one.runs[run].frames for one in group.each],
        whole.arrival_rate / evidence.prediction.critical_rate.value,
        [v.runs[run].drift for v in verdicts],
        served,
    )
