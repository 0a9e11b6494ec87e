"""The operating point of an engine that sets room aside: closed forms, and the scheduler itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from analysis.schedulers.engine import EngineLimits, Request, SGLangRules
from analysis.schedulers.sglang import SGLangEngine
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.reservation import reserving
from analysis.theory.reserved_demand import declared_to_come, reserved_demand
from analysis.theory.reserved_room import usable_tokens
from analysis.theory.room_walk import Charges, ruin_exponent
from analysis.theory.saw_tooth import saturated
from analysis.theory.waterfall import waterfall
from analysis.verdicts.second_opinion import simulated_rate
from loadgen.workload import Workload, declared, fixed, uniform

LAW = StepTime(b0_s=0.014, b1_s_per_token=1e-5, b2_s_per_kv_token=4e-7, b3_s_per_request=1e-5)
WIDE = uniform((16, 112), (16, 112))
DECODE = uniform((16, 48), (64, 448))


def limits(tokens: int, page: int = 1, chunk: int | None = 8192, **other: Any) -> EngineLimits:
    rules = {k: other.pop(k) for k in list(other) if k in SGLangRules.__slots__}
    return EngineLimits(
        num_blocks=tokens // page,
        block_size=page,
        max_num_batched_tokens=chunk,
        sglang=SGLangRules(**rules),
        **other,
    )


def early(law: Workload, factor: float = 1.0) -> Workload:
    return declared(replace(law, ignore_eos=False), factor=factor)


@pytest.mark.parametrize(
    ("s", "o", "d", "page", "ratio", "clip"),
    [
        (5, 9, 9, 1, 1.0, 4096),
        (5, 9, 30, 4, 0.3, 4096),
        (7, 1, 4, 2, 1.0, 10),
        (3, 40, 50, 1, 0.5, 12),
    ],
)
def test_reserved_demand_is_the_sum_over_decode_steps(
    s: int, o: int, d: int, page: int, ratio: float, clip: int
) -> None:
    law = replace(fixed(s, o, d), ignore_eos=False) if d > o else fixed(s, o)
    bounds = limits(1000, page, clip_max_new_tokens=clip)
    found = reserved_demand(law, bounds, ratio)
    held = sum(-(-(s + j - 1) // page) * page for j in range(1, o))
    to_come = sum(min(d - j, clip) for j in range(1, o))
    assert declared_to_come(law, bounds.sglang or SGLangRules())[0] == to_come
    assert found.reserved[0] == pytest.approx(held + ratio * to_come)
    assert found.decode_kv[0] == sum(-(-(s + j) // page) * page for j in range(1, o))
    assert found.decode_steps[0] == o - 1


def test_uniform_lengths_keep_71_percent() -> None:
    """theory.md 7.2: E[s o + o^2 / 2] / E[(s + o) o], which is 5/7 for equal uniform laws."""
    law = uniform((1, 1600), (1, 1600))
    found = reserving(law, limits(131_000))
    kept = found.ceilings["output_reservation"] / found.ceilings["kv_cache"]
    assert kept == pytest.approx(5 / 7, abs=0.002)


def test_declaring_more_costs_as_much_as_using_it() -> None:
    """With everything set aside, x is the pool over E[(s + d) (o - 1)] whatever the outputs are."""
    bounds = limits(100_000)
    found = reserved_demand(declared(early(fixed(50, 50)), max_tokens=200), bounds, 1.0)
    assert found.reserved[0] == 49 * (50 + 200 - 1)
    used = reserved_demand(fixed(50, 200), bounds, 1.0)
    assert used.reserved[0] / used.decode_steps[0] == found.reserved[0] / found.decode_steps[0]
    exact = (100_000 - 101 / 2) / (99 * 49)
    assert reserving(fixed(50, 50), bounds).by_pool == pytest.approx(exact, rel=0.001)


@pytest.mark.parametrize("radix", [True, False])
def test_room_of_the_head_of_the_queue(radix: bool) -> None:
    """Mean of the room that a head leaves, when it is refused below N and keeps X: by playing it."""
    law = uniform((10, 20), (30, 60))
    bounds = limits(10_000, radix_cache=radix)
    usable = usable_tokens(law, bounds, reserved_demand(law, bounds, 1.0))
    rng = np.random.default_rng(1)
    room, seen = 0.0, []
    for s, d, _ in law.sample(rng, 20_000).tolist():
        asked = s + 1 + (d if radix else 0)
        # Room comes back little by little until the head fits.
        seen += [room + (asked - room) * t for t in (0.25, 0.75)] if asked > room else []
        weights = max(asked - room, 0.0)
        seen[-2:] = [(v, weights / 2) for v in seen[-2:]] if weights else seen[-2:]
        room = max(room, asked) - (s + 1 + d)
    values, weight = np.array(seen).T
    assert 10_000 - usable == pytest.approx(float(values @ weight / weight.sum()), abs=0.5)


def test_equal_requests_one_at_a_time_need_one_prefill_step_each() -> None:
    """Completions are then rare, and each uncovers exactly one head."""
    found = reserving(fixed(100, 2000), limits(20_000))
    assert found.requests < 0.005
    assert found.prefill_steps == pytest.approx(1.0, abs=0.01)


def test_exponential_lengths_uncover_a_head_in_every_second_completion() -> None:
    """E[min(X, Y)] / E[X] = 1/2 for exponential X and Y; here geometric, the prompt one token."""
    o = np.arange(2, 3900)
    weight = 0.995**o
    law = Workload(
        name="geometric",
        prompt_tokens=np.ones_like(o),
        output_tokens=o,
        max_tokens=o,
        weight=weight / weight.sum(),
        observed=np.full(len(o), np.inf),
        source="test",
    )
    assert reserving(law, limits(4000)).prefill_steps == pytest.approx(0.5, abs=0.02)


def test_the_ratio_falls_to_its_floor_in_a_large_pool_and_is_lifted_in_a_small_one() -> None:
    law = early(DECODE)
    assert saturated(law, limits(262_144)).ratio == pytest.approx(0.098, abs=0.002)
    assert saturated(law, limits(8192)).ratio > 0.2


@pytest.mark.parametrize("rows", [None, 256])
def test_a_pool_that_never_overflows_stays_at_the_floor(rows: int | None) -> None:
    """Millions of tokens, requests of a hundred: an overflow is as likely as e to minus thousands."""
    bounds = limits(4_000_000, max_num_seqs=rows)
    law = early(uniform((80, 120), (80, 120)), 4.0)
    assert saturated(law, bounds).ratio == pytest.approx(0.098, abs=1e-9)
    assert reserving(law, bounds).running == pytest.approx(rows or 21_270, rel=0.01)


def test_the_walk_says_the_same_every_time() -> None:
    found = [saturated.__wrapped__(early(WIDE), limits(4096)) for _ in range(2)]
    assert found[0] == found[1]


def test_where_rows_bind_the_pool_overflows_less() -> None:
    """The scheduler model with 36 rows: a ratio of 0.195 and 35.2 running; without: 0.40, 34.6."""
    law = early(WIDE)
    free, bound = (reserving(law, limits(4096, max_num_seqs=rows)) for rows in (None, 36))
    assert free.ratio == pytest.approx(0.41, abs=0.03)
    assert bound.ratio < 0.27
    assert bound.running == pytest.approx(35.2, abs=0.4)


@pytest.mark.parametrize(
    ("law", "tokens"),
    [
        (early(WIDE, 4.0), 4096),
        (early(WIDE), 4096),
        (early(DECODE), 12_288),
        (declared(early(DECODE), max_tokens=1000), 32_768),
    ],
)
def test_the_saw_tooth_against_the_scheduler(law: Workload, tokens: int) -> None:
    """Ratio, completions and prefill steps over the decode steps of a queue that is never empty."""
    bounds = limits(tokens)
    found = saturated(law, bounds)
    engine = SGLangEngine(bounds)
    for s, o, d in law.sample(np.random.default_rng(2), 8000).tolist():
        engine.submit(Request(0, s, o, max_tokens=d, ignore_eos=False))
    # An idle engine begins at the top of a tooth: the first is left out.
    ratios: list[float] = []
    ended = prefills = 0
    while len(engine.waiting) > 200:
        step = engine.start()
        assert step is not None
        done = sum(finished for _, finished in engine.complete(step))
        if engine.steps_scheduled > 2000:
            ended += done
            prefills += step.prefill
            ratios += [] if step.prefill else [engine.new_token_ratio]
    assert found.ratio == pytest.approx(float(np.mean(ratios)), abs=0.04)
    assert found.requests == pytest.approx(ended / len(ratios), rel=0.05)
    assert found.passes == pytest.approx(prefills / ended, rel=0.06)


@pytest.mark.parametrize(
    ("law", "bounds", "within"),
    [
        (WIDE, limits(8192), 0.012),
        (WIDE, limits(8192, page=16), 0.012),
        (WIDE, limits(8192, async_scheduling=True), 0.012),
        (WIDE, limits(8192, radix_cache=False), 0.012),
        (WIDE, limits(8192, max_num_seqs=40), 0.012),
        (WIDE, limits(8192, max_num_seqs=58), 0.012),
        (uniform((256, 768), (8, 24)), limits(16_384, chunk=512), 0.02),
        (early(WIDE, 3.0), limits(8192), 0.02),
        (early(WIDE), limits(32_768), 0.03),
        (uniform((50, 150), (1, 8)), limits(8192), 0.04),
        (uniform((256, 768), (1, 15)), limits(16_384), 0.03),
        (uniform((512, 1536), (32, 96)), limits(32_768, chunk=None, max_prefill_tokens=512), 0.02),
        (declared(early(DECODE), max_tokens=1000), limits(32_768), 0.02),
        (uniform((100, 500), (100, 500)), limits(2048), 0.06),
        (uniform((100, 500), (100, 500)), limits(16_384, page=64), 0.012),
    ],
)
def test_closed_form_against_the_scheduler(
    law: Workload, bounds: EngineLimits, within: float
) -> None:
    closed = predict(law, bounds, exact_step_time(LAW), "engine", "P0").critical_rate
    simulated = simulated_rate(law, bounds, LAW, requests=4000, overload=1.15)
    assert closed.value == pytest.approx(simulated.value, rel=within)


@pytest.mark.parametrize("bounds", [limits(8192), EngineLimits(num_blocks=512, block_size=16)])
def test_the_mechanisms_multiply_to_the_engines_rate(bounds: EngineLimits) -> None:
    paper, mechanisms = waterfall(WIDE, bounds, LAW, chunk=2048)
    engine = predict(WIDE, bounds, exact_step_time(LAW), "engine", "P0").critical_rate.value
    assert paper * np.prod([m.factor for m in mechanisms]) == pytest.approx(engine)
    stated = replace(bounds, num_blocks=bounds.pool_tokens, block_size=1)
    claimed = predict(WIDE, stated, exact_step_time(LAW), "paper", "P0", chunk=2048).critical_rate
    assert paper == pytest.approx(claimed.value)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("law", [WIDE, DECODE, uniform((200, 600), (2, 4))])
def test_the_chance_to_fall_on_is_that_of_the_walk(law: Workload, ratio: float) -> None:
    """Played without admissions: completions come one at a time, what is held grows in between."""
    demand = reserved_demand(early(law), limits(100_000), ratio)
    charges = Charges(
        asked=demand.asked,
        charged=demand.declared,
        kept=demand.kept,
        released=demand.kept + (1 - ratio) * demand.decode_steps,
    )
    eta = ruin_exponent(law, charges)
    grown = law.mean(charges.released - charges.kept)
    rng = np.random.default_rng(3)
    weight = law.weight / law.weight.sum()
    falls, paths, steps = 2 / eta, 4000, 400
    jumps = charges.released[rng.choice(len(weight), (paths, steps), p=weight)]
    down = grown * rng.exponential(size=(paths, steps))
    room = np.cumsum(np.concatenate([-down[:, :1], jumps[:, :-1] - down[:, 1:]], axis=1), axis=1)
    fell = float((room.min(axis=1) < -falls).mean())
    # Four standard errors of a share of exp(-2) in 4 000.
    assert fell == pytest.approx(np.exp(-2), abs=0.022)
