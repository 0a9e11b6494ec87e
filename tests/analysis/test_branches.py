"""The two-branch test on made judgements, and its error rates on a server that has a second branch."""

import math
from bisect import bisect_right
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from analysis.inference.capacity import backlogged_window, completions
from analysis.inference.growth import critical_excursion, drift
from analysis.inference.long_run import Stretch
from analysis.numbers.estimate import Estimate
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.branches import (
    Branches,
    bistable_band,
    branch_checks,
    branch_warnings,
    judge_from_full,
    two_branches,
)
from analysis.verdicts.verdict import RunJudgement, RunVerdict
from loadgen.records import LoadFidelity, Run, Start

RATE = 8.0
NOTHING = LoadFidelity(
    valid=True, checks=(), achieved_rate=RATE, lag_p50_ms=0.0, lag_p99_ms=0.0, lag_max_ms=0.0
)


def estimate(value: float, half: float, level: float = 0.95) -> Estimate:
    return Estimate(value, value - half, value + half, level, "req/s", "made")


def stretch(rate: float) -> Stretch:
    """Whose mean is known to about 1 %."""
    noise = np.random.default_rng(7).standard_normal(64)
    return Stretch(rate * (1 + 0.05 * (noise - noise.mean())), 100.0, 20.0, "req/s", "made")


def judgement(
    start: Start, verdict: RunVerdict, growth: Estimate, rate: float = RATE
) -> RunJudgement:
    return RunJudgement(
        id=f"{rate:.2f}-{start}",
        arrival_rate=rate,
        load=rate / 10,
        warmup_s=10.0,
        end_s=100.0,
        verdict=verdict,
        text=verdict,
        realised_rate=rate,
        drift=growth,
        stable_below=0.05 * rate,
        fidelity=NOTHING,
        requests=800,
        completed=800,
        unfinished=0,
        preemptions=0,
        kv_usage=0.9,
        running=10.0,
        waiting=0.0,
        backlogged=0.5,
        step_time_s=None,
        pace=None,
        ttft_p50_s=0.1,
        ttft_p95_s=0.2,
        start=start,
    )


def pair(
    empty: tuple[RunVerdict, float],
    full: tuple[RunVerdict, float],
    served: float | None = None,
    rate: float = RATE,
) -> Branches:
    """Every drift with an interval of 0.2 to both sides, a capacity with 0.1."""
    judgements = [
        judgement("full", full[0], estimate(full[1], 0.2), rate),
        judgement("empty", empty[0], estimate(empty[1], 0.2), rate),
        judgement("empty", "unstable", estimate(3.0, 0.2), 12.0),
    ]
    capacities = {} if served is None else {f"{rate:.2f}-full": estimate(served, 0.1)}
    (found,) = two_branches(judgements, capacities)
    return found


@pytest.mark.parametrize(
    ("empty", "full", "served", "same"),
    [
        (("stable", 0.0), ("stable", -1.0), None, True),
        (("unstable", 1.0), ("unstable", 1.0), None, True),
        (("stable", 0.0), ("unstable", 1.0), None, False),
        (("inconclusive", 0.3), ("unstable", 1.0), None, False),
        (("unstable", 1.0), ("stable", -1.0), None, False),
        # What is stable may grow by less than was asked: these two may be the same growth.
        (("stable", 0.2), ("unstable", 0.3), None, None),
        (("inconclusive", 0.3), ("stable", -1.0), None, None),
        (("stable", 0.0), ("inconclusive", 0.1), None, None),
        (("invalid", 0.0), ("unstable", 1.0), None, None),
        (("stable", 0.0), ("invalid", 1.0), 7.0, None),
        # How much was served decides where N itself does not.
        (("stable", 0.0), ("inconclusive", 0.1), 7.0, False),
        (("stable", 0.0), ("inconclusive", 0.1), 8.5, True),
    ],
)
def test_what_two_starts_say_together(
    empty: tuple[RunVerdict, float],
    full: tuple[RunVerdict, float],
    served: float | None,
    same: bool | None,
) -> None:
    found = pair(empty, full, served)
    assert found.same is same
    (check,) = branch_checks([found])
    assert check.holds is same
    begins = {True: "no second branch seen", False: "two branches", None: "cannot say"}[same]
    assert found.text.startswith(f"{begins}")
    assert "0.80" in found.text


def test_the_difference_is_of_growth_that_lasts_with_errors_in_quadrature() -> None:
    found = pair(("stable", 0.1), ("unstable", 1.0))
    assert found.difference.value == pytest.approx(0.9)
    # Student's with the 5 degrees of freedom of 6 batches: 4.032 at 99 %, 2.571 at 95 %.
    half = 0.2 * 4.032 / 2.571
    # From empty, what is below nothing is none.
    assert found.difference.low == pytest.approx(0.9 - math.hypot(half, half), rel=1e-3)
    assert found.difference.high == pytest.approx(0.9 + math.hypot(half, 0.1), rel=1e-3)
    drains = pair(("stable", 0.1), ("stable", -1.0)).difference
    assert (drains.value, drains.high) == (pytest.approx(-0.1), pytest.approx(0.0))
    served = pair(("stable", 0.0), ("inconclusive", 0.1), 7.0)
    assert served.full_growth.value == pytest.approx(1.0)
    assert served.full_growth.half_width == pytest.approx(0.1 * 2.576 / 1.960, rel=1e-3)


