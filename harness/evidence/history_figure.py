"""The picture of the history's series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.reports.figures_of_history import NightPoint, rate_by_night
from harness.evidence.history_series import Judged, change_text


def figure(nights: Mapping[str, Sequence[Judged]]) -> str:
    """An SVG of the measured rates, a row for each name that has any."""
    series = [(name, [_point(night) for night in found]) for name, found in nights.items() if found]
    return rate_by_night(series) + "\n"


def _point(night: Judged) -> NightPoint:
    rate = night.entry.rate
    assert rate is not None
    return NightPoint(
        label=night.entry.began[:10],
        rate=rate,
        broke=change_text(night.broke),
        alarm=night.answer is not None and night.answer.answer == "regression",
    )
