"""Service rates under backlog, on servers whose rate is known."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.inference.capacity import (
    Backlog,
    HingePoint,
    backlogged_window,
    capacity_by_regression,
    completions,
    hinge,
    in_step,
    service_rates,
    work_served,
)
from analysis.inference.work import decoding_steps, work_by_counter, work_done, work_of
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.frames import RunFrames, run_frames
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.kv_demand import kv_demand_engine
from analysis.verdicts.evidence import work_demand
from loadgen.arrivals import poisson
from loadgen.records import RequestRecord, Run
from loadgen.workload import Workload, declared, fixed, uniform

LAW = StepTime(b0_s=14e-3, b1_s_per_token=10e-6, b2_s_per_kv_token=400e-9, b3_s_per_request=10e-6)
WIDE = uniform((8, 56), (8, 56))


def limits(tokens: int, seqs: int = 256, budget: int = 2048) -> EngineLimits:
    return EngineLimits(
        num_blocks=tokens // 16, block_size=16, max_num_seqs=seqs, max_num_batched_tokens=budget
    )


def overloaded(workload: Workload, bounds: EngineLimits, seed: int, horizon_s: float) -> RunFrames:
    rate = 1.3 * predict(workload, bounds, exact_step_time(LAW), "engine", "P1").critical_rate.value
    run = Run(id="x", arrival_rate=rate, horizon_s=horizon_s, warmup_s=4.0, seed=seed)
    arrival_s = poisson(rate, horizon_s, seed)
    lengths = workload.sample(np.random.default_rng([seed, 1]), len(arrival_s))
    simulated = simulate(bounds, LAW, arrival_s, lengths, horizon_s)
    return run_frames(run, 0, round(horizon_s * 1e9), simulated.records, simulated.samples)


@pytest.mark.parametrize(
    ("binding", "served"),
    [
        ("kv_cache", [0, 10, 10 + 11, 10 + 11 + 12]),
        ("output_reservation", [0, 0, 10 + 5 - 1, 2 * (10 + 5 - 1)]),
        ("max_num_batched_tokens", [0, 10, 11, 12]),
        ("max_num_seqs", [0, 1, 2, 3]),
    ],
)
def test_work_token_by_token(binding: str, served: list[int]) -> None:
    """A prompt of 10 and a declared output of 5, after 0 to 3 tokens."""
    tokens = np.arange(4.0)
    found = work_of(binding, np.full(4, 10.0), np.full(4, 5.0), tokens)
    assert found.tolist() == served


def test_the_work_of_a_law_is_its_kv_demand() -> None:
    law = declared(uniform((2, 30), (1, 20)), factor=2.0)
    s, o = law.prompt_tokens, law.output_tokens
    assert work_demand(law) == pytest.approx(kv_demand_engine(s, o, int(s.max())))


def test_work_served_in_the_end_is_the_demand_of_what_was_completed() -> None:
    lengths = np.array([[10, 4, 9], [30, 1, 9], [5, 7, 9]])
    simulated = simulate(limits(4096), LAW, np.zeros(3), lengths, 10.0)
    run = Run(id="x", arrival_rate=1.0, horizon_s=10.0, warmup_s=0.0, seed=1)
    frames = run_frames(run, 0, 10**10, simulated.records, simulated.samples)
    for binding in ("kv_cache", "output_reservation", "max_num_batched_tokens", "max_num_seqs"):
        expected = work_of(binding, *lengths[:, [0, 2, 1]].T.astype(float)).sum()
        assert work_done(frames, np.array([10.0]), binding)[0] == pytest.approx(expected)


ESTIMATORS = ("work", "regression", "count")


def estimates(
    workload: Workload, bounds: EngineLimits, binding: str, runs: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Value, low and high of each estimator over short runs, over the rate of a long one."""
    demand, kv_demand = (workload.mean(work_demand(workload, b)) for b in (binding, "kv_cache"))
    truth = work_served(
        overloaded(workload, bounds, 99, 200.0), Backlog(10.0, 199.0), demand, binding
    ).mean
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ESTIMATORS}
    for seed in range(runs):
        frames = overloaded(workload, bounds, seed, 20.0)
        window = backlogged_window(frames, 4.0)
        assert window is not None and window.duration_s > 12.0
        for name, e in zip(
            ESTIMATORS,
            (
                work_served(frames, window, demand, binding).estimate,
                capacity_by_regression(frames, window, kv_demand),
                completions(frames, window).estimate,
            ),
            strict=True,
        ):
            found[name].append((e.value / truth, e.low / truth, e.high / truth))
    return found


