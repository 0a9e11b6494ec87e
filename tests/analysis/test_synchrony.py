"""The detector of waves: what lasts, what dies out, what is even, and what is too small to tell."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.inference.synchrony import Waves, completion_waves, synchrony
from analysis.reports import report_figures
from analysis.reports.report import ReportContext, report_md
from analysis.reports.summary import summary_lines
from analysis.schedulers.frames import RunFrames
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import exact_step_time
from analysis.theory.critical_rate import predict
from analysis.verdicts.evidence import MeasuredRun
from analysis.verdicts.judge import judge
from analysis.verdicts.verdict import Verdict
from harness.rehearsals.error_rates import LAW, SETTINGS, evidence_of
from harness.rehearsals.rehearsal import offered
from harness.rehearsals.synchrony_runs import (
    ALIKE,
    WIDE,
    one_word,
    root_of,
    setting_named,
    spread_name,
)
from loadgen.records import Run

CONTEXT = ReportContext(
    title="waves", created="", environment={}, limits={}, calibration=None, config=""
)


def departures(instants: np.ndarray, lived_s: float = 1.0, tokens: int = 50) -> RunFrames:
    """A run of 100 s that consists of requests which leave at these instants."""
    instants = np.sort(instants)
    requests = pd.DataFrame(
        {
            "scheduled_s": instants - lived_s,
            "first_token_s": instants - lived_s,
            "last_token_s": instants,
            "output_tokens": tokens,
            "outcome": "completed",
        }
    )
    t_s = np.arange(0, 100, 0.1)
    engine = pd.DataFrame({"t_s": t_s, "kv_usage": 1.0, "preemptions": 0})
    run = Run(id="made", arrival_rate=1.0, horizon_s=100.0, warmup_s=0.0, seed=0)
    return RunFrames(run, 100.0, requests, engine, pd.DataFrame())


@pytest.mark.parametrize(
    ("name", "load", "word"),
    [
        ("fixed", 1.3, "synchronised"),
        ("fixed, noisy steps", 1.15, "synchronised"),
        ("fixed, sequence-bound", 1.3, "synchronised"),
        ("SGLang, fixed", 1.3, "synchronised"),
        ("wide", 1.3, "not synchronised"),
        ("heavy tails", 0.85, "not synchronised"),
        ("sequence-bound", 1.3, "not synchronised"),
        ("SGLang", 1.15, "not synchronised"),
    ],
)
def test_what_theory_says_is_found(name: str, load: float, word: str) -> None:
    for seed in (101, 102):
        found = one_word(setting_named(name), load, seed, requests=1100)
        assert found.word == word, found.text
        assert found.period_s is not None and found.residence_s is not None
        if word == "synchronised":
            assert found.period_s / found.residence_s == pytest.approx(1.0, abs=0.2)


def test_theory_puts_each_setting_on_its_side() -> None:
    for name in ("fixed", "fixed outputs alone", "SGLang, fixed", "fixed, sequence-bound"):
        assert root_of(ALIKE[name])[0].modulus > 1 - 1e-9
    for name in ("long prompts", "SGLang", "token-bound"):
        assert root_of(WIDE[name])[0].stable


def test_lengths_that_differ_enough_calm_the_waves() -> None:
    """Critical CV beside prompts of the same length: 0.19."""
    narrow, wide = (setting_named(spread_name(cv)) for cv in (0.10, 0.30))
    assert root_of(narrow)[0].modulus > 1 > root_of(wide)[0].modulus
    assert one_word(narrow, 1.3, 1, requests=800).word == "synchronised"
    assert one_word(wide, 1.3, 1, requests=800).word == "not synchronised"


def test_evenly_spaced_admissions_just_below_the_critical_rate_mend_fixed_lengths() -> None:
    server, law = SETTINGS["fixed"].server, SETTINGS["fixed"].workload
    found = predict(law, server.limits, exact_step_time(LAW), "engine", "P0")
    rate = 0.97 * found.critical_rate.value
    arrival_s = np.arange(0.0, 40.0, 1 / rate)
    lengths = law.sample(np.random.default_rng(1), len(arrival_s))
    done = simulate(server.limits, LAW, arrival_s, lengths, 40.0)
    frames = done.frames(Run(id="even", arrival_rate=rate, horizon_s=40.0, warmup_s=5.0, seed=1))
    assert synchrony(frames).word == "not synchronised"
    assert frames.per_sample("preemptions")[-1] == 0


def test_the_same_departures_in_another_order_are_no_waves() -> None:
    rng = np.random.default_rng(3)
    wave = np.concatenate([i + 0.05 * rng.standard_normal(30) for i in range(1, 99)])
    found = synchrony(departures(wave))
    assert found.word == "synchronised"
    assert found.period_s == pytest.approx(1.0, abs=0.05)
    assert synchrony(departures(rng.uniform(0, 100, len(wave)))).word == "not synchronised"
    assert synchrony(departures(np.linspace(0.01, 99.9, len(wave)))).word == "not synchronised"


def test_a_slow_change_of_the_rate_is_no_wave() -> None:
    rng = np.random.default_rng(4)
    t = rng.uniform(0, 100, 6000)
    slow = t[rng.uniform(size=len(t)) < 0.5 + 0.4 * np.sin(2 * np.pi * t / 40)]
    assert synchrony(departures(slow)).word == "not synchronised"


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (departures(np.arange(0.5, 100, 0.2), lived_s=20.0), "12 are needed"),
        (departures(np.arange(0.5, 100, 0.9)), "4 are needed"),
        (departures(np.arange(0.5, 100, 0.01), lived_s=0.1, tokens=5), "as short as steps"),
        (departures(np.array([150.0])), "no request completed"),
    ],
)
def test_what_is_too_small_is_not_judged(frames: RunFrames, why: str) -> None:
    found = synchrony(frames)
    assert found.word == "cannot say" and why in found.text
    assert found.correlation is None and found.kv_share is None


def test_chance_is_as_large_as_it_says() -> None:
    rng = np.random.default_rng(5)
    values = []
    for _ in range(60):
        seen = completion_waves(departures(rng.uniform(0, 100, 2000)))
        assert isinstance(seen, Waves)
        values.append(seen.correlation[64])
    assert np.std(values) == pytest.approx(seen.by_chance, rel=0.35)


def judged(name: str) -> tuple[Verdict, MeasuredRun]:
    """The verdict of one overloaded run, and the run."""
    setting = setting_named(name)
    law = exact_step_time(setting.server.law)
    claim = predict(setting.workload, setting.server.limits, law, "engine", "P0")
    rate = claim.critical_rate.value
    run = Run(id="00", arrival_rate=1.3 * rate, horizon_s=40.0, warmup_s=5.0, seed=11)
    measured = offered(setting.server, setting.workload, run)
    return judge(evidence_of(setting, claim, 0.1, (measured,))), measured


def wave_figures(
    verdict: Verdict, measured: MeasuredRun, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Figures of waves in a report; the others are not drawn, they take seconds."""
    empty = report_figures.FigureGroup("", "", (), wide=False)
    for group in ("_rates", "_number_in_system", "_engine", "_client"):
        monkeypatch.setattr(report_figures, group, lambda _: empty)
    groups = report_figures.figure_groups(verdict, [measured.frames])
    return [panel.svg for group in groups if group.title == "Waves" for panel in group.panels]


