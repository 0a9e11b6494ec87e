"""What a finished search says, and how it says it in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from analysis.inference.search_rule import Design, Search, Side, batches, capacity, search_rate
from analysis.inference.sequential import Look
from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, grouped, percent, plain, words
from analysis.numbers.quantiles import normal_quantile
from loadgen.records import LoadFidelity

BOOKS_LEVEL = 0.999
OUTCOME_EXIT = {"found": 0, "cannot say": 11, "invalid": 13}

SearchOutcome = Literal["found", "cannot say", "invalid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideVerdict:
    """What one side says: the queue changes by ``drift``, the offered rate less the service rate."""

    side: Side
    rate: float
    drift: Estimate
    holds: bool
    """Above it certainly grows, below it certainly drains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """``critrate search``, as it stands in search.json."""

    outcome: SearchOutcome
    reason: str
    critical_rate: Estimate
    sides: tuple[SideVerdict, ...]
    drained: bool
    """The queue was seen to vanish below the critical rate."""
    counted_departures: float
    expected_departures: float
    """Departures while measured: counted, and by the critical rate; they must agree."""
    batches: int
    batch_s: float
    binding: str
    requests: int
    duration_s: float
    fidelity: LoadFidelity | None
    warnings: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return OUTCOME_EXIT[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def search_result(
    design: Design,
    search: Search,
    looks: Sequence[Look],
    binding: str = "unknown",
    fidelity: LoadFidelity | None = None,
    warnings: tuple[str, ...] = (),
) -> SearchResult:
    """The result of a search that ended, or was cut off, at the last of these looks."""
    whole = capacity(design, search, looks)
    counted, expected, allowed = _books(design, search, looks, whole)
    outcome: SearchOutcome = search.outcome or "cannot say"
    reason = search.reason or ("" if search.outcome else "it was interrupted")
    if outcome == "found" and abs(counted - expected) > allowed:
        outcome = "cannot say"
        reason = (
            f"{counted:.0f} requests left while {expected:.0f} +- {allowed:.0f} should have by the work "
            "served: other clients, a prefix cache, or other lengths than designed"
        )
    failed = [c.name for c in fidelity.checks if c.passed is False] if fidelity else []
    if failed:
        outcome, reason = "invalid", "we did not offer what we claim: " + ", ".join(failed)
    elif warnings:
        outcome, reason = "invalid", warnings[0]
    return SearchResult(
        outcome=outcome,
        reason=reason,
        critical_rate=whole,
        sides=tuple(
            side_verdict(design, search, looks, side)
            for side in ("above", "below")
            if not math.isnan(search_rate(search, side))
        ),
        drained=search.drained,
        counted_departures=counted,
        expected_departures=expected,
        batches=len(batches(design, search, looks)),
        batch_s=search.batch_s,
        binding=binding,
        requests=looks[-1].arrivals,
        duration_s=looks[-1].t_s,
        fidelity=fidelity,
        warnings=warnings,
    )


def side_verdict(design: Design, search: Search, looks: Sequence[Look], side: Side) -> SideVerdict:
    """Drift at the rate of one side, from the work served on that side alone."""
    rate = search_rate(search, side)
    served = capacity(design, search, looks, side)
    drift = Estimate(
        rate - served.value,
        rate - served.high,
        rate - served.low,
        served.level,
        "req/s",
        "offered rate less " + served.method,
    )
    holds = drift.low > 0 if side == "above" else drift.high < 0
    return SideVerdict(side=side, rate=rate, drift=drift, holds=holds)


def _books(
    design: Design, search: Search, looks: Sequence[Look], whole: Estimate
) -> tuple[float, float, float]:
    """Departures counted while measured, expected by the critical rate, and how far they may differ.

    Departures of a backlogged server scatter by cd2 of their number (theory.md 6.1). Those in service
    at either end may all have just begun, or be about to leave: fixed lengths go in waves.
    """
    counted = duration_s = 0.0
    for stretch in search.measured:
        inside = [k for k in looks if stretch.start_s <= k.t_s <= stretch.end_s]
        counted += inside[-1].departures - inside[0].departures
        duration_s += inside[-1].t_s - inside[0].t_s
    expected = whole.value * duration_s
    if not expected > 0:
        return counted, expected, math.inf
    running = max(look.running for look in looks)
    scatter = math.sqrt((design.variance_ratio - 1) * expected)
    z = normal_quantile(0.5 + BOOKS_LEVEL / 2)
    return counted, expected, z * scatter + running + design.precision * expected


# -- in words ------------------------------------------------------------------------------------


def search_lines(result: SearchResult) -> list[tuple[str, str]]:
    """Labels and texts for the terminal, in the style of `analysis.reports.summary`."""
    spent = (
        f"{grouped(result.requests)} requests in {result.duration_s / 60:.1f} minutes, all counted"
    )
    known = math.isfinite(result.critical_rate.half_width)
    lines = []
    if known:
        rate = estimate_text(result.critical_rate)
        width = result.critical_rate.half_width / result.critical_rate.value
        lines.append(
            ("critical", f"{rate}   +- {percent(width)}   bound by {words(result.binding)}")
        )
        lines.append(
            (
                "how",
                f"{result.critical_rate.method} of {plain(round(result.batch_s, 2))} s",
            )
        )
    lines.append(("spent", spent))
    for side in result.sides:
        lines.append((side.side, _side(side, result)))
    lines.append((result.outcome, result.reason or f"departures agree: {_departures(result)}"))
    lines += [("warning", text) for text in result.warnings if text != result.reason]
    return lines


def _side(side: SideVerdict, result: SearchResult) -> str:
    if not math.isfinite(side.drift.half_width):
        return f"{side.rate:.4g} req/s   too few batches to say"
    drift = f"{side.drift.value:+.3g} req/s [{side.drift.low:+.3g}, {side.drift.high:+.3g}]"
    if not side.holds:
        verdict = "cannot say"
    elif side.side == "above":
        verdict = "grows"
    else:
        verdict = "drains: stable from above" + (", to the last request" if result.drained else "")
    return f"{side.rate:.4g} req/s   the queue changes by {drift}   {verdict}"


def _departures(result: SearchResult) -> str:
    by_work = result.expected_departures
    return f"{result.counted_departures:.0f} counted, {by_work:.0f} by the work served"
