"""The picture of flow control with unknown lengths: how often memory overflows, against the slack."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from analysis.reports.figure_style import BLUE, GREEN, MEASURED, MUTED, WIDTH_IN, draw

FEWEST = 1e-5
"""A share below it is not drawn."""


def overflow_against_slack(
    slack: Sequence[float],
    alone: Sequence[float],
    controlled: Sequence[float],
    gaussian: Sequence[float],
    hoeffding: Sequence[float],
) -> str:
    """SVG: shares of slots that overflow, logarithmic, against (M - mean) / deviation.

    ``alone``: usage with nobody evicted; ``controlled``: slots in which algorithm 2 had to act.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        lines = (
            (hoeffding, "Hoeffding's bound", MUTED, "--"),
            (gaussian, "normal tail", BLUE, "-"),
        )
        for values, name, color, style in lines:
            axes.plot(slack, values, style, color=color, label=name)
        for values, name, color, marker in (
            (alone, "usage, nobody evicted", GREEN, "o"),
            (controlled, "algorithm 2", MEASURED, "x"),
        ):
            some = [(x, y) for x, y in zip(slack, values, strict=True) if y > FEWEST]
            axes.plot(*zip(*some, strict=True), marker, color=color, label=name, markersize=5)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set_ylim(FEWEST, 2.0)
        axes.set(xlabel="slack, in standard deviations of usage", ylabel="share of slots")
        axes.set_title("Overflow, output lengths unknown")
        axes.legend(frameon=False, fontsize=8)

    return draw(WIDTH_IN, 3.2, "Share of slots that overflow against the slack of memory", paint)
