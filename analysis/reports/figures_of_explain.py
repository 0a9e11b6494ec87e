"""One picture of an explanation, for readers who know nothing else of it."""

from __future__ import annotations

import itertools
import operator
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, value_text
from analysis.reports.explain_text import answer_text, change_interval, change_text
from analysis.reports.figure_style import (
    GREEN,
    INK,
    MEASURED,
    MUTED,
    PIXELS_PER_IN,
    PREDICTED,
    draw,
    draw_png,
)
from analysis.verdicts.explain import Cause, Explanation

FIGURE_WIDTH_IN = 8.0
PIXELS_WIDE = round(FIGURE_WIDTH_IN * PIXELS_PER_IN)
ROW_IN = 0.44
TEXT_COLUMNS = 62
LESS, MORE, LEFT = "#d98b5f", "#7fb2d6", "#9aa4af"


@dataclass(frozen=True, slots=True)
class Step:
    """One row: the rate before and after a cause."""

    cause: Cause
    factor: Estimate
    before: float
    after: float


def explanation_svg(found: Explanation, about: tuple[str, ...]) -> str:
    """The picture as an SVG string. Needs what was measured (`Explanation.measured`)."""
    return draw(FIGURE_WIDTH_IN, _height_in(found, about), _title(found), _painter(found, about))


def explanation_png(found: Explanation, about: tuple[str, ...]) -> bytes:
    """The same as a PNG, 1600 pixels wide, legible at half of that."""
    return draw_png(FIGURE_WIDTH_IN, _height_in(found, about), _painter(found, about))


def steps(found: Explanation) -> tuple[Step, ...]:
    """The rows with a factor, in order, each beginning where the one before ends."""
    rows = [*found.causes, *([] if found.unexplained is None else [found.unexplained])]
    seen = [(cause, cause.factor) for cause in rows if cause.factor is not None]
    rates = itertools.accumulate(
        (factor.value for _, factor in seen), operator.mul, initial=found.paper.value
    )
    return tuple(
        Step(cause, factor, before, after)
        for (cause, factor), (before, after) in zip(seen, itertools.pairwise(rates), strict=True)
    )


def _title(found: Explanation) -> str:
    assert found.measured is not None and found.gap is not None
    change = change_text(found.gap.value, found.gap.half_width)
    formula = f"M / (b E[g]) = {value_text(found.paper)}"
    return f"Measured {value_text(found.measured)}, {change} from {formula}"


def _height_in(found: Explanation, about: tuple[str, ...]) -> float:
    lines = len(_header(about)) + len(_footer(found))
    return 0.9 + 0.17 * lines + ROW_IN * (len(steps(found)) + 2)


def _header(about: tuple[str, ...]) -> list[str]:
    return [line for part in about for line in textwrap.wrap(part, 112)]


def _footer(found: Explanation) -> list[str]:
    answer = "; ".join(answer_text(found))
    answer = f"Cannot say: {answer}" if found.share is None else f"The causes account {answer}."
    key = (
        "Bars: as found in the records, with 95 % intervals. Diamonds: what the engine model predicted "
        "of each factor before the first run. Hatched: modelled, nothing counts it."
    )
    return [line for part in (answer, key) for line in textwrap.wrap(part, 118)]


def _painter(found: Explanation, about: tuple[str, ...]) -> Callable[[Figure], None]:
    rows = steps(found)

    def paint(figure: Figure) -> None:
        assert found.measured is not None
        names, axes, words = figure.subplots(1, 3, width_ratios=(0.36, 1.1, 1.16), sharey=True)
        figure.suptitle(_title(found), x=0.01, ha="left", fontsize=12, fontweight="bold")
        names.set_title("\n".join(_header(about)), fontsize=8.5, fontweight="normal", color=MUTED)
        labels = ["paper's formula", *(step.cause.name for step in rows), "measured"]
        for place, name in enumerate(labels):
            names.text(0.0, -place, name, va="center", fontsize=9.5)
        for place, step in enumerate(rows, start=1):
            _bar(axes, step, -place, found.unexplained)
            _said(words, step, -place)
        _total(axes, words, found.paper, 0, PREDICTED)
        _total(axes, words, found.measured, -len(rows) - 1, MEASURED)
        axes.set_ylim(-len(rows) - 1.55, 0.55)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("requests per second")
        axes.tick_params(axis="y", length=0, labelleft=False)
        axes.grid(visible=False, axis="y")
        for column in (names, words):
            column.set_axis_off()
            column.set_xlim(0, 1)
        figure.supxlabel("\n".join(_footer(found)), x=0.01, ha="left", fontsize=8.5, color=MUTED)

    return paint


def _bar(axes: Axes, step: Step, y: float, unexplained: Cause | None) -> None:
    color = LESS if step.after < step.before else MORE
    color = LEFT if step.cause is unexplained else color
    axes.barh(
        y,
        step.after - step.before,
        left=step.before,
        height=0.56,
        color=color,
        edgecolor=INK if step.cause.source == "modelled" else color,
        linewidth=0.6,
        hatch="////" if step.cause.source == "modelled" else None,
    )
    low, high = step.before * step.factor.low, step.before * step.factor.high
    if high > low:
        axes.plot([low, high], [y, y], color=INK, linewidth=1.1)
    axes.plot([step.after, step.after], [y - 0.28, y - 1], color=MUTED, linewidth=0.7)
    axes.plot([step.after, step.after], [y - 0.28, y + 0.28], color=INK, linewidth=1.4)
    if step.cause.predicted is not None and step.cause is not unexplained:
        at = step.before * step.cause.predicted
        axes.plot([at], [y], "D", color="white", markeredgecolor=GREEN, markersize=5, zorder=5)


def _said(axes: Axes, step: Step, y: float) -> None:
    change = f"{change_text(step.factor.value, step.factor.half_width)}"
    interval = change_interval(step.factor)
    axes.text(0.0, y + 0.04, change, fontweight="bold", va="bottom", fontsize=9.5)
    axes.text(0.29, y + 0.04, interval, va="bottom", fontsize=9)
    how = textwrap.wrap(f"{step.cause.source}: {step.cause.how}", TEXT_COLUMNS)
    axes.text(0.0, y, "\n".join(how[:2]), va="top", fontsize=7.8, color=MUTED, linespacing=1.05)


def _total(axes: Axes, words: Axes, rate: Estimate, y: float, color: str) -> None:
    axes.plot([rate.low, rate.high], [y, y], color=color, linewidth=3.5, solid_capstyle="butt")
    axes.plot([rate.value], [y], "o", color=color, markersize=7)
    if y == 0:
        axes.plot([rate.value, rate.value], [y, y - 1], color=MUTED, linewidth=0.7)
    text = estimate_text(rate)
    words.text(0.0, y, text, color=color, fontweight="bold", va="center", fontsize=9.5)
