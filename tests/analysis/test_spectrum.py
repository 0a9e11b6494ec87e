"""Spectra of a full pool: weights against a count by hand, roots against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.theory.spectrum import Root, largest_root, survival_weights

ONE = np.ones(1)


def counted(
    prompts: list[int], outputs: list[int], shares: list[float], first: int, block: int
) -> list[float]:
    """W_j by its definition."""
    return [
        sum(
            p * block * math.ceil((s + first + j) / block)
            for s, o, p in zip(prompts, outputs, shares, strict=True)
            if o > j
        )
        for j in range(max(outputs))
    ]


@pytest.mark.parametrize(("first", "block"), [(1, 1), (0, 1), (0, 16), (1, 5)])
def test_weights_are_what_requests_hold_on_average(first: int, block: int) -> None:
    prompts, outputs, shares = [10, 40, 7], [3, 20, 20], [0.5, 0.2, 0.3]
    found = survival_weights(
        np.array(prompts, float),
        np.array(outputs),
        np.array(shares),
        first=first,
        block_size=block,
    )
    assert found == pytest.approx(counted(prompts, outputs, shares, first, block))


@pytest.mark.parametrize(("prompt", "output"), [(1, 40), (100, 100), (400, 40), (5000, 3)])
def test_every_wave_of_fixed_lengths_grows_within_the_bounds_of_enestrom_and_kakeya(
    prompt: int, output: int
) -> None:
    root = largest_root(survival_weights(prompt, np.array([output]), ONE))
    assert root.growing == output - 1 and not root.stable
    assert 1 + 1 / (prompt + output - 1) - 1e-12 <= root.modulus <= 1 + 1 / (prompt + 1) + 1e-12
    assert prompt <= root.e_folding_iterations <= prompt + output


@pytest.mark.parametrize("outputs", [[6, 9, 15], [4, 8, 20], [5, 7], [10, 15, 21]])
def test_with_long_prompts_as_many_waves_grow_as_the_common_divisor_says(
    outputs: list[int],
) -> None:
    found = largest_root(
        survival_weights(1e7, np.array(outputs), np.full(len(outputs), 1 / len(outputs)))
    )
    assert found.growing == np.gcd.reduce(outputs) - 1


def test_reserved_fixed_lengths_are_neutral() -> None:
    """As with `max_num_seqs`: a wave neither grows nor dies out."""
    root = largest_root(survival_weights(64, np.array([64]), ONE, reserved_tokens=np.array([64.0])))
    assert root.modulus == pytest.approx(1, abs=1e-9)
    assert root.growing == 0 and not root.stable
    assert root.e_folding_iterations > 1e6


@pytest.mark.parametrize("prompt", [10, 100, 1000])
def test_uniform_outputs_are_stable(prompt: int) -> None:
    """theory.md 3.3: 0.978 to 0.9996 for outputs of 1 to 200 tokens and such."""
    root = largest_root(survival_weights(prompt, np.arange(1, 201), np.full(200, 1 / 200)))
    assert root.stable and 0.97 < root.modulus < 1


def test_published_mixes() -> None:
    """theory.md 3.4: lengths mixed until nothing is common to them are stable, the parts are not."""

    def modulus(*outputs: int) -> float:
        shares = np.full(len(outputs), 1 / len(outputs))
        return largest_root(survival_weights(300, np.array(outputs), shares)).modulus

    assert modulus(5, 6, 10, 12) == pytest.approx(0.945, abs=5e-4)
    assert modulus(5, 10) == pytest.approx(1.0033, abs=5e-5)
    assert modulus(6, 12) > 1


def test_the_root_solves_its_equation() -> None:
    weights = survival_weights(20, np.array([7, 11, 13]), np.array([0.2, 0.5, 0.3]))
    z = largest_root(weights).value
    assert abs(np.polyval(weights, z)) < 1e-9 * weights.sum() * abs(z) ** 12


def test_requests_of_one_iteration_have_no_waves() -> None:
    assert largest_root(np.array([3.0])) == Root(0j, 0)
    assert Root(0j, 0).stable and Root(0j, 0).e_folding_iterations == 0


@pytest.mark.parametrize(("value", "period"), [(-1.2 + 0j, 2), (1j, 4), (0.5 + 0j, math.inf)])
def test_periods(value: complex, period: float) -> None:
    assert Root(value, 0).period_iterations == pytest.approx(period)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        survival_weights(1, np.array([0, 3]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="positive"):
        largest_root(np.array([1.0, 0.0]))
