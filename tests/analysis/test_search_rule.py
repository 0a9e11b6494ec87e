"""The rule against fluid servers whose critical rate is set, and against the simulator."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from analysis.inference.search_rule import Design, Search, advance, batches, begin, capacity
from analysis.inference.sequential import EMPTY, Look
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime
from analysis.verdicts.search_result import search_lines, search_result
from harness.rehearsals.rehearsal import SimulatedServer
from harness.rehearsals.search_rehearsal import Rehearsal, design_for, rehearse_search
from loadgen.workload import uniform

DESIGN = Design(
    precision=0.02,
    theta=0.10,
    demand=(100.0, 10.0, 5.0),
    variance_ratio=1.5,
    max_rate=256.0,
    max_duration_s=300.0,
)


SHORT = replace(DESIGN, max_duration_s=80.0)


def fluid(
    serves: Callable[[float], float], seed: int = 1, design: Design = DESIGN, noise: float = 0.01
) -> tuple[Search, list[Look]]:
    """A search on a server that serves ``serves(t)`` requests per second while somebody waits.

    Residences are 1 s; what arrives is exactly what is offered.
    """
    rng = np.random.default_rng(seed)
    search, looks = begin(design), [EMPTY]
    arrived = served = queue = 0.0
    while search.phase != "finished":
        before = looks[-1]
        now_s = before.t_s + 0.5
        arrived += search.rate * 0.5
        able = serves(now_s) * 0.5 * (1 + noise * rng.standard_normal())
        done = min(able, queue + search.rate * 0.5)
        served += done
        queue = arrived - served
        looks.append(
            Look(
                t_s=now_s,
                arrivals=round(arrived),
                departures=int(served),
                waiting=int(queue),
                waiting_least=int(min(queue, before.waiting)),
                running=20.0,
                work=(100.0 * served, 10.0 * served, 5.0 * served),
                residence_s=1.0,
                memory_s=1.0,
            )
        )
        search = advance(design, search, looks)
    return search, looks


def phases(looks: list[Look]) -> list[str]:
    """The phases in order, by folding the rule over the looks again."""
    search, seen = begin(DESIGN), ["raise"]
    for k in range(2, len(looks) + 1):
        search = advance(DESIGN, search, looks[:k])
        if search.phase != seen[-1]:
            seen.append(search.phase)
    return seen


@pytest.mark.parametrize("rate", [0.3, 3.0, 40.0, 200.0])
def test_a_steady_server_is_found_within_the_precision(rate: float):
    search, looks = fluid(lambda _: rate)
    result = search_result(DESIGN, search, looks)
    assert result.outcome == "found", result.reason
    assert result.critical_rate.value == pytest.approx(rate, rel=0.02)
    assert result.critical_rate.half_width <= 0.02 * result.critical_rate.value
    above, below = result.sides
    assert above.holds and below.holds
    assert above.rate == pytest.approx(1.1 * rate, rel=0.03)
    assert below.rate == pytest.approx(0.9 * rate, rel=0.03)
    seen = phases(looks)
    assert seen[:5] == ["raise", "fill", "warm-up", "above", "below"] and seen[-1] == "finished"
    text = dict(search_lines(result))
    assert "grows" in text["above"] and "drains" in text["below"]


@pytest.mark.parametrize(
    ("serves", "words"),
    [
        (lambda _: 1000.0, ("no queue stays at 256 req/s",)),
        (lambda t: 40.0 * math.exp(-t / 40), ("not steady",)),
        (lambda t: 40.0 * math.exp(-t / 100), ("not steady",)),
        (
            lambda t: 40.0 * (0.5 + (t // 7) % 2),
            ("the queue vanished", "not yet narrow enough", "not steady"),
        ),
    ],
    ids=["too fast", "throttling", "throttling slowly", "restless"],
)
def test_what_cannot_be_said_is_not_said(serves: Callable[[float], float], words: tuple[str, ...]):
    results = [search_result(SHORT, *fluid(serves, seed, SHORT)) for seed in range(10)]
    wrong = [r for r in results if r.outcome != "cannot say" or r.exit_code != 11]
    assert not wrong
    for result in results:
        assert any(phrase in result.reason for phrase in words), result.reason


def test_a_steady_server_is_rarely_refused():
    results = [search_result(SHORT, *fluid(lambda _: 40.0, seed, SHORT)) for seed in range(40)]
    assert sum(result.outcome == "found" for result in results) >= 38


def test_other_lengths_than_designed_do_not_pass():
    search, looks = fluid(lambda _: 40.0)
    wrong = [replace(look, departures=round(1.3 * look.departures)) for look in looks]
    result = search_result(DESIGN, search, wrong)
    assert result.outcome == "cannot say" and "other lengths" in result.reason


def test_an_interrupted_search_keeps_what_it_knows():
    _, looks = fluid(lambda _: 40.0)
    cut = begin(DESIGN)
    for k in range(2, len(looks) - 2):
        cut = advance(DESIGN, cut, looks[:k])
    result = search_result(DESIGN, cut, looks[: len(looks) - 3])
    assert result.outcome == "cannot say" and "interrupted" in result.reason
    assert result.critical_rate.value == pytest.approx(40.0, rel=0.03)


def test_batches_lie_within_the_stretches():
    search, looks = fluid(lambda _: 40.0)
    whole = batches(DESIGN, search, looks)
    sides = [batches(DESIGN, search, looks, side) for side in ("above", "below")]
    assert len(whole) == sum(map(len, sides))
    assert capacity(DESIGN, search, looks).value == pytest.approx(whole.mean())
    assert all(m.end_s - m.start_s >= search.batch_s for m in search.measured)


LAW = StepTime(b0_s=14e-3, b1_s_per_token=10e-6, b2_s_per_kv_token=400e-9, b3_s_per_request=10e-6)
SMALL = EngineLimits(num_blocks=128, block_size=16, max_num_seqs=256, max_num_batched_tokens=2048)
WIDE = uniform((16, 112), (16, 112))
TRUE_RATE = 18.682
"""Of SMALL and WIDE, in long saturated runs; scripts/bench/search measures such anew."""


def simulated(seed: int) -> Rehearsal:
    return rehearse_search(SimulatedServer(SMALL, LAW), WIDE, design_for(WIDE, 0.02, 0.10), seed)


def test_the_simulated_critical_rate_is_found():
    pytest.importorskip("numba", reason="20 searches take a minute without the compiled engine")
    design = design_for(WIDE, 0.02, 0.10)
    results = []
    for seed in range(20):
        done = simulated(seed)
        results.append(search_result(design, done.search, done.looks))
    assert all(result.outcome == "found" for result in results)
    rates = [result.critical_rate for result in results]
    held = np.mean([rate.low <= TRUE_RATE <= rate.high for rate in rates])
    assert held >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 20)
    assert np.mean([rate.value for rate in rates]) == pytest.approx(TRUE_RATE, rel=0.005)
    assert np.std([rate.value for rate in rates]) < 0.008 * TRUE_RATE
    assert np.median([result.requests for result in results]) < 500


def test_one_seed_is_one_search():
    pytest.importorskip("numba", reason="two searches take a while without the compiled engine")
    one, other = simulated(4), simulated(4)
    # NaN before the first departure is not equal to itself.
    assert repr(one.looks) == repr(other.looks) and one.search == other.search
