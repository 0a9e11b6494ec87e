"""Several servers behind one list: taken apart and put together without loss, and N times one's rate."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.inference.capacity import backlogged_window, work_served
from analysis.inference.imbalance import imbalance, last_seen
from analysis.inference.long_run import Stretch, long_run_mean
from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import RunFrames, number_in_system
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime
from analysis.verdicts.evidence import work_demand
from analysis.verdicts.replicas import added_up, slowest, sum_of, thinned, together, whole_rate
from loadgen.records import Run
from loadgen.workload import uniform

RUN = Run(id="00", arrival_rate=6.0, horizon_s=10.0, warmup_s=2.0, seed=1)
NO_GPU = pd.DataFrame()


def rate(value: float, error: float = 0.0) -> Estimate:
    return (
        Estimate.normal(value, error, "req/s", "") if error else Estimate.exact(value, "req/s", "")
    )


def flat(mean: float, seed: int, duration_s: float = 100.0, spread: float = 0.1) -> Stretch:
    noise = np.random.default_rng(seed).normal(0.0, spread, 64)
    return Stretch(mean + noise - noise.mean(), duration_s, 20.0, "req/s", "work")


def frames(run: Run, arrivals_s: list[float], waiting: list[int], at_s: list[float]) -> RunFrames:
    """Requests that never leave, and samples of a queue."""
    count = len(arrivals_s)
    requests = pd.DataFrame(
        {
            "id": range(count),
            "scheduled_s": arrivals_s,
            "first_token_s": math.nan,
            "last_token_s": math.nan,
            "outcome": ["unfinished"] * count,
        }
    )
    engine = pd.DataFrame(
        {"t_s": at_s, "read_s": at_s, "waiting": waiting, "steps": [10 * w for w in waiting]}
    )
    return RunFrames(run, run.horizon_s, requests, engine.assign(kv_usage=0.5), NO_GPU)


@pytest.mark.parametrize(("burst", "split"), [(0, [0, 0, 0]), (7, [3, 2, 2]), (2, [1, 1, 0])])
def test_a_burst_and_a_rate_are_split_without_loss(burst: int, split: list[int]) -> None:
    parts = [thinned(replace(RUN, preload=burst), i, 3) for i in range(3)]
    assert [part.preload for part in parts] == split
    assert sum(part.arrival_rate for part in parts) == pytest.approx(RUN.arrival_rate)


def test_the_whole_is_the_sum_of_its_parts() -> None:
    one = frames(RUN, [1.0, 3.0, 5.0], [0, 2, 4], [0.0, 4.0, 8.0])
    other = frames(RUN, [2.0, 4.0], [1, 3], [1.0, 7.0])
    whole = together(RUN, [one, other])
    at_s = np.linspace(0, 10, 41)
    assert list(number_in_system(whole, at_s)) == list(
        number_in_system(one, at_s) + number_in_system(other, at_s)
    )
    # Before its first sample that one counts, then the last seen.
    assert list(whole.engine["waiting"]) == [0 + 1, 2 + 1, 4 + 3]
    assert list(whole.engine["steps"]) == [5, 15, 35]
    assert list(whole.engine["kv_usage"]) == [0.5] * 3
    assert list(last_seen(other, "waiting", np.array([0.5, 6.9, 7.0]))) == [1, 1, 3]


def test_imbalance_counts_who_waits_beside_an_empty_queue() -> None:
    one = frames(RUN, [3.0, 5.0, 9.0], [9, 0, 4, 4, 0], [1.0, 2.0, 4.0, 6.0, 8.0])
    other = frames(RUN, [], [9, 0, 0, 2, 0], [1.0, 2.0, 4.0, 6.0, 8.0])
    seen = imbalance([one, other], 0.9, [rate(0.0)] * 2, [None, rate(3.0)])
    # The warm-up's sample is left out; in one of the other four one waits beside an empty queue.
    assert seen.one_waits == 0.25
    assert seen.beside_empty == 1.0
    assert [own.offered for own in seen.replicas] == [3 / 8, 0.0]
    assert [own.waiting for own in seen.replicas] == [2.0, 0.5]
    assert seen.apart == (0 + 1 + 2 + 2) / 4
    assert seen.wait_s == pytest.approx(1.0 / (3 / 8))


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ([rate(5.0)], (0,)),
        ([rate(5.0), rate(5.0)], (0, 1)),
        ([rate(5.0), rate(4.0)], (1,)),
        ([rate(5.0), rate(4.9)], (0, 1)),
        ([rate(5.0, 0.5), rate(4.0, 0.5)], (0, 1)),
        ([rate(5.0, 0.05), rate(4.0, 0.05)], (1,)),
        ([rate(4.0, 0.05), rate(5.0, 0.05), rate(4.02, 0.05)], (0, 2)),
    ],
)
def test_those_bound_the_whole_that_cannot_be_told_from_the_slowest(
    rates: list[Estimate], found: tuple[int, ...]
) -> None:
    assert slowest(rates, 0.10) == found


def test_alike_servers_are_told_apart_in_few_cases() -> None:
    """At 1 % over all pairs, and only beyond a quarter of theta."""
    draw = np.random.default_rng(5)
    alarms = sum(
        len(slowest([rate(x, 0.2) for x in draw.normal(5.0, 0.2, 4)], 0.10)) < 4
        for _ in range(1000)
    )
    assert alarms < 25


def test_rates_add_up_and_one_server_is_the_mean_of_its_runs() -> None:
    own, other = [flat(5.0, 1), flat(5.2, 2, 50.0)], [flat(3.0, 3, 200.0)]
    assert added_up([own]).value == pytest.approx(long_run_mean(own).value)
    assert added_up([own]).half_width == pytest.approx(long_run_mean(own).half_width)
    both = added_up([own, other])
    assert both.value == pytest.approx(long_run_mean(own).value + 3.0)
    with pytest.raises(ValueError, match="of every server"):
        added_up([own, []])
    quadrature = sum_of([rate(2.0, 0.3), rate(3.0, 0.4)], "")
    assert quadrature.value == 5.0
    assert quadrature.standard_error == pytest.approx(0.5)


def test_the_slowest_bounds_the_whole_and_idle_ones_are_no_slower() -> None:
    slow, fast = [flat(3.0, 1)], [flat(4.0, 2)]
    found, who = whole_rate([fast, slow], 0.10)
    assert found is not None and who == (1,)
    assert found.value == pytest.approx(6.0)
    found, who = whole_rate([[], slow], 0.10)
    assert found is not None and who == (1,)
    assert found.value == pytest.approx(6.0)
    assert whole_rate([[], []], 0.10) == (None, ())


def test_two_servers_serve_twice_what_one_does() -> None:
    """mu_2 = 2 mu: the 95 % interval of the sum holds twice the rate of one in 40 experiments, but for
    chance (7 misses or more have a probability of 0.2 %)."""
    limits = EngineLimits(
        num_blocks=128, block_size=16, max_num_seqs=64, max_num_batched_tokens=1024
    )
    law, lengths = StepTime(b0_s=20e-3, b1_s_per_token=20e-6), uniform((16, 64), (16, 64))
    demand = lengths.mean(work_demand(lengths))

    def stretch(arrival_s: np.ndarray, triples: np.ndarray, end_s: float) -> Stretch:
        run = Run(id="x", arrival_rate=1.0, horizon_s=end_s, warmup_s=5.0, seed=0)
        seen = simulate(limits, law, arrival_s, triples, end_s, 0.5).frames(run)
        window = backlogged_window(seen, 5.0)
        assert window is not None
        return work_served(seen, window, demand)

    def offered(seed: int, offered_rate: float, end_s: float) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        arrival_s = np.cumsum(rng.exponential(1 / offered_rate, round(1.1 * offered_rate * end_s)))
        arrival_s = arrival_s[arrival_s < end_s]
        return arrival_s, lengths.sample(rng, len(arrival_s))

    alone = long_run_mean([stretch(*offered(1000 + i, 50.0, 100.0), 100.0) for i in range(6)])
    errors, held = [], 0
    for seed in range(40):
        arrival_s, triples = offered(seed, 100.0, 24.0)
        found = added_up([[stretch(arrival_s[i::2], triples[i::2], 24.0)] for i in range(2)])
        errors.append(found.value / (2 * alone.value) - 1)
        held += found.low <= 2 * alone.value <= found.high
    assert held >= 34
    assert (
        abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(40) + alone.half_width / alone.value
    )
