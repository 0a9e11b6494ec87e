"""Flow control: the conditions of arXiv 2604.11001 against the slot model."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.slot_models.slots import Load, run_slots
from analysis.theory.flow_control import class_budgets_hold, mean_queue, needed_memory, overflow

PROMPTS, OUTPUTS = np.array([10, 10, 10]), np.array([20, 40, 60])
BUDGETS = np.array([4, 4, 4])
MEMORY = 16_492


def poisson_load(rates: list[float], slots: int, seed: int) -> Load:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rates, (slots, len(rates)))
    lane = np.repeat(np.tile(np.arange(len(rates)), slots), counts.ravel())
    return Load(
        arrival_slot=np.repeat(np.arange(slots), counts.sum(axis=1)),
        prompt_tokens=PROMPTS[lane],
        output_tokens=OUTPUTS[lane],
        lane=lane,
    )


def test_the_published_numbers() -> None:
    found = class_budgets_hold(BUDGETS, np.full(3, 5.0), PROMPTS, OUTPUTS, MEMORY)
    assert (found.peak_tokens, found.fits, found.drains, found.drift) == (16_240, True, False, 3.0)
    assert MEMORY / needed_memory(np.ones(3), PROMPTS, OUTPUTS) == pytest.approx(4.0621, abs=1e-4)
    assert class_budgets_hold(BUDGETS, np.full(3, 3.9), PROMPTS, OUTPUTS, MEMORY).stable
    assert not class_budgets_hold(BUDGETS, np.full(3, 3.9), PROMPTS, OUTPUTS, 16_239).stable


def test_classes_do_not_touch_each_other_and_memory_is_filled_to_the_bound() -> None:
    """Q_t = (Q_{t-1} + n_t - b)+ for each class, slot for slot."""
    slots = 400
    load = poisson_load([5.0, 4.5, 3.0], slots, 1)
    run = run_slots("class_budgets", MEMORY, load, slots, BUDGETS[None])
    total = np.zeros(slots, np.int64)
    for lane in range(3):
        arrived = np.bincount(load.arrival_slot[load.lane == lane], minlength=slots)
        queue = 0
        for t in range(slots):
            queue = max(queue + int(arrived[t]) - 4, 0)
            total[t] += queue
    np.testing.assert_array_equal(run.slots["waiting"], total)
    full = run_slots("class_budgets", MEMORY, poisson_load([9.0] * 3, 100, 2), 100, BUDGETS[None])
    assert full.slots["used_tokens"].max() == 16_240 and not full.slots["overflow"].any()


def test_no_overflow_in_a_million_slots() -> None:
    pytest.importorskip("numba")
    slots = 1_000_000
    rng = np.random.default_rng(3)
    counts = rng.poisson(0.8, (slots, 2))
    lane = np.repeat(np.tile([0, 1], slots), counts.ravel())
    prompts, outputs, budgets = np.array([3, 1]), np.array([2, 3]), np.array([1, 1])
    memory = int(budgets @ (prompts * outputs + outputs * (outputs + 1) // 2))
    load = Load(
        arrival_slot=np.repeat(np.arange(slots), counts.sum(axis=1)),
        prompt_tokens=prompts[lane],
        output_tokens=outputs[lane],
        lane=lane,
    )
    run = run_slots("class_budgets", memory, load, slots, budgets[None])
    assert not run.slots["overflow"].any()
    assert run.slots["used_tokens"].max() == memory, "the bound is reached, so that it is sharp"
    assert run.slots["waiting"].mean() == pytest.approx(2 * mean_queue(0.8, 1), rel=0.05)


@pytest.mark.parametrize(("rate", "budget"), [(3.0, 4), (0.7, 1)])
def test_the_mean_queue_is_that_of_its_markov_chain(rate: float, budget: int) -> None:
    size = 120
    arrivals = np.exp(
        -rate + np.arange(size) * np.log(rate) - np.cumsum(np.log(np.maximum(np.arange(size), 1)))
    )
    queue = np.zeros(size)
    queue[0] = 1.0
    for _ in range(400):
        full = np.convolve(queue, arrivals)[:size]
        queue = np.append(full[budget:], np.zeros(budget))
        queue[0] += full[:budget].sum()
    assert mean_queue(rate, budget) == pytest.approx(queue @ np.arange(size), rel=2e-3)
    assert np.isinf(mean_queue(float(budget), budget))


def test_overflow_of_drawn_budgets() -> None:
    """Mean and variance of usage against the slot model without a memory that could bind."""
    pytest.importorskip("numba")
    slots, rng = 60_000, np.random.default_rng(4)
    shares = np.full(4, 0.25)
    prompts, outputs, law = np.array([5, 20]), np.array([12, 6]), np.array([0.4, 0.6])
    drawn = rng.choice(2, 3 * slots, p=law)
    load = Load(
        arrival_slot=np.zeros(3 * slots, np.int64),
        prompt_tokens=prompts[drawn],
        output_tokens=outputs[drawn],
        lane=np.zeros(3 * slots, np.int64),
    )
    run = run_slots("flow_control", 10**6, load, slots, rng.integers(0, 4, (slots, 1)))
    used = run.slots["used_tokens"][100:]
    found = overflow(shares, prompts, outputs, law, 350)
    assert used.mean() == pytest.approx(found.mean_tokens, rel=0.01)
    assert used.std() == pytest.approx(found.deviation_tokens, rel=0.02)
    for memory in (300, 350, 400):
        found = overflow(shares, prompts, outputs, law, memory)
        seen = float((used > memory).mean())
        assert seen <= found.hoeffding
        assert seen == pytest.approx(found.gaussian, abs=0.02)
    never = overflow(np.array([0.0, 1.0]), prompts[:1], outputs[:1], np.ones(1), 139)
    assert never.mean_tokens == 138
    assert (never.deviation_tokens, never.gaussian, never.hoeffding) == (0.0, 0.0, 0.0)
