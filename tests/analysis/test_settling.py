"""Three ways to grow, told apart on reflected random walks and in whole experiments; errors counted."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import expm

from analysis.numbers.estimate import Estimate
from analysis.reports.figures_of_settling import implied
from analysis.reports.report import ReportContext, report_html, report_md
from analysis.reports.summary import WIDTH, summary_lines
from analysis.verdicts.evidence import Evidence, MeasuredRun
from analysis.verdicts.judge import judge
from analysis.verdicts.settling import Queue, Settling, near_critical, settling, stays_below
from harness.configs.config import load_config
from harness.rehearsals import rehearsal

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MU = 60.0
SPREAD = 1.6
"""ca2 + cd2: of Poisson arrivals and wide lengths."""
T_S = 470.0
RUNS = 400
STEPS = 5_000


def walks(load: float, seed: int) -> list[Queue]:
    """Reflected random walks with the drift and variance of a server."""
    dt = T_S / STEPS
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RUNS):
        steps = rng.normal((load - 1) * MU * dt, math.sqrt(MU * SPREAD * dt), STEPS)
        free = steps.cumsum()
        queue = free - np.minimum(np.minimum.accumulate(free), 0.0)
        found.append(Queue(0.0, float(queue[-1]), float(queue.max())))
    return found


def judged(load: float, seed: int, error: float = 0.002) -> Counter[str]:
    """Answers over the walks; the critical rate is measured with this relative standard error."""
    rng = np.random.default_rng([seed, 1])
    found: Counter[str] = Counter()
    for queue in walks(load, seed):
        measured = Estimate.normal(MU * (1 + error * rng.normal()), MU * error, "req/s", "test")
        found[settling("r", load, load * MU, measured, queue, T_S, SPREAD).growth] += 1
    return found


@pytest.mark.parametrize(
    ("load", "answer", "at_least"),
    [(0.90, "bounded", 0.97), (1.0, "sqrt(t)", 0.90), (1.05, "linear", 0.97)],
)
def test_the_three_are_told_apart(load: float, answer: str, at_least: float) -> None:
    found = judged(load, 1)
    assert found[answer] >= at_least * RUNS, found
    wrong = RUNS - found[answer] - found["cannot say"]
    assert wrong <= 0.01 * RUNS, found


@pytest.mark.parametrize("load", [0.985, 1.015])
def test_between_two_answers_the_far_one_is_never_given(load: float) -> None:
    found = judged(load, 2)
    assert found["linear" if load < 1 else "bounded"] == 0, found
    assert found["cannot say"] > 0, found


def one(load: float, queue: Queue, error: float = 0.002) -> Settling:
    measured = Estimate.normal(MU, MU * error, "req/s", "test")
    return settling("r", load, load * MU, measured, queue, T_S, SPREAD)


@pytest.mark.parametrize(
    ("load", "queue", "why"),
    [
        (0.90, Queue(0.0, 2000.0, 2000.0), "a second branch"),
        (1.0, Queue(0.0, 1500.0, 1500.0), "a second branch"),
        (1.0, Queue(0.0, 5.0, 40.0), "caps its queue"),
        (1.05, Queue(0.0, 0.0, 300.0), "a second branch"),
        (1.05, Queue(0.0, 4000.0, 4000.0), "a second branch"),
    ],
)
def test_a_queue_that_contradicts_its_rate_is_no_answer(
    load: float, queue: Queue, why: str
) -> None:
    found = one(load, queue)
    assert found.growth == "cannot say"
    assert why in found.text


@pytest.mark.parametrize(
    ("load", "error", "advice"),
    [
        (1.0, 0.02, "run longer above it"),
        (0.98, 0.002, "to see it settle"),
        (1.008, 0.002, "to see it grow"),
    ],
)
def test_a_rate_between_two_answers_says_what_would_tell(
    load: float, error: float, advice: str
) -> None:
    found = one(load, Queue(0.0, 100.0, 150.0), error)
    assert found.growth == "cannot say"
    assert advice in found.text


@pytest.mark.parametrize(("load", "answer"), [(0.98, "bounded"), (1.008, "linear")])
def test_as_much_longer_as_it_says_is_enough(load: float, answer: str) -> None:
    measured = Estimate.normal(MU, MU * 0.002, "req/s", "test")
    text = one(load, Queue(0.0, 100.0, 150.0)).text
    factor = float(text.split(" takes ")[1].split(" times")[0])
    drift = (load - 1) * MU
    for times, said in ((factor + 0.1, answer), (factor - 0.1, "cannot say")):
        end = max(drift * T_S * times, 10.0)
        found = settling("r", load, load * MU, measured, Queue(0.0, end, end), T_S * times, SPREAD)
        assert found.growth == said


def test_the_distance_and_its_units() -> None:
    found = one(1.02, Queue(3.0, 600.0, 610.0))
    assert found.distance.value == pytest.approx(0.02)
    assert found.distance.half_width == pytest.approx(1.02 * 1.96 * 0.002, rel=1e-2)
    assert found.wandering == pytest.approx(math.sqrt(MU * SPREAD * T_S))
    assert found.departure.value * found.wandering == pytest.approx(0.02 * MU * T_S)
    assert found.distance_text == "+2.00 % [+1.60, +2.40] from the measured rate"
    assert "1.2 req/s [0.96, 1.4] above critical" in found.text


# -- the probability of a low queue --------------------------------------------------------------


@pytest.mark.parametrize("level", [0.35, 0.45, 0.6])
def test_without_drift_a_low_queue_has_the_probability_of_the_series(level: float) -> None:
    terms = [
        (-1) ** k / (2 * k + 1) * math.exp(-(((2 * k + 1) * math.pi / level) ** 2) / 8)
        for k in range(20)
    ]
    assert stays_below(level, 0.0) == pytest.approx(4 / math.pi * sum(terms), rel=1e-6)


@pytest.mark.parametrize("drift", [-1.0, -0.4, 0.4, 1.0])
def test_with_drift_it_is_that_of_a_chain_on_a_fine_grid(drift: float) -> None:
    level, cells = 0.5, 150
    h = level / (cells + 0.5)
    up, down = 0.5 / h**2 + drift / (2 * h), 0.5 / h**2 - drift / (2 * h)
    # Cell centres at h/2, 3h/2, ...: reflected below the first; the one after the last is the level.
    generator = np.diag(np.full(cells, -up - down))
    generator += np.diag(np.full(cells - 1, up), 1) + np.diag(np.full(cells - 1, down), -1)
    generator[0, 0] = -up
    survival = expm(generator).sum(axis=1)[0]
    assert stays_below(level, drift) == pytest.approx(survival, rel=1e-3)


def test_a_low_queue_at_the_ends_of_the_range() -> None:
    assert stays_below(0.0, 0.0) == 0.0
    assert stays_below(2.0, -1.0) == 1.0
    probabilities = [stays_below(x, -1.0) for x in np.linspace(0.1, 1.5, 30)]
    assert probabilities == sorted(probabilities)


@pytest.mark.parametrize(
    ("departure", "mean"),
    [
        (0.0, math.sqrt(2 / math.pi)),
        (1e-7, math.sqrt(2 / math.pi)),
        (-8.0, 1 / 16),
        (8.0, 8 + 1 / 16),
    ],
)
def test_the_drawn_mean_has_its_limits(departure: float, mean: float) -> None:
    drawn = implied(np.array([0.0, 1.0]), departure, 100.0)
    assert drawn == pytest.approx([0.0, 100.0 * mean], rel=1e-3)


@pytest.mark.parametrize("load", [0.992, 1.0, 1.008])
def test_the_drawn_mean_is_that_of_the_walks(load: float) -> None:
    ends = np.array([queue.end for queue in walks(load, 3)])
    scale = math.sqrt(MU * SPREAD * T_S)
    drawn = implied(np.array([1.0]), (load - 1) * MU * T_S / scale, scale)[0]
    assert abs(ends.mean() - drawn) < 3 * ends.std() / math.sqrt(RUNS) + 0.01 * scale


# -- whole experiments ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """configs/critical.yaml with a shorter run at the predicted rate."""
    seen: list[Evidence] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "judge", seen.append)
        config = load_config(CONFIGS / "critical.yaml")
        load = config.load.model_copy(update={"max_horizon_s": 100.0})
        rehearsal.rehearse(config.model_copy(update={"load": load}), 1)
    return seen[0]


def test_a_run_at_the_predicted_rate_is_as_at_critical(evidence: Evidence) -> None:
    verdict = judge(evidence)
    (found,) = verdict.near_critical
    assert found.growth == "sqrt(t)"
    assert found.load == pytest.approx(1.0)
    assert abs(found.distance.value) < 0.02
    assert verdict.to_dict()["near_critical"][0]["distance"]["low"] == found.distance.low


def test_it_is_said_in_the_terminal_and_drawn_in_the_report(evidence: Evidence) -> None:
    verdict = judge(evidence)
    (found,) = verdict.near_critical
    lines = summary_lines(verdict)
    assert max(map(len, lines)) <= WIDTH
    at = next(i for i, line in enumerate(lines) if line.startswith("at 1.00"))
    said = " ".join(" ".join(lines[at : at + 3]).split())
    assert f"as at critical {found.distance_text} {found.text}" in said
    context = ReportContext(
        title="x", created="", environment={}, limits={}, calibration=None, config=""
    )
    page = report_html(replace(verdict, runs=()), [evidence.runs[-1].frames], context)
    assert page.count(f"Waiting requests at the critical rate, run {found.run}") == 1
    assert found.text in report_md(verdict, context)
    none = replace(verdict, near_critical=())
    assert "At the critical rate" not in report_md(none, context)
    assert not [line for line in summary_lines(none) if line.startswith("at ")]


def test_only_valid_runs_from_empty_near_the_measured_rate_are_asked(evidence: Evidence) -> None:
    measured = judge(evidence).measured
    assert measured is not None
    at = next(run for run in evidence.runs if run.frames.run.id.endswith("1.00"))

    def asked(run: MeasuredRun, rate: Estimate | None = measured) -> list[str]:
        return [s.growth for s in near_critical(replace(evidence, runs=(run,)), rate, True)]

    full = replace(at.frames, run=replace(at.frames.run, preload=500))
    cut = replace(at.frames, end_s=at.frames.run.warmup_s + 1.0)
    assert asked(at) == ["sqrt(t)"]
    assert asked(replace(at, overrun=0.5)) == []
    assert asked(replace(at, frames=full)) == []
    assert asked(replace(at, frames=cut)) == []
    assert asked(at, measured.scaled(1.06)) == []
    assert asked(at, None) == []


def test_an_engine_without_one_speed_has_no_critical_rate(evidence: Evidence) -> None:
    measured = judge(evidence).measured
    (found,) = near_critical(evidence, measured, steady=False)
    assert found.growth == "cannot say"
    assert "speed changed" in found.text
