"""Growth and capacity, tested by their error rates on queues whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from analysis.engine import EngineSample
from analysis.frames import RunFrames, run_frames
from analysis.growth import (
    Backlog,
    HingePoint,
    backlogged_window,
    capacity_by_work,
    critical_excursion,
    drift,
    growth_power,
    hinge,
    needed_requests,
    stability_duration,
    stability_power,
)
from loadgen.records import RequestRecord, Run

HORIZON_S = 1000.0


def mm1(load: float, seed: int, horizon_s: float = HORIZON_S) -> RunFrames:
    """An M/M/1 queue with service rate 1, started empty."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / load, int(load * horizon_s * 1.2) + 50))
    arrivals = arrivals[arrivals < horizon_s]
    service = rng.exponential(1.0, len(arrivals))
    ends = np.empty_like(arrivals)
    free_s = 0.0
    for i, (at, work) in enumerate(zip(arrivals.tolist(), service.tolist(), strict=True)):
        free_s = max(free_s, at) + work
        ends[i] = free_s
    return frames_of(arrivals, ends, horizon_s)


def frames_of(
    arrivals: NDArray[np.float64], ends: NDArray[np.float64], horizon_s: float
) -> RunFrames:
    requests = pd.DataFrame(
        {
            "id": np.arange(len(arrivals)),
            "scheduled_s": arrivals,
            "last_token_s": np.where(ends < horizon_s, ends, np.nan),
            "outcome": np.where(ends < horizon_s, "completed", "unfinished"),
        }
    )
    run = Run(id="x", arrival_rate=1.0, horizon_s=horizon_s, warmup_s=0.0, seed=1)
    return RunFrames(run, horizon_s, requests, pd.DataFrame(), pd.DataFrame())


def rate_of(load: float, event: object, runs: int = 200, start_s: float = 50.0) -> float:
    return float(
        np.mean([event(drift(mm1(load, 1000 + k), start_s, HORIZON_S)) for k in range(runs)])
    )


def grows(estimate) -> bool:
    """The rule of `analysis.run_verdict`, for a service rate of 1."""
    duration_s = HORIZON_S - 50.0
    by_chance = critical_excursion(1.0, duration_s, 0.95, 2.0)
    return estimate.low > 0 and estimate.value * duration_s > by_chance


@pytest.mark.parametrize(("load", "most"), [(0.8, 0.005), (0.95, 0.01), (1.0, 0.05)])
def test_false_alarms_of_growth(load: float, most: float) -> None:
    """A line fitted with independent errors calls 40-77 % of these growing (theory.md 6.4)."""
    assert rate_of(load, grows) <= most + 2 * np.sqrt(most * (1 - most) / 200)


def test_growth_is_found_where_the_plan_says_so() -> None:
    expected = growth_power(0.2, 2.0, 0.05, 950 * 1.2)
    assert rate_of(1.2, grows) >= expected - 0.12


def test_coverage_of_the_drift_in_overload() -> None:
    """90 % intervals of a backlogged queue cover the true drift in 86-94 % of 400 runs."""
    covered = []
    for k in range(400):
        estimate = drift(mm1(1.5, 5000 + k, 400.0), 20.0, 400.0)
        covered.append(estimate.low <= 0.5 <= estimate.high)
    assert 0.86 <= np.mean(covered) <= 0.94


def test_a_drift_at_the_threshold_is_called_stable_in_at_most_5_percent() -> None:
    bounds = [drift(mm1(1.5, 9000 + k, 400.0), 20.0, 400.0).high for k in range(400)]
    assert np.mean(np.array(bounds) < 0.5) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_needed_requests_are_those_of_the_table() -> None:
    """theory.md 6.2, alpha 5 %, power 90 %."""
    assert needed_requests(0.10, 2.0, 0.05, 0.90) == pytest.approx(1713, rel=1e-3)
    assert needed_requests(0.05, 1.64, 0.05, 0.90) == pytest.approx(5618, rel=1e-3)
    assert growth_power(0.10, 2.0, 0.05, 1713) == pytest.approx(0.90, abs=1e-3)


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


def test_hinge_finds_the_rate_and_says_nothing_without_growth() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(200):
        points = [
            HingePoint(rate, max(0.0, rate - 10.0) + rng.normal(0, 0.3), 0.3)
            for rate in (8.0, 9.5, 11.0, 12.0, 13.0)
        ]
        found = hinge(points)
        assert found is not None
        inside += found.low <= 10.0 <= found.high
    assert inside / 200 >= 0.90
    assert hinge([HingePoint(8.0, 0.01, 0.3), HingePoint(9.0, -0.02, 0.3)]) is None


def test_capacity_by_work_does_not_depend_on_which_lengths_were_served() -> None:
    """Ten servers that each serve one request after another, one token every 10 ms."""
    rng = np.random.default_rng(5)
    records, number = [], 0
    for lane in range(10):
        now = 0.001 * lane
        while now < 60.0:
            output = int(rng.integers(10, 200))
            first, last = now + 0.01, now + 0.01 * output
            records.append(
                RequestRecord(
                    id=number,
                    scheduled_ns=0,
                    sent_ns=0,
                    first_token_ns=round(first * 1e9),
                    last_token_ns=round(last * 1e9),
                    prompt_tokens=100,
                    output_tokens_designed=output,
                    max_tokens=output,
                    output_tokens=output,
                    prompt_tokens_reported=100,
                    outcome="completed",
                )
            )
            number, now = number + 1, last
    run = Run(id="x", arrival_rate=1.0, horizon_s=60.0, warmup_s=0.0, seed=1)
    frames = run_frames(run, 0, round(60e9), records, samples(60.0, waiting=5))
    outputs = np.arange(10, 200)
    demand = float(np.mean(100 * outputs + outputs * (outputs - 1) / 2))
    # In saturation each lane completes one request per mean service time.
    truth = 10 / (0.01 * outputs.mean())
    window = backlogged_window(frames, 5.0)
    assert window is not None
    found = capacity_by_work(frames, window, demand)
    assert found.value == pytest.approx(truth, rel=0.06)


def samples(end_s: float, waiting: int) -> list[EngineSample]:
    return [
        EngineSample(
            read_ns=round(t * 1e9),
            t_ns=round(t * 1e9),
            waiting=waiting,
            running=10,
            kv_usage=0.9,
            preemptions=0,
            prompt_tokens=0,
            generation_tokens=0,
            steps=round(t * 100),
            step_tokens=0,
            finished=0,
            rejected=0,
            prefix_hit_tokens=0,
        )
        for t in np.arange(0.0, end_s, 0.1)
    ]


def test_the_backlogged_window_is_the_longest_stretch_without_an_empty_queue() -> None:
    run = Run(id="x", arrival_rate=1.0, horizon_s=30.0, warmup_s=0.0, seed=1)
    waiting = [3] * 50 + [0] * 10 + [2] * 200 + [0] + [1] * 39
    rows = [
        EngineSample(
            read_ns=i * 10**8,
            t_ns=i * 10**8,
            waiting=w,
            running=1,
            kv_usage=0.5,
            preemptions=0,
            prompt_tokens=0,
            generation_tokens=0,
            steps=i,
            step_tokens=0,
            finished=0,
            rejected=0,
            prefix_hit_tokens=0,
        )
        for i, w in enumerate(waiting)
    ]
    window = backlogged_window(run_frames(run, 0, 30 * 10**9, [], rows), 0.0)
    assert window == Backlog(pytest.approx(6.0), pytest.approx(25.9))
