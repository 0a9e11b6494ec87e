"""The closed form against the scheduler under sustained overload."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.wave_walk import FILLS
from analysis.verdicts.second_opinion import simulated_rate
from loadgen import workload as wl

LINEAR = StepTime(
    b0_s=0.008, b1_s_per_token=30e-6, b2_s_per_kv_token=0.12e-6, b3_s_per_request=1e-5
)


def limits(tokens: int, seqs: int = 1000, budget: int = 2048, late: bool = False) -> EngineLimits:
    return EngineLimits(
        num_blocks=tokens // 16,
        block_size=16,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        async_scheduling=late,
    )


@pytest.mark.parametrize(
    ("workload", "bounds", "binding", "tolerance"),
    [
        (wl.uniform((2, 200), (2, 200)), limits(6_000), "kv_cache", 0.015),
        (wl.uniform((2, 200), (2, 200)), limits(6_000, late=True), "kv_cache", 0.015),
        (wl.uniform((3, 280), (2, 140)), limits(8_000), "kv_cache", 0.015),
        (wl.uniform((2, 100), (4, 200)), limits(6_000), "kv_cache", 0.015),
        (wl.uniform((6, 560), (2, 70)), limits(16_000), "kv_cache", 0.015),
        (wl.uniform((2, 200), (2, 200)), limits(6_000, seqs=25), "max_num_seqs", 0.015),
        (wl.uniform((2, 200), (2, 200)), limits(6_000, seqs=33), "max_num_seqs", 0.015),
        (wl.uniform((6, 560), (2, 70)), limits(24_000, budget=300), "max_num_batched_tokens", 0.04),
        (wl.fixed(200, 200), limits(15_000), "kv_cache", 0.04),
    ],
)
def test_the_closed_form_lands_on_the_simulated_rate(
    workload: wl.Workload, bounds: EngineLimits, binding: str, tolerance: float
) -> None:
    predicted = predict(workload, bounds, exact_step_time(LINEAR), "engine", "P1")
    simulated = simulated_rate(workload, bounds, LINEAR, requests=1500, seed=3)
    assert predicted.binding == binding
    slack = simulated.half_width / simulated.value
    assert slack < 0.03
    assert predicted.critical_rate.value == pytest.approx(simulated.value, rel=tolerance + slack)


def test_the_constant_step_case_of_the_paper() -> None:
    workload = wl.uniform((10, 1600), (10, 1600))
    law = StepTime(b0_s=0.0372)
    bounds = limits(131_000)
    simulated = simulated_rate(workload, bounds, law, requests=300)
    predicted = predict(workload, bounds, exact_step_time(law), "engine", "P3")
    assert simulated.half_width / simulated.value < 0.005
    assert predicted.critical_rate.value == pytest.approx(simulated.value, rel=0.003)


def test_a_seed_gives_one_answer_and_intervals_hold_other_seeds() -> None:
    workload, bounds = wl.uniform((2, 200), (2, 200)), limits(6_000)
    first = simulated_rate(workload, bounds, LINEAR, requests=600, seed=1)
    assert first == simulated_rate(workload, bounds, LINEAR, requests=600, seed=1)
    other = simulated_rate(workload, bounds, LINEAR, requests=600, seed=2)
    assert first != other
    assert abs(first.value - other.value) < 2 * (first.half_width + other.half_width)


@pytest.mark.parametrize(("late", "amplified"), [(False, 1.0), (True, 2.0)])
def test_equal_outputs_under_sglang_are_served_as_chance_filled_the_batch(
    late: bool, amplified: float
) -> None:
    """The rate differs by several percent from one filling to the next: the interval is that of one
    filling. Other seeds agree on the middle, and so does the walk of the waves.

    With the overlap schedule half of what is offered more is served more, so that where the two meet is
    known half as well as what is served at one rate.
    """
    workload, law = wl.fixed(32, 32), StepTime(b0_s=0.05)
    bounds = EngineLimits(
        num_blocks=768,
        block_size=1,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        async_scheduling=late,
        sglang=SGLangRules(radix_cache=False),
    )
    found = [simulated_rate(workload, bounds, law, requests=300, seed=seed) for seed in range(2)]
    relative = np.array([e.standard_error / e.value for e in found])
    assert (relative > 0.01).all() and (relative < 0.08).all()
    values = np.array([e.value for e in found])
    of_mean = amplified * relative.mean() / np.sqrt(FILLS)
    assert values.std(ddof=1) / values.mean() < 2.5 * of_mean
    walked = predict(workload, bounds, exact_step_time(law), "engine", "P1").critical_rate
    assert walked.value == pytest.approx(values.mean(), rel=2.5 * of_mean)
    assert 0.5 < walked.standard_error / walked.value / relative.mean() < 2


def test_a_queue_that_empties_is_no_saturation() -> None:
    with pytest.raises(ValueError, match="raise the overload"):
        simulated_rate(wl.uniform((2, 200), (2, 200)), limits(6_000), LINEAR, overload=0.3)
