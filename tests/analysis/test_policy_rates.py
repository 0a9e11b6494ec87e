"""Each policy's stability condition against its runs."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.inference.slot_growth import growth
from analysis.slot_models.policies import POLICIES
from analysis.slot_models.slots import Load, evenly, run_slots
from analysis.theory.policy_rates import (
    Law,
    eviction_free,
    growth_per_slot,
    stability,
    used_at_most,
)

FIXED = Law(prompt_tokens=np.array([30]), output_tokens=np.array([30]), shares=np.array([1.0]))
WIDE = Law(
    prompt_tokens=np.full(59, 30), output_tokens=np.arange(1, 60), shares=np.full(59, 1 / 59)
)
MEMORY = 1200


def offered(law: Law, rate: float, slots: int, seed: int) -> Load:
    rng = np.random.default_rng(seed)
    arrival = np.repeat(np.arange(slots), rng.poisson(rate, slots))
    drawn = rng.choice(len(law.shares), len(arrival), p=law.shares)
    return Load(
        arrival_slot=arrival,
        prompt_tokens=law.prompt_tokens[drawn],
        output_tokens=law.output_tokens[drawn],
        lane=np.zeros(len(arrival), np.int64),
    )


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "class_budgets"])
@pytest.mark.parametrize("law", [FIXED, WIDE], ids=["fixed", "wide"])
def test_stable_below_and_unstable_above(policy: str, law: Law) -> None:
    pytest.importorskip("numba")
    condition = stability(policy, law, MEMORY)
    assert 0 <= condition.below <= condition.above <= eviction_free(law, MEMORY)
    for rate, expected in ((0.93 * condition.below, "stable"), (1.1 * condition.above, "grows")):
        if not rate:
            continue
        slots = 12_000
        runs = [
            run_slots(policy, MEMORY, offered(law, rate, slots, seed), slots) for seed in (1, 2)
        ]
        numbers = [run.number_in_system[2000:].astype(float) for run in runs]
        assert growth(numbers, slots - 2000, rate, 1.6, "per slot").verdict == expected


def test_a_cap_is_exact_where_its_highest_use_fits() -> None:
    most = eviction_free(FIXED, MEMORY)
    for cap in (0.5, 0.7, 0.8):
        peak = used_at_most(FIXED, cap)
        found = stability("greedy_restart", FIXED, MEMORY, cap=cap)
        assert (found.below == cap) == (peak <= MEMORY)
        slots = 2000
        load = offered(FIXED, 3.0, slots, 1)
        run = run_slots("greedy_restart", MEMORY, load, slots, evenly(cap, slots), compiled=False)
        assert (run.slots["used_tokens"].max() == peak) == (peak <= MEMORY)
        assert bool(run.evictions.sum() or run.slots["overflow"].any()) == (peak > MEMORY)
    assert stability("greedy_restart", FIXED, MEMORY, cap=2 * most).above == most


def test_class_budgets() -> None:
    law = Law(
        prompt_tokens=np.array([10, 10]),
        output_tokens=np.array([20, 40]),
        shares=np.array([0.25, 0.75]),
    )
    found = stability("class_budgets", law, 10**5, budgets=np.array([2, 3]))
    assert found.below == found.above == 4.0
    assert stability("class_budgets", law, 100, budgets=np.array([2, 3])).below == 0.0
    with pytest.raises(ValueError, match="budget for each class"):
        stability("class_budgets", law, 100)


def test_fixed_lengths_grow_waves_and_wide_ones_do_not() -> None:
    assert growth_per_slot(FIXED) > 1 > growth_per_slot(WIDE)
