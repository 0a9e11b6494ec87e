"""The slot model: conservation, the compiled loop against the plain one, closed forms of policies."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.slot_models.policies import POLICIES
from analysis.slot_models.slots import Load, SlotRun, check_conservation, evenly, run_slots

MEMORY = 400


def load(requests: int, slots: int, seed: int, by: str = "one", rate: float | None = None) -> Load:
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.integers(0, slots if rate is None else int(requests / rate), requests))
    prompt = rng.integers(1, 30, requests)
    output = rng.choice([1, 5, 9, 20, 40], requests)
    lane = {
        "one": np.zeros(requests, np.int64),
        "output": np.searchsorted([1, 5, 9, 20, 40], output),
        "class": rng.integers(0, 3, requests),
    }[by]
    return Load(arrival_slot=arrival, prompt_tokens=prompt, output_tokens=output, lane=lane)


def fixed(requests: int, prompt: int, output: int) -> Load:
    """A backlog from the first slot on."""
    return Load(
        arrival_slot=np.zeros(requests, np.int64),
        prompt_tokens=np.full(requests, prompt),
        output_tokens=np.full(requests, output),
        lane=np.zeros(requests, np.int64),
    )


def budgets_of(policy: str, kind: str, seed: int) -> NDArray[np.int64] | None:
    if policy == "class_budgets":
        return np.array([[1, 2, 0], [0, 1, 1]])
    if kind == "none":
        return None
    return np.random.default_rng(seed).integers(0, 4, (7, 1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("by", ["one", "output", "class"])
@pytest.mark.parametrize("kind", ["none", "drawn"])
def test_compiled_equals_plain_slot_for_slot(policy: str, by: str, kind: str) -> None:
    pytest.importorskip("numba")
    if policy == "class_budgets" and by == "output":
        pytest.skip("class_budgets has a budget for each class")
    for seed in range(3):
        offered = load(260, 200, seed, by)
        budgets = budgets_of(policy, kind, seed)
        plain, fast = (
            run_slots(policy, MEMORY, offered, 320, budgets, compiled) for compiled in (False, True)
        )
        for name in plain.slots.dtype.names or ():
            np.testing.assert_array_equal(fast.slots[name], plain.slots[name], err_msg=name)
        np.testing.assert_array_equal(fast.finished_slot, plain.finished_slot)
        np.testing.assert_array_equal(fast.evictions, plain.evictions)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_lost_or_made_up(policy: str, compiled: bool) -> None:
    if compiled:
        pytest.importorskip("numba")
    for seed in range(4):
        offered = load(400, 300, seed, "class" if policy == "class_budgets" else "one")
        run = run_slots(policy, MEMORY, offered, 350, budgets_of(policy, "none", seed), compiled)
        check_conservation(run, None if policy == "class_budgets" else MEMORY)
        if policy in ("look_ahead", "reserve_peak", "class_budgets"):
            assert run.evictions.sum() == 0
        elif policy != "flow_control":
            assert run.evictions.sum() > 0, "a test without evictions tests too little"


def test_a_run_that_ends_has_served_all() -> None:
    offered = load(150, 100, 1)
    run = run_slots("greedy_restart", MEMORY, offered, 3000, compiled=False)
    assert (run.finished_slot >= 0).all()
    area = run.slots["used_tokens"].sum() - run.slots["lost_token_slots"].sum()
    assert area == offered.work_token_slots.sum()
    assert run.slots["lost_token_slots"].sum() > 0


def saturated(policy: str, prompt: int, output: int, memory: int, slots: int) -> SlotRun:
    return run_slots(
        policy, memory, fixed(int(2 * memory * slots / (output * prompt)), prompt, output), slots
    )


@pytest.mark.parametrize("policy", ["greedy_restart", "look_ahead", "reserve_peak"])
@pytest.mark.parametrize(("prompt", "output"), [(100, 100), (20, 200), (400, 40)])
def test_fixed_lengths_lock_into_the_worst_cycle(policy: str, prompt: int, output: int) -> None:
    """theta_1 = M / (l1 (l0 + l1)), arXiv 2606.15555, within the rounding to whole requests."""
    memory, slots = 100 * (prompt + output), 40 * output
    run = saturated(policy, prompt, output, memory, slots)
    done = run.slots["completed"][slots // 2 :].sum() / (slots / 2)
    assert done == pytest.approx(memory / (output * (prompt + output)), rel=0.02)


def test_a_cap_below_the_eviction_free_rate_evicts_nobody() -> None:
    prompt, output, memory = 100, 100, 20_000
    free = memory / (prompt * output + output * (output + 1) / 2)
    slots = 4000
    for share, evicts in ((0.97, False), (1.2, True)):
        run = run_slots(
            "greedy_restart",
            memory,
            fixed(8000, prompt, output),
            slots,
            evenly(share * free, slots),
        )
        assert (run.evictions.sum() > 0) == evicts
        if not evicts:
            done = run.slots["completed"][slots // 2 :].sum() / (slots / 2)
            assert done == pytest.approx(0.97 * free, rel=0.01)


def test_what_cannot_run_is_refused() -> None:
    offered = fixed(3, 30, 30)
    with pytest.raises(ValueError, match="never fits into 59"):
        run_slots("look_ahead", 59, offered, 10)
    with pytest.raises(ValueError, match="no policy 'greedy'"):
        run_slots("greedy", 100, offered, 10)
    with pytest.raises(ValueError, match="shape"):
        run_slots("class_budgets", 100, offered, 10, np.array([1]))
