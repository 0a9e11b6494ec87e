"""Closed forms of service-induced congestion against one another, and against the steps."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.theory.cohorts import Law, growth_per_iteration, run, spaced
from analysis.theory.congestion import (
    CRITICAL_CV,
    bell,
    cohort_evictions,
    cohort_rate,
    common_divisor,
    critical_cv,
    eviction_free_rate,
    least_stable_prompt,
    request_area,
    tabled_critical_cv,
    worst_loss,
)
from analysis.theory.spectrum import largest_root
from harness.rehearsals.congestion_truth import closed_forms, spectra

LENGTHS = [(100, 100), (20, 200), (400, 40), (64, 64), (7, 1)]


def fixed(prompt: int, output: int) -> Law:
    return Law.of(prompt, np.array([output]), np.ones(1))


@pytest.mark.parametrize(("prompt", "output"), LENGTHS)
def test_closed_forms_agree_with_one_another(prompt: int, output: int) -> None:
    pool = 1e6
    best = eviction_free_rate(prompt, output, pool)
    assert request_area(prompt, output) == sum(prompt + 1 + j for j in range(output))
    assert cohort_rate(prompt, output, pool, output) == pytest.approx(best)
    assert cohort_evictions(prompt, output, output) == 0
    worst = cohort_rate(prompt, output, pool, 1)
    assert 1 - worst / best == pytest.approx(worst_loss(prompt, output))
    assert worst_loss(1, 10**6) == pytest.approx(0.5, abs=1e-5)
    rates = [cohort_rate(prompt, output, pool, k) for k in range(1, output + 1) if output % k == 0]
    assert rates == sorted(rates)


def test_cohorts_that_cannot_be_spaced() -> None:
    with pytest.raises(ValueError, match="3 cohorts cannot be spaced"):
        cohort_rate(10, 100, 1e6, 3)


@pytest.mark.parametrize(("prompt", "output", "cohorts"), [(64, 64, 4), (20, 200, 5), (400, 40, 1)])
def test_spaced_cohorts_do_what_the_closed_forms_say(
    prompt: int, output: int, cohorts: int
) -> None:
    pool = 1e6
    law = fixed(prompt, output)
    steps = run(law, pool, spaced(law, pool, cohorts), 2 * output)
    rate = cohort_rate(prompt, output, pool, cohorts)
    assert steps.completed.mean() == pytest.approx(rate, rel=1e-9)
    evictions = steps.evicted.sum() / steps.completed.sum()
    assert evictions == pytest.approx(cohort_evictions(prompt, output, cohorts), rel=1e-9)
    assert steps.held_tokens == pytest.approx(pool)


def test_the_worst_cycle_is_where_a_pool_ends_up() -> None:
    for found in closed_forms(((64, 64),)):
        assert abs(found.off) < 0.01, found


@pytest.mark.parametrize(("share", "evicts"), [(0.98, False), (1.02, True)])
def test_a_cap_below_x_star_keeps_evictions_away(share: float, evicts: bool) -> None:
    pool, law = 1e6, fixed(20, 60)
    best = eviction_free_rate(20, 60, pool)
    steps = run(law, pool, np.zeros(60), 4000, cap=share * best)
    late = slice(2000, None)
    assert bool(steps.evicted[late].sum() > 0) is evicts
    assert bool(steps.completed[late].mean() > 0.979 * best) is not evicts


@pytest.mark.parametrize("outputs", [[64], [5, 6, 10, 12], list(range(3, 40))])
def test_requests_are_conserved_and_the_pool_is_never_exceeded(outputs: list[int]) -> None:
    law = Law.of(30, np.array(outputs), np.full(len(outputs), 1 / len(outputs)))
    start = law.equilibrium(1e5) * np.linspace(0, 2, len(law.weights))
    steps = run(law, 1e5, start, 500)
    before, after = float(law.alive @ start), float(law.alive @ steps.cohorts)
    gone = steps.completed.sum() + steps.evicted.sum()
    assert before + steps.admitted.sum() == pytest.approx(after + gone)
    assert steps.held_tokens.max() <= 1e5 * (1 + 1e-9)


def test_spectra_tell_which_disturbances_grow() -> None:
    for found in spectra(5):
        assert found.right, found
        assert found.simulated == pytest.approx(found.root, abs=5e-3)


def test_growth_needs_a_small_disturbance() -> None:
    with pytest.raises(ValueError, match="smaller"):
        growth_per_iteration(fixed(10, 20), np.linspace(-0.5, 0.5, 20), 400)


def test_the_prompt_that_calms_neighbouring_lengths_grows_with_their_cube() -> None:
    """theory.md 3.3: 0.12 to 0.2 times the cube of the longer one."""
    for longer, share in ((5, 0.115), (17, 0.182), (33, 0.193)):
        assert least_stable_prompt(longer - 1) / longer**3 == pytest.approx(share, abs=1e-3)
    assert least_stable_prompt(1) == pytest.approx(0, abs=1)
    with pytest.raises(ValueError, match="at least one token"):
        least_stable_prompt(0)


def test_critical_spread() -> None:
    for ratio, expected in CRITICAL_CV[3:5]:
        assert critical_cv(40 * ratio, 40) == pytest.approx(expected, abs=5e-3)
        assert tabled_critical_cv(100 * ratio, 100) == pytest.approx(expected)
    assert CRITICAL_CV[3][1] > tabled_critical_cv(150, 100) > CRITICAL_CV[4][1]
    assert tabled_critical_cv(1, 1e6) == pytest.approx(CRITICAL_CV[0][1])


def test_bell_shaped_lengths() -> None:
    outputs, shares = bell(64, 0.2)
    mean = float(shares @ outputs)
    assert mean == pytest.approx(64, abs=0.1)
    assert float(shares @ (outputs - mean) ** 2) ** 0.5 / mean == pytest.approx(0.2, abs=2e-3)
    narrow = largest_root(Law.of(64, *bell(40, 0.1)).weights)
    wide = largest_root(Law.of(64, *bell(40, 0.3)).weights)
    assert not narrow.stable and wide.stable


def test_common_divisor() -> None:
    assert common_divisor(np.array([128, 256, 512])) == 128
    assert common_divisor(np.array([127, 255, 509])) == 1
