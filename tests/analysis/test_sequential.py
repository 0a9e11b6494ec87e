"""The interval under repeated looks: its coverage, and what makes it wider."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm, t

from analysis.inference.sequential import (
    EMPTY,
    MIN_BATCHES,
    STUDENT_LEVEL,
    Served,
    interval,
    narrow,
    regression,
    served,
    trend,
    work_rates,
)

SCATTERS = (0.2, 0.4, 0.5, 0.6, 0.8, 1.2, 2.0)
"""Wanted half width over the standard deviation of a batch."""


def coverage(level: float, scatter: float, cases: int = 4000, most: int = 300) -> float:
    """Of Student's interval that is looked at after every batch until its half width is ``scatter``.

    Given where it stops, the mean of normal batches is N(0, 1/n): its part of the chance is exact.
    """
    batches = np.random.default_rng(3).standard_normal((cases, most))
    n = np.arange(MIN_BATCHES, most + 1)
    sums, squares = np.cumsum(batches, 1), np.cumsum(batches**2, 1)
    sums, squares = sums[:, MIN_BATCHES - 1 :], squares[:, MIN_BATCHES - 1 :]
    error = np.sqrt((squares - sums**2 / n) / (n - 1) / n)
    half = t.ppf(0.5 + level / 2, n - 1) * error
    stop = np.argmax(half <= scatter, axis=1)
    at_stop = half[np.arange(cases), stop]
    return float(np.mean(2 * norm.cdf(at_stop * np.sqrt(n[stop])) - 1))


def test_95_percent_are_covered_whatever_the_scatter():
    assert min(coverage(STUDENT_LEVEL, scatter) for scatter in SCATTERS) >= 0.95
    # What it costs to look often: the usual quantile would fall short.
    assert min(coverage(0.95, scatter) for scatter in SCATTERS) < 0.925


def plain(rates: np.ndarray) -> np.ndarray:
    """Batches whose control variates are 0, shape (n, 3)."""
    return np.repeat(rates[:, None], 3, axis=1)


def stopped(rng: np.random.Generator, share: float, scatter: float, r: float, mix: float) -> bool:
    """Does the interval hold the truth 1 when it is first narrow enough, from eight batches on?

    Batches with correlation r and scatter; ``mix`` is that of their control variates, of which the rate
    by KV demand takes a tenth and a fiftieth.
    """
    noise, batches = rng.standard_normal(), []
    while True:
        outputs, prompts = mix * rng.standard_normal(2)
        rate = 1.0 + scatter * noise - 0.1 * outputs - 0.02 * prompts
        batches.append([rate, rate + outputs, rate + prompts])
        noise = r * noise + math.sqrt(1 - r**2) * rng.standard_normal()
        if len(batches) < 2 * MIN_BATCHES:
            continue
        estimate = interval(np.array(batches))
        if narrow(estimate, share):
            return estimate.low <= 1.0 <= estimate.high


@pytest.mark.parametrize(
    ("r", "mix", "least"),
    [(0.0, 0.3, 0.95), (0.25, 0.0, 0.95), (0.25, 0.3, 0.95), (0.45, 0.3, 0.90)],
)
def test_batches_that_are_alike_are_paid_for(r: float, mix: float, least: float):
    rng = np.random.default_rng(11)
    held = np.mean([stopped(rng, 0.02, 0.03, r, mix) for _ in range(200)])
    assert held >= least - 2 * math.sqrt(least * (1 - least) / 200)


def test_control_variates_take_out_the_mix_of_lengths():
    rng = np.random.default_rng(2)
    outputs, prompts = 0.3 * rng.standard_normal((2, 12))
    rate = 40.0 * (1.0 - 0.1 * outputs - 0.02 * prompts)
    mixed = np.stack([rate, rate + 40 * outputs, rate + 40 * prompts], axis=1)
    assert regression(mixed).coefficients[0] == pytest.approx(40.0)
    assert interval(mixed).half_width < 1e-6
    assert interval(plain(rate)).half_width > 0.3


def test_a_young_pool_does_not_bias_the_rate():
    """Its batches have served too little KV demand and too many output tokens, all of them."""
    rng = np.random.default_rng(4)
    values = []
    for _ in range(300):
        outputs = 0.05 + 0.05 * rng.standard_normal(10)
        rate = 1.0 - 0.2 * outputs + 0.002 * rng.standard_normal(10)
        values.append(interval(np.stack([rate, rate + outputs, rate], axis=1)))
    assert np.mean([v.value for v in values]) == pytest.approx(1.0, abs=5e-4)
    assert np.mean([v.low <= 1.0 <= v.high for v in values]) >= 0.95


def test_few_batches_say_nothing():
    assert interval(plain(np.ones(MIN_BATCHES - 1))).half_width == math.inf
    assert math.isnan(interval(np.empty((0, 3))).value)
    for count in range(MIN_BATCHES, 12):
        assert interval(plain(np.ones(count))).half_width == 0.0


@pytest.mark.parametrize("count", [MIN_BATCHES, 8])
def test_equal_batches_by_hand(count: int):
    rates = np.resize([9.0, 11.0], count)
    error = math.sqrt(count / (count - 1)) / math.sqrt(count) * math.sqrt(1.2 / 0.8)
    half = t.ppf(0.5 + STUDENT_LEVEL / 2, count - 1) * error
    assert interval(plain(rates)).half_width == pytest.approx(half)


def test_a_drift_is_seen_and_noise_is_none():
    rng = np.random.default_rng(5)
    outputs = 0.1 * rng.standard_normal((500, 12))
    rate = 1 + 0.01 * rng.standard_normal((500, 12)) - 0.2 * outputs
    steady = np.stack([rate, rate + outputs, rate], axis=2)
    changes = [trend(rows) for rows in steady]
    assert np.mean([change.low <= 0.0 <= change.high for change in changes]) >= 0.93
    slower = [trend(rows) for rows in steady * (1 - 0.1 * np.linspace(0, 1, 12))[:, None]]
    assert np.mean([change.high < 0.0 for change in slower]) > 0.95
    assert np.mean([change.value for change in slower]) == pytest.approx(-0.105, abs=0.005)
    assert trend(steady[0][: 2 * MIN_BATCHES - 1]) is None


def test_work_over_its_mean_is_a_rate():
    works = [(600.0 * i, 40.0 * i, 120.0 * i) for i in range(5)]
    looks = [replace(EMPTY, t_s=float(i), work=work) for i, work in enumerate(works)]
    rates = work_rates(looks, np.array([0.5, 2.0, 4.0]), (300.0, 20.0, 60.0))
    assert rates == pytest.approx(np.full((2, 3), 2.0))


def test_work_and_memory_by_hand():
    one = served(np.array([10.0]), np.array([3.0]), np.array([2.0]))
    # Two output tokens follow the first; the three steps held 10, 11 and 12 tokens.
    assert one == Served((33.0, 3.0, 10.0), 2.0, 4.0)
    both = one + served(np.array([5.0]), np.array([1.0]), np.array([1.0]))
    assert both.work == (38.0, 4.0, 15.0)
    assert both.memory_s == pytest.approx(5.0 / 3.0)
    assert Served().memory_s == 0.0
