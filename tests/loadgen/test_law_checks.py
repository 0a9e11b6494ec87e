"""Arrivals of every law are judged by the error rates of their tests: honest ones pass, others fail."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from loadgen.arrivals import SECOND_NS, arrivals, run_arrivals, schedule_ns
from loadgen.fidelity import fidelity
from loadgen.law_checks import law_checks
from loadgen.processes import (
    POISSON,
    Gamma,
    OnOff,
    Piecewise,
    Process,
    Sinusoidal,
    Weibull,
    dispersion,
)
from loadgen.records import RequestRecord, Run
from loadgen.rescaling import rescaled

RATE, END_S = 20.0, 50.0
HONEST_S = 25.0
BURSTS = OnOff(on_s=2.0, off_s=8.0, off_over_on=0.2)
STEPS = Piecewise(pieces=((3.0, 1.0), (2.0, 3.0), (5.0, 0.0)))
WAVE = Sinusoidal(period_s=7.0, amplitude=0.8)
LAWS: list[Process] = [
    Gamma(cv=3.0),
    Weibull(cv=0.5),
    BURSTS,
    Gamma(cv=0.5),
    Weibull(cv=3.0),
    OnOff(on_s=0.5, off_s=1.5),
    STEPS,
    WAVE,
]


def failed(law: Process, due_s: np.ndarray, end_s: float = END_S) -> set[str]:
    lag_s = np.random.default_rng(len(due_s)).uniform(0.0, 0.002, len(due_s))
    checks = law_checks(law, RATE, due_s, end_s)(due_s + lag_s, lag_s)
    return {check.name for check in checks if check.passed is False}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.text)
def test_honest_loads_pass(law: Process) -> None:
    loads = (arrivals(law, RATE, HONEST_S, seed) for seed in range(200))
    rejections = sum(bool(failed(law, due_s, HONEST_S)) for due_s in loads)
    # Six checks at LEVEL: 0.12 expected in 200; more than 2 has probability 3e-4.
    assert rejections <= 2


@pytest.mark.parametrize("law", LAWS[:3], ids=lambda law: law.text)
def test_rescaled_gaps_are_uniform_at_the_nominal_error_rate(law: Process) -> None:
    """At a level that rejections can be counted at; ties of floats leave a few points their middle."""
    assert isinstance(law, Gamma | Weibull | OnOff)
    loads = (arrivals(law, RATE, HONEST_S, seed) for seed in range(200))
    found = [rescaled(law, RATE, due_s, HONEST_S) for due_s in loads]
    assert max(one.resolution for one in found) < (0.05 if law == Gamma(cv=3.0) else 1e-4)
    gaps = [np.diff(one.instants, prepend=0.0)[:250] for one in found]
    rejected = sum(stats.kstest(one, stats.expon.cdf, mode="asymp").pvalue < 0.1 for one in gaps)
    low, high = stats.binom.interval(1 - 1e-4, len(found), 0.1)
    assert low <= rejected <= high
    lag_one = [np.corrcoef(one[1:], one[:-1])[0, 1] for one in gaps if len(one) > 100]
    assert abs(np.mean(lag_one)) < 5 / (200 * len(lag_one)) ** 0.5
    # What is expected of the whole run is what came, in the mean and in the spread of a Poisson count.
    scores = [(len(one.instants) - one.end) / one.end**0.5 for one in found]
    assert abs(np.mean(scores)) < 5 / len(scores) ** 0.5
    assert np.std(scores) == pytest.approx(1.0, abs=5 / (2 * len(scores)) ** 0.5)


@pytest.mark.parametrize(
    ("claimed", "offered", "check"),
    [
        (Gamma(cv=2.0), POISSON, "gaps"),
        (Gamma(cv=2.0), Weibull(cv=2.0), "gaps"),
        (Gamma(cv=1.5), Gamma(cv=2.0), "gaps"),
        (Weibull(cv=0.5), POISSON, "dispersion"),
        (Weibull(cv=3.0), Gamma(cv=3.0), "rate"),
        (BURSTS, POISSON, "rate"),
        (BURSTS, Gamma(cv=dispersion(BURSTS, RATE) ** 0.5 / 3), "gaps"),
        (WAVE, POISSON, "gap correlation"),
        (WAVE, Sinusoidal(period_s=7.0, amplitude=0.8, phase=0.1), "dispersion"),
        (Piecewise(pieces=((3.0, 1.0), (2.0, 3.0), (5.0, 0.5))), POISSON, "dispersion"),
    ],
    ids=lambda law: getattr(law, "kind", law),
)
def test_another_law_of_the_same_rate_is_caught(
    claimed: Process, offered: Process, check: str
) -> None:
    runs = 20
    caught = sum(
        check in failed(claimed, arrivals(offered, RATE, END_S, seed)) for seed in range(runs)
    )
    assert caught >= 0.9 * runs


def records_of(run: Run, lag_ms: float = 0.5) -> list[RequestRecord]:
    return [
        RequestRecord(
            id=i,
            scheduled_ns=ns,
            sent_ns=ns + round(lag_ms * 1e6),
            first_token_ns=ns + SECOND_NS,
            last_token_ns=ns + 2 * SECOND_NS,
            prompt_tokens=10,
            output_tokens_designed=20,
            max_tokens=20,
            output_tokens=20,
            prompt_tokens_reported=10,
            outcome="completed",
            status=200,
        )
        for i, ns in enumerate(schedule_ns(run_arrivals(run), 5 * SECOND_NS).tolist())
    ]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.text)
@pytest.mark.parametrize("preload", [0, 100])
def test_runs_of_every_law_are_judged_whole_cut_and_behind_a_burst(
    law: Process, preload: int
) -> None:
    run = Run(
        id="r",
        arrival_rate=RATE,
        horizon_s=END_S,
        warmup_s=3.0,
        seed=5,
        preload=preload,
        arrivals=law,
    )
    records = records_of(run)
    for end_s in (END_S, 0.7 * END_S):
        result = fidelity(run, records, end_s, 5 * SECOND_NS)
        assert result.valid, [c for c in result.checks if c.passed is False]
    names = [check.name for check in result.checks]
    assert names.count("gaps") == 1 and ("burst" in names) == bool(preload)
    other = [r for r in records if r.id % 10]
    damaged = fidelity(run, other, END_S, 5 * SECOND_NS)
    assert "schedule" in {check.name for check in damaged.checks if check.passed is False}
    late = fidelity(run, records_of(run, lag_ms=50.0), END_S, 5 * SECOND_NS)
    assert "send lag" in {check.name for check in late.checks if check.passed is False}


def test_what_the_clock_puts_near_whole_seconds_is_no_fault() -> None:
    """A rate that peaks at every second has many arrivals there; twice as many would be pinned."""
    law = Sinusoidal(period_s=1.0, amplitude=1.0, phase=0.25)
    due_s = arrivals(law, 100.0, 60.0, 1)
    lag_s = np.zeros(len(due_s))
    near = law_checks(law, 100.0, due_s, 60.0)(due_s, lag_s)[-1]
    assert near.name == "whole seconds" and near.passed
    pinned = np.sort(np.where(np.arange(len(due_s)) % 50, due_s, np.round(due_s)))
    assert law_checks(law, 100.0, due_s, 60.0)(pinned, lag_s)[-1].passed is False
