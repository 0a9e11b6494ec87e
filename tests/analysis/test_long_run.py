"""Intervals of a mean rate: how often they hold the truth, under noise, wandering and waves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter

from analysis.inference.long_run import Stretch, bins_of, long_run_mean
from analysis.numbers.estimate import Estimate

TRIALS = 500
FINE = 16
"""Instants of a process to one bin."""
Process = Callable[[np.random.Generator, float], NDArray[np.float64]]


def white(rng: np.random.Generator, residences: float) -> NDArray[np.float64]:
    """Alike per second in stretches of any length."""
    count = bins_of(residences) * FINE
    return rng.standard_normal(count) * np.sqrt(count / 1024 / residences)


def wandering(rng: np.random.Generator, residences: float) -> NDArray[np.float64]:
    """Correlated over a quarter of a residence."""
    count = bins_of(residences) * FINE
    memory = np.exp(-4.0 * residences / count)
    noise = rng.standard_normal(2 * count) * np.sqrt(1 - memory**2)
    return np.asarray(lfilter([1.0], [1.0, -memory], noise))[count:]


def waves(rng: np.random.Generator, residences: float) -> NDArray[np.float64]:
    """One wave for each residence, at any phase, on little noise."""
    count = bins_of(residences) * FINE
    turns = np.arange(count) / count * residences
    wave = np.sin(2 * np.pi * (turns + rng.random()))
    return 0.3 * white(rng, residences) + wave


def stretch(process: Process, rng: np.random.Generator, residences: float) -> Stretch:
    rates = 10.0 + process(rng, residences).reshape(-1, FINE).mean(axis=1)
    return Stretch(rates, 100.0 * residences, residences, "req/s", "made up")


def found(process: Process, residences: tuple[float, ...], seed: int) -> list[Estimate]:
    rng = np.random.default_rng(seed)
    return [long_run_mean([stretch(process, rng, r) for r in residences]) for _ in range(TRIALS)]


def covered(estimates: list[Estimate]) -> float:
    return float(np.mean([e.low <= 10.0 <= e.high for e in estimates]))


@pytest.mark.parametrize("residences", [(6.3,), (20.0,), (60.5,), (8.0, 30.0)])
@pytest.mark.parametrize("process", [white, wandering])
def test_intervals_cover_at_their_level(process: Process, residences: tuple[float, ...]) -> None:
    """95 % of normal processes, within three Monte Carlo errors of the 93 to 97 that are promised."""
    error = 3 * np.sqrt(0.95 * 0.05 / TRIALS)
    assert 0.93 - error < covered(found(process, residences, 1)) < 0.97 + error


@pytest.mark.parametrize("residences", [(6.3,), (10.0,), (30.25,), (60.5,), (11.2, 30.0)])
def test_waves_are_not_taken_for_noise(residences: tuple[float, ...]) -> None:
    """They add to the mean what is left of the last one; ten batches would cover in 71 to 100 %."""
    estimates = found(waves, residences, 2)
    assert covered(estimates) > 0.95
    error = float(np.sqrt(np.mean([(e.value - 10.0) ** 2 for e in estimates])))
    left_over = 1 / (np.pi * min(residences))
    assert np.mean([e.half_width for e in estimates]) < 2.5 * 1.96 * max(error, left_over)


def test_stretches_count_for_their_length() -> None:
    flat = np.ones(bins_of(10.0))
    short, long = (Stretch(x * flat, s, 10.0, "req/s", "x") for x, s in ((1.0, 10.0), (2.0, 30.0)))
    both = long_run_mean([short, long])
    assert both.value == pytest.approx(1.75)
    assert both.method == "x; 2 runs, each for its length"


def test_runs_that_differ_widen_the_interval() -> None:
    """A server that changed between runs: the scatter within them says nothing about the mean."""
    rng = np.random.default_rng(5)
    slow = stretch(white, rng, 20.0)
    fast = Stretch(slow.rates + 2.0, slow.duration_s, 20.0, "req/s", "x")
    both = long_run_mean([slow, fast])
    assert both.low < slow.mean and both.high > fast.mean


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(ValueError, match="no stretch"):
        long_run_mean([])
