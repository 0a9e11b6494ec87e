"""The rules of a verdict: from what was found of an experiment to an outcome and its reasons."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.formatting import load_label
from analysis.theory.reserved_demand import keeps_its_fill
from analysis.theory.wave_walk import FILL_RESIDENCES, GENTLE_LOAD
from analysis.verdicts.audit import binding_resource
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.identity import Identity
from analysis.verdicts.run_verdict import MIN_BACKLOG_RESIDENCES, Capacity
from analysis.verdicts.verdict import Check, Outcome, RunJudgement, agreement
from analysis.verdicts.wave_advice import mend


@dataclass(frozen=True, slots=True)
class Ruling:
    """An outcome, the words behind it, its reasons and what to do next."""

    outcome: Outcome
    headline: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Findings:
    """What `decide` goes by."""

    evidence: Evidence
    judgements: tuple[RunJudgement, ...]
    audit: tuple[Check, ...]
    premises: tuple[Check, ...]
    best: Capacity | None
    audited: Identity | None

    @property
    def highest(self) -> float:
        """The highest rate that a valid run offered, req/s."""
        return max(j.arrival_rate for j in self.judgements if j.verdict != "invalid")


def decide(found: Findings, measured: Estimate | None, share: Estimate | None) -> Ruling:
    """The rules of the design page's section 4, in their order."""
    if (ruling := _invalid(found)) is not None:
        return ruling
    if measured is None or share is None or found.best is None:
        return _one_sided(found)
    theta, answer = found.evidence.theta, agreement(share, found.evidence.theta)
    reasons: tuple[str, ...] = (
        f"measured / predicted {share.value:.3f} [{share.low:.3f}, {share.high:.3f}]",
    )
    unsteady = next(
        (c for c in found.premises if c.name == "steady step time" and c.holds is False), None
    )
    if unsteady is not None:
        # The load was what it claims, so nothing is invalid; but there is no one rate to confirm. A rate
        # outside by more than the speed changed is outside at any of its speeds.
        speeds = 1 + unsteady.observed
        if not (share.low > (1 + theta) * speeds or share.high * speeds < 1 - theta):
            return Ruling(
                "inconclusive",
                "the engine's speed changed while it was measured",
                (unsteady.text, *reasons),
                ("keep other work off the machine, cool it or lock its clocks, and repeat",),
            )
        reasons += (unsteady.text,)
    if answer == "inside":
        return _agreeing(found, measured, reasons)
    if share.value > 1 and _fed_by_the_load(found, measured):
        return _fed(found, found.best, reasons)
    if answer == "outside":
        return _refuted(found, found.best, share, reasons)
    return _undecided(found, found.best, measured, share, reasons)


def _fed_by_the_load(found: Findings, measured: Estimate) -> bool:
    """May what was served be due to the overload itself?

    Not where a run far above was stable, nor for more than is served without any prefill step: waves,
    however large, can save no more than these.
    """
    evidence = found.evidence
    predicted = evidence.prediction.critical_rate.value
    prefills = next((m.factor for m in evidence.mechanisms if m.name == "prefill steps"), 1.0)
    return (
        keeps_its_fill(evidence.workload, evidence.limits)
        and found.highest > 1.001 * GENTLE_LOAD * predicted
        and measured.low < evidence.engine.critical_rate.value / prefills
        and not any(
            j.verdict == "stable" and j.arrival_rate > (1 + evidence.theta) * predicted
            for j in found.judgements
        )
    )


