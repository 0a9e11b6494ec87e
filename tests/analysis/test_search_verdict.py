"""A search held against a prediction."""

import pytest

from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.prediction import Prediction
from analysis.verdicts.search_result import SearchOutcome, SearchResult
from analysis.verdicts.search_verdict import search_verdict, verdict_lines
from loadgen.workload import uniform

LIMITS = EngineLimits(num_blocks=256, block_size=16, max_num_seqs=256, max_num_batched_tokens=2048)
LAW = StepTime(b0_s=0.02)


def prediction(error: float) -> Prediction:
    """A prediction of 10 req/s with this relative standard error."""
    made = predict(uniform((16, 112), (16, 112)), LIMITS, exact_step_time(LAW), "engine", "P1")
    rate = Estimate.log_normal(10.0, error, "req/s", "made up")
    return Prediction.from_dict(made.to_dict() | {"critical_rate": rate.to_dict()})


def found(value: float, half: float, outcome: SearchOutcome = "found") -> SearchResult:
    rate = Estimate(value, value - half, value + half, 0.95, "req/s", "made up")
    return SearchResult(
        outcome=outcome,
        reason="" if outcome == "found" else "the time was up",
        critical_rate=rate,
        sides=(),
        drained=True,
        counted_departures=100.0,
        expected_departures=100.0,
        batches=8,
        batch_s=1.0,
        binding="kv_cache",
        requests=1000,
        duration_s=60.0,
        fidelity=None,
    )


@pytest.mark.parametrize(
    ("rate", "half", "error", "outcome", "exit_code"),
    [
        (10.0, 0.1, 0.005, "confirmed", 0),
        (9.7, 0.1, 0.005, "confirmed", 0),
        (9.5, 0.1, 0.005, "inconclusive", 11),
        (9.2, 0.1, 0.005, "refuted", 10),
        (11.0, 0.1, 0.005, "refuted", 10),
        (10.0, 0.1, 0.05, "inconclusive", 11),
    ],
)
def test_the_band_decides(
    rate: float, half: float, error: float, outcome: str, exit_code: int
) -> None:
    verdict = search_verdict(prediction(error), found(rate, half), 0.05, 400)
    assert (verdict.outcome, verdict.exit_code) == (outcome, exit_code)
    assert verdict.requests == 1400
    assert verdict.ratio is not None
    assert verdict.ratio.value == pytest.approx(rate / 10)
    assert dict(verdict_lines(verdict))[outcome] == verdict.headline


def test_a_search_without_an_answer_decides_nothing() -> None:
    verdict = search_verdict(prediction(0.005), found(10.0, 0.1, "cannot say"), 0.05, 400)
    assert verdict.outcome == "inconclusive"
    assert "the time was up" in verdict.headline
    assert verdict.ratio is None
    assert search_verdict(prediction(0.005), found(7, 1, "invalid"), 0.05, 0).exit_code == 13