def test_a_locked_run_says_so_under_its_number_shows_it_and_says_what_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdict, measured = judged("fixed")
    lines = summary_lines(verdict)
    at = next(i for i, line in enumerate(lines) if line.startswith("measured"))
    said = " ".join(" ".join(lines[at + 1 :]).split())
    assert lines[at + 1].strip().startswith("warning: synchronised at 1.30")
    x_star = 4096 / sum(16 * math.ceil((64 + j) / 16) for j in range(64))
    assert "output lengths with a CV above 0.19 (it is 0.00)" in said
    assert f"or at most {x_star:.3g} admissions a step" in said
    markdown = report_md(verdict, CONTEXT)
    assert "| 00 | synchronised |" in markdown and "- synchronised at 1.30" in markdown
    (svg,) = wave_figures(verdict, measured, monkeypatch)
    assert 'aria-label="Waves of run 00"' in svg


def test_a_run_of_wide_lengths_says_nothing_of_waves_but_in_its_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdict, measured = judged("SGLang")
    assert not any("waves" in line for line in summary_lines(verdict))
    assert "| 00 | not synchronised |" in report_md(verdict, CONTEXT)
    assert wave_figures(verdict, measured, monkeypatch) == []


def test_a_period_is_found_where_no_lag_correlates() -> None:
    """Completions that avoid one another: the least negative crest, not an error."""
    lags = np.arange(3 * 160)
    correlation = np.where(lags == 0, 1.0, -0.3 - 0.1 * np.cos(lags / 9))
    waves = Waves(
        start_s=0.0,
        interval_s=1 / 64,
        rate=np.zeros(1000),
        width=2.0,
        correlation=correlation,
        residence_s=1.0,
        residences=1000 / 64,
        by_chance=0.1,
        swing=0.2,
        swing_by_chance=0.1,
    )
    assert 48 <= waves.period <= 160
    assert correlation[waves.period] == pytest.approx(-0.2, abs=0.01)