def _fed(found: Findings, best: Capacity, reasons: tuple[str, ...]) -> Ruling:
    """Faster than predicted, where the rate that is served bounds the critical rate from above only."""
    evidence = found.evidence
    load = load_label(found.highest / evidence.prediction.critical_rate.value)
    seconds = FILL_RESIDENCES * evidence.prediction.longest_residence_s
    return Ruling(
        "inconclusive",
        "what is served above the critical rate depends on the load",
        (
            *reasons,
            "equal outputs stay in the waves in which they were admitted, and a wave shares its prefill "
            f"step: {load} of the predicted rate fills larger waves, which are served faster than those "
            "just above the critical rate",
        ),
        (
            f"to mend the waves: {mend(evidence, best)}",
            "or come nearer with little overload, for long, and several fills: load.rates "
            f"[0.8, {GENTLE_LOAD}, {GENTLE_LOAD}, {GENTLE_LOAD}], load.horizon_s {seconds:.0f} or more",
        ),
    )


def _invalid(found: Findings) -> Ruling | None:
    """No usable run, books that do not balance, or an invalid run where no other gave a rate."""
    broken = tuple(f"{j.id}: {j.text}" for j in found.judgements if j.verdict == "invalid")
    books = tuple(
        f"{c.name}: {c.text}"
        for c in found.audit
        if c.holds is False and c.name != "memory-time identity"
    )
    if not books and not (broken and (found.best is None or len(broken) == len(found.judgements))):
        return None
    return Ruling(
        "invalid",
        "the load or the records are not what they claim",
        broken + books,
        ("run the generator on an idle machine, or lower the rates, then repeat",),
    )


def _one_sided(found: Findings) -> Ruling:
    return Ruling(
        "inconclusive",
        "the critical rate was not reached",
        (
            f"no valid run kept its queue non-empty for {MIN_BACKLOG_RESIDENCES:.0f} residence "
            f"times; the highest rate offered was {found.highest:.3g} req/s",
        ),
        (f"add a rate above {1.3 * found.highest:.3g} req/s (load.rates)",),
    )


def _agreeing(found: Findings, measured: Estimate, reasons: tuple[str, ...]) -> Ruling:
    """The rate agrees; it is confirmed when one run below is stable and one above grows."""
    band = f"{100 * found.evidence.theta:.0f} %"
    rate = measured.value
    stable = any(j.verdict == "stable" and j.arrival_rate < rate for j in found.judgements)
    grows = any(j.verdict == "unstable" and j.arrival_rate > rate for j in found.judgements)
    if stable and grows:
        return Ruling("confirmed", f"within {band}", reasons)
    lacking = "no run above it grows" if stable else "no run below it is certainly stable"
    return Ruling(
        "inconclusive",
        f"the rate agrees within {band}, but {lacking}",
        reasons,
        ("lengthen the runs (load.horizon_s), or add a rate farther from the critical one",),
    )


def _undecided(
    found: Findings, best: Capacity, measured: Estimate, share: Estimate, reasons: tuple[str, ...]
) -> Ruling:
    evidence, theta = found.evidence, found.evidence.theta
    predicted = evidence.prediction.critical_rate
    wide = predicted.at_level(0.90)
    if wide.half_width > theta * wide.value:
        return Ruling(
            "inconclusive",
            "the prediction's own interval is too wide to test",
            reasons,
            (
                f"predicted {wide.value:.3g} [{wide.low:.3g}, {wide.high:.3g}] at 90 %: calibrate "
                "on an idle machine, or longer",
            ),
        )
    of_measured, of_predicted = (100 * x.half_width / x.value for x in (measured, predicted))
    if keeps_its_fill(evidence.workload, evidence.limits):
        advice = f"to mend the waves: {mend(evidence, best)}"
    elif of_predicted > of_measured:
        advice = (
            f"calibrate on an idle machine: the measured rate is known to {of_measured:.1f} %, the "
            f"predicted one to {of_predicted:.1f} %, by its calibration and the closed form's own error"
        )
    else:
        factor = max((share.half_width / (theta / 2)) ** 2, 1.5)
        advice = f"lengthen the overloaded runs about {factor:.1f} times"
    return Ruling(
        "inconclusive", f"the interval straddles the {100 * theta:.0f} % band", reasons, (advice,)
    )


