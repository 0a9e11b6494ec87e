"""A search held against a prediction that was on disk before it: confirmed, refuted, or neither.

A search offers more and less than its server serves until one certainly grows and the other certainly
drains, and stops when its interval is narrow: so it answers what an experiment at fixed rates answers,
with as few requests as that takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.formatting import estimate_text
from analysis.theory.prediction import Prediction
from analysis.verdicts.search_result import SearchResult
from analysis.verdicts.verdict import EXIT_CODES, Outcome, agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchVerdict:
    """The answer of ``critrate search --verdict``."""

    outcome: Outcome
    headline: str
    theta: float
    claim: str
    grade: str
    predicted: Estimate
    binding: str
    """Ceiling that the prediction says binds."""
    measured: Estimate | None
    ratio: Estimate | None
    requests: int
    """Of the search and of the calibration before it."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, "exit_code": self.exit_code, **asdict(self)}


def search_verdict(
    prediction: Prediction, result: SearchResult, theta: float, probe_requests: int
) -> SearchVerdict:
    """The rules of the design page's section 4 for a search.

    A search that found its rate saw the queue grow at a rate above and drain at one below, both
    certain; without that the answer is "inconclusive".
    """
    predicted = prediction.critical_rate
    measured = share = None
    outcome: Outcome = "inconclusive"
    headline = f"the critical rate was not found: {result.reason}"
    if result.outcome == "invalid":
        outcome, headline = "invalid", result.reason
    elif result.outcome == "found":
        measured = result.critical_rate
        share = ratio(measured, predicted, "measured over predicted, errors in quadrature")
        band = f"{100 * theta:.3g} %"
        answer = agreement(share, theta)
        if answer == "inside":
            outcome, headline = "confirmed", f"within {band}"
        elif answer == "outside":
            outcome, headline = "refuted", _off(share)
        else:
            headline = f"the interval straddles the {band} band"
    return SearchVerdict(
        outcome=outcome,
        headline=headline,
        theta=theta,
        claim=prediction.claim,
        grade=prediction.grade,
        predicted=predicted,
        binding=prediction.binding,
        measured=measured,
        ratio=share,
        requests=result.requests + probe_requests,
    )


def _off(share: Estimate) -> str:
    side = "faster" if share.value > 1 else "slower"
    return f"{100 * abs(share.value - 1):.0f} % {side} than predicted"


def verdict_lines(verdict: SearchVerdict) -> list[tuple[str, str]]:
    """Labels and texts for the terminal, before and after those of the search."""
    rate = estimate_text(verdict.predicted)
    lines = [("predicted", f"{rate}   {verdict.claim} {verdict.grade}, bound by {verdict.binding}")]
    if verdict.ratio is not None:
        lines.append(("ratio", f"measured / predicted {estimate_text(verdict.ratio)}"))
    lines.append((verdict.outcome, verdict.headline))
    return lines
