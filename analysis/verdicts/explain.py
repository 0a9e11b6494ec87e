"""Where does the distance between the paper's formula and the measured rate come from?

Some factors are *exact*, arithmetic on the law of lengths. Most are *measured* under backlog: how full
the pool was and with what, decode steps among all steps, the mean step beside that of the calibrated law
for the same contents. One, what preemptions cost, is *modelled*, as no engine counts it
(`analysis.verdicts.explain_walk`).

What is left is the closing error of the memory-time identity (theory.md 2.6) and is called unexplained.
As that is close to an identity, a small rest says little of the theory: beside each factor stands what
the engine model predicted of it before the first run, which could have been wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.inference.long_run import long_run_mean
from analysis.inference.work import kv_work
from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.quantiles import normal_quantile
from analysis.schedulers.step_time import StepTimeFit
from analysis.verdicts.audit import binding_resource
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.explain_walk import NO_EFFECT, Walk
from analysis.verdicts.run_verdict import Capacity, capacity
from analysis.verdicts.verdict import Verdict

Source = Literal["exact", "measured", "modelled"]

ENOUGH = 0.9
"""Share of the gap that the causes should account for."""
NO_FACTOR = ("no prefix hits", "no rejections", "exact lengths", "steady step time")
"""Premises whose failure no factor stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """By which factor one cause changes the rate."""

    name: str
    factor: Estimate | None
    """As found in the records; None where it is only predicted."""
    predicted: float | None
    """By the engine model before the first run; None where that says nothing of this cause."""
    source: Source
    how: str
    """One clause: what was compared with what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean KV demand of a request in token-steps: of the law, as offered, as served."""

    designed: float
    offered: Estimate
    served: Estimate
    """KV demand served under backlog over the requests that completed then."""
    counted: Estimate
    """Completions per second under backlog. Unlike the measured rate they move with what was served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The paper's rate times the factors of all causes and the unexplained one is the measured rate."""

    paper: Estimate
    measured: Estimate | None
    gap: Estimate | None
    """Measured over the paper's rate."""
    causes: tuple[Cause, ...]
    unexplained: Cause | None
    share: Estimate | None
    """Share of the gap, as a logarithm, that the causes account for; None where that cannot be said."""
    share_predicted: Estimate | None
    """The same by what was predicted before the first run alone."""
    lengths: Lengths | None
    cannot_say: str | None
    """Why there is no share; None where there is one."""
    notes: tuple[str, ...]

    @property
    def enough(self) -> bool | None:
        """Do the causes account for `ENOUGH` of the gap, as the estimate has it? None: cannot say.

        No is said only where the whole interval lies below.
        """
        if self.share is None:
            return None
        if self.share.value >= ENOUGH:
            return True
        return False if self.share.high < ENOUGH else None

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, "enough": self.enough, **asdict(self)}


def explain(
    evidence: Evidence,
    verdict: Verdict,
    fit: StepTimeFit,
    chunk: int,
    recomputed_tokens: float | None = None,
) -> Explanation:
    """Split measured over paper's rate; ``verdict`` is that of ``evidence``.

    ``fit`` and ``chunk`` are those that the prediction was made with; ``recomputed_tokens`` are those of
    a request, where something counted them. Where no run was backlogged, or the load was not what it
    claims, `cannot_say` says so and only what was predicted is left.
    """
    lacking = _lacking(evidence, verdict)
    if lacking is not None or verdict.measured is None:
        return _only_predicted(evidence, verdict, lacking)
    seen = [c for run in evidence.runs if (c := capacity(run, evidence)) is not None]
    backlogged = [c for c in seen if c.run.frames.run.start == "empty"] or seen
    best = max(backlogged, key=lambda c: c.saturated.window.duration_s)
    binds = binding_resource(best.saturated, evidence.limits)
    walk = Walk(evidence, fit, chunk, verdict.measured, backlogged, binds, recomputed_tokens)
    factors = walk.factors()
    left = factors.pop("unexplained")
    gap = ratio(verdict.measured, evidence.paper.critical_rate, "errors in quadrature")
    nothing = _indistinct(gap)
    by_model = next((f.estimate for f in verdict.from_paper if f.name == "unexplained"), None)
    return Explanation(
        paper=evidence.paper.critical_rate,
        measured=verdict.measured,
        gap=gap,
        causes=_causes(walk, factors, _predicted(evidence, verdict, factors, binds)),
        unexplained=Cause(
            name="unexplained",
            factor=left,
            predicted=None if by_model is None else by_model.value,
            source="measured",
            how=_closing(verdict, binds),
        ),
        share=None if nothing else share_of(left, gap),
        share_predicted=None if nothing or by_model is None else share_of(by_model, gap),
        lengths=_lengths(walk, backlogged),
        cannot_say=nothing,
        notes=tuple(c.text for c in verdict.premises if c.name in NO_FACTOR and c.holds is False),
    )


def share_of(left: Estimate, gap: Estimate) -> Estimate:
    """1 - |log left| / |log gap|, of two factors; the interval (95 %) by the delta method.

    A rest counts against the share on either side: causes that explain too much explain it wrongly. A
    rest larger than the gap leaves nothing explained.
    """
    u, g = math.log(left.value), math.log(gap.value)
    errors = [e.standard_error / e.value for e in (left, gap)]
    spread = normal_quantile(0.975) * math.hypot(errors[0] / g, u / g * errors[1] / g)
    low, high = u / g - spread, u / g + spread
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    most = max(abs(low), abs(high))
    method = "1 - |log unexplained| / |log gap|, delta method"
    value, least, most = (max(1 - off, 0.0) for off in (abs(u / g), least, most))
    return Estimate(value, most, least, 0.95, "", method)


# -- why nothing can be said -----------------------------------------------------------------------


