"""Verdicts of whole experiments, rehearsed in virtual time against honest and lying servers."""

from pathlib import Path

import numpy as np
import pytest

from analysis.verdicts.verdict import EXIT_CODES, Verdict
from harness.configs.config import ExperimentConfig, load_config
from harness.configs.sections import StepTimeConfig
from harness.configs.workload_config import FixedConfig, WorkloadConfig
from harness.rehearsals.rehearsal import rehearse

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def verdict_of(name: str, seed: int = 1) -> Verdict:
    return rehearse(load_config(CONFIGS / name), seed)


@pytest.fixture(scope="module")
def honest() -> Verdict:
    return verdict_of("mock.yaml")


def test_an_honest_server_is_confirmed(honest: Verdict) -> None:
    assert honest.outcome == "confirmed"
    assert [run.verdict for run in honest.runs] == ["stable", "unstable", "unstable"]
    assert honest.ratio is not None
    assert honest.ratio.low <= 1.0 <= honest.ratio.high + 0.01
    assert honest.binding == honest.binding_observed == "kv_cache"


def test_the_books_of_an_honest_server_balance(honest: Verdict) -> None:
    assert all(check.holds for check in honest.audit), [c for c in honest.audit if not c.holds]
    assert all(check.holds for check in honest.premises)
    *factors, product, measured = (factor.estimate.value for factor in honest.identity)
    assert product == pytest.approx(factors[0] * factors[1] * factors[2])
    assert measured == pytest.approx(product, rel=0.04)


def test_every_number_carries_an_interval(honest: Verdict) -> None:
    for estimate in (honest.predicted, honest.measured, honest.ratio):
        assert estimate is not None
        assert estimate.low < estimate.value < estimate.high
        assert estimate.method


@pytest.mark.parametrize(
    ("config", "side"), [("faults/pool_smaller.yaml", -1), ("faults/pool_larger.yaml", 1)]
)
def test_a_pool_that_is_not_the_claimed_one_is_refuted_and_named(config: str, side: int) -> None:
    verdict = verdict_of(config)
    assert verdict.outcome == "refuted"
    assert verdict.exit_code == EXIT_CODES["refuted"] == 10
    assert verdict.ratio is not None
    assert (verdict.ratio.value - 1.0) * side > 0.2
    assert any(reason.startswith("pool:") for reason in verdict.reasons)
    implied = next(c for c in verdict.audit if c.name == "memory-time identity")
    assert implied.observed == pytest.approx(0.7 if side < 0 else 1.3, abs=0.06)


def test_a_sequence_limit_violates_the_papers_premise() -> None:
    verdict = verdict_of("sequence_bound_paper.yaml")
    # A rehearsal does not probe for ceilings; the engine's model must know the limit.
    config = load_config(CONFIGS / "sequence_bound_paper.yaml")
    known = config.model_copy(
        update={"limits": config.limits.model_copy(update={"max_num_seqs": 64})}
    )
    verdict = rehearse(known, 1)
    assert verdict.outcome == "premise_violated"
    assert verdict.binding_observed == "max_num_seqs"
    assert "max_num_seqs" in verdict.headline
    confirmed = rehearse(known.model_copy(update={"claim": "engine", "load": load_of()}), 1)
    assert confirmed.outcome == "confirmed"
    assert confirmed.binding == "max_num_seqs"


def test_the_papers_gap_is_split_into_its_mechanisms() -> None:
    config = load_config(CONFIGS / "mock.yaml")
    assert config.server is not None and config.server.mock is not None
    mock = config.server.mock.model_copy(update={"block_size": 64, "num_blocks": 64})
    verdict = rehearse(
        config.model_copy(
            update={
                "claim": "paper",
                "server": config.server.model_copy(update={"mock": mock}),
                "workload": WorkloadConfig(fixed=FixedConfig(prompt=70, output=70)),
            }
        ),
        1,
    )
    assert verdict.outcome == "refuted"
    assert verdict.measured is not None
    product = verdict.predicted.value * np.prod([f.estimate.value for f in verdict.from_paper])
    assert product == pytest.approx(verdict.measured.value)
    assert [f.name for f in verdict.from_paper][-1] == "unexplained"
    assert verdict.from_paper[-1].estimate.value == pytest.approx(1.0, abs=0.05)
    assert any("the formula leaves out: rounding" in reason for reason in verdict.reasons)


def load_of():
    return load_config(CONFIGS / "sequence_bound.yaml").load


def test_outcomes_never_come_without_a_reason(honest: Verdict) -> None:
    for verdict in (honest, verdict_of("faults/pool_smaller.yaml")):
        assert verdict.headline
        assert verdict.reasons


def of_equal_outputs_on_sglang(
    claimed: int, rates: tuple[float, ...], max_horizon_s: float = 130.0
) -> ExperimentConfig:
    """Pools of 2 048 tokens and steps of 50 ms, as in the row `sglang_fixed`."""
    config = load_config(CONFIGS / "mock_sglang.yaml")
    assert config.server is not None and config.server.mock is not None
    mock = config.server.mock.model_copy(
        update={
            "num_blocks": 2048,
            "claimed_num_blocks": claimed,
            "step_time": StepTimeConfig(b0_ms=50),
        }
    )
    return config.model_copy(
        update={
            "server": config.server.model_copy(update={"mock": mock}),
            "workload": WorkloadConfig(fixed=FixedConfig(prompt=32, output=32)),
            "load": config.load.model_copy(update={"rates": rates, "max_horizon_s": max_horizon_s}),
        }
    )


def test_waves_that_the_load_itself_made_refute_no_prediction() -> None:
    config = of_equal_outputs_on_sglang(2048, (0.8, 1.35))
    found = [rehearse(config, seed) for seed in (5, 8, 14)]
    # Seeds at which the served rate alone, 25 % above a right prediction, would refute it.
    assert all(verdict.ratio is not None and verdict.ratio.low > 1.1 for verdict in found)
    assert {verdict.outcome for verdict in found} == {"inconclusive"}
    for verdict in found:
        assert verdict.headline == "what is served above the critical rate depends on the load"
        assert "1.35 of the predicted rate fills larger waves" in verdict.reasons[-1]
        assert verdict.advice[0].startswith("to mend the waves: output lengths that differ")


def test_a_smaller_pool_is_refuted_whatever_the_waves() -> None:
    verdict = rehearse(of_equal_outputs_on_sglang(4096, (0.3, 0.7)), 1)
    assert verdict.outcome == "refuted"
    assert verdict.ratio is not None and verdict.ratio.high < 0.9


def test_what_no_wave_serves_is_refuted() -> None:
    verdict = rehearse(of_equal_outputs_on_sglang(1024, (0.8, 2.5)), 2)
    assert verdict.outcome == "refuted"
    assert verdict.ratio is not None and verdict.ratio.low > 1.6


def test_a_stable_run_beyond_the_band_refutes_whatever_the_waves() -> None:
    rates = (0.8, 1.12, 1.12, 1.12, 1.46, 2.0)
    verdict = rehearse(of_equal_outputs_on_sglang(1365, rates, 355.0), 1)
    assert any(run.verdict == "stable" and run.load > 1.1 for run in verdict.runs)
    assert verdict.outcome == "refuted"


def test_who_straddles_the_band_is_told_what_would_narrow_it() -> None:
    verdict = rehearse(of_equal_outputs_on_sglang(2048, (0.8, 1.06), 400.0), 1)
    assert verdict.headline == "the interval straddles the 10 % band"
    assert verdict.advice[0].startswith("to mend the waves: output lengths that differ")
