"""Growth and capacity, tested by their error rates on queues whose truth is known."""

import functools

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import norm, t

from analysis.inference.growth import (
    DRIFT_BATCHES,
    bartlett_quantile,
    critical_excursion,
    drift,
    drift_by_end_point,
    drift_by_hac,
    growth_power,
    needed_requests,
    stability_duration,
    stability_power,
    why_no_slope,
)
from analysis.numbers.estimate import Estimate
from analysis.schedulers.frames import RunFrames
from loadgen.records import Run

HORIZON_S = 1000.0


def mm1(load: float, seed: int, horizon_s: float = HORIZON_S) -> RunFrames:
    """An M/M/1 queue with service rate 1, started empty."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / load, int(load * horizon_s * 1.2) + 50))
    arrivals = arrivals[arrivals < horizon_s]
    service = rng.exponential(1.0, len(arrivals))
    begins, ends = np.empty_like(arrivals), np.empty_like(arrivals)
    free_s = 0.0
    for i, (at, work) in enumerate(zip(arrivals.tolist(), service.tolist(), strict=True)):
        begins[i] = max(free_s, at)
        free_s = ends[i] = begins[i] + work
    return frames_of(arrivals, begins, ends, horizon_s)


def frames_of(
    arrivals: NDArray[np.float64],
    begins: NDArray[np.float64],
    ends: NDArray[np.float64],
    horizon_s: float,
) -> RunFrames:
    requests = pd.DataFrame(
        {
            "id": np.arange(len(arrivals)),
            "scheduled_s": arrivals,
            "first_token_s": np.where(begins < horizon_s, begins, np.nan),
            "last_token_s": np.where(ends < horizon_s, ends, np.nan),
            "outcome": np.where(ends < horizon_s, "completed", "unfinished"),
        }
    )
    run = Run(id="x", arrival_rate=1.0, horizon_s=horizon_s, warmup_s=0.0, seed=1)
    return RunFrames(run, horizon_s, requests, pd.DataFrame(), pd.DataFrame())


RUNS = 200
ESTIMATORS = {
    "batch means": drift,
    "HAC": drift_by_hac,
    "end point": lambda frames, start_s, end_s: drift_by_end_point(frames, start_s, end_s, 2.0),
}


@functools.cache
def drifts_at(load: float) -> dict[str, list[Estimate]]:
    """Every estimator on the same 200 runs."""
    runs = [mm1(load, 1000 + k) for k in range(RUNS)]
    return {name: [f(run, 50.0, HORIZON_S) for run in runs] for name, f in ESTIMATORS.items()}


def grows(estimate: Estimate) -> bool:
    """The rule of `analysis.verdicts.run_verdict`, for a service rate of 1."""
    duration_s = HORIZON_S - 50.0
    by_chance = critical_excursion(1.0, duration_s, 0.95, 2.0)
    return estimate.low > 0 and estimate.value * duration_s > by_chance


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("load", "most"), [(0.8, 0.005), (0.95, 0.01), (1.0, 0.05)])
def test_false_alarms_of_growth(load: float, most: float, name: str) -> None:
    """A line fitted with independent errors calls 40-77 % of these growing (theory.md 6.4)."""
    alarms = np.mean([grows(estimate) for estimate in drifts_at(load)[name]])
    assert alarms <= most + 2 * np.sqrt(most * (1 - most) / RUNS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_growth_is_found_where_the_plan_says_so(name: str) -> None:
    expected = growth_power(0.2, 2.0, 950 * 1.2)
    assert np.mean([grows(estimate) for estimate in drifts_at(1.2)[name]]) >= expected - 0.12


def test_coverage_of_the_drift_in_overload() -> None:
    """90 % intervals of a backlogged queue cover the true drift in 86-94 % of 400 runs."""
    runs = [mm1(1.5, 5000 + k, 400.0) for k in range(400)]
    for name, estimator in ESTIMATORS.items():
        found = [estimator(run, 20.0, 400.0) for run in runs]
        covered = np.mean([e.low <= 0.5 <= e.high for e in found])
        assert 0.86 <= covered <= 0.94, name


def test_the_error_of_an_end_point_is_that_of_poisson_arrivals_and_departures() -> None:
    """Both rates 1 and ca2 = cd2 = 1: the slope over T seconds has the variance 2 / T."""
    estimate = drift_by_end_point(mm1(1.5, 1, 4000.0), 50.0, 4000.0, 2.0)
    assert estimate.standard_error == pytest.approx(np.sqrt(2.5 / 3950.0), rel=0.03)


def test_the_quantile_of_a_variance_with_bartlett_weights() -> None:
    """Of 60 independent numbers at a bandwidth of a sixth, its share of t-ratios lies below it."""
    assert bartlett_quantile(0.0) == pytest.approx(1.645, abs=1e-3)
    numbers = np.random.default_rng(2).standard_normal((20_000, 60))
    deviations = numbers - numbers.mean(axis=1, keepdims=True)
    variance = (deviations**2).sum(axis=1)
    for lag in range(1, 10):
        products = (deviations[:, lag:] * deviations[:, :-lag]).sum(axis=1)
        variance += 2 * (1 - lag / 10) * products
    ratios = numbers.sum(axis=1) / np.sqrt(variance)
    assert np.mean(ratios < bartlett_quantile(1 / 6)) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("start_s", "end_s", "why"),
    [
        (0.5, 400.0, "begins 0.5 s into the run, before one mean residence"),
        (20.0, 22.0, "shorter than 3 mean residence times"),
        (20.0, 400.0, None),
    ],
)
def test_no_slope_before_one_residence_time(start_s: float, end_s: float, why: str | None) -> None:
    """A mean service of one second."""
    run = mm1(1.5, 1, 400.0)
    reason = why_no_slope(run, start_s, end_s)
    if why is None:
        assert reason is None
        return
    assert reason is not None and why in reason
    for estimator in ESTIMATORS.values():
        with pytest.raises(ValueError, match=why):
            estimator(run, start_s, end_s)


def test_no_slope_while_nothing_was_completed() -> None:
    """Thirty requests in service, none has left: N grows at the rate of arrivals."""
    arrivals = np.arange(30.0)
    run = frames_of(arrivals, arrivals + 0.1, arrivals + 100.0, 30.0)
    assert run.mean_residence_s == np.inf
    with pytest.raises(ValueError, match="no request was completed"):
        drift(run, 5.0, 30.0)


def test_the_mean_residence_counts_those_that_are_still_in_service() -> None:
    """Of residences of 2 and 40 s in equal parts a run of 41 s completes nearly only the short ones."""
    arrivals = np.arange(0.0, 41.0, 0.5)
    residences = np.where(np.arange(len(arrivals)) % 2, 40.0, 2.0)
    run = frames_of(arrivals, arrivals, arrivals + residences, 41.0)
    assert 15.0 < run.mean_residence_s < 30.0
    done = run.requests[run.requests["outcome"] == "completed"]
    assert (done["last_token_s"] - done["first_token_s"]).mean() < 4.0


def test_a_drift_at_the_threshold_is_called_stable_in_at_most_5_percent() -> None:
    bounds = [drift(mm1(1.5, 9000 + k, 400.0), 20.0, 400.0).high for k in range(400)]
    assert np.mean(np.array(bounds) < 0.5) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_the_power_is_that_of_the_rule() -> None:
    """Normal increments of six batches: as often both conditions hold."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((20_000, DRIFT_BATCHES))
    for excess, variance_ratio, requests in (
        (0.1, 2.0, 2500),
        (0.05, 1.64, 12_000),
        (0.2, 1.6, 900),
    ):
        shift = excess * np.sqrt(requests / variance_ratio)
        batches = noise + shift / np.sqrt(DRIFT_BATCHES)
        error = batches.std(axis=1, ddof=1) / np.sqrt(DRIFT_BATCHES)
        seen = batches.mean(axis=1) > t.ppf(0.95, DRIFT_BATCHES - 1) * error
        far = batches.sum(axis=1) / np.sqrt(DRIFT_BATCHES) > norm.ppf(0.975)
        share = float(np.mean(seen & far))
        assert growth_power(excess, variance_ratio, requests) == pytest.approx(share, abs=0.006)


def test_needed_requests_invert_the_power() -> None:
    for power in (0.8, 0.95):
        requests = needed_requests(0.05, 1.64, power)
        assert growth_power(0.05, 1.64, requests) == pytest.approx(power, abs=1e-6)


def test_stability_power_inverts_the_duration() -> None:
    for power in (0.8, 0.95, 0.995):
        duration_s = stability_duration(2.5, 80.0, power)
        assert stability_power(2.5, 80.0, duration_s) == pytest.approx(power, abs=1e-4)


def test_a_run_of_the_planned_length_is_called_stable() -> None:
    """M/M/1 at half load: Var N = 2; independent batches need a horizon of many relaxation times."""
    duration_s = stability_duration(0.025, 2.0, 0.9)
    stable = []
    for k in range(200):
        estimate = drift(mm1(0.5, 300 + k, duration_s + 20), 20.0, duration_s + 20)
        stable.append(estimate.high < 0.025)
    assert np.mean(stable) >= 0.88
