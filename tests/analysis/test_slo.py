"""The share of the critical rate at which a target for the first token holds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.operation.slo import WIDTH, Draws, largest_share, mean_ttft, ttft_s
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from loadgen.workload import uniform

LIMITS = EngineLimits(num_blocks=32, block_size=16, max_num_seqs=16, max_num_batched_tokens=512)
STEP_S = 0.02
LAW = StepTime(b0_s=STEP_S)
LENGTHS = uniform((8, 40), (4, 20))
CRITICAL = predict(LENGTHS, LIMITS, exact_step_time(LAW), "engine", "P0").critical_rate.value


def day(seed: int, requests: int = 400) -> Draws:
    rng = np.random.default_rng(seed)
    return Draws(np.cumsum(rng.exponential(1.0, requests)), LENGTHS.sample(rng, requests))


DAYS = [day(1), day(2)]


def at(share: float, which: Draws = DAYS[0], quantile: float = 0.95) -> float:
    return ttft_s(LIMITS, LAW, which, share * CRITICAL, quantile, True)


def test_an_idle_server_answers_within_the_step_under_way_and_the_next() -> None:
    assert STEP_S <= at(0.05) <= 2 * STEP_S + 1e-9
    assert at(0.05, quantile=0.5) <= at(0.05)


def test_waiting_grows_with_the_rate_and_without_end_above_it() -> None:
    times = [at(share) for share in (0.1, 0.5, 0.9, 1.3)]
    assert times == sorted(times)
    assert times[-1] > 20 * STEP_S


def test_the_target_holds_up_to_the_share_and_not_beyond() -> None:
    target_s = 0.1
    share = largest_share(LIMITS, LAW, CRITICAL, DAYS, target_s)
    assert share is not None and 0.3 < share.value < 1.0
    assert share.low < share.value < share.high
    alone = largest_share(LIMITS, LAW, CRITICAL, [DAYS[0], DAYS[0]], target_s)
    assert alone is not None and alone.half_width == pytest.approx(WIDTH / 2)
    assert at(alone.value) <= target_s < at(alone.value + 0.03)


@pytest.mark.parametrize(("target_s", "share"), [(0.5 * STEP_S, None), (1e6, 1.0)])
def test_targets_that_are_out_of_reach_or_always_met(target_s: float, share: float | None) -> None:
    found = largest_share(LIMITS, LAW, CRITICAL, DAYS, target_s)
    assert (found and found.value) == share


def test_one_day_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two or more"):
        largest_share(LIMITS, LAW, CRITICAL, DAYS[:1], 1.0)


def test_the_quantile_at_a_rate_is_the_mean_over_the_days() -> None:
    found = mean_ttft(LIMITS, LAW, DAYS, 0.6 * CRITICAL)
    assert found.value == pytest.approx(np.mean([at(0.6, d) for d in DAYS]))
    assert found.low <= found.value <= found.high and math.isfinite(found.high)
