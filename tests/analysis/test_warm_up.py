"""MSER-5 on series whose transient is known, and how often it cries wolf."""

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from analysis.inference.warm_up import mser_cut, settled_s, warm_up_warning
from analysis.schedulers.frames import RunFrames
from loadgen.records import Run


def direct(series: NDArray[np.float64]) -> int:
    """The definition, term by term."""
    means = series[: len(series) // 5 * 5].reshape(-1, 5).mean(axis=1)
    count = len(means)
    rests = [means[cut:] for cut in range(count - 2)]
    criterion = [((rest - rest.mean()) ** 2).sum() / len(rest) ** 2 for rest in rests]
    return int(np.argmin(criterion))


def test_the_cut_is_that_of_the_definition() -> None:
    said = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        series = rng.poisson(5.0, 203) - 5.0 * np.exp(-np.arange(203) / 20)
        cut = direct(series)
        if cut <= 20:
            assert mser_cut(series) == 5 * cut
            said += 1
        else:
            assert mser_cut(series) is None
    assert said > 25


def test_a_series_that_never_settles_or_is_too_short_says_nothing() -> None:
    assert mser_cut(np.concatenate([np.zeros(60), np.ones(40)])) is None
    assert mser_cut(np.ones(19)) is None


def frames_of(departures: NDArray[np.float64], end_s: float, warmup_s: float) -> RunFrames:
    """Requests of one second each; how they arrived does not matter."""
    departures = departures[departures < end_s]
    requests = pd.DataFrame(
        {
            "scheduled_s": departures - 1.0,
            "first_token_s": departures - 1.0,
            "last_token_s": departures,
            "outcome": "completed",
        }
    )
    run = Run(id="x", arrival_rate=10.0, horizon_s=end_s, warmup_s=warmup_s, seed=1)
    return RunFrames(run, end_s, requests, pd.DataFrame(), pd.DataFrame())


def poisson_from(rate: float, start_s: float, end_s: float, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(start_s, end_s, rng.poisson(rate * (end_s - start_s))))


@pytest.mark.parametrize("rate", [1.0, 10.0, 60.0])
def test_settled_departures_raise_no_alarm(rate: float) -> None:
    """A warm-up of three residences of one second, in a run of forty: at most 5 % warnings."""
    runs = 300
    warned = [
        warm_up_warning(frames_of(poisson_from(rate, 1.0, 40.0, k), 40.0, 3.0)) is not None
        for k in range(runs)
    ]
    assert np.mean(warned) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)


def test_a_warm_up_that_ends_before_the_first_departures_is_named() -> None:
    """Nothing leaves in the first eight seconds."""
    named = []
    for k in range(100):
        frames = frames_of(poisson_from(20.0, 8.0, 40.0, k), 40.0, 3.0)
        warning = warm_up_warning(frames)
        named.append(warning is not None)
        if warning is not None:
            wanted_s = settled_s(frames)
            assert wanted_s is not None and wanted_s >= 7.0
            assert f"{wanted_s:.3g} s by MSER-5, the warm-up ended at 3 s" in warning
    assert np.mean(named) >= 0.8


def test_a_run_that_completed_nothing_says_nothing() -> None:
    assert warm_up_warning(frames_of(np.array([50.0]), 40.0, 3.0)) is None
