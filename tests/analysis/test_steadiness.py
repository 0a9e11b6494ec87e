"""Trends of the mean step: their error rates on steady and drifting series, and the words for them."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from analysis.inference.capacity import Backlog
from analysis.verdicts.audit import STEP_BATCHES, Saturation
from analysis.verdicts.steadiness import HELD_BACK, THROTTLE_REASONS, changes, clocks, steady

THETA = 0.10
STEP_S = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a trend reads of a `Saturation`."""

    window: Backlog
    batch_steps: NDArray[np.float64]


def seen(relative_steps: Any, window_s: float = 20.0) -> Saturation:
    """A stretch whose batches had these mean steps, in multiples of 20 ms."""
    batch_s = window_s / len(relative_steps)
    steps = batch_s / (STEP_S * np.asarray(relative_steps, dtype=float))
    return cast(Saturation, Seen(Backlog(10.0, 10.0 + window_s), steps))


def frames(name: str, gpu: pd.DataFrame | None = None) -> Any:
    return SimpleNamespace(run=SimpleNamespace(id=name), gpu=pd.DataFrame() if gpu is None else gpu)


def checked(*stretches: Saturation) -> Any:
    names = [f"0{i}-1.30" for i in range(len(stretches))]
    return steady(dict(zip(names, stretches, strict=True)), {n: frames(n) for n in names}, THETA)


def exponential(change: float, parts: int = STEP_BATCHES) -> NDArray[np.float64]:
    """Mean steps whose logarithm is a line that rises by ``change`` from edge to edge."""
    return np.exp(math.log1p(change) * (np.arange(parts) + 0.5) / parts)


@pytest.mark.parametrize("change", [-0.2, -0.03, 0.0, 0.08, 0.5])
def test_an_even_change_is_read_as_it_is(change: float) -> None:
    (found,) = changes({"a": seen(exponential(change))})
    assert found.estimate.value == pytest.approx(change, abs=1e-12)
    assert found.estimate.high - found.estimate.low == pytest.approx(0.0, abs=1e-6)


def test_a_change_over_two_runs_counts_the_time_of_both() -> None:
    whole = exponential(0.12, parts=30)
    # The first run lasted half as long as the second, so that its batches had half as many steps.
    first, second = whole[:10], whole[10:].reshape(10, 2).mean(axis=1)
    *each, both = changes({"a": seen(first, 20.0), "b": seen(second, 40.0)})
    assert both.where == "from run a to b,"
    assert both.estimate.value == pytest.approx(0.12, abs=2e-4)
    assert [c.estimate.value for c in each] == pytest.approx(
        [1.12 ** (1 / 3) - 1, 1.12 ** (2 / 3) - 1], abs=2e-4
    )


@pytest.mark.parametrize(
    ("change", "holds"),
    [(0.0, True), (0.024, True), (-0.024, True), (0.026, False), (-0.03, False)],
)
def test_a_quarter_of_theta_is_allowed(change: float, holds: bool) -> None:
    check = checked(seen(exponential(change)))
    assert check.holds is holds
    assert (check.observed, check.threshold) == (pytest.approx(abs(change)), pytest.approx(0.025))


@pytest.mark.parametrize(("change", "word"), [(0.1, "10.0 % slower"), (-0.1, "10.0 % faster")])
def test_a_change_is_named_with_its_run_and_its_interval(change: float, word: str) -> None:
    # The same from both ends: no trend of its own.
    noise = 0.001 * np.array([1, -1, 1, -1, 0, 0, -1, 1, -1, 1])
    text = checked(seen(exponential(0.0)), seen(exponential(change) * np.exp(noise))).text
    assert f"within run 01-1.30, the engine became {word} [" in text
    assert "a GPU that throttles" in text


def test_noise_that_hides_a_change_is_no_proof_that_there_is_none() -> None:
    noise = 0.2 * np.array([1, -1, 1, -1, 1, -1, 1, -1, 1, -1])
    check = checked(seen(np.exp(noise)))
    assert check.observed > check.threshold
    assert check.holds is None


