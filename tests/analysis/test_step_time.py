"""The fitted step-time law: exact without noise, honest with it, physical always."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.schedulers.step_time import (
    StepObservation,
    StepTime,
    StepTimeFit,
    exact_step_time,
    fit_step_time,
)

LAW = StepTime(b0_s=0.008, b1_s_per_token=30e-6, b2_s_per_kv_token=0.12e-6, b3_s_per_request=10e-6)
SATURATED = np.array([1.0, 400.0, 40_000.0, 100.0])


def calibration(
    rng: np.random.Generator, law: StepTime, noise: float, count: int = 24
) -> list[StepObservation]:
    """Decode stretches of several batch sizes and contexts, and prompts alone."""
    observations = []
    for i in range(count):
        if i % 3:
            running, steps = float(rng.integers(1, 33)), 50.0
            context = float(rng.integers(50, 1500))
            tokens, kv, overheads = steps * running, steps * running * context, 0.0
        else:
            running, steps, overheads = 1.0, 1.0, 1.0
            tokens = kv = float(rng.integers(100, 4000))
        duration = steps * law(tokens / steps, kv / steps, running) + 0.004 * overheads
        observations.append(
            StepObservation(
                duration_s=duration * (1 + noise * rng.standard_normal()),
                steps=steps,
                tokens=tokens,
                kv_tokens=kv,
                running=steps * running,
                overheads=overheads,
            )
        )
    return observations


def test_without_noise_the_law_comes_back() -> None:
    fit = fit_step_time(calibration(np.random.default_rng(1), LAW, 0.0))
    assert fit.law.coefficients() == pytest.approx(LAW.coefficients(), rel=1e-6)
    assert fit.overhead_s == pytest.approx(0.004, rel=1e-6)
    assert fit.residual_relative < 1e-9 and fit.num_observations == 24


@pytest.mark.parametrize("noise", [0.005, 0.03])
@pytest.mark.parametrize(
    ("law", "terms"),
    [
        (LAW, ("b0", "b1", "b2", "b3")),
        (StepTime(b0_s=0.008, b1_s_per_token=30e-6, b2_s_per_kv_token=0.12e-6), ("b0", "b1", "b2")),
        (StepTime(b0_s=0.03), ("b0", "b1", "b2", "b3")),
    ],
)
def test_the_interval_of_the_saturated_step_time_covers(
    law: StepTime, terms: tuple[str, ...], noise: float
) -> None:
    rng = np.random.default_rng(11)
    truth = law(*SATURATED[1:])
    covered, repeats = 0, 500
    for _ in range(repeats):
        value, error = fit_step_time(calibration(rng, law, noise), terms).combination(SATURATED)
        covered += abs(value - truth) <= 1.96 * error
    # Where the truth lies on the boundary the constraint makes the interval cover more, never less.
    on_boundary = any(getattr(law, name) == 0.0 for name in law.__slots__) and len(terms) == 4
    assert 0.93 <= covered / repeats <= (1.0 if on_boundary else 0.995)


def test_few_observations_widen_the_interval() -> None:
    rng = np.random.default_rng(5)
    truth, covered = LAW(*SATURATED[1:]), 0
    for _ in range(400):
        fit = fit_step_time(calibration(rng, LAW, 0.01, count=9))
        value, error = fit.combination(SATURATED)
        covered += abs(value - truth) <= 1.96 * error
    assert covered / 400 >= 0.93


def test_no_coefficient_is_negative_and_a_dropped_one_keeps_its_error() -> None:
    rng = np.random.default_rng(3)
    fits = [fit_step_time(calibration(rng, StepTime(b0_s=0.03), 0.02)) for _ in range(50)]
    assert all((fit.law.coefficients() >= 0).all() for fit in fits)
    dropped = [fit for fit in fits if "held at zero" in fit.method]
    assert dropped
    for fit in dropped:
        assert (np.diag(fit.covariance) > 0).all()


def test_the_errors_scale_with_the_noise() -> None:
    errors = [
        fit_step_time(calibration(np.random.default_rng(2), LAW, noise)).combination(SATURATED)[1]
        for noise in (0.005, 0.01)
    ]
    assert errors[1] / errors[0] == pytest.approx(2.0, rel=0.1)


def test_a_known_error_takes_weight_away() -> None:
    good = calibration(np.random.default_rng(4), LAW, 0.002)
    bad = [
        StepObservation(
            duration_s=3.0, steps=50, tokens=50, kv_tokens=5000, running=50, standard_error_s=50.0
        )
    ]
    with_bad, without = fit_step_time(good + bad), fit_step_time(good)
    assert with_bad.law.coefficients() == pytest.approx(without.law.coefficients(), rel=0.05)


def test_a_stated_law_is_exact() -> None:
    fit = exact_step_time(LAW)
    value, error = fit.combination(SATURATED)
    assert isinstance(fit, StepTimeFit)
    assert value == pytest.approx(LAW(*SATURATED[1:])) and error == 0.0


def test_what_cannot_be_fitted_is_refused() -> None:
    observations = calibration(np.random.default_rng(1), LAW, 0.01)
    with pytest.raises(ValueError, match="at least 6"):
        fit_step_time(observations[:5])
    decode = [o for o in observations if o.overheads == 0]
    with pytest.raises(ValueError, match="cannot tell"):
        fit_step_time(decode)
    assert fit_step_time(decode, ("b0", "b1", "b2")).law.b3_s_per_request == 0.0
    with pytest.raises(ValueError, match="terms must be"):
        fit_step_time(observations, ("b0", "b7"))
    with pytest.raises(ValueError, match="positive duration"):
        StepObservation(duration_s=0.0, steps=1, tokens=1, kv_tokens=1, running=1)
    with pytest.raises(ValueError, match="four weights"):
        exact_step_time(LAW).combination([1.0, 2.0])
