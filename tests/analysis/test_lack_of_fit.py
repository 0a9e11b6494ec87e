"""Is a step time linear? Error rates of the test and of the extrapolated interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import f_oneway

from analysis.calibration.probe_readings import step_observation
from analysis.calibration.probes import design_probes
from analysis.numbers.lack_of_fit import lack_of_fit
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepObservation, StepTime, fit_step_time
from loadgen.workload import uniform

LIMITS = EngineLimits(num_blocks=512, block_size=16, max_num_batched_tokens=2048)
LAW = StepTime(b0_s=0.014, b1_s_per_token=1e-5, b2_s_per_kv_token=4e-7, b3_s_per_request=1e-5)
SATURATED = np.array([1.0, 171.6, 7598.0, 74.8])
"""Steps, tokens, KV tokens and requests of a saturated step of this workload and pool."""
STEP_S = float(SATURATED @ LAW.coefficients())

Truth = Callable[[np.ndarray], float]


@pytest.fixture(scope="module")
def designs() -> list[StepObservation]:
    """One noiseless observation of each design that decodes."""
    seen = []
    for probe in design_probes(uniform((16, 112), (16, 112)), LIMITS):
        if probe.output_tokens == 1:
            continue
        lengths = [(probe.prompt_tokens, probe.output_tokens, probe.output_tokens)] * probe.count
        lengths += [(probe.prompt_length, 1, 1)] * probe.prompts
        arrivals = [0.0] * probe.count + [0.04 * (i + 1) for i in range(probe.prompts)]
        records = simulate(LIMITS, LAW, np.array(arrivals), np.array(lengths), 600.0).records
        seen.append(replace(step_observation(records), probe=probe.name))
    return seen


def linear(rng: np.random.Generator) -> Truth:
    b = LAW.coefficients() * np.array([1, *rng.uniform(0, 2, 3)])
    return lambda step: float(b @ step)


def bent(size: float) -> Callable[[np.random.Generator], Truth]:
    """One term, any of three, has a square that is up to ``size`` of the step time at saturation."""

    def make(rng: np.random.Generator) -> Truth:
        line, term = linear(rng), int(rng.integers(1, 4))
        square = rng.uniform(-size, size) * STEP_S
        return lambda step: line(step) + square * (step[term] / SATURATED[term]) ** 2

    return make


def bucketed(size: float) -> Callable[[np.random.Generator], Truth]:
    """Requests are padded to the next multiple of 8, 16 or 32, as captured graphs are."""

    def make(rng: np.random.Generator) -> Truth:
        line, bucket = linear(rng), float(rng.choice([8, 16, 32]))
        return lambda step: (
            line(step) + size * STEP_S * np.ceil(step[3] / bucket) * bucket / SATURATED[3]
        )

    return make


def rates(
    designs: list[StepObservation],
    truth: Callable[[np.random.Generator], Truth],
    noise: float,
    calibrations: int,
) -> tuple[float, float]:
    """Shares of calibrations that cover the saturated step time, and that call the law not linear."""
    rng = np.random.default_rng(20)
    covered = called = 0
    for _ in range(calibrations):
        step_s = truth(rng)
        observations = []
        for o in designs:
            held = np.array([o.steps, o.tokens, o.kv_tokens, o.running])
            duration_s = o.steps * step_s(held / o.steps)
            for _ in range(3):
                noisy = duration_s * (1 + noise * rng.standard_normal())
                observations.append(replace(o, duration_s=noisy))
        fit = fit_step_time(observations)
        value, error = fit.combination(SATURATED)
        covered += abs(value - step_s(SATURATED)) <= 1.96 * error
        assert fit.lack_of_fit is not None
        called += fit.lack_of_fit.seen
    return covered / calibrations, called / calibrations


def test_enough_designs_are_left_to_see_a_law_that_is_not_linear(designs) -> None:
    fit = fit_step_time([o for o in designs for _ in range(3)])
    assert fit.lack_of_fit is not None and fit.lack_of_fit.designs_dof >= 4
    assert fit.lack_of_fit.repeats_dof == 2 * len(designs)


@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_a_linear_law_is_covered_and_seldom_called_bent(designs, noise: float) -> None:
    covered, called = rates(designs, linear, noise, 400)
    assert 0.93 <= covered <= 0.99
    # Four standard errors of a count of 5 % in 400.
    assert 0.006 <= called <= 0.094


@pytest.mark.parametrize("noise", [0.002, 0.01])
@pytest.mark.parametrize("truth", [bent(0.02), bent(0.05), bucketed(0.03)])
def test_the_interval_holds_a_mild_bend(designs, truth, noise: float) -> None:
    assert rates(designs, truth, noise, 300)[0] >= 0.9


def test_a_bend_is_seen_where_repeats_agree(designs) -> None:
    assert rates(designs, bucketed(0.05), 0.002, 60)[1] > 0.8


def test_the_quotient_of_mean_squares_is_that_of_an_analysis_of_variance() -> None:
    rng = np.random.default_rng(4)
    groups = [rng.normal(size=n) for n in (3, 5, 4, 6)]
    names = [name for name, values in zip("abcd", groups, strict=True) for _ in values]
    residual = np.concatenate(groups)
    found = lack_of_fit(names, residual - residual.mean(), 1)
    expected = f_oneway(*groups)
    assert found is not None
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(
    ("probes", "width"), [(["a", "b"] * 4, 2), (["a", "b", "c", "d"], 2), (["a", "", "c"] * 4, 2)]
)
def test_without_designs_to_spare_there_is_no_test(probes: list[str], width: int) -> None:
    assert lack_of_fit(probes, np.linspace(-1, 1, len(probes)), width) is None


def test_few_designs_decide_with_their_own_degrees_of_freedom(designs) -> None:
    rng = np.random.default_rng(3)
    off = {o.probe: 1 + 0.05 * rng.standard_normal() for o in designs}
    fit = fit_step_time(
        [replace(o, duration_s=o.duration_s * off[o.probe]) for o in designs for _ in range(8)]
    )
    assert fit.interval_dof == len(designs) - 4
    assert fit.widening == pytest.approx(2.5706 / 1.95996, rel=1e-3)
