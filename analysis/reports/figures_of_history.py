"""The picture of a history: the measured critical rate night by night, cut where something changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.numbers.estimate import Estimate
from analysis.reports.figure_style import (
    INK,
    MEASURED,
    MUTED,
    SHADE,
    VERMILION,
    draw,
    say_nothing_to_show,
)

WIDTH_IN, ROW_IN = 7.2, 2.3
MOST_LABELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NightPoint:
    """One night of a series."""

    label: str
    """Its date."""
    rate: Estimate
    broke: str
    """What changed before this night, such as "engine_version 0.31 to 0.32"; empty without a break."""
    alarm: bool
    """Was it called a regression?"""


def rate_by_night(series: Sequence[tuple[str, Sequence[NightPoint]]]) -> str:
    """An SVG: a row for each named series, its nights with 95 % intervals, and its breaks.

    Nights are joined within an environment and never across a break; alarms are filled.
    """
    title = f"Measured critical rate, night by night: {', '.join(name for name, _ in series)}"

    def paint(figure: Figure) -> None:
        if not series:
            say_nothing_to_show(figure.subplots(), "no night was measured")
            return
        rows = figure.subplots(len(series), squeeze=False)[:, 0]
        for axes, (name, points) in zip(rows, series, strict=True):
            axes.set_title(name)
            axes.set_ylabel("measured (req/s)")
            begin = 0
            for i in range(1, len(points) + 1):
                if i == len(points) or points[i].broke:
                    xs = range(begin, i)
                    axes.plot(xs, [points[k].rate.value for k in xs], color=MUTED, linewidth=0.8)
                    begin = i
            for i, point in enumerate(points):
                rate, color = point.rate, VERMILION if point.alarm else INK
                axes.plot([i, i], [rate.low, rate.high], color=color, linewidth=1.2)
                fill = MEASURED if point.alarm else "white"
                axes.plot([i], [rate.value], "o", color=fill, markeredgecolor=color, markersize=5)
                if point.broke:
                    axes.axvline(i - 0.5, color=MUTED, linewidth=1.0, dashes=(3, 2))
                    axes.annotate(
                        point.broke,
                        (i - 0.45, 0.98),
                        xycoords=("data", "axes fraction"),
                        va="top",
                        fontsize=8.0,
                        color=MUTED,
                        bbox={"color": SHADE, "pad": 1.0},
                    )
            axes.set_xlim(-0.6, len(points) - 0.4)
            axes.margins(y=0.25)
            step = -(-len(points) // MOST_LABELS)
            axes.set_xticks(range(0, len(points), step), [p.label for p in points[::step]])
            axes.yaxis.set_major_locator(MaxNLocator(5))

    return draw(WIDTH_IN, ROW_IN * max(len(series), 1), title, paint)
