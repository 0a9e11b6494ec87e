"""Plans: longer where the question is harder, numbered, reproducible."""

import pytest

from analysis.critical_rate import predict
from analysis.engine import EngineLimits
from analysis.step_time import StepTime, exact_step_time
from harness.plan import make_plan
from loadgen.workload import uniform

WORKLOAD = uniform((16, 112), (16, 112))
PREDICTION = predict(
    WORKLOAD,
    EngineLimits(num_blocks=512, block_size=16),
    exact_step_time(StepTime(b0_s=0.02)),
    "engine",
    "P0",
)


def plan(*loads: float, horizon_s: float | None = None, most_s: float = 600.0, seed: int = 1):
    return make_plan(
        PREDICTION,
        PREDICTION,
        WORKLOAD,
        loads=loads,
        horizon_s=horizon_s,
        max_horizon_s=most_s,
        theta=0.1,
        seed=seed,
        prediction_digest="d",
    )


def test_rates_near_the_critical_one_need_longer_runs() -> None:
    near, far = plan(1.05, 1.5).runs
    assert near.horizon_s > far.horizon_s
    near, far = plan(0.95, 0.7).runs
    assert near.horizon_s > far.horizon_s


def test_power_is_what_was_asked_unless_the_horizon_is_cut() -> None:
    assert all(power >= 0.949 for power in plan(0.85, 1.15, 1.3).power)
    assert plan(0.85, most_s=25.0).power[0] < 0.9


def test_runs_have_their_own_ids_and_seeds_and_a_warm_up_of_three_residences() -> None:
    runs = plan(0.85, 1.15, 1.3, seed=7).runs
    assert len({r.id for r in runs}) == len({r.seed for r in runs}) == 3
    assert runs[0].warmup_s == pytest.approx(3 * 112 * 0.02, rel=1e-3)
    assert runs == plan(0.85, 1.15, 1.3, seed=7).runs
    assert {r.seed for r in runs}.isdisjoint(r.seed for r in plan(0.85, 1.15, seed=8).runs)


def test_a_stated_horizon_is_kept() -> None:
    assert [r.horizon_s for r in plan(0.85, 1.2, horizon_s=40.0).runs] == [40.0, 40.0]
