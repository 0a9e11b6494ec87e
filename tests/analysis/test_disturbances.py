"""Probes that something held up: how often one is called so, and what an interval covers then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.calibration.disturbances import disturbed, disturbed_share
from analysis.schedulers.step_time import StepObservation, StepTimeFit, fit_step_time

LAW = np.array([0.014, 1e-5, 4e-7, 1e-5])
SATURATED = np.array([1.0, 171.6, 7598.0, 74.8])
DESIGNS = {
    "alone": (1, 40, 1),
    "few": (25, 1000, 25),
    "short": (97, 3900, 97),
    "long": (7, 5700, 7),
    "medium": (19, 2900, 19),
    "half": (37, 3500, 37),
    "typical": (75, 5700, 75),
    "prompts": (110, 150, 1.3),
    "small prompts": (80, 900, 10),
}


def probes(rng: np.random.Generator, noise: float, repeats: int = 3) -> list[StepObservation]:
    seen = []
    for name, (tokens, kv, running) in DESIGNS.items():
        held = 64 * np.array([1.0, tokens, kv, running])
        for _ in range(repeats):
            duration_s = float(held @ LAW) * (1 + noise * rng.standard_normal())
            sums = dict(zip(("steps", "tokens", "kv_tokens", "running"), held, strict=True))
            seen.append(StepObservation(duration_s=duration_s, probe=name, **sums))
    return seen


def fitted(seen: list[StepObservation]) -> StepTimeFit:
    marked = [replace(o, disturbed=bool(far)) for o, far in zip(seen, disturbed(seen), strict=True)]
    fit = fit_step_time([o for o in marked if not o.disturbed])
    return replace(fit, disturbed_share=disturbed_share(marked))


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("repeats", [3, 10])
def test_normal_scatter_is_no_disturbance(noise: float, repeats: int) -> None:
    rng = np.random.default_rng(7)
    called = sum(bool(disturbed(probes(rng, noise, repeats)).any()) for _ in range(400))
    assert called < 3


def test_a_design_that_scatters_by_nature_keeps_most_of_its_repeats() -> None:
    """One of nine with 3 %, the others with 0.2 %: a far repeat is left out in some calibrations."""
    rng, called = np.random.default_rng(12), 0
    for _ in range(300):
        quiet, loud = probes(rng, 0.002, 6), probes(rng, 0.03, 6)
        seen = [b if a.probe == "prompts" else a for a, b in zip(quiet, loud, strict=True)]
        called += bool(disturbed(seen).any())
    assert called / 300 < 0.05


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_an_interval_covers_where_one_probe_was_held_up(noise: float) -> None:
    """By 10 % to 300 %: it is found, and the interval stays far narrower than with it."""
    rng, true_s = np.random.default_rng(8), float(SATURATED @ LAW)
    covered, found, widths = 0, 0, []
    for _ in range(400):
        seen = probes(rng, noise)
        held = int(rng.integers(len(seen)))
        factor = 1 + float(np.exp(rng.uniform(np.log(0.1), np.log(3))))
        seen[held] = replace(seen[held], duration_s=seen[held].duration_s * factor)
        found += bool(disturbed(seen)[held])
        value_s, error_s = fitted(seen).combination(SATURATED)
        covered += abs(value_s - true_s) <= 1.96 * error_s
        with_it = fit_step_time(seen).combination(SATURATED)[1]
        widths.append(error_s / with_it)
    assert covered / 400 >= 0.95
    assert found / 400 >= (0.99 if noise < 0.01 else 0.85)
    assert np.median(widths) < 0.5


def test_a_time_that_was_hidden_counts_like_one_that_was_lost() -> None:
    seen = probes(np.random.default_rng(9), 0.0)
    for factor in (0.7, 1.3):
        odd = [replace(seen[0], duration_s=factor * seen[0].duration_s), *seen[1:]]
        fit = fitted(odd)
        share = 0.3 * seen[0].duration_s / sum(o.duration_s for o in odd)
        assert fit.disturbed_share == pytest.approx(share)
        assert fit.combination(SATURATED)[1] == pytest.approx(share * (SATURATED @ LAW), rel=1e-6)


def test_what_happens_often_is_the_engines_own() -> None:
    """Three in ten take half as long again: that some of them are left out is the exception."""
    rng, left_out = np.random.default_rng(10), 0
    for _ in range(200):
        seen = [
            replace(o, duration_s=o.duration_s * (1.5 if rng.random() < 0.3 else 1.0))
            for o in probes(rng, 0.002)
        ]
        left_out += bool(disturbed(seen).any())
    assert left_out / 200 < 0.05


def test_of_two_repeats_none_is_the_wrong_one() -> None:
    seen = probes(np.random.default_rng(11), 0.002, repeats=2)
    seen[0] = replace(seen[0], duration_s=2 * seen[0].duration_s)
    assert not disturbed(seen).any()
