"""Pictures of the runs over time and of what a client sees: frames in, SVG strings out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from analysis.numbers.formatting import load_label, plus_minus
from analysis.reports.figure_style import (
    BLUE,
    GREEN,
    INK,
    MAX_POINTS,
    ORANGE,
    SHADE,
    VERMILION,
    WIDTH_IN,
    draw,
    label_ends,
    run_colors,
    say_nothing_to_show,
    thin,
)
from analysis.schedulers.frames import RunFrames, number_in_system
from analysis.verdicts.verdict import RunJudgement

Pair = tuple[RunFrames, RunJudgement]
HEIGHT_IN = 3.0
NARROW_IN = 3.9
GPU_ROWS = (
    ("utilization", "GPU busy (%)", 100.0),
    ("power_w", "power (W)", 1.0),
    ("sm_clock_mhz", "SM clock (MHz)", 1.0),
    ("memory_clock_mhz", "memory clock (MHz)", 1.0),
    ("temperature_c", "temperature (°C)", 1.0),
    ("memory_bytes", "memory (GiB)", 2.0**-30),
)
LAG_FLOOR_MS = 1e-3


def number_in_system_overview(pairs: Sequence[Pair]) -> str:
    """N(t) of every run on one axis, named at the lines' ends."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        colors = run_colors([judgement.load for _, judgement in pairs])
        ends = []
        for (frames, judgement), color in zip(pairs, colors, strict=True):
            t, n = _number_series(frames)
            axes.plot(t, n, color=color, drawstyle=_drawstyle(t))
            ends.append((float(t[-1]), float(n[-1]), load_label(judgement.load), color))
        axes.set(
            xlabel="time since the start of the run (s)", ylabel="requests in the system, N(t)"
        )
        axes.set_title("all runs, named by load")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        label_ends(axes, ends)

    return draw(WIDTH_IN, HEIGHT_IN, "Number in system over time, all runs", paint)


def number_in_system_run(frames: RunFrames, judgement: RunJudgement, color: str) -> str:
    """N(t) of one run, its drift line, the fan of the drift's interval; the warm-up shaded."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        t, n = _number_series(frames)
        _shade_warmup(axes, judgement.warmup_s)
        axes.plot(t, n, color=color, drawstyle=_drawstyle(t), linewidth=1.0)
        drift = judgement.drift
        window = np.array([judgement.warmup_s, judgement.end_s])
        if np.isfinite([drift.low, drift.value, drift.high]).all() and window[1] > window[0]:
            start = float(number_in_system(frames, window[:1])[0])
            ahead = window - window[0]
            low, high = start + drift.low * ahead, start + drift.high * ahead
            axes.fill_between(window, low, high, color=INK, alpha=0.13, linewidth=0)
            axes.plot(window, start + drift.value * ahead, color=INK, linewidth=1.5, dashes=(5, 2))
        axes.set(
            xlabel="time since the start of the run (s)", ylabel="requests in the system, N(t)"
        )
        axes.set_title(
            f"load {load_label(judgement.load)}: drift {plus_minus(drift)}".replace("+-", "±")
        )
        axes.set_xlim(0, max(judgement.end_s, frames.end_s))
        axes.set_ylim(0, max(1.0, min(axes.get_ylim()[1], 1.5 * float(n.max()))))

    return draw(WIDTH_IN, HEIGHT_IN, f"Number in system over time, run {judgement.id}", paint)


def engine_over_time(frames: RunFrames, judgement: RunJudgement) -> str:
    """Running and waiting requests, KV occupancy and preemptions per second of one run."""

    def paint(figure: Figure) -> None:
        requests, cache, preempted = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
        engine = frames.engine
        if engine.empty:
            for axes in (requests, cache, preempted):
                say_nothing_to_show(axes, "no engine samples")
            return
        t = engine["t_s"].to_numpy(dtype=float)
        for axes in (requests, cache, preempted):
            _shade_warmup(axes, judgement.warmup_s)
        for name, color in (("running", GREEN), ("waiting", VERMILION)):
            requests.plot(*thin(t, engine[name].to_numpy(dtype=float)), color=color, linewidth=1.1)
        requests.set_ylabel("requests")
        requests.set_title(f"load {load_label(judgement.load)}")
        requests.set_title("running", color=GREEN, loc="center", fontsize=9)
        requests.set_title("waiting", color=VERMILION, loc="right", fontsize=9)
        usage = 100 * engine["kv_usage"].to_numpy(dtype=float)
        cache.plot(*thin(t, usage), color=BLUE, linewidth=1.0)
        cache.set(ylabel="KV used (%)", ylim=(0, 105))
        edges = np.linspace(0.0, frames.end_s, 41)
        counts = np.interp(edges, t, engine["preemptions"].to_numpy(dtype=float))
        rate = np.diff(counts) / np.diff(edges)
        preempted.bar(edges[:-1], rate, width=np.diff(edges), align="edge", color=ORANGE)
        preempted.set(ylabel="preempted/s", xlabel="time since the start of the run (s)")
        preempted.set_ylim(0, max(1.0, 1.1 * float(rate.max(initial=0.0))))
        preempted.set_xlim(0, frames.end_s)
        figure.align_ylabels()

    return draw(NARROW_IN, 4.2, f"Engine over time, run {judgement.id}", paint)


def latency_distribution(pairs: Sequence[Pair], until: str, name: str) -> str:
    """Share of requests whose ``until`` (a column) came within x seconds of the scheduled arrival.

    Requests that arrived after the warm-up count; one without that instant stays in the
    denominator, so that its curve ends below 1.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        curves = []
        for frames, judgement in pairs:
            requests = frames.requests
            requests = requests[requests["scheduled_s"] >= judgement.warmup_s]
            delays = (requests[until] - requests["scheduled_s"]).to_numpy(dtype=float)
            curves.append((delays, load_label(judgement.load)))
        _step_curves(axes, curves, run_colors([j.load for _, j in pairs]), floor=1e-4)
        axes.set(xlabel=f"{name}, from the scheduled arrival (s)", ylabel="share of requests")

    return draw(NARROW_IN, 2.7, f"Distribution of {name}", paint)