@pytest.mark.parametrize(
    ("workload", "together"), [(fixed(64, 64), True), (uniform((16, 112), (16, 112)), False)]
)
def test_waves_of_equal_outputs_do_not_reach_the_ends_of_a_window(
    workload: Workload, together: bool
) -> None:
    frames = overloaded(workload, limits(4096), seed=3, horizon_s=60.0)
    assert in_step(frames) is together
    residence_s, demand = frames.mean_residence_s, workload.mean(work_demand(workload, "kv_cache"))
    averaged, plain = [], []
    for part in np.arange(12) / 12:
        window = Backlog(6 * residence_s, (18 + part) * residence_s)
        averaged.append(work_served(frames, window, demand).mean)
        edges = np.array([window.start_s, window.end_s])
        plain.extend(service_rates(work_by_counter(frames, edges), edges, demand))
    if together:
        assert np.std(averaged) < 0.5 * np.std(plain)
    else:
        assert averaged == pytest.approx(plain)


@pytest.mark.parametrize(
    ("bounds", "binding"),
    [(limits(2048), "kv_cache"), (limits(8192, seqs=24), "max_num_seqs")],
)
def test_lengths_that_were_served_drop_out(bounds: EngineLimits, binding: str) -> None:
    """Intervals hold the truth; work scatters below a third of counting, the regression below it."""
    runs = 24
    found = estimates(WIDE, bounds, binding, runs)
    scatter = {}
    for name, rows in found.items():
        value, low, high = np.array(rows).T
        scatter[name] = value.std(ddof=1)
        assert value.mean() == pytest.approx(1.0, abs=3 * scatter[name] / np.sqrt(runs) + 0.002), (
            name
        )
        assert np.mean((low <= 1) & (high >= 1)) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs), name
    assert scatter["work"] < scatter["count"] / 3
    assert scatter["work"] < scatter["regression"] < scatter["count"]


def test_requests_that_stood_still_do_not_bend_the_rate() -> None:
    """Of one length on a small pool, half of which are preempted: without the counter of tokens the last
    part of a run seems 6 % slower, and its interval is more than twice as wide."""
    workload, bounds = fixed(64, 64), limits(4096)
    demand = workload.mean(work_demand(workload))
    long = overloaded(workload, bounds, 99, 150.0)
    truth = work_served(long, Backlog(10.0, 149.0), demand).mean
    found, even = [], []
    for seed in range(8):
        frames = overloaded(workload, bounds, seed, 13.0)
        window = backlogged_window(frames, 4.0)
        assert window is not None and frames.per_sample("preemptions")[-1] > 50
        found.append(work_served(frames, window, demand).estimate)
        uncounted = replace(frames, engine=frames.engine.drop(columns="generation_tokens"))
        even.append(work_served(uncounted, window, demand).estimate)
    assert np.mean([e.value for e in found]) == pytest.approx(truth, rel=0.004)
    assert sum(e.low <= truth <= e.high for e in found) >= 6
    narrow, wide = (np.mean([e.half_width for e in es]) for es in (found, even))
    assert 2 * narrow < wide and narrow < 0.015 * truth


def test_the_last_residence_is_not_read_high() -> None:
    """Long outputs beside short prompts on a full pool: requests stand still while they are young.

    A mean token's weight in place of a young one's read the last eighth of such runs 1.9 % high.
    """
    workload, bounds = uniform((4, 12), (48, 144)), limits(1024)
    demand = workload.mean(work_demand(workload, "kv_cache"))
    lasts = []
    for seed in range(24):
        frames = overloaded(workload, bounds, seed, 50.0)
        window = backlogged_window(frames, 10.0)
        assert window is not None and frames.per_sample("preemptions")[-1] > 50
        rates = work_served(frames, window, demand).rates
        eighth = len(rates) // 8
        lasts.append(rates[-eighth:].mean() / rates[:-eighth].mean() - 1.0)
    assert abs(np.mean(lasts)) < 3 * np.std(lasts) / np.sqrt(len(lasts)) + 0.004


