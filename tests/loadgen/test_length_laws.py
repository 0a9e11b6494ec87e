"""Laws on bounded grids against what they stand for: moments, correlation, truncation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import lognorm, norm

from loadgen.length_laws import BINS, binned, lognormal, marginals
from loadgen.workload import Workload


def moments(law: Workload) -> NDArray[np.float64]:
    """E[s], E[o], E[s^2], E[o^2], E[s o], E[s o^2]."""
    s, o = law.prompt_tokens.astype(float), law.output_tokens.astype(float)
    return np.array([law.mean(v) for v in (s, o, s * s, o * o, s * o, s * o * o)])


def quadrature(  # type: ignore[no-untyped-def]
    prompt, output, correlation, prompt_bounds, output_bounds, nodes=2000
) -> tuple[float, NDArray[np.float64]]:
    """Mass within the bounds and the same moments of the rounded log-normal pair: midpoints of two
    independent normals, each of them rounded on its own."""
    (mu_s, sigma_s), (mu_o, sigma_o) = (
        (math.log(mean / math.sqrt(1 + cv * cv)), math.sqrt(math.log(1 + cv * cv)))
        for mean, cv in (prompt, output)
    )
    rho = math.log(1 + correlation * prompt[1] * output[1]) / (sigma_s * sigma_o)
    edges = np.linspace(-7.5, 7.5, nodes + 1)
    z, p = (edges[1:] + edges[:-1]) / 2, np.diff(norm.cdf(edges))
    total = np.zeros(7)
    for z_s, p_s, s in zip(z, p, np.rint(np.exp(mu_s + sigma_s * z)), strict=True):
        if not prompt_bounds[0] <= s <= prompt_bounds[1]:
            continue
        o = np.rint(np.exp(mu_o + sigma_o * (rho * z_s + math.sqrt(1 - rho**2) * z)))
        kept = (output_bounds[0] <= o) & (o <= output_bounds[1])
        a, b, c = (float(p_s * p[kept] @ o[kept] ** k) for k in (0, 1, 2))
        total += [a, s * a, b, s * s * a, c, s * b, s * c]
    return float(total[0]), total[1:] / total[0]


WIDE = (1, 100_000)


@pytest.mark.parametrize(
    ("prompt", "output", "correlation", "prompt_bounds", "output_bounds"),
    [
        ((512, 1.0), (128, 0.7), 0.2, (1, 4096), (1, 1024)),
        ((1155, 0.95), (211, 0.75), -0.11, (1, 16_384), (1, 1000)),
        ((1000, 2.0), (500, 2.0), 0.8, WIDE, (1, 20_000)),
        ((1000, 2.0), (500, 2.0), -0.15, WIDE, (1, 20_000)),
        ((3000, 0.3), (300, 1.5), -0.3, (1, 4096), (1, 4096)),
        ((8, 1.0), (5, 1.0), 0.5, (1, 60), (2, 60)),
        ((4000, 0.05), (300, 0.5), 0.0, (500, 15_000), (10, 1000)),
    ],
)
def test_a_lognormal_grid_has_the_moments_of_the_rounded_pair(  # type: ignore[no-untyped-def]
    prompt, output, correlation, prompt_bounds, output_bounds
) -> None:
    arguments = (prompt, output, correlation, prompt_bounds, output_bounds)
    law = lognormal(*arguments)
    mass, expected = quadrature(*arguments)
    assert law.exact and len(law.weight) <= (4 * BINS) ** 2
    assert moments(law)[:5] == pytest.approx(expected[:5], rel=2e-3)
    assert moments(law)[5] == pytest.approx(expected[5], rel=5e-3)
    cut = float(law.notes[0].split(" cut ")[1].split(" %")[0]) / 100
    assert cut == pytest.approx(1 - mass, rel=0.02, abs=1e-4)


def test_without_bounds_that_cut_the_moments_are_those_of_the_continuous_law() -> None:
    law = lognormal((2000, 0.5), (400, 0.4), 0.3, WIDE, WIDE)
    s, o, ss, oo, so = moments(law)[:5]
    assert (s, o) == pytest.approx((2000, 400), rel=1e-4)
    assert (ss, oo) == pytest.approx((2000**2 * 1.25, 400**2 * 1.16), rel=1e-3)
    # Pearson's correlation of the lengths, not of their logarithms.
    assert so == pytest.approx(2000 * 400 * (1 + 0.3 * 0.5 * 0.4), rel=1e-3)


@pytest.mark.parametrize("correlation", [-0.3, 0.0, 0.3])
def test_the_correlation_has_the_size_and_sign_that_was_asked(correlation: float) -> None:
    law = lognormal((800, 0.8), (300, 0.6), correlation, (1, 50_000), (1, 50_000))
    s, o, ss, oo, so = moments(law)[:5]
    found = (so - s * o) / math.sqrt((ss - s * s) * (oo - o * o))
    assert found == pytest.approx(correlation, abs=0.005)


def test_truncation_conditions_on_the_bounds() -> None:
    law = lognormal((1000, 1.0), (100, 0.5), 0.0, (200, 1500), (50, 51))
    assert (law.prompt_tokens.min(), law.prompt_tokens.max()) == (200, 1500)
    assert set(law.output_tokens) == {50, 51}
    sigma = math.sqrt(math.log(2))
    continuous = lognorm(sigma, scale=1000 / math.sqrt(2))
    expected = continuous.expect(lambda x: x, lb=199.5, ub=1500.5, conditional=True)
    assert law.mean(law.prompt_tokens) == pytest.approx(expected, rel=1e-4)
    assert "bounds [200, 1500] and [50, 51] cut 98" in law.notes[0]
    assert f"leave means of {expected:.4g} / " in law.notes[0]


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(0.1, 3.0))
@example(seed=1522925, bins=40, power=2.7955568661969616)
@example(seed=1027, bins=39, power=1.0)
@settings(max_examples=60, deadline=None)
def test_bins_keep_total_mean_and_second_moment(seed: int, bins: int, power: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.unique((1 + 5000 * rng.random(500) ** power).astype(np.int64))
    probability = rng.random(len(values)) ** 3 * 0.37
    axis = binned(values, probability, bins)
    assert len(axis.probability) <= max(bins, len(values) if len(values) <= 4 * bins else 0)
    weight = axis.probability[axis.bin] * axis.within
    for power_of in (0, 1, 2):
        kept = weight @ axis.values.astype(float) ** power_of
        assert kept == pytest.approx(probability @ values.astype(float) ** power_of, rel=1e-9)
    assert (weight > 0).all()
    assert (axis.values >= axis.first[axis.bin]).all()
    assert (axis.values <= axis.last[axis.bin]).all()
    assert (axis.first[1:] > axis.last[:-1]).all()


def test_marginals_are_independent_and_bounded_in_size() -> None:
    rng = np.random.default_rng(3)
    prompt = np.arange(1, 40_001), rng.random(40_000) / np.arange(1, 40_001)
    output = np.arange(1, 3001), rng.random(3000)
    prompt, output = ((v, p / p.sum()) for v, p in (prompt, output))  # type: ignore[assignment]
    law = marginals(prompt, output, name="seen", source="two files")
    (s, p), (o, q) = prompt, output
    expected = [p @ s, q @ o, p @ s**2, q @ o**2, (p @ s) * (q @ o), (p @ s) * (q @ o**2)]
    assert moments(law) == pytest.approx(expected, rel=1e-8)
    assert law.exact and len(law.weight) <= (4 * BINS) ** 2
    assert law.source == "two files; prompt and output taken as independent"
    assert "prompt and output taken as independent" in law.notes[0]
    third = law.mean(law.prompt_tokens.astype(float) ** 3) / (p @ s.astype(float) ** 3) - 1
    assert law.notes[1].endswith(f"the third moves by {100 * third:+.3g} %")
    assert abs(third) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 1), (5, 1), 0, (1, 9), (1, 9)), "prompt: mean 0 and cv 1 must be positive"),
        (((5, 1), (5, 0), 0, (1, 9), (1, 9)), "output: mean 5 and cv 0 must be positive"),
        (((5, 1), (5, 1), 0, (9, 1), (1, 9)), "1 <= low <= high"),
        (((5, 1), (5, 1), 0, (0, 9), (1, 9)), "1 <= low <= high"),
        (((5, 1), (5, 1), 0, (1, 10**9), (1, 9)), "span at most 2000000"),
        (((5, 1), (5, 1), -0.9, (1, 9), (1, 9)), "correlation between -0.4"),
        (((5, 0.1), (5, 0.1), 0, (900, 990), (1, 9)), "less than one in a million"),
        (((50, 1), (50, 1), 0.95, (1, 5), (300, 900)), "within both bounds"),
    ],
)
def test_laws_that_cannot_be(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        lognormal(*arguments)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (([1, 2], [0.5, 0.4]), "sum to 0.9, not to 1"),
        (([0, 2], [0.5, 0.5]), "at least 1"),
        (([], []), "at least 1"),
        (([1, 2], [1.5, -0.5]), "of the prompt lengths is negative"),
    ],
)
def test_marginals_that_are_none(prompt, message: str) -> None:  # type: ignore[no-untyped-def]
    good = np.array([1]), np.array([1.0])
    with pytest.raises(ValueError, match=message):
        marginals(tuple(map(np.array, prompt)), good, name="x", source="y")  # type: ignore[arg-type]