def test_the_band_reaches_from_what_the_full_server_serves_to_the_highest_rate_apart() -> None:
    same = pair(("stable", 0.0), ("stable", -1.0), 7.5, rate=7.0)
    apart = [pair(("stable", 0.0), ("unstable", rate - 7.5), 7.5, rate=rate) for rate in (8.0, 9.0)]
    assert bistable_band([same]) is None
    assert bistable_band([same, *apart]) == (7.5, 9.0)
    assert bistable_band([pair(("stable", 0.0), ("unstable", 1.0))]) == (RATE, RATE)
    (warning,) = branch_warnings([same, *apart], 10.0, [], [])
    assert "bistable band [7.5, 9] req/s, 0.75 to 0.90 of the predicted rate" in warning
    assert branch_warnings([same], 10.0, [], []) == ()


@pytest.mark.parametrize(
    ("poisson", "full", "words"),
    [
        ([10.0], [10.05], None),
        ([10.0], [7.0], "0.700"),
        ([10.0], [], None),
        ([], [7.0], "from a full start alone"),
    ],
)
def test_a_capacity_behind_a_burst_is_held_against_the_sustained_one(
    poisson: list[float], full: list[float], words: str | None
) -> None:
    warnings = branch_warnings([], 10.0, [stretch(v) for v in poisson], [stretch(v) for v in full])
    assert len(warnings) == (words is not None)
    assert all(words in warning for warning in warnings if words)


# -- a server that serves worse when many wait ---------------------------------------------------

SERVERS = 10
QUICK, SLOW, MANY = 1.0, 0.75, 80
HORIZON_S, WARMUP_S, BURST = 1200.0, 60.0, 400


def collapsing(rate: float, seed: int, preload: int = 0, slow: float = SLOW) -> RunFrames:
    """Ten servers of 10 s each; ``slow`` of their speed while more than 80 wait. Capacity 1 req/s."""
    rng = np.random.default_rng(seed)
    run = Run(
        id="x",
        arrival_rate=rate,
        horizon_s=HORIZON_S,
        warmup_s=WARMUP_S,
        seed=seed,
        preload=preload,
    )
    gaps = rng.exponential(1 / rate, round(rate * HORIZON_S * 1.3) + 50)
    arrivals = np.concatenate([np.zeros(preload), np.cumsum(gaps)])
    arrivals = arrivals[arrivals < HORIZON_S]
    first, last = np.full(len(arrivals), np.nan), np.full(len(arrivals), np.nan)
    free_s = [0.0] * SERVERS
    instants = arrivals.tolist()
    for i, at in enumerate(instants):
        server = min(range(SERVERS), key=free_s.__getitem__)
        begun = max(free_s[server], at)
        waiting = bisect_right(instants, begun) - i
        free_s[server] = begun + 10.0 / (slow if waiting > MANY else QUICK)
        if begun < HORIZON_S:
            first[i] = begun
        if free_s[server] < HORIZON_S:
            last[i] = free_s[server]
    times = np.arange(0.0, HORIZON_S, 1.0)
    waiting_at = np.searchsorted(arrivals, times, "right") - np.searchsorted(
        np.sort(first[~np.isnan(first)]), times, "right"
    )
    requests = pd.DataFrame(
        {
            "scheduled_s": arrivals,
            "first_token_s": first,
            "last_token_s": last,
            "outcome": np.where(np.isnan(last), "unfinished", "completed"),
        }
    )
    engine = pd.DataFrame({"t_s": times, "waiting": waiting_at})
    return RunFrames(run, HORIZON_S, requests, engine, pd.DataFrame())


def judged(frames: RunFrames) -> RunJudgement:
    """As `analysis.verdicts.run_verdict` decides, at a theta of 10 %."""
    rate = frames.run.arrival_rate

    def plain(start_s: float, end_s: float) -> tuple[Estimate, RunVerdict, str]:
        growth = drift(frames, start_s, end_s)
        by_chance = critical_excursion(1.0, end_s - start_s, 0.95, 1.0)
        if growth.high < 0.05 * rate:
            return growth, "stable", "stable"
        if growth.low > 0 and growth.value * (end_s - start_s) > by_chance:
            return growth, "unstable", "grows"
        return growth, "inconclusive", "cannot say"

    if frames.run.preload:
        _, _, (growth, verdict, _) = judge_from_full(frames, WARMUP_S, HORIZON_S, plain)
    else:
        growth, verdict, _ = plain(WARMUP_S, HORIZON_S)
    return judgement(frames.run.start, verdict, growth, rate)


