"""The picture of a calibration: what each design took, the fitted law, and where it is taken to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.calibration.calibration_lines import Floats, off_by_design, undisturbed
from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text
from analysis.reports.figure_style import INK, MEASURED, MUTED, PREDICTED, WIDTH_IN, draw, spread


def step_time_figure(record: Mapping[str, Any]) -> str | None:
    """Measured over fitted step time per design, relative residuals below, the saturated point.

    None for a record without named designs. Bars are 95 % intervals of a design's mean, from the
    scatter of all repeats; the saturated point has its own.
    """
    if "fit" not in record or not record.get("observations"):
        return None
    seen = [o for o in undisturbed(record) if o.get("probe")]
    if not seen:
        return None
    names = list(dict.fromkeys(str(o["probe"]) for o in seen))
    fitted, off, half = off_by_design(seen, names, record["fit"]["law"])
    point = record.get("saturated")
    step = None if not point else Estimate.from_dict(point["step_time_s"]).scaled(1e3, "ms")

    def paint(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
        _paint_steps(above, names, fitted, off, half, step)
        below.axhline(0.0, color=MUTED, linewidth=0.8)
        below.errorbar(fitted, 100 * off, 100 * half, fmt="o", color=PREDICTED, markersize=4)
        if step is not None:
            low, high = (100 * (x / step.value - 1) for x in (step.low, step.high))
            below.plot([step.value] * 2, [low, high], color=MEASURED, linewidth=2.2)
            below.plot([step.value], [0.0], "D", color=MEASURED, markersize=5)
        below.set(xlabel="fitted step time (ms)", ylabel="off the law (%)")
        figure.align_ylabels()

    return draw(WIDTH_IN, 4.4, "Measured against fitted step time per design of probe", paint)


def _paint_steps(
    axes: Axes, names: list[str], fitted: Floats, off: Floats, half: Floats, step: Estimate | None
) -> None:
    measured = fitted * (1 + off)
    ends = [fitted.min(), fitted.max()] + ([] if step is None else [step.value])
    margin = 0.05 * (max(ends) - min(ends) or max(ends))
    line = [min(ends) - margin, max(ends) + margin]
    axes.plot(line, line, color=INK, linewidth=0.9)
    axes.errorbar(fitted, measured, fitted * half, fmt="o", color=PREDICTED, markersize=4)
    axes.set(ylabel="measured step time (ms)", xlim=line)
    # Names stand right of their points, moved apart, inside the half below the line.
    low, high = axes.get_ylim()
    places = spread(list(measured), 0.062 * (high - low))
    for name, x, y, place in zip(names, fitted, measured, places, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(x + 0.09 * (line[1] - line[0]), place),
            color=PREDICTED,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkB": 3},
        )
    if step is not None:
        axes.plot([step.value] * 2, [step.low, step.high], color=MEASURED, linewidth=2.2)
        axes.plot([step.value], [step.value], "D", color=MEASURED, markersize=5)
        axes.set_title(f"saturated, extrapolated: {estimate_text(step)}", color=MEASURED)
    axes.text(0.02, 0.9, "fitted = measured", transform=axes.transAxes, color=INK, fontsize=8)
