"""Plans: longer where the question is harder, numbered, reproducible."""

import pytest

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.verdicts.evidence import variance_ratio
from harness.configs.sections import ConfigError
from harness.experiments.plan import (
    Plan,
    StartOption,
    least_excess,
    make_plan,
    preload_size,
    require_distinct_prompts,
)
from loadgen.workload import uniform

WORKLOAD = uniform((16, 112), (16, 112))
PREDICTION = predict(
    WORKLOAD,
    EngineLimits(num_blocks=512, block_size=16),
    exact_step_time(StepTime(b0_s=0.02)),
    "engine",
    "P0",
)


def plan(
    *loads: float,
    horizon_s: float | None = None,
    most_s: float = 600.0,
    seed: int = 1,
    start: StartOption = "empty",
) -> Plan:
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
        start=start,
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


def test_pairs_stand_below_the_predicted_rate_alone_and_have_seeds_of_their_own() -> None:
    both = plan(0.7, 0.85, 1.15, start="both")
    assert [r.start for r in both.runs] == ["empty", "full", "empty", "full", "empty"]
    assert len({r.id for r in both.runs}) == len({r.seed for r in both.runs}) == 5
    for empty, full in (both.runs[:2], both.runs[2:4]):
        assert empty.arrival_rate == full.arrival_rate
        assert full.id.endswith("-full")
    assert [r.start for r in plan(0.85, 1.15, start="full").runs] == ["full", "full"]
    offered = sum(r.horizon_s * r.arrival_rate for r in both.runs)
    assert both.requests == pytest.approx(offered + both.runs[1].preload + both.runs[3].preload)


@pytest.mark.parametrize("load", [0.7, 0.85, 0.95])
def test_a_full_start_outlasts_its_wave_and_chance(load: float) -> None:
    empty, full = plan(load, start="both").runs
    assert full.warmup_s == empty.warmup_s >= 3 * 112 * 0.02 - 0.01
    rate = PREDICTION.critical_rate.value
    spread = variance_ratio(WORKLOAD)
    assert full.preload >= 10 * PREDICTION.running
    assert full.preload >= 4 * (rate * spread * full.horizon_s) ** 0.5
    # While the warm-up lasts, no more leaves than the server can serve.
    assert full.preload > (1 - load) * rate * full.warmup_s


def test_a_burst_is_ten_memories_or_four_deviations() -> None:
    running, rate = PREDICTION.running, PREDICTION.critical_rate.value
    assert preload_size(PREDICTION, 1.0, 1.5) == -(-10 * running // 1)
    assert preload_size(PREDICTION, 1e6, 1.5) == -(-4 * (rate * 1.5 * 1e6) ** 0.5 // 1)


def test_a_run_at_the_predicted_rate_has_the_power_of_the_least_excess() -> None:
    at, off = plan(1.0, most_s=1e4), plan(1.0 + least_excess(0.1), most_s=1e4)
    assert at.power == pytest.approx(off.power, abs=0.02)
    requests = [run.arrival_rate * (run.horizon_s - run.warmup_s) for run in (*at.runs, *off.runs)]
    assert requests[0] == pytest.approx(requests[1], rel=0.01)


def test_prompts_too_short_to_differ_are_refused_before_the_load() -> None:
    short = uniform((1, 30), (1, 30))
    few, many = plan(1.2, horizon_s=20.0), plan(1.2, horizon_s=600.0)
    ids = range(3, 3 + round(4 * few.runs[0].arrival_rate * 20))
    require_distinct_prompts(few, short, ids)
    require_distinct_prompts(many, uniform((2, 30), (1, 30)), ids)
    with pytest.raises(ConfigError, match=r"prompts of 1 tokens.*2 tokens or more.*vocabulary"):
        require_distinct_prompts(many, short, ids)
