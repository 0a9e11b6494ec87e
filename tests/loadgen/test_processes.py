"""Laws of arrivals: closed forms against enumeration and against what is drawn."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from loadgen.arrivals import arrivals, weibull_shape
from loadgen.processes import (
    POISSON,
    Gamma,
    OnOff,
    Piecewise,
    Replay,
    Sinusoidal,
    Weibull,
    dispersion,
    dispersion_over,
    expected_arrivals,
    instants_of,
    period_s,
    process_from_dict,
    swing,
)
from loadgen.records import Run

STEPS = Piecewise(pieces=((3.0, 1.0), (2.0, 3.0), (5.0, 0.0), (1.5, 0.5)))
WAVE = Sinusoidal(period_s=7.0, amplitude=0.8, phase=0.2)
FULL_WAVE = Sinusoidal(period_s=7.0, amplitude=1.0)
BURSTS = OnOff(on_s=2.0, off_s=8.0, off_over_on=0.1)
TRACE = Replay(file="a/b.csv", format="azure", sha256="0", own_rate=2.0, duration_s=9.0)
ALL = [POISSON, Gamma(cv=2.0), Weibull(cv=0.5), BURSTS, STEPS, WAVE, TRACE]


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.kind)
def test_a_law_comes_back_from_the_results_folder(law) -> None:  # type: ignore[no-untyped-def]
    run = Run(id="r", arrival_rate=3.0, horizon_s=9.0, warmup_s=1.0, seed=4, arrivals=law)
    assert Run.from_dict(json.loads(json.dumps(asdict(run)))) == run


def test_runs_of_older_folders_are_poisson_and_unknown_laws_are_refused() -> None:
    old = {"id": "r", "arrival_rate": 3.0, "horizon_s": 9.0, "warmup_s": 1.0, "seed": 4}
    assert Run.from_dict(old).arrivals == POISSON
    with pytest.raises(ValueError, match="no arrivals of kind 'pareto'"):
        process_from_dict({"kind": "pareto"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gamma(cv=4.5), "between 0.05 and 4"),
        (lambda: Weibull(cv=0.01), "between 0.05 and 10"),
        (lambda: OnOff(on_s=0.0, off_s=1.0), "on_s must be positive"),
        (lambda: OnOff(on_s=1.0, off_s=1.0, off_over_on=1.0), r"off_over_on must be in \[0, 1\)"),
        (lambda: Piecewise(pieces=((1.0, 1.0),)), "at least two"),
        (lambda: Piecewise(pieces=((1.0, 0.0), (2.0, 0.0))), "must be positive"),
        (lambda: Piecewise(pieces=((1.0, -1.0), (2.0, 0.0))), "no relative rate negative"),
        (lambda: Sinusoidal(period_s=1.0, amplitude=1.5), r"amplitude must be in \(0, 1\]"),
        (lambda: Sinusoidal(period_s=1.0, amplitude=0.5, phase=1.0), "phase is in periods"),
    ],
)
def test_impossible_laws_are_refused(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cv", [0.05, 0.3, 1.0, 2.5, 10.0])
def test_weibull_shape_gives_the_cv(cv: float) -> None:
    k = weibull_shape(cv)
    square = math.exp(math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k)) - 1
    assert math.sqrt(square) == pytest.approx(cv, rel=1e-9)
    assert weibull_shape(1.0) == pytest.approx(1.0)


def test_mean_of_the_states_is_the_rate() -> None:
    on, off = BURSTS.rates(5.0)
    assert off == pytest.approx(0.1 * on)
    assert (2.0 * on + 8.0 * off) / 10.0 == pytest.approx(5.0)


def test_dispersion_of_an_mmpp_against_its_two_equations() -> None:
    """Variance of the counts from the moments of a Markov chain in small steps."""
    rate, step_s = 6.0, 1e-3
    on, off = BURSTS.rates(rate)
    leave = np.array([step_s / BURSTS.on_s, step_s / BURSTS.off_s])
    chain = np.array([[1 - leave[0], leave[0]], [leave[1], 1 - leave[1]]])
    share = np.array([0.2, 0.8])
    means = np.array([on, off]) * step_s
    second, ahead, found = float(share @ means), share * means, {}
    for count in range(1, 4001):
        if count in (1000, 4000):
            mean = count * float(share @ means)
            found[count * step_s] = 1.0 + (second - mean**2) / mean
        if count == 1:
            second = float(share @ means**2)
        # Twice the covariance with all that came before, and the square of the new step.
        ahead = ahead @ chain
        second += 2 * float(ahead @ means) + float(share @ means**2)
        ahead = ahead + share * means
    windows = np.array(sorted(found))
    assert dispersion_over(BURSTS, rate, windows) == pytest.approx(
        [found[w] for w in windows], rel=2e-3
    )
    assert dispersion_over(BURSTS, rate, np.array([1e7]))[0] == pytest.approx(
        dispersion(BURSTS, rate), rel=1e-5
    )
    assert dispersion_over(BURSTS, rate, np.array([1e-6]))[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("law", "ca2"), [(Gamma(cv=2.0), 4.0), (Weibull(cv=0.5), 0.25), (POISSON, 1.0), (STEPS, 1.0)]
)
def test_dispersion_of_the_others(law, ca2) -> None:  # type: ignore[no-untyped-def]
    assert dispersion(law, 7.0) == ca2
    assert Run(id="r", arrival_rate=7.0, horizon_s=1, warmup_s=0, seed=1, arrivals=law).ca2 == ca2


def test_a_replay_has_no_dispersion() -> None:
    assert math.isnan(dispersion(TRACE, 1.0))


@pytest.mark.parametrize("law", [STEPS, WAVE, FULL_WAVE], ids=lambda law: law.kind)
def test_rates_that_follow_the_clock(law) -> None:  # type: ignore[no-untyped-def]
    period, rate = period_s(law), 5.0
    assert period is not None
    at_s = np.linspace(0.0, 3 * period, 5000)
    expected = expected_arrivals(law, rate, at_s)
    assert (np.diff(expected) >= -1e-12).all()
    whole = expected_arrivals(law, rate, period * np.arange(4))
    assert whole == pytest.approx(rate * period * np.arange(4), abs=1e-9)
    counts = np.linspace(0.01, 3 * rate * period - 0.01, 997)
    back = expected_arrivals(law, rate, instants_of(law, rate, counts))
    assert back == pytest.approx(counts, abs=1e-9)
    ahead = expected - rate * at_s
    assert swing(law, rate) == pytest.approx(ahead.max() - ahead.min(), rel=1e-3)
    assert swing(POISSON, rate) == 0.0


def test_a_wave_is_ahead_by_its_closed_form() -> None:
    """The integral of amplitude sin over half a period: A P / pi."""
    assert swing(WAVE, 5.0) == pytest.approx(5.0 * 0.8 * 7.0 / math.pi, rel=1e-5)
    rates = np.diff(expected_arrivals(WAVE, 5.0, np.array([1.0, 1.0 + 1e-6]))) / 1e-6
    turn = 2 * math.pi * (1.0 / 7.0 + 0.2)
    assert rates[0] == pytest.approx(5.0 * (1 + 0.8 * math.sin(turn)), rel=1e-4)


@pytest.mark.parametrize(
    ("law", "rate", "window_s"),
    [
        (Gamma(cv=3.0), 20.0, 40.0),
        (Gamma(cv=0.5), 20.0, 10.0),
        (Weibull(cv=2.0), 20.0, 20.0),
        (BURSTS, 6.0, 4.0),
    ],
)
def test_counts_have_the_mean_and_the_variance_of_the_law(law, rate, window_s) -> None:  # type: ignore[no-untyped-def]
    """From the first second on: every law is in full swing at 0."""
    seeds = 800
    drawn = [arrivals(law, rate, window_s, seed) for seed in range(seeds)]
    counts = np.array([len(instants) for instants in drawn])
    early = np.array([(instants < 1.0).sum() for instants in drawn])
    for seen, mean in ((counts, rate * window_s), (early, rate)):
        assert abs(seen.mean() - mean) < 5 * seen.std() / seeds**0.5
    index = counts.var(ddof=1) / counts.mean()
    whole = dispersion(law, rate)
    if isinstance(law, OnOff):
        whole = float(dispersion_over(law, rate, np.array([window_s]))[0])
    # A sample variance of nearly normal counts; finite windows differ by a few per cent.
    assert index == pytest.approx(whole, rel=5 * (2 / seeds) ** 0.5 + 0.05)
