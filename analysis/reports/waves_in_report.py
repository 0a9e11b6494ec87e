"""The waves of a run in the report: a table of all runs, a figure of the synchronised ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from analysis.inference.synchrony import CALM, LOCKED, Synchrony, completion_waves
from analysis.numbers.formatting import NOT_MEASURED, load_label
from analysis.reports.figure_style import BLUE, INK, MEASURED, MUTED, SHADE, WIDTH_IN, draw
from analysis.reports.report_tables import Table
from analysis.schedulers.frames import RunFrames

SHOWN_PERIODS = 6.0


def waves_table(found: Sequence[Synchrony]) -> Table:
    """One row for each valid run: the word, and what it rests on."""
    rows = [
        (
            f.run,
            f.word,
            f"{_number(f.correlation)} (chance: {_number(f.by_chance)})",
            NOT_MEASURED if f.period_s is None else f"{f.period_s:.3g} s",
            _number(f.swing),
            _number(f.kv_share),
            _number(f.preemptions),
            f.text,
        )
        for f in found
    ]
    return Table(
        "Waves",
        (
            "run",
            "answer",
            "correlation",
            "period",
            "swing",
            "KV at the period",
            "preemptions",
            "what was seen",
        ),
        tuple(rows),
        "Do requests that were admitted together go on leaving together? The correlation of the rate of "
        f"completions with itself a period later decides: synchronised from {LOCKED:g} on, not "
        f"synchronised below {CALM:g}, chance allowed for. Swing: standard deviation of that rate over "
        "its mean. KV at the period: share of the variance of KV occupancy at the period and its "
        "harmonics. Preemptions: their correlation with those a period later.",
    )


def waves_figure(frames: RunFrames, found: Synchrony) -> str | None:
    """Correlation of completions by lag, and the last periods: completions and KV occupancy.

    None for a run that is too small.
    """
    seen = completion_waves(frames)
    if isinstance(seen, str) or found.period_s is None:
        return None
    period_s = found.period_s
    times = seen.start_s + seen.interval_s * np.arange(len(seen.rate))
    begin_s = times[-1] - SHOWN_PERIODS * period_s
    last = times >= begin_s
    mean = float((frames.completed & (frames.per_request("last_token_s") >= times[0])).sum()) / (
        times[-1] - times[0]
    )
    engine_s, usage = frames.per_sample("t_s"), frames.per_sample("kv_usage")
    inside = (engine_s >= begin_s) & (engine_s <= times[-1])

    def paint(figure: Figure) -> None:
        above, middle, below = figure.subplots(3, 1, height_ratios=(1.4, 1, 0.8))
        chance = 2 * seen.by_chance
        above.axhspan(-chance, chance, color=SHADE, linewidth=0)
        above.plot(seen.lags_s / period_s, seen.correlation, color=INK, linewidth=1.1)
        above.axhline(LOCKED, color=MUTED, linewidth=0.9, dashes=(3, 2))
        above.set(xlabel="lag (periods)", ylabel="correlation", ylim=(-0.65, 1.05))
        above.set_title(f"load {load_label(found.load)}: {found.word}")
        middle.plot(times[last] - begin_s, mean + seen.rate[last], color=MEASURED, linewidth=1.1)
        middle.set_ylabel("completions\nper second")
        below.plot(engine_s[inside] - begin_s, 100 * usage[inside], color=BLUE, linewidth=1.1)
        below.set(xlabel=f"last {SHOWN_PERIODS:.0f} periods (s)", ylabel="KV used\n(%)")
        for axes in (middle, below):
            axes.set_xlim(0, SHOWN_PERIODS * period_s)
            axes.set_ylim(bottom=0)

    return draw(WIDTH_IN, 4.4, f"Waves of run {found.run}", paint)


def waves_caption(found: Sequence[Synchrony]) -> str:
    """What the figures show."""
    loads = ", ".join(load_label(f.load) for f in found)
    return (
        f"Runs in which requests leave in waves (load {loads}). Above: the rate of completions after "
        f"the warm-up, correlated with itself later; from {LOCKED:g} on (dashed) a wave counts as "
        "lasting, grey is what chance makes in 95 % of runs. Below: completions and KV occupancy at "
        "the end of the run."
    )


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"