def _lacking(evidence: Evidence, verdict: Verdict) -> str | None:
    if verdict.outcome == "invalid" or verdict.measured is None:
        return "; ".join((verdict.headline, *verdict.reasons, *verdict.advice))
    if evidence.paper.replicas != 1:
        return "replicas share the records: how full and how fast each was is not known"
    return None


def _indistinct(gap: Estimate) -> str | None:
    if not gap.low <= 1 <= gap.high:
        return None
    low, value, high = (100 * (x - 1) for x in (gap.low, gap.value, gap.high))
    return (
        f"the gap of {value:+.1f} % [{low:+.1f}, {high:+.1f}] cannot be told from none, so that there "
        "is nothing to share out"
    )


def _only_predicted(evidence: Evidence, verdict: Verdict, lacking: str | None) -> Explanation:
    how = "the engine model, before the first run"
    causes = tuple(
        Cause(name=f.name, factor=None, predicted=f.estimate.value, source="modelled", how=how)
        for f in verdict.from_paper
        if f.name != "unexplained"
    )
    return Explanation(
        paper=evidence.paper.critical_rate,
        measured=verdict.measured,
        gap=None,
        causes=causes,
        unexplained=None,
        share=None,
        share_predicted=None,
        lengths=None,
        cannot_say=lacking,
        notes=(),
    )


# -- the causes --------------------------------------------------------------------------------------


def _causes(
    walk: Walk, factors: dict[str, Estimate], predicted: dict[str, float]
) -> tuple[Cause, ...]:
    said = _how(walk)
    unseen: tuple[Source, str] = ("modelled", "predicted, but not what was seen to bind")
    found = []
    for name in dict.fromkeys([*factors, *predicted]):
        source, how = said.get(name, unseen)
        cause = Cause(
            name=name,
            factor=factors.get(name),
            predicted=predicted.get(name),
            source=source,
            how=how,
        )
        found.append(cause)
    return tuple(found)


def _how(walk: Walk) -> dict[str, tuple[Source, str]]:
    """How each factor was got, and from what."""
    totals = walk.totals
    used, aside = 100 * totals.usage, 100 * totals.set_aside
    step_ms, law_ms = 1e3 * totals.seconds / totals.steps, 1e3 * walk.law_step_s()
    found: dict[str, tuple[Source, str]] = {
        "lengths": ("exact", "the law that was offered, not the one predicted from"),
        "first token": ("exact", "the prompt's last step gives the first output"),
        "block rounding": ("exact", f"blocks of {walk.evidence.limits.block_size} tokens"),
        "async scheduling": ("exact", "a finished request keeps its blocks for a step more"),
        "output reservation": (
            "measured",
            f"{aside:.1f} % of the pool set aside for outputs to come",
        ),
        "under-fill": ("measured", f"{100 - used - aside:.1f} % of the pool free under backlog"),
        "prefill steps": (
            "measured",
            f"{totals.steps / totals.decode_steps:.3f} steps from one output to the next",
        ),
        "recompute": (
            "modelled" if walk.recomputed_tokens is None else "measured",
            f"{walk.again:.0f} tokens a request; {walk.preemptions_per_request:.2f} preemptions counted",
        ),
        "step time": (
            "measured",
            f"{step_ms:.2f} ms a step, by the calibrated law {law_ms:.2f} ms",
        ),
        "mix of lengths": ("measured", "KV served, beside what binds"),
    }
    if walk.binds not in ("kv_cache", "output_reservation", "unknown"):
        found[walk.binds] = ("measured", f"it binds, with {used:.1f} % of the pool in use")
    return found


def _predicted(
    evidence: Evidence, verdict: Verdict, factors: dict[str, Estimate], binds: str
) -> dict[str, float]:
    """The predicted mechanisms by the names of what was found; none where none were predicted."""
    stated = {f.name: f.estimate.value for f in verdict.from_paper if f.name != "unexplained"}
    if not stated:
        return {}
    exact = [name for name in ("first token", "async scheduling") if name in factors]
    named: dict[str, float] = {name: factors[name].value for name in exact}
    named["block rounding"] = stated.pop("rounding", 1.0) / math.prod(named.values())
    if "reservation" in stated:
        named["output reservation"] = stated.pop("reservation")
    if "ceiling" in stated:
        named[evidence.engine.binding] = stated.pop("ceiling")
    named |= stated
    if binds in factors:
        # With another ceiling hit, what is left free is one number: its parts cannot be seen apart.
        parts = [named.pop(name, 1.0) for name in ("output reservation", "under-fill")]
        named[binds] = named.get(binds, 1.0) * math.prod(parts)
    return {name: value for name, value in named.items() if abs(value - 1) > NO_EFFECT}


def _closing(verdict: Verdict, binds: str) -> str:
    pool = next(c for c in verdict.audit if c.name == "memory-time identity")
    if binds == "unknown":
        return "the pool was not full, and no known ceiling was reached"
    if pool.holds is False:
        return pool.text
    return "what was served, beside what occupancy allows"


def _lengths(walk: Walk, backlogged: Sequence[Capacity]) -> Lengths:
    columns = ("prompt_tokens", "output_tokens_designed")
    offered = np.concatenate(
        [kv_work(*(c.run.frames.per_request(column) for column in columns)) for c in backlogged]
    )
    return Lengths(
        designed=walk.demand,
        offered=_mean(offered),
        served=walk.served_per_request(),
        counted=long_run_mean([c.count for c in backlogged]),
    )


def _mean(values: NDArray[np.float64]) -> Estimate:
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    method = "all that arrived in the backlogged runs"
    if error == 0.0:
        return Estimate.exact(float(values[0]), "token-steps", method)
    return Estimate.normal(float(values.mean()), error, "token-steps", method)
