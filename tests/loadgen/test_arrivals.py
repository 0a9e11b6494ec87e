"""Schedules are judged by the error rates of tests that would find their defects."""

import numpy as np
import pytest
from scipy import stats

from loadgen.arrivals import (
    arrivals,
    evenly_spaced,
    gamma,
    poisson,
    run_arrivals,
    schedule_ns,
    shard,
    weibull,
)
from loadgen.processes import Gamma, OnOff, Piecewise, Poisson, Sinusoidal, Weibull
from loadgen.records import Run

LAWS = [
    Poisson(),
    Gamma(cv=2.0),
    Weibull(cv=0.5),
    OnOff(on_s=2.0, off_s=5.0),
    OnOff(on_s=0.5, off_s=3.0, off_over_on=0.3),
    Piecewise(pieces=((3.0, 1.0), (2.0, 3.0), (5.0, 0.0))),
    Sinusoidal(period_s=7.0, amplitude=1.0, phase=0.3),
]


def drawn(law):
    def instants(rate, horizon_s, seed):
        return arrivals(law, rate, horizon_s, seed)

    return pytest.param(instants, id=law.kind)


ALL = [evenly_spaced, *map(drawn, LAWS)]


@pytest.mark.parametrize("law", ALL)
def test_schedules_increase_inside_the_horizon_and_repeat_by_seed(law):
    instants = law(50.0, 20.0, 7)
    assert instants.dtype == np.float64
    assert (np.diff(instants) > 0).all()
    assert instants[0] >= 0
    assert instants[-1] < 20.0
    assert np.array_equal(instants, law(50.0, 20.0, 7))
    assert not np.array_equal(instants[:5], law(50.0, 20.0, 8)[:5])


@pytest.mark.parametrize("law", ALL)
@pytest.mark.parametrize("seed", range(10))
def test_a_longer_horizon_begins_with_the_shorter_one(law, seed):
    short, long = law(30.0, 10.0, seed), law(30.0, 1000.0, seed)
    assert np.array_equal(short, long[: len(short)])
    assert long[len(short)] >= 10.0


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_poisson_gaps_are_exponential_at_the_nominal_error_rate(level):
    runs = 1000
    rejected = 0
    for seed in range(runs):
        gaps = np.diff(poisson(20.0, 25.0, seed), prepend=0.0)[:300]
        rejected += stats.kstest(gaps, "expon", args=(0, 1 / 20.0)).pvalue < level
    low, high = stats.binom.interval(1 - 1e-6, runs, level)
    assert low <= rejected <= high


def test_poisson_counts_have_the_variance_of_their_mean():
    counts = np.array([len(poisson(10.0, 10.0, seed)) for seed in range(3000)])
    assert counts.mean() == pytest.approx(100.0, abs=5 * 10 / 3000**0.5)
    index = counts.var(ddof=1) / counts.mean()
    low, high = stats.chi2.interval(1 - 1e-6, 2999)
    assert low <= index * 2999 <= high
    halves = [poisson(10.0, 10.0, seed) for seed in range(3000)]
    first = np.array([(h < 5.0).sum() for h in halves])
    assert abs(np.corrcoef(first, counts - first)[0, 1]) < 5 / 3000**0.5


def test_poisson_gaps_are_uncorrelated():
    lag_one = []
    for seed in range(500):
        gaps = np.diff(poisson(20.0, 20.0, seed))
        lag_one.append(np.corrcoef(gaps[1:], gaps[:-1])[0, 1])
    # Expected -1/n in each of the runs, with variance 1/n.
    assert np.mean(lag_one) == pytest.approx(-1 / 400, abs=5 / (400 * 500) ** 0.5)
    assert np.std(lag_one) == pytest.approx(1 / 400**0.5, rel=0.15)


@pytest.mark.parametrize("law", [gamma, weibull])
@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_their_moments(law, cv):
    gaps = np.diff(law(10.0, cv, 20_000.0, 1))
    assert gaps.mean() == pytest.approx(0.1, rel=5 * cv / len(gaps) ** 0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_evenly_spaced_counts_have_the_nominal_mean():
    counts = [len(evenly_spaced(3.0, 1.5, seed)) for seed in range(2000)]
    assert set(counts) == {4, 5}
    assert np.mean(counts) == pytest.approx(4.5, abs=0.06)
    assert np.diff(evenly_spaced(3.0, 10.0, 1)) == pytest.approx(1 / 3)


def test_shards_are_the_schedule():
    instants = poisson(10.0, 30.0, 1)
    parts = [shard(instants, index, 4) for index in range(4)]
    assert np.array_equal(np.sort(np.concatenate(parts)), instants)
    with pytest.raises(ValueError, match="shard 4 of 4"):
        shard(instants, 4, 4)


def test_hardly_any_load_gives_few_or_no_arrivals():
    counts = [len(poisson(0.01, 10.0, seed)) for seed in range(2000)]
    assert min(counts) == 0
    assert np.mean(counts) == pytest.approx(0.1, abs=0.04)


def test_schedule_in_nanoseconds_is_relative_to_the_start():
    assert schedule_ns(np.array([0.0, 1.5, 2.0000000014]), 10).tolist() == [
        10,
        1_500_000_010,
        2_000_000_011,
    ]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: poisson(0.0, 1.0, 0), "rate_per_s"),
        (lambda: poisson(-1.0, 1.0, 0), "rate_per_s"),
        (lambda: poisson(float("nan"), 1.0, 0), "rate_per_s"),
        (lambda: poisson(1.0, 0.0, 0), "horizon_s"),
        (lambda: poisson(1.0, float("inf"), 0), "horizon_s"),
        (lambda: evenly_spaced(0.0, 1.0, 0), "rate_per_s"),
        (lambda: gamma(1.0, 0.0, 1.0, 0), "cv"),
        (lambda: weibull(1.0, float("nan"), 1.0, 0), "cv"),
        (lambda: arrivals(LAWS[3], 0.0, 1.0, 0), "rate_per_s"),
        (lambda: arrivals(LAWS[5], 1.0, 0.0, 0), "horizon_s"),
    ],
)
def test_impossible_loads_are_refused(call, name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        call()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.kind)
@pytest.mark.parametrize("preload", [0, 1, 250])
def test_a_run_from_full_has_its_burst_before_the_same_arrivals(law, preload):
    run = Run(
        id="r",
        arrival_rate=20.0,
        horizon_s=30.0,
        warmup_s=1.0,
        seed=4,
        preload=preload,
        arrivals=law,
    )
    instants = run_arrivals(run)
    assert run.start == ("full" if preload else "empty")
    assert (instants[:preload] == 0.0).all()
    assert np.array_equal(instants[preload:], arrivals(law, 20.0, 30.0, 4))
    if law == Poisson():
        assert np.array_equal(instants[preload:], poisson(20.0, 30.0, 4))


def test_pauses_without_rate_have_no_arrivals():
    steps = arrivals(LAWS[5], 40.0, 100.0, 3)
    assert not ((steps % 10.0) > 5.0).any()
    # Two thirds of the arrivals come in the two seconds of the triple rate.
    inside = ((steps % 10.0 >= 3.0) & (steps % 10.0 < 5.0)).mean()
    assert inside == pytest.approx(2 / 3, abs=5 * (2 / 9 / len(steps)) ** 0.5)
    silent = np.diff(arrivals(OnOff(on_s=1.0, off_s=9.0), 30.0, 500.0, 3))
    assert (silent > 1.0).sum() > 20
