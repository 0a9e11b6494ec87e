"""Pictures of the answer: critical rates predicted and measured, and drift against rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, load_label, percent
from analysis.reports.figure_style import (
    INK,
    MEASURED,
    MUTED,
    PREDICTED,
    WIDTH_IN,
    draw,
    run_colors,
)
from analysis.verdicts.verdict import NamedEstimate, RunJudgement, Verdict

BAND = "#d5e6f2"


def ratio_strip(ratio: Estimate, theta: float) -> str:
    """Measured / predicted with its 90 and 95 % intervals against the band 1 +- theta."""
    narrow, wide = ratio.at_level(0.90), ratio.at_level(0.95)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        reach = max(2.0 * theta, *(1.15 * abs(x - 1.0) for x in (wide.low, wide.high)))
        axes.axvspan(1 - theta, 1 + theta, color=BAND, linewidth=0)
        axes.axvline(1.0, color=MUTED, linewidth=0.8)
        axes.plot([wide.low, wide.high], [0, 0], color=INK, linewidth=1.5)
        axes.plot([narrow.low, narrow.high], [0, 0], color=INK, linewidth=5, solid_capstyle="butt")
        axes.plot([ratio.value], [0], "o", color="white", markeredgecolor=INK, markersize=7)
        axes.set(xlim=(1 - reach, 1 + reach), ylim=(-1, 1), yticks=[])
        axes.set_xlabel("measured / predicted (thick: 90 %, thin: 95 %)")
        axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        for edge, sign in ((1 - theta, "-"), (1 + theta, "+")):
            name = f"{sign}{percent(theta, None)}"
            axes.text(edge, 1.05, name, color=PREDICTED, fontsize=8.5, ha="center", va="bottom")

    return draw(WIDTH_IN, 1.15, "Measured over predicted critical rate against the band", paint)


def drift_against_rate(verdict: Verdict) -> str:
    """Drift of each run over its realised rate, with max(0, rate - critical rate)."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        x = [_rate_of(run) for run in verdict.runs]
        critical = [(verdict.predicted, PREDICTED, "predicted")]
        if verdict.measured is not None:
            critical.append((verdict.measured, MEASURED, "measured"))
        values = [v for v in (*x, *(c.value for c, _, _ in critical)) if np.isfinite(v)]
        low, high = min(values), max(values)
        pad = 0.08 * ((high - low) or high)
        grid = np.linspace(low - pad, high + pad, 200)
        for row, (estimate, color, name) in enumerate(critical):
            if not np.isfinite(estimate.value):
                continue
            axes.axvspan(*_finite_span(estimate, grid), color=color, alpha=0.14, linewidth=0)
            hinge = np.maximum(0.0, grid - estimate.value)
            dashes = (1, 0) if row == 0 else (4, 2)
            axes.plot(grid, hinge, color=color, linewidth=1.3, dashes=dashes)
            axes.text(
                0.02,
                0.97 - 0.085 * row,
                f"{name} {estimate_text(estimate)}",
                color=color,
                fontweight="bold",
                transform=axes.transAxes,
                va="top",
            )
        for run, rate, color in zip(
            verdict.runs, x, run_colors([run.load for run in verdict.runs]), strict=True
        ):
            _drift_point(axes, run, rate, color)
        axes.axhline(0.0, color=MUTED, linewidth=0.8)
        axes.set_xlim(grid[0], grid[-1])
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom - 0.08 * (top - bottom), top + 0.22 * (top - bottom))
        axes.set(xlabel="realised arrival rate (req/s)", ylabel="drift of N(t) (req/s)")

    return draw(WIDTH_IN, 3.4, "Drift against arrival rate", paint)


def forest(verdict: Verdict) -> str:
    """Every predictor and estimator of the critical rate with its interval, on one axis."""
    rows = _forest_rows(verdict)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        center = verdict.predicted.value
        if np.isfinite(center):
            band = (center * (1 - verdict.theta), center * (1 + verdict.theta))
            axes.axvspan(*band, color=BAND, linewidth=0)
            axes.axvline(center, color=PREDICTED, linewidth=0.8)
        for place, (row, color, strong) in enumerate(rows):
            estimate, weight = row.estimate, 2.6 if strong else 1.4
            marker = "D" if strong else "o"
            axes.text(
                0.0,
                -place + 0.33,
                f"{row.name}: {estimate_text(estimate)}",
                color=color,
                fontsize=8.5,
                fontweight="bold" if strong else "normal",
                transform=axes.get_yaxis_transform(),
                va="center",
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
            )
            if np.isfinite([estimate.low, estimate.high]).all():
                axes.plot(
                    [estimate.low, estimate.high], [-place] * 2, color=color, linewidth=weight
                )
            axes.plot([estimate.value], [-place], marker, color=color, markersize=5)
        axes.set(yticks=[], ylim=(-len(rows) + 0.5, 0.7), xlabel="critical rate (req/s)")
        axes.margins(x=0.04)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        if np.isfinite(center) and center > 0:
            above = axes.secondary_xaxis("top", functions=_relative_to(center))
            above.set_xlabel("relative to the prediction under test")

    return draw(WIDTH_IN, 1.1 + 0.42 * len(rows), "Predicted and measured critical rates", paint)


def _rate_of(run: RunJudgement) -> float:
    return run.realised_rate if np.isfinite(run.realised_rate) else run.arrival_rate


def _finite_span(estimate: Estimate, grid: NDArray[np.float64]) -> tuple[float, float]:
    low = estimate.low if np.isfinite(estimate.low) else grid[0]
    high = estimate.high if np.isfinite(estimate.high) else grid[-1]
    return float(low), float(high)


def _drift_point(axes: Axes, run: RunJudgement, rate: float, color: str) -> None:
    drift = run.drift
    if not np.isfinite(drift.value):
        return
    below, above = drift.value - drift.low, drift.high - drift.value
    errors = [[below], [above]] if np.isfinite([below, above]).all() else None
    axes.errorbar([rate], [drift.value], yerr=errors, fmt="o", color=color, capsize=3, markersize=6)
    # Below its interval, unless it grows: above it lies the dash of what counts as stable.
    grows = not drift.value <= run.stable_below
    low, high = (drift.value, drift.value) if errors is None else (drift.low, drift.high)
    axes.annotate(
        load_label(run.load),
        (rate, high if grows else low),
        xytext=(0, 4 if grows else -4),
        textcoords="offset points",
        color=color,
        ha="center",
        va="bottom" if grows else "top",
        fontweight="bold",
    )
    if np.isfinite(run.stable_below):
        axes.plot([rate], [run.stable_below], marker="_", color=MUTED, markersize=12)


def _forest_rows(verdict: Verdict) -> list[tuple[NamedEstimate, str, bool]]:
    claim = NamedEstimate(name=f"predicted ({verdict.claim})", estimate=verdict.predicted, note="")
    rows = [(claim, PREDICTED, True)]
    rows += [(other, PREDICTED, False) for other in verdict.predictions]
    if verdict.measured is not None:
        main = NamedEstimate(name="measured", estimate=verdict.measured, note="")
        rows.append((main, MEASURED, True))
    rows += [(other, MEASURED, False) for other in verdict.measurements]
    return rows


def _relative_to(center: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return lambda x: np.asarray(x) / center, lambda x: np.asarray(x) * center