def runs(rng: np.random.Generator, scatter: float, change: float) -> list[Saturation]:
    """Two runs whose batches scatter independently; both drift by ``change``."""
    return [
        seen(exponential(change) * np.exp(scatter * rng.standard_normal(STEP_BATCHES)), window_s)
        for window_s in (20.0, 60.0)
    ]


@pytest.mark.parametrize("scatter", [0.005, 0.02, 0.05, 0.1])
def test_false_alarms_are_rare_whatever_the_noise(scatter: float) -> None:
    rng = np.random.default_rng(3)
    count = 400
    alarms = sum(checked(*runs(rng, scatter, 0.0)).holds is False for _ in range(count))
    # 1 % at most by construction, and three standard errors.
    assert alarms <= count * 0.01 + 3 * math.sqrt(count * 0.01 * 0.99)


def test_a_drift_of_theta_is_found_in_noise_of_several_percent() -> None:
    rng = np.random.default_rng(4)
    # Noise of 5 % of a step is 0.5 % of a batch of 100 steps; 1 % is twice that.
    found = sum(checked(*runs(rng, 0.01, 0.08)).holds is False for _ in range(200))
    assert found >= 199


def test_the_bits_that_hold_a_gpu_back_are_known_ones() -> None:
    assert all(bit & (bit - 1) == 0 for bit in THROTTLE_REASONS)
    assert sum(bit for bit in THROTTLE_REASONS if bit & HELD_BACK) == HELD_BACK
    assert not HELD_BACK & 0x01, "an idle GPU is not held back"


def gpu_rows(bits: Any, clock_mhz: Any) -> pd.DataFrame:
    count = 100
    return pd.DataFrame(
        {
            "t_s": np.linspace(10.0, 30.0, count),
            "gpu": 0,
            "throttle_reasons": np.resize(bits, count),
            "sm_clock_mhz": np.resize(clock_mhz, count),
        }
    )


@pytest.mark.parametrize(
    ("bits", "clock_mhz", "words"),
    [
        ([0, 1], [1980], []),
        ([2], [1980], []),
        (
            [0x44, 0],
            [1410],
            [
                "GPU 0 in run x: held back by software power cap in 50 %, hardware thermal slowdown "
                "in 50 % of samples"
            ],
        ),
        ([0], np.linspace(2000, 1500, 100), ["GPU 0 in run x: SM clock from 1952 to 1548 MHz"]),
        ([np.nan], [np.nan], []),
        ([None], [None], []),
    ],
)
def test_what_a_gpu_tells_of_its_clock(bits: Any, clock_mhz: Any, words: list[str]) -> None:
    window = Backlog(10.0, 30.0)
    assert clocks(frames("x", gpu_rows(bits, clock_mhz)), window) == words
    assert clocks(frames("x"), window) == []


def test_the_memory_clock_is_told_too_and_of_cards_alone() -> None:
    card = gpu_rows([0], [1980]).assign(
        mig=np.nan, memory_clock_mhz=np.linspace(2600.0, 1300.0, 100)
    )
    instance = gpu_rows([np.nan], [np.nan]).assign(mig=0.0, memory_clock_mhz=np.nan)
    both = frames("x", pd.concat([card, instance], ignore_index=True))
    told = ["GPU 0 in run x: memory clock from 2475 to 1425 MHz"]
    assert clocks(both, Backlog(10.0, 30.0)) == told


def test_a_throttling_gpu_stands_beside_the_change() -> None:
    hot = frames("00-1.30", gpu_rows([0x40], np.linspace(2000, 1500, 100)))
    check = steady({"00-1.30": seen(exponential(0.2))}, {"00-1.30": hot}, THETA)
    assert check.holds is False
    assert "20.0 % slower" in check.text
    assert "hardware thermal slowdown in 100 % of samples, SM clock from 1952 to 1548" in check.text