def send_lag(pairs: Sequence[Pair]) -> str:
    """Distribution of how long after its scheduled instant a request was sent."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        curves = []
        for frames, judgement in pairs:
            lag = 1e3 * (frames.requests["sent_s"] - frames.requests["scheduled_s"])
            curves.append((lag.to_numpy(dtype=float), load_label(judgement.load)))
        _step_curves(axes, curves, run_colors([j.load for _, j in pairs]), floor=LAG_FLOOR_MS)
        axes.set(xlabel="sent after the scheduled instant (ms)", ylabel="share of requests")

    return draw(NARROW_IN, 2.7, "Distribution of the send lag", paint)


def gpu_over_time(frames: RunFrames, judgement: RunJudgement) -> str | None:
    """What the GPU reported during one run; None where there was none."""
    names = [row for row in GPU_ROWS if row[0] in frames.gpu and frames.gpu[row[0]].notna().any()]
    if frames.gpu.empty or not names:
        return None

    def paint(figure: Figure) -> None:
        grid = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        names_of = [column for column in ("gpu", "mig") if column in frames.gpu]
        for axes, (column, label, factor) in zip(grid, names, strict=True):
            _shade_warmup(axes, judgement.warmup_s)
            for _, rows in frames.gpu.dropna(subset=[column]).groupby(names_of, dropna=False):
                values = factor * rows[column].to_numpy(dtype=float)
                axes.plot(*thin(rows["t_s"].to_numpy(dtype=float), values), color=BLUE, linewidth=1)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        grid[0].set_title(f"load {load_label(judgement.load)}")
        grid[-1].set_xlabel("time since the start of the run (s)")
        grid[-1].set_xlim(0, frames.end_s)
        figure.align_ylabels()

    return draw(NARROW_IN, 0.8 + 0.95 * len(names), f"GPU over time, run {judgement.id}", paint)


def _number_series(frames: RunFrames) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """N(t) at every arrival and departure, thinned; shape (k,) each."""
    arrivals = frames.requests["scheduled_s"].to_numpy(dtype=float)
    events = np.sort(np.concatenate([[0.0], arrivals, frames.departures_s, [frames.end_s]]))
    events = events[(events >= 0.0) & (events <= frames.end_s)]
    return thin(events, number_in_system(frames, events).astype(float))


def _drawstyle(t: NDArray[np.float64]) -> Literal["default", "steps-post"]:
    """Steps while each can be seen; a thinned series joins its extremes."""
    return "steps-post" if len(t) < MAX_POINTS // 2 else "default"


def _shade_warmup(axes: Axes, warmup_s: float) -> None:
    if warmup_s > 0:
        axes.axvspan(0.0, warmup_s, color=SHADE, linewidth=0)


def _step_curves(
    axes: Axes,
    curves: Sequence[tuple[NDArray[np.float64], str]],
    colors: Sequence[str],
    floor: float,
) -> None:
    """Empirical distribution functions on a logarithmic axis; missing values are beyond every x."""
    ends = max((float(np.nanmax(d)) for d, _ in curves if np.isfinite(d).any()), default=np.nan)
    if not np.isfinite(ends):
        say_nothing_to_show(axes, "no request got that far")
        return
    heights = np.linspace(0.3, 0.8, len(curves)) if len(curves) > 1 else [0.6]
    for (values, name), color, height in zip(curves, colors, heights, strict=True):
        seen = np.maximum(np.sort(values[np.isfinite(values)]), floor)
        if not len(seen):
            continue
        share = np.arange(1, len(seen) + 1) / len(values)
        x, y = thin(seen, share)
        end = [max(ends, floor) * 1.3]
        axes.step(
            np.concatenate([x[:1], x, end]),
            np.concatenate([[0], y, y[-1:]]),
            color=color,
            where="post",
        )
        at = int(np.searchsorted(y, min(height, 0.9 * float(y[-1]))))
        axes.text(
            x[min(at, len(x) - 1)],
            y[min(at, len(y) - 1)],
            name,
            color=color,
            fontweight="bold",
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 1.02)