def test_decoding_steps_are_tokens_that_were_nobodys_first() -> None:
    """Two requests take ten tokens a second each, a third joins at 10 s: ten steps a second throughout,
    after the last sample at 20 s as well."""
    records = [record(i, first, 60.0, 8, 400) for i, first in enumerate((0.0, 0.0, 10.05))]
    seen = [
        replace(
            sample,
            running=2 if sample.t_ns <= 10e9 else 3,
            generation_tokens=2 + round(2 * sample.t_ns / 1e8)
            if sample.t_ns <= 10e9
            else 203 + round(3 * (sample.t_ns / 1e8 - 100)),
        )
        for sample in samples(20.0, 5)
    ]
    run = Run(id="x", arrival_rate=1.0, horizon_s=25.0, warmup_s=0.0, seed=1)
    frames = run_frames(run, 0, round(25e9), records, seen)
    steps = decoding_steps(frames, np.array([5.0, 9.0, 15.0, 19.0, 24.0]))
    assert steps[1] - steps[0] == pytest.approx(40.0, abs=0.1)
    assert steps[3] - steps[2] == pytest.approx(40.0, abs=0.1)
    assert steps[4] - steps[3] == pytest.approx(50.0, abs=0.1)


def long_outputs_beside_short_prompts() -> tuple[RunFrames, Backlog, float]:
    workload, bounds = uniform((4, 12), (48, 144)), limits(1024)
    frames = overloaded(workload, bounds, 7, 50.0)
    window = backlogged_window(frames, 10.0)
    assert window is not None and frames.per_sample("preemptions")[-1] > 50
    return frames, window, workload.mean(work_demand(workload))


def test_what_the_counter_had_before_the_run_is_not_served_in_it() -> None:
    """On a live server the counter of tokens goes on from run to run."""
    frames, window, demand = long_outputs_beside_short_prompts()
    later = frames.engine.assign(generation_tokens=frames.engine["generation_tokens"] + 29_005)
    before = work_served(frames, window, demand).rates
    assert work_served(replace(frames, engine=later), window, demand).rates == pytest.approx(before)


def unseen_at_the_end(frames: RunFrames) -> RunFrames:
    """Without five tokens of each unfinished request."""
    requests = frames.requests.copy()
    open_yet = (requests["outcome"] == "unfinished") & (requests["output_tokens"] > 6)
    assert open_yet.sum() > 5
    requests.loc[open_yet, "output_tokens"] -= 5
    return replace(frames, requests=requests)


def test_tokens_that_a_client_did_not_see_at_the_end_are_counted() -> None:
    """Chunks may bring several tokens: those of unfinished requests are then counted short."""
    frames, window, demand = long_outputs_beside_short_prompts()
    short = work_served(unseen_at_the_end(frames), window, demand).estimate
    whole = work_served(frames, window, demand).estimate
    assert short.value == pytest.approx(whole.value, rel=1e-3)
    assert short.half_width < 1.5 * whole.half_width


@pytest.mark.parametrize(
    ("binding", "bounds"),
    [
        ("max_num_batched_tokens", limits(8192, budget=128)),
        ("max_num_seqs", limits(8192, seqs=12)),
    ],
)
def test_tokens_as_work_are_the_counters(binding: str, bounds: EngineLimits) -> None:
    """Whatever a client saw of unfinished requests, and wherever it took their tokens to come."""
    workload = uniform((64, 192), (8, 24))
    frames = overloaded(workload, bounds, 3, 20.0)
    window = backlogged_window(frames, 4.0)
    assert window is not None
    demand = workload.mean(work_demand(workload, binding))
    whole = work_served(frames, window, demand, binding).rates
    assert work_served(unseen_at_the_end(frames), window, demand, binding).rates == pytest.approx(
        whole
    )
    even = frames.engine.drop(columns="generation_tokens")
    rough = work_served(replace(frames, engine=even), window, demand, binding).mean
    assert whole.mean() == pytest.approx(rough, rel=0.01)


