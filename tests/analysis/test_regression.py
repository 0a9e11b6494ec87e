"""The nightly rule: its intervals, its error rates, and what it makes of changes that last or do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from analysis.numbers.estimate import Estimate
from analysis.operation.regression import ALARM, LEAST_NIGHTS, POWER, NightAnswer, judge_nights

OWN = 0.006


def nights(logs: ArrayLike, own: float = OWN) -> list[Estimate]:
    rates = 60 * np.exp(np.asarray(logs, dtype=float))
    return [Estimate.normal(rate, rate * own, "req/s", "") for rate in rates.tolist()]


def scattered(seed: int, count: int, scatter: float) -> np.ndarray:
    return math.hypot(OWN, scatter) * np.random.default_rng(seed).standard_normal(count)


def words(answers: tuple[NightAnswer, ...]) -> list[str]:
    return [a.answer for a in answers]


def test_equal_errors_give_the_prediction_interval_of_student() -> None:
    logs = scattered(1, 12, 0.02)
    mean, sd, n = logs[:-1].mean(), logs[:-1].std(ddof=1), 11
    found = judge_nights(nights(logs))[-1]
    spread = sd * math.sqrt(1 + 1 / n)
    half = t(n - 1).ppf(0.975) * spread
    assert found.change is not None
    assert found.change.value == pytest.approx(math.expm1(logs[-1] - mean), rel=1e-6)
    assert found.change.low == pytest.approx(math.expm1(logs[-1] - mean - half), rel=1e-4)
    assert found.scatter == pytest.approx(math.sqrt(sd**2 - OWN**2), rel=1e-4)
    reach = (t(n - 1).ppf(1 - ALARM) + norm.ppf(POWER)) * spread
    assert found.findable == pytest.approx(1 - math.exp(-reach), rel=1e-4)


def test_nights_that_scatter_less_than_their_own_errors_have_no_scatter_of_their_own() -> None:
    found = judge_nights(nights([0.001, -0.001] * 5))[-1]
    assert found.scatter == 0.0
    assert found.answer == "steady"


def test_nothing_is_said_before_enough_nights() -> None:
    found = judge_nights(nights([0.0] * LEAST_NIGHTS + [0.001]))
    assert words(found) == ["cannot say"] * LEAST_NIGHTS + ["steady"]
    assert all(a.change is None for a in found[:LEAST_NIGHTS])


@pytest.mark.parametrize("shift, word", [(-0.10, "regression"), (0.10, "rise")])
def test_a_change_that_lasts_is_said_once_and_makes_a_new_level(shift: float, word: str) -> None:
    logs = scattered(2, 24, 0.005) + np.where(np.arange(24) >= 12, shift, 0.0)
    found = judge_nights(nights(logs))
    assert [i for i, a in enumerate(found) if a.answer in ("regression", "rise")] == [12]
    assert found[12].answer == word
    assert found[23].level_since == 12
    assert abs(found[23].change.value) < 0.04  # type: ignore[union-attr]


def test_a_single_bad_night_is_set_aside() -> None:
    logs = scattered(3, 24, 0.005)
    logs[12] -= 0.10
    found = judge_nights(nights(logs))
    assert [i for i, a in enumerate(found) if a.answer in ("regression", "rise")] == [12]
    assert found[23].nights == 22 and found[23].level_since == 0


def test_a_second_change_is_found_from_the_new_level() -> None:
    logs = scattered(4, 26, 0.004)
    logs[12:] -= 0.10
    logs[18:] -= 0.10
    assert [i for i, a in enumerate(judge_nights(nights(logs))) if a.answer == "regression"] == [
        12,
        18,
    ]


def test_where_nights_scatter_too_widely_it_says_so_and_not_that_all_is_well() -> None:
    found = judge_nights(nights(scattered(5, 20, 0.04)))[-1]
    assert found.answer == "cannot say" and found.findable > 0.08
    assert "could be missed" in found.text


def test_a_rate_without_an_error_is_refused() -> None:
    with pytest.raises(ValueError, match="error of its own"):
        judge_nights([Estimate.exact(60.0, "req/s", "")])


def test_error_rates_of_months_with_one_regression_of_8_percent() -> None:
    found = false = 0
    months = 60
    for seed in range(months):
        at = int(np.random.default_rng([seed, 1]).integers(10, 30))
        logs = scattered(seed, 30, 0.008) + np.where(np.arange(30) >= at, math.log(0.92), 0.0)
        alarms = [i for i, a in enumerate(judge_nights(nights(logs))) if a.answer == "regression"]
        found += at in alarms
        false += len(alarms) - (at in alarms)
    assert found >= 54
    assert false <= 18


def test_false_alarms_in_nights_without_a_change_are_as_rare_as_the_rule_says() -> None:
    count = judged = 0
    for seed in range(40):
        found = judge_nights(nights(scattered(seed + 500, 30, 0.01)))
        count += sum(a.answer == "regression" for a in found)
        judged += 30 - LEAST_NIGHTS
    # 1000 nights at 0.3 %: 3 expected, 10 or more in 0.1 % of such tests.
    assert count < 10
