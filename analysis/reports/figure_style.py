"""How figures look, and how a drawing becomes a small, reproducible SVG string."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

# After Okabe and Ito, told apart with any colour vision, dark enough to write with: blue below the
# critical rate, orange above.
BLUE, SKY, NAVY = "#0072B2", "#2B87C1", "#00466E"
ORANGE, VERMILION, GREEN = "#BE6900", "#A33200", "#007A5A"
INK, MUTED, GRID, SHADE = "#1d2733", "#56616e", "#dfe3e8", "#eceff3"
PREDICTED, MEASURED = BLUE, VERMILION
MAX_POINTS = 600
WIDTH_IN = 4.6
PIXELS_PER_IN = 200
FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9aa4af",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": "#9aa4af",
    "ytick.color": "#9aa4af",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "lines.linewidth": 1.3,
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "path.simplify": True,
}


def draw(width_in: float, height_in: float, title: str, paint: Callable[[Figure], None]) -> str:
    """An SVG string of what ``paint`` draws; the same input gives the same bytes.

    ``title`` becomes the accessible name and salts the ids inside, so it must differ between the
    figures of one page. Width and height are left to the page; the view box keeps the proportions.
    """
    settings: Any = {**STYLE, "svg.hashsalt": title}
    with rc_context(settings):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        paint(figure)
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return _cleaned(sink.getvalue().decode(), title)


def draw_png(width_in: float, height_in: float, paint: Callable[[Figure], None]) -> bytes:
    """The same drawing as a PNG of `PIXELS_PER_IN`, for places that take no SVG."""
    settings: Any = STYLE
    with rc_context(settings):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        paint(figure)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=PIXELS_PER_IN, metadata={"Software": None})
    return sink.getvalue()


def _cleaned(svg: str, title: str) -> str:
    """Matplotlib's file as an element of a page: no prolog, no sizes, no repeated names."""
    view_box = re.findall(r'viewBox="[^"]*"', svg)[0]
    body = svg[svg.index("<svg") :].split(">", 1)[1].strip()
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"\s*<defs>\s*<style.*?</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("'DejaVu Sans'", FONT_STACK)
    body = re.sub(r' (?:d|x|y|transform)="[^"]*"', _to_tenths, body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view_box} role="img" aria-label="{escape(title)}" stroke-linejoin="round">{body}'
    )


def _to_tenths(attribute: re.Match[str]) -> str:
    """Coordinates of an SVG attribute in tenths of a point, finer than any screen shows."""
    return re.sub(r"(\d+)(\.0|\.\d)\d*", _tenths, attribute.group())


def _tenths(number: re.Match[str]) -> str:
    return number[1] if number[2] == ".0" else number[1] + number[2]


def run_colors(loads: Sequence[float]) -> list[str]:
    """One colour per run: blues below the predicted critical rate, oranges at and above it."""
    below = sorted({load for load in loads if load < 1.0})
    above = sorted({load for load in loads if load >= 1.0})
    colors = {
        **dict(zip(below, _ramp(SKY, NAVY, len(below)), strict=True)),
        **dict(zip(above, _ramp(ORANGE, VERMILION, len(above)), strict=True)),
        **{load: MUTED for load in loads if np.isnan(load)},
    }
    return [colors[load] for load in loads]


def _ramp(first: str, last: str, count: int) -> list[str]:
    start, end = np.array(to_rgb(first)), np.array(to_rgb(last))
    weights = [0.5] if count == 1 else np.linspace(0.0, 1.0, count)
    return [to_hex(tuple(start + w * (end - start))) for w in weights]


def thin(
    x: NDArray[np.float64], y: NDArray[np.float64], points: int = MAX_POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most ``points`` of a long series, the least and the greatest of every stretch kept.

    ``x`` and ``y`` have shape (n,); so have the results, with n at most ``points``.
    """
    if len(x) <= points:
        return x, y
    keep: list[int] = []
    for part in np.array_split(np.arange(len(x)), points // 2):
        keep.extend(sorted({int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])}))
    return x[keep], y[keep]


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved apart to at least ``gap``, in their order, about where they were."""
    order = np.argsort(positions, kind="stable")
    placed = np.array(positions, dtype=float)
    for lower, upper in pairwise(order):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    shift = float(np.mean(placed - np.array(positions))) if len(placed) else 0.0
    return [float(p) - shift for p in placed]


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name lines at their right ends, each (x, y, text, colour), moved apart where they touch."""
    low, high = axes.get_ylim()
    placed = spread([end[1] for end in ends], 0.075 * (high - low))
    for (x, _, text, color), y in zip(ends, placed, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(4, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def say_nothing_to_show(axes: Axes, sentence: str) -> None:
    """An empty panel states why it is empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, sentence, ha="center", va="center", color=MUTED, transform=axes.transAxes)
