"""Was a set step time kept? Idle time must neither hide a lost sleep nor accuse a kept one."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.engine import EngineLimits, SGLangRules
from analysis.frames import RunFrames, run_frames
from analysis.pace import MIN_STEPS, PACE_LIMIT, Pace, busy_step_s
from analysis.simulate import simulate
from analysis.step_time import StepTime
from loadgen.arrivals import poisson
from loadgen.records import Run

LIMITS = EngineLimits(
    num_blocks=2048,
    block_size=1,
    max_model_len=4096,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    sglang=SGLangRules(
        max_prefill_tokens=16384,
        schedule_conservativeness=1.0,
        radix_cache=False,
        whole_output_of_ignore_eos=True,
    ),
)
SLEEP_S = 0.025


def a_run(step_s: float, rate: float, horizon_s: float, seed: int) -> RunFrames:
    """Steps of one length under Poisson arrivals of 32 + 32 tokens."""
    arrival_s = poisson(rate, horizon_s, seed)
    lengths = np.full((len(arrival_s), 3), 32)
    done = simulate(LIMITS, StepTime(b0_s=step_s), arrival_s, lengths, horizon_s, ignore_eos=True)
    run = Run(id="r", arrival_rate=rate, horizon_s=horizon_s, warmup_s=1.0, seed=seed)
    return run_frames(run, 0, round(horizon_s * 1e9), done.records, done.samples)


@pytest.mark.parametrize("rate", [0.3, 1.0, 12.0])
@pytest.mark.parametrize("step_s", [0.020, SLEEP_S, 0.043])
def test_the_mean_step_under_load_does_not_see_idle_time(step_s: float, rate: float) -> None:
    frames = a_run(step_s, rate, 60.0, 1)
    found = busy_step_s(frames)
    assert found == pytest.approx(step_s, rel=0.025)
    whole = frames.end_s / frames.engine["steps"].iloc[-1]
    assert rate > 1 or whole > 1.15 * step_s, "this run was to be idle for part of its time"


def test_a_lost_sleep_is_found_and_a_kept_one_is_not_accused() -> None:
    """Error rates over 40 runs of mixed load: none of either kind, 5 % below the sleep and at it."""
    wrong = 0
    for seed in range(20):
        rate = (0.5, 4.0)[seed % 2]
        for step_s, kept in ((0.95 * SLEEP_S, False), (SLEEP_S, True)):
            found = busy_step_s(a_run(step_s, rate, 30.0, seed))
            assert found is not None
            wrong += Pace(found, SLEEP_S, sleeps=True).kept is not kept
    assert wrong == 0


def test_few_steps_say_nothing() -> None:
    frames = a_run(SLEEP_S, 12.0, 2.0, 1)
    assert frames.engine["steps"].iloc[-1] < MIN_STEPS
    assert busy_step_s(frames) is None


@pytest.mark.parametrize(
    ("off", "sleeps", "kept", "words"),
    [
        (0.0, False, True, "20.00 ms by the law, kept within +0.0 %"),
        (0.9 * PACE_LIMIT, False, True, "+2.7 %"),
        (1.1 * PACE_LIMIT, False, False, "paced engine: its steps were +3.3 % off"),
        (-1.1 * PACE_LIMIT, False, False, "paced engine: its steps were -3.3 % off"),
        (-0.9 * PACE_LIMIT, True, True, "-0.54 ms"),
        (-1.1 * PACE_LIMIT, True, False, "19.34 ms, less than the 20.00 ms that each was to sleep"),
        (0.9, True, True, "sleeps 20.00 ms, takes +18.00 ms of its own (+90.0 %)"),
    ],
)
def test_what_counts_as_kept(off: float, sleeps: bool, kept: bool, words: str) -> None:
    pace = Pace(0.02 * (1 + off), 0.02, sleeps)
    assert pace.off == pytest.approx(off)
    assert pace.kept is kept
    assert words in (pace.text() if kept else pace.complaint())