def both(rate: float, slow: float, seed: int) -> Branches:
    empty, full = (
        collapsing(rate, 2 * seed + i, preload, slow) for i, preload in enumerate((0, BURST))
    )
    window = backlogged_window(full, WARMUP_S)
    assert window is not None
    served = {f"{rate:.2f}-full": completions(full, window).estimate}
    return two_branches([judged(empty), judged(full)], served)[0]


def shares(rate: float, slow: float, count: int = 24) -> dict[bool | None, float]:
    found = [both(rate, slow, seed).same for seed in range(count)]
    return {answer: found.count(answer) / count for answer in (True, False, None)}


@pytest.mark.parametrize(("rate", "slow"), [(0.6, SLOW), (0.85, 1.0), (0.95, 1.0), (1.02, 1.0)])
def test_no_second_branch_is_seen_where_there_is_none(rate: float, slow: float) -> None:
    # At 5 % more than 4 of 24 have a probability of 0.6 %.
    assert shares(rate, slow)[False] <= 4 / 24


def test_the_second_branch_of_a_collapsing_server_is_seen() -> None:
    assert shares(0.9, SLOW)[False] >= 0.9


@pytest.mark.parametrize(
    ("rate", "slow", "preload", "verdict", "words"),
    [
        (0.6, 1.0, 400, "stable", "drained by"),
        (0.6, SLOW, 400, "stable", "drains"),
        (0.6, SLOW, 20, "stable", "drained by"),
        (0.9, SLOW, 400, "unstable", "grows"),
        (1.2, 1.0, 400, "unstable", "grows"),
    ],
)
def test_a_run_from_full_drains_or_grows(
    rate: float, slow: float, preload: int, verdict: RunVerdict, words: str
) -> None:
    frames = collapsing(rate, 5, preload, slow)
    asked: list[tuple[float, float]] = []

    def plain(start_s: float, end_s: float) -> tuple[Estimate, RunVerdict, str]:
        asked.append((start_s, end_s))
        return drift(frames, start_s, end_s), "stable", "stable"

    start_s, end_s, (growth, found, text) = judge_from_full(frames, WARMUP_S, HORIZON_S, plain)
    assert found == verdict
    assert words in text
    assert (start_s, end_s) in asked
    empty = frames.engine[(frames.engine["t_s"] >= WARMUP_S) & (frames.engine["waiting"] == 0)]
    emptied_s = float(empty["t_s"].iloc[0]) if len(empty) else HORIZON_S
    if preload == 20:
        assert (start_s, end_s) == (emptied_s, HORIZON_S)
        return
    # While the backlog lasts, N moves at what is offered less what is served.
    assert (start_s, end_s) == (WARMUP_S, emptied_s)
    wide = growth.at_level(0.999)
    assert wide.low <= rate - slow <= wide.high
    assert (growth.high < 0) if verdict == "stable" else (growth.low > 0)


def test_a_queue_that_drained_and_then_grows_is_no_stable_one() -> None:
    frames = collapsing(0.6, 7, 60, slow=1.0)

    def grows(start_s: float, end_s: float) -> tuple[Estimate, RunVerdict, str]:
        return drift(frames, start_s, end_s), "unstable", "grows"

    start_s, end_s, (_, verdict, text) = judge_from_full(frames, WARMUP_S, HORIZON_S, grows)
    assert (verdict, end_s) == ("unstable", HORIZON_S)
    assert start_s > WARMUP_S
    assert text.startswith("drained by") and text.endswith("then grows")


@pytest.mark.parametrize(("rate", "right"), [(0.85, "stable"), (1.15, "unstable")])
def test_error_rates_of_runs_from_full(rate: float, right: RunVerdict) -> None:
    found = [judged(collapsing(rate, seed, BURST, slow=1.0)).verdict for seed in range(24)]
    assert set(found) <= {right, "inconclusive"}
    assert found.count(right) >= 0.9 * 24


@pytest.mark.parametrize("end_s", [WARMUP_S + 5, WARMUP_S + 25])
def test_a_run_cut_short_says_nothing(end_s: float) -> None:
    for preload in (5, 400):
        frames = collapsing(0.6, 5, preload, slow=1.0)

        def short(from_s: float, until_s: float) -> tuple[Estimate, RunVerdict, str]:
            return estimate(math.nan, math.nan), "inconclusive", f"{until_s - from_s:.0f} s only"

        window = judge_from_full(frames, WARMUP_S, end_s, short)
        assert window[:2] == (WARMUP_S, end_s)
        assert window[2][1] == "inconclusive"


def test_bands_of_more_pairs_hold_those_of_fewer() -> None:
    pairs = [pair(("stable", 0.0), ("unstable", rate - 6.0), 6.0, rate) for rate in (7.0, 8.0, 9.0)]
    bands = [bistable_band(pairs[:n]) for n in (1, 2, 3)]
    assert all(band is not None for band in bands)
    for smaller, larger in pairwise(b for b in bands if b is not None):
        assert larger[0] <= smaller[0] <= smaller[1] <= larger[1]
