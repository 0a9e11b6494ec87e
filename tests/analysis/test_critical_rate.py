"""The prediction: the paper's printed numbers, its own invariants, and the simulated scheduler."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime, StepTimeFit, exact_step_time
from analysis.theory.critical_rate import Prediction, digest, mixture_rate, predict
from loadgen import workload as wl

PAPER_LIMITS = EngineLimits(num_blocks=131_000, block_size=1, max_num_batched_tokens=512)
LAW = exact_step_time(
    StepTime(b0_s=0.008, b1_s_per_token=30e-6, b2_s_per_kv_token=0.12e-6, b3_s_per_request=1e-5)
)


def limits(
    blocks: int = 200, seqs: int | None = 1000, budget: int | None = 2048, late: bool = False
) -> EngineLimits:
    return EngineLimits(
        num_blocks=blocks,
        block_size=16,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        async_scheduling=late,
    )


def paper(
    prompt: tuple[int, int], output: tuple[int, int], b: float, replicas: int = 1
) -> Prediction:
    law = exact_step_time(StepTime(b0_s=b))
    return predict(wl.uniform(prompt, output), PAPER_LIMITS, law, "paper", "P3", 512, replicas)


@pytest.mark.parametrize(
    ("prompt", "output", "b", "demand", "rate"),
    [
        ((10, 1600), (10, 1600), 0.0372, 1_079_151, 3.263),
        ((10, 2133), (10, 1066), 0.0430, 770_034, 3.956),
        ((10, 1066), (10, 2133), 0.0337, 1_339_675, 2.902),
    ],
)
def test_the_published_rates(
    prompt: tuple[int, int], output: tuple[int, int], b: float, demand: int, rate: float
) -> None:
    prediction = paper(prompt, output, b)
    assert round(prediction.kv_demand.value) == demand
    assert round(prediction.critical_rate.value, 3) == rate
    assert prediction.delta == pytest.approx(0.0244, abs=5e-5)
    assert prediction.lower == pytest.approx(rate * (1 - prediction.delta), rel=1e-3)
    assert prediction.step_time_s.value == pytest.approx(b)
    assert prediction.critical_rate.level == 1.0 and prediction.under_fill == 1.0
    assert [c.name for c in prediction.ceilings] == ["kv_cache"]


def test_mixed_regimes_and_replicas() -> None:
    # The paper prints 3.385 for the mixture, which no equal shares give, and 25.808 for 8 GPUs.
    assert round(mixture_rate([(0.5, 3.9563), (0.5, 2.9016)]), 3) == 3.348
    one = paper((10, 1600), (10, 1600), 0.0372)
    eight = paper((10, 1600), (10, 1600), 0.0372, replicas=8)
    assert eight.critical_rate.value == pytest.approx(8 * one.critical_rate.value)
    assert eight.lower == pytest.approx(8 * one.lower)
    assert eight.running == one.running and eight.step_time_s == one.step_time_s
    with pytest.raises(ValueError, match="sum to 1"):
        mixture_rate([(0.5, 3.0)])


def test_the_mixture_of_laws_has_the_harmonic_rate_at_constant_step_time() -> None:
    parts = [wl.uniform((10, 213), (10, 106)), wl.uniform((10, 106), (10, 213))]
    law = exact_step_time(StepTime(b0_s=0.03))
    rates = [predict(w, PAPER_LIMITS, law, "paper", "P1", 512).critical_rate.value for w in parts]
    mixed = predict(
        wl.mixture([(0.3, parts[0]), (0.7, parts[1])]), PAPER_LIMITS, law, "paper", "P1", 512
    )
    harmonic = mixture_rate([(0.3, rates[0]), (0.7, rates[1])])
    assert mixed.critical_rate.value == pytest.approx(harmonic)


@given(st.floats(0.01, 0.99), st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_mixture_lies_between_its_parts(share: float, one: float, other: float) -> None:
    mixed = mixture_rate([(share, one), (1 - share, other)])
    assert min(one, other) * (1 - 1e-9) <= mixed <= max(one, other) * (1 + 1e-9)


def test_the_linear_law_is_formula_star() -> None:
    law = LAW.law
    w = wl.uniform((10, 400), (10, 400))
    s, o = w.prompt_tokens, w.output_tokens
    found = predict(w, PAPER_LIMITS, LAW, "paper", "P1", 512)
    g = found.kv_demand.value
    inverse = (
        law.b0_s * g / 131_000
        + law.b1_s_per_token * w.mean(s + o - 1)
        + law.b2_s_per_kv_token * g
        + law.b3_s_per_request * w.mean(-(-s // 512) + o - 1)
    )
    assert 1 / found.critical_rate.value == pytest.approx(inverse)


WORKLOAD = wl.uniform((4, 60), (4, 60))


@given(blocks=st.integers(20, 600), more=st.integers(1, 100), late=st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_memory_never_serves_fewer_requests_per_step(
    blocks: int, more: int, late: bool
) -> None:
    found = [
        predict(
            WORKLOAD, limits(b, 60, late=late), exact_step_time(StepTime(b0_s=0.01)), "engine", "P1"
        )
        for b in (blocks, blocks + more)
    ]
    assert found[0].critical_rate.value <= found[1].critical_rate.value * (1 + 1e-9)


@given(seqs=st.integers(1, 200), more=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_more_sequences_never_serve_fewer_requests_per_step(seqs: int, more: int) -> None:
    law = exact_step_time(StepTime(b0_s=0.01))
    found = [
        predict(WORKLOAD, limits(200, n, 512), law, "engine", "P1") for n in (seqs, seqs + more)
    ]
    assert found[0].critical_rate.value <= found[1].critical_rate.value * (1 + 1e-9)


@given(
    blocks=st.integers(10, 1000),
    seqs=st.none() | st.integers(1, 300),
    budget=st.none() | st.integers(16, 8192),
    late=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_an_engine_stays_below_its_ceilings(
    blocks: int, seqs: int | None, budget: int | None, late: bool
) -> None:
    bounds = limits(blocks, seqs, budget, late)
    found = predict(WORKLOAD, bounds, LAW, "engine", "P1")
    known = {c.name: c.requests_per_step.value for c in found.ceilings if c.requests_per_step}
    assert 0 < found.under_fill <= 1 + 1e-9
    assert found.binding == min(known, key=lambda name: known[name])
    assert 0 <= found.recomputed_tokens <= WORKLOAD.mean(WORKLOAD.output_tokens)
    if seqs is not None:
        assert found.running <= seqs * (1 + 1e-9)
    assert found.critical_rate.low < found.critical_rate.value < found.critical_rate.high
    if found.onset_rate is not None:
        assert found.onset_rate.value > 0
    assert math.isclose(
        found.critical_rate.value * found.step_time_s.value,
        known[found.binding] * found.under_fill,
    )
    assert ("max_num_seqs is unknown" in " ".join(found.notes)) == (seqs is None)
    assert ("batched_tokens is unknown" in " ".join(found.notes)) == (budget is None)


def test_other_ceilings_take_recompute_and_onset_away() -> None:
    by_memory = predict(WORKLOAD, limits(100), LAW, "engine", "P1")
    by_seqs = predict(WORKLOAD, limits(1000, 20), LAW, "engine", "P1")
    by_budget = predict(WORKLOAD, limits(30_000, 1000, 64), LAW, "engine", "P1")
    assert by_memory.binding == "kv_cache" and by_memory.onset_rate is not None
    assert by_memory.onset_rate.value < by_memory.critical_rate.value
    assert by_seqs.binding == "max_num_seqs" and by_seqs.onset_rate is None
    assert by_seqs.recomputed_tokens < 1e-6 and by_seqs.running == pytest.approx(20)
    assert by_budget.binding == "max_num_batched_tokens" and by_budget.recomputed_tokens < 1


def test_the_interval_holds_calibration_and_sampling_errors() -> None:
    rng = np.random.default_rng(8)
    covariance = np.diag((0.05 * LAW.law.coefficients()) ** 2)
    measured = StepTimeFit(
        law=LAW.law,
        covariance=covariance,
        residual_relative=0.01,
        condition_number=10.0,
        num_observations=20,
        method="test",
    )
    exact = predict(WORKLOAD, limits(), LAW, "engine", "P1").critical_rate
    wide = predict(WORKLOAD, limits(), measured, "engine", "P1").critical_rate
    assert wide.value == exact.value and wide.half_width > 2 * exact.half_width
    rates = []
    for _ in range(300):
        b = rng.multivariate_normal(LAW.law.coefficients(), covariance)
        law = StepTime(
            b0_s=b[0], b1_s_per_token=b[1], b2_s_per_kv_token=b[2], b3_s_per_request=b[3]
        )
        found = predict(wl.fixed(100, 100), limits(), exact_step_time(law), "paper", "P1", 512)
        rates.append(found.critical_rate.value)
    stated = predict(wl.fixed(100, 100), limits(), measured, "paper", "P1", 512).critical_rate
    assert stated.standard_error == pytest.approx(np.std(rates), rel=0.15)


@pytest.mark.parametrize("seqs", [1000, 25])
def test_the_sampling_error_of_lengths_is_that_of_repeated_samples(seqs: int) -> None:
    rng = np.random.default_rng(9)
    rates, errors = [], []
    for _ in range(200):
        draws = WORKLOAD.sample(rng, 300)
        observed = wl.pairs(draws[:, 0], draws[:, 1], name="seen", source="test")
        found = predict(observed, limits(seqs=seqs), LAW, "engine", "P1").critical_rate
        rates.append(found.value)
        errors.append(math.sqrt((found.standard_error / found.value) ** 2 - 0.005**2))
    assert np.mean(errors) == pytest.approx(np.std(rates) / np.mean(rates), rel=0.2)


@pytest.mark.parametrize(
    ("law", "residences"),
    [
        (wl.fixed(64, 64), 5.0),
        (wl.uniform((16, 112), (64, 64)), 5.0),
        (wl.uniform((64, 64), (60, 68)), 0.0),
        (wl.uniform((16, 112), (16, 112)), 0.0),
    ],
)
def test_equal_outputs_stay_in_step_for_longer(law: wl.Workload, residences: float) -> None:
    """Served too much or too little meanwhile; a scatter of 4 % ends it."""
    found = predict(law, limits(256), LAW, "engine", "P1")
    assert found.settling_s == pytest.approx(residences * found.longest_residence_s)


def test_a_prediction_goes_through_json_unchanged() -> None:
    found = predict(WORKLOAD, limits(seqs=None), LAW, "engine", "P1")
    back = Prediction.from_dict(json.loads(json.dumps(found.to_dict())))
    assert back == found and digest(back) == digest(found)
    assert len(digest(found)) == 64 and found.bracket == (found.lower, found.critical_rate.value)
    other = predict(WORKLOAD, limits(seqs=None), LAW, "engine", "P2")
    assert digest(other) != digest(found) and other.inputs_digest == found.inputs_digest


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(ValueError, match="clip the workload to 80 tokens"):
        predict(WORKLOAD, limits(5), LAW, "engine", "P1")
    with pytest.raises(ValueError, match="needs a prefill chunk"):
        predict(WORKLOAD, limits(budget=None), LAW, "paper", "P1")
    with pytest.raises(ValueError, match="replicas"):
        predict(WORKLOAD, limits(), LAW, "engine", "P1", replicas=0)
    with pytest.raises(ValueError, match="claim"):
        predict(WORKLOAD, limits(), LAW, "guess", "P1")  # type: ignore[arg-type]
