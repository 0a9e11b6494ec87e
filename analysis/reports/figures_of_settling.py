"""The picture of a run at nearly the critical rate: its queue against sqrt(t) and against t."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import ndtr

from analysis.numbers.formatting import load_label
from analysis.numbers.quantiles import normal_density, normal_quantile
from analysis.reports.figure_style import (
    INK,
    MEASURED,
    MUTED,
    SHADE,
    WIDTH_IN,
    draw,
    label_ends,
    thin,
)
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.settling import Settling

WITHIN = 0.95
SMALL = 1e-6


def queue_at_critical(frames: RunFrames, settling: Settling) -> str:
    """Waiting requests of one run since its warm-up, the reach of sqrt(t), and the mean by the rate."""
    engine = frames.engine[frames.engine["t_s"].between(frames.run.warmup_s, frames.end_s)]
    since = engine["t_s"].to_numpy(dtype=float) - frames.run.warmup_s
    share = np.linspace(0.0, 1.0, 201)
    t = share * settling.duration_s
    wander = settling.wandering * np.sqrt(share)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        reach = normal_quantile(0.5 + WITHIN / 2)
        axes.fill_between(t, 0.0, reach * wander, color=SHADE, linewidth=0)
        axes.plot(t, wander, color=MUTED, linewidth=1.2, dashes=(2, 2))
        low, value, high = (
            implied(share, x, settling.wandering)
            for x in (settling.departure.low, settling.departure.value, settling.departure.high)
        )
        axes.fill_between(t, low, high, color=MEASURED, alpha=0.14, linewidth=0)
        axes.plot(t, value, color=MEASURED, linewidth=1.3, dashes=(5, 2))
        waiting = engine["waiting"].to_numpy(dtype=float)
        axes.plot(*thin(since, waiting), color=INK, linewidth=1.0)
        axes.set(xlabel="time since the warm-up (s)", ylabel="requests waiting")
        axes.set_title(f"load {load_label(settling.load)}: {settling.answer}")
        axes.set_xlim(0, settling.duration_s)
        highest = max(float(waiting.max(initial=0.0)), float(value[-1]))
        top = max(reach * settling.wandering, 1.1 * highest)
        axes.set_ylim(0, top)
        label_ends(
            axes,
            [
                (float(t[-1]), float(value[-1]), "by the rate", MEASURED),
                (float(t[-1]), float(wander[-1]), "sigma √t", MUTED),
                (float(t[-1]), float(waiting[-1]), "run", INK),
            ],
        )

    return draw(WIDTH_IN, 3.0, f"Waiting requests at the critical rate, run {settling.run}", paint)


def implied(share: NDArray[np.float64], departure: float, wandering: float) -> NDArray[np.float64]:
    """Mean queue from empty at each share of the run, in requests, shape of ``share``.

    Of a reflected Brownian motion with d T / (sigma sqrt(T)) = ``departure``: that of the maximum of the
    free one, d t P(x) + sqrt(t) p(x) + (2 P(x) - 1) / (2 d) at x = d sqrt(t) for unit variance, p and P
    the normal density and distribution. It tends to d t above and to sigma^2 / (2 |d|) below.
    """
    x = departure * np.sqrt(share)
    # (2 P(x) - 1) / (2 d) = sqrt(t) (2 P(x) - 1) / (2 x), which tends to sqrt(t) p(0).
    small = np.abs(x) < SMALL
    safe = np.where(small, SMALL, x)
    rest = np.where(small, normal_density(0.0), (2 * ndtr(safe) - 1) / (2 * safe))
    mean = departure * share * ndtr(x) + np.sqrt(share) * (normal_density(x) + rest)
    return np.asarray(wandering * mean, dtype=float)