def test_a_counter_that_goes_back_is_left_aside() -> None:
    """An engine that began anew in a run: its tokens are those that the client saw."""
    frames, window, demand = long_outputs_beside_short_prompts()
    counter = frames.engine["generation_tokens"]
    anew = counter.where(counter.index < len(counter) // 2, counter - counter[len(counter) // 2])
    without = frames.engine.drop(columns="generation_tokens")
    found = [
        work_served(replace(frames, engine=engine), window, demand).rates
        for engine in (frames.engine.assign(generation_tokens=anew), without)
    ]
    assert found[0] == pytest.approx(found[1])


def test_outputs_of_one_token_have_a_rate() -> None:
    workload = fixed(64, 1)
    frames = overloaded(workload, limits(2048), 3, 10.0)
    window = backlogged_window(frames, 4.0)
    assert window is not None
    demand = workload.mean(work_demand(workload))
    counted = completions(frames, window).mean
    assert work_served(frames, window, demand).mean == pytest.approx(counted, rel=0.02)


def test_a_regression_on_what_does_not_vary_is_the_mean() -> None:
    """Fixed lengths leave one variate, the arrivals; with those at their mean there is none."""
    workload = fixed(20, 20)
    frames = overloaded(workload, limits(2048), 3, 20.0)
    demand = workload.mean(work_demand(workload))
    window = Backlog(5.0, 19.0)
    found = capacity_by_regression(frames, window, demand)
    counted = completions(frames, window).estimate
    assert found.low <= counted.value <= found.high
    with pytest.raises(ValueError, match="four batches"):
        capacity_by_regression(frames, window, demand, batches=3)


def test_a_regression_takes_out_the_lengths() -> None:
    """Two lengths, one request after another, each as long as its tokens take."""
    records = []
    now_s, rng = 0.0, np.random.default_rng(4)
    for number in range(400):
        output = int(rng.choice([1, 3]))
        now_s += 0.05 * output
        records.append(record(number, now_s - 1e-3, now_s, 10, output))
    # 20 tokens per second, two tokens on average.
    run = Run(id="x", arrival_rate=len(records) / now_s, horizon_s=now_s, warmup_s=0.0, seed=1)
    frames = run_frames(run, 0, round(now_s * 1e9), records, [])
    found = capacity_by_regression(frames, Backlog(0.0, now_s), (10 + 33) / 2, batches=20)
    counted = completions(frames, Backlog(0.0, now_s)).estimate
    assert found.value == pytest.approx(10.0, rel=0.02)
    assert found.half_width < counted.half_width / 3


def record(number: int, first_s: float, last_s: float, prompt: int, output: int) -> RequestRecord:
    return RequestRecord(
        id=number,
        scheduled_ns=0,
        sent_ns=0,
        first_token_ns=round(first_s * 1e9),
        last_token_ns=round(last_s * 1e9),
        prompt_tokens=prompt,
        output_tokens_designed=output,
        max_tokens=output,
        output_tokens=output,
        prompt_tokens_reported=prompt,
        outcome="completed",
    )


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


def test_work_served_does_not_depend_on_which_lengths_were_served() -> None:
    """Ten servers that each serve one request after another, one token every 10 ms."""
    rng = np.random.default_rng(5)
    records, number = [], 0
    for lane in range(10):
        now = 0.001 * lane
        while now < 60.0:
            output = int(rng.integers(10, 200))
            first, last = now + 0.01, now + 0.01 * output
            records.append(record(number, first, last, 100, output))
            number, now = number + 1, last
    run = Run(id="x", arrival_rate=1.0, horizon_s=60.0, warmup_s=0.0, seed=1)
    frames = run_frames(run, 0, round(60e9), records, samples(60.0, waiting=5))
    outputs = np.arange(10, 200)
    demand = float(np.mean(100 * outputs + outputs * (outputs - 1) / 2))
    # In saturation each lane completes one request per mean service time.
    truth = 10 / (0.01 * outputs.mean())
    window = backlogged_window(frames, 5.0)
    assert window is not None
    found = work_served(frames, window, demand)
    assert found.mean == pytest.approx(truth, rel=0.06)


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


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([3] * 50 + [0] * 10 + [2] * 200 + [0] + [1] * 39, (26.1, 29.9)),
        ([3] * 300, (1.0, 29.9)),
        ([3] * 250 + [0] * 50, None),
    ],
)
def test_the_backlogged_window_lasts_until_the_end(
    waiting: list[int], expected: tuple[float, float] | None
) -> None:
    """A queue that emptied was served fast: what lies before it tells too high a rate."""
    run = Run(id="x", arrival_rate=1.0, horizon_s=30.0, warmup_s=0.0, seed=1)
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
    window = backlogged_window(run_frames(run, 0, 30 * 10**9, [], rows), 1.0)
    assert window == (expected and Backlog(*(pytest.approx(s) for s in expected)))