def _refuted(found: Findings, best: Capacity, share: Estimate, reasons: tuple[str, ...]) -> Ruling:
    """Refuted, or a premise of the paper failed and the model with that mechanism explains it."""
    evidence = found.evidence
    binds = binding_resource(best.saturated, evidence.limits)
    if evidence.prediction.claim == "paper" and _premise_of(found, binds):
        explained = ratio(best.by_work, evidence.engine.critical_rate, "measured over engine model")
        reasons += (
            f"with {binds} in the model, measured / predicted {explained.value:.3f} "
            f"[{explained.low:.3f}, {explained.high:.3f}]",
        )
        within = agreement(explained, evidence.theta) == "inside"
        if within and evidence.engine.binding == binds:
            return Ruling("premise_violated", *_mechanism(binds, best, reasons))
    side = "faster" if share.value > 1 else "slower"
    causes, advice = _causes(found, best, share, binds)
    headline = f"{100 * (abs(share.value - 1)):.0f} % {side} than predicted"
    return Ruling("refuted", headline, reasons + causes, advice)


def _premise_of(found: Findings, binds: str) -> bool:
    """Did a premise of the paper fail that this mechanism breaks?"""
    broken = "no output reservation" if binds == "output_reservation" else "KV cache binds"
    return any(check.name == broken and check.holds is False for check in found.premises)


def _mechanism(
    binds: str, best: Capacity, reasons: tuple[str, ...]
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Headline, reasons and advice for a premise of the paper that failed."""
    if binds == "output_reservation":
        held, aside = best.saturated.kv_usage, best.saturated.set_aside
        return (
            "output reservation",
            (
                *reasons,
                f"under backlog {100 * held:.0f} % of the pool was in use and {100 * aside:.0f} % "
                "set aside for outputs to come",
            ),
            (
                "declare max_tokens as short as the outputs are, send requests that may end early "
                "(ignore_eos: false), or test claim: engine",
            ),
        )
    return (
        f"{binds} binds before the KV cache",
        reasons,
        (f"raise {binds} until the KV cache binds, or test claim: engine",),
    )


def _causes(
    found: Findings, best: Capacity, share: Estimate, binds: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which input of the prediction the evidence contradicts, and what to do about it."""
    prediction = found.evidence.prediction
    causes: list[str] = []
    advice: list[str] = []
    if found.audited is not None and found.audited.check.holds is False:
        causes.append(f"pool: {found.audited.check.text}")
        advice.append("check the KV capacity that the server reports against its log")
    step, expected = best.saturated.step_time.value, prediction.step_time_s.value
    if abs(step / expected - 1) > found.evidence.theta / 2:
        causes.append(
            f"step time: {step * 1e3:.2f} ms measured under backlog, {expected * 1e3:.2f} ms "
            f"predicted ({100 * (step / expected - 1):+.1f} %)"
        )
        advice.append("calibrate again: the step-time law does not hold at saturation")
    if binds != prediction.binding:
        causes.append(f"{binds} bound, {prediction.binding} was predicted to")
    if prediction.claim == "paper" and found.evidence.mechanisms:
        causes.append(_left_out(found.evidence, best))
        advice.append("claim: engine has these mechanisms in its prediction")
    if share.low > 1:
        causes.append(
            "the measured rate lies above an upper bound: the pool, the step time or the lengths "
            "that went into the prediction are wrong"
        )
    return tuple(causes), tuple(advice)


def _left_out(evidence: Evidence, best: Capacity) -> str:
    """What the paper's formula leaves out, by the engine model, and how well that explains the gap."""
    effects = ", ".join(f"{m.name} {100 * (m.factor - 1):+.1f} %" for m in evidence.mechanisms)
    explained = ratio(best.by_work, evidence.engine.critical_rate, "measured over engine model")
    return (
        f"the formula leaves out: {effects}; with them measured / predicted {explained.value:.3f} "
        f"[{explained.low:.3f}, {explained.high:.3f}]"
    )
