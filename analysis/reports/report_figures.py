"""Which figures a report shows, and the sentence under each that says how its numbers were got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from analysis.numbers.formatting import percent
from analysis.reports import figures
from analysis.reports.figure_style import run_colors
from analysis.reports.figures import Pair
from analysis.reports.figures_of_rates import drift_against_rate, forest
from analysis.reports.figures_of_settling import queue_at_critical
from analysis.reports.figures_of_steps import step_time_figure
from analysis.reports.waves_in_report import waves_caption, waves_figure
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.settling import NEAR, Settling
from analysis.verdicts.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure with its own caption, which may be empty where the group's says it all."""

    svg: Markup
    caption: str = ""


@dataclass(frozen=True, slots=True)
class FigureGroup:
    """Figures of one kind side by side; ``wide``: two in a row, else three."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    wide: bool


def figure_groups(verdict: Verdict, runs: Sequence[RunFrames]) -> list[FigureGroup]:
    """All figures that the records allow; runs are matched to their judgements by id."""
    by_id = {frames.run.id: frames for frames in runs}
    pairs = [(by_id[run.id], run) for run in verdict.runs if run.id in by_id]
    groups = [_rates(verdict)]
    if pairs:
        groups += [_number_in_system(pairs), _engine(pairs), _client(pairs)]
    near = [(by_id[found.run], found) for found in verdict.near_critical if found.run in by_id]
    if near:
        groups.insert(2, _near_critical(near))
    locked = [
        (by_id[found.run], found)
        for found in verdict.synchrony
        if found.word == "synchronised" and found.run in by_id
    ]
    if locked:
        panels = tuple(_panel(svg) for pair in locked if (svg := waves_figure(*pair)) is not None)
        caption = waves_caption([found for _, found in locked])
        groups.append(FigureGroup("Waves", caption, panels, wide=True))
    gpu = [figures.gpu_over_time(*pair) for pair in pairs]
    panels = tuple(_panel(svg) for svg in gpu if svg is not None)
    if panels:
        caption = "What the GPUs' own counters reported, a line for each; warm-up shaded."
        groups.append(FigureGroup("GPU", caption, panels, wide=False))
    return groups


def calibration_group(calibration: Mapping[str, Any] | None) -> list[FigureGroup]:
    """The picture of the calibration; none where no design of it was recorded."""
    svg = None if calibration is None else step_time_figure(calibration)
    if svg is None:
        return []
    caption = (
        "Blue: each design of probe, measured over fitted, with the 95 % interval that its repeats "
        "give. Red: the step at saturation, which no probe reached, with its interval."
    )
    return [FigureGroup("Calibration", caption, (_panel(svg),), wide=True)]


def _rates(verdict: Verdict) -> FigureGroup:
    panels = [
        _panel(
            forest(verdict),
            f"Every predictor (blue) and estimator (red) with its interval. The shaded band is the "
            f"claim ± {percent(verdict.theta, None)}; the bold rows alone decide the verdict.",
        )
    ]
    if verdict.runs:
        panels.append(
            _panel(
                drift_against_rate(verdict),
                "Drift of each run with its interval, named by load, against max(0, arrival rate - "
                "critical rate) for the predicted (solid) and the measured rate (dashed), their "
                "intervals shaded; a grey dash is the drift below which a run counts as stable.",
            )
        )
    return FigureGroup("Critical rate", "", tuple(panels), wide=True)


def _number_in_system(pairs: Sequence[Pair]) -> FigureGroup:
    colors = run_colors([judgement.load for _, judgement in pairs])
    panels = [_panel(figures.number_in_system_overview(pairs))]
    for (frames, judgement), color in zip(pairs, colors, strict=True):
        panels.append(_panel(figures.number_in_system_run(frames, judgement, color)))
    caption = (
        "N(t) is scheduled minus departed requests, counted by the client. Warm-up shaded; the "
        "dashed line rises with the drift from the end of the warm-up on, and the fan spans the "
        "drift's interval."
    )
    return FigureGroup("Number in system", caption, tuple(panels), wide=True)


def _near_critical(near: Sequence[tuple[RunFrames, Settling]]) -> FigureGroup:
    caption = (
        f"Requests waiting in runs within {percent(NEAR, None)} of the measured critical rate, from the "
        "end of the warm-up on. Grey: sigma √t, and below 1.96 sigma √t the range in which an exactly "
        "critical queue is in 95 % of runs. Red: the mean queue by the measured rate and its interval; "
        "it tends to growth by d t above critical, to sigma² / 2|d| below."
    )
    panels = tuple(_panel(queue_at_critical(frames, found)) for frames, found in near)
    return FigureGroup("At the critical rate", caption, panels, wide=True)


def _engine(pairs: Sequence[Pair]) -> FigureGroup:
    caption = (
        "Gauges of the engine's own metrics as they were sampled, and its preemption counter "
        "differenced over fortieths of the run; warm-up shaded."
    )
    panels = tuple(_panel(figures.engine_over_time(*pair)) for pair in pairs)
    return FigureGroup("Inside the engine", caption, panels, wide=False)


def _client(pairs: Sequence[Pair]) -> FigureGroup:
    unserved = (
        "of the requests that arrived after the warm-up. One that was not served when the run "
        "ended counts as longer than any value shown: such a curve stays below 1."
    )
    panels = (
        _panel(
            figures.latency_distribution(pairs, "first_token_s", "TTFT"),
            f"Waiting for the first token, empirical distribution {unserved}",
        ),
        _panel(
            figures.latency_distribution(pairs, "last_token_s", "end-to-end latency"),
            f"Arrival to last token, empirical distribution {unserved}",
        ),
        _panel(
            figures.send_lag(pairs),
            "How late the generator sent, by its own clock, all requests: an audit of the load, "
            "not of the server.",
        ),
    )
    return FigureGroup("At the client", "", panels, wide=False)


def _panel(svg: str, caption: str = "") -> Panel:
    return Panel(Markup(svg), caption)
