"""The interval under repeated looks: its coverage, and what makes it wider."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm, t

from analysis.sequential import (
    EMPTY,
    MIN_BATCHES,
    STUDENT_LEVEL,
    drifted,
    interval,
    narrow,
    work_rate,
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


def stopped(rng: np.random.Generator, share: float, scatter: float, r: float) -> bool:
    """Does the interval hold the truth 1 when it is first narrow enough? Batches with correlation r."""
    noise, batches = rng.standard_normal(), []
    while True:
        batches.append(1.0 + scatter * noise)
        noise = r * noise + math.sqrt(1 - r**2) * rng.standard_normal()
        estimate = interval(np.array(batches), "batches")
        if narrow(estimate, share):
            return estimate.low <= 1.0 <= estimate.high


@pytest.mark.parametrize(("r", "least"), [(0.0, 0.95), (0.3, 0.92), (0.54, 0.84)])
def test_batches_that_are_alike_are_paid_for(r: float, least: float):
    rng = np.random.default_rng(11)
    held = np.mean([stopped(rng, 0.02, 0.03, r) for _ in range(400)])
    assert held >= least - 2 * math.sqrt(least * (1 - least) / 400)


def test_few_batches_say_nothing():
    assert interval(np.ones(MIN_BATCHES - 1), "x").half_width == math.inf
    assert math.isnan(interval(np.empty(0), "x").value)
    assert interval(np.ones(MIN_BATCHES), "x").half_width == 0.0


def test_equal_batches_by_hand():
    rates = np.array([9.0, 11.0, 9.0, 11.0])
    half = t.ppf(0.5 + STUDENT_LEVEL / 2, 3) * math.sqrt(4 / 3) / 2 * math.sqrt(1.2 / 0.8)
    assert interval(rates, "x").half_width == pytest.approx(half)


def test_a_drift_is_seen_and_noise_is_none():
    rng = np.random.default_rng(5)
    noise = 0.01 * rng.standard_normal((500, 12))
    assert np.mean([drifted(1 + row, 0.0) is not None for row in noise]) < 0.03
    slower = 1 + noise - 0.1 * np.linspace(0, 1, 12)
    changes = [drifted(row, 0.02) for row in slower]
    assert np.mean([change is not None for change in changes]) > 0.98
    assert np.mean([change for change in changes if change]) == pytest.approx(-0.105, abs=0.01)


def test_work_over_its_mean_is_a_rate():
    looks = [replace(EMPTY, t_s=float(i), kv_work=600.0 * i, token_work=40.0 * i) for i in range(5)]
    edges = np.array([0.5, 2.0, 4.0])
    assert work_rate(looks, "kv", edges, 300.0) == pytest.approx([2.0, 2.0])
    assert work_rate(looks, "token", edges, 20.0) == pytest.approx([2.0, 2.0])
