"""What is judged of one run, beside the rule that decides: cross-checks and warnings."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import run_frames
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.verdicts.evidence import Evidence, MeasuredRun
from analysis.verdicts.judge import judge
from analysis.verdicts.run_verdict import capacity, judge_run
from loadgen.arrivals import poisson
from loadgen.fidelity import fidelity
from loadgen.records import Run
from loadgen.workload import uniform

LAW = StepTime(b0_s=14e-3, b1_s_per_token=10e-6, b2_s_per_kv_token=400e-9, b3_s_per_request=10e-6)
WORKLOAD = uniform((16, 112), (16, 112))
MEMORY = EngineLimits(
    num_blocks=256, block_size=16, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=4096
)
SEQUENCES = replace(MEMORY, num_blocks=512, max_num_seqs=32)


def evidence(limits: EngineLimits, load: float, warmup_s: float, horizon_s: float) -> Evidence:
    """One run at a multiple of the predicted critical rate."""
    claim = predict(WORKLOAD, limits, exact_step_time(LAW), "engine", "P1")
    run = Run(
        id="00",
        arrival_rate=load * claim.critical_rate.value,
        horizon_s=horizon_s,
        warmup_s=warmup_s,
        seed=1,
    )
    arrival_s = poisson(run.arrival_rate, horizon_s, run.seed)
    lengths = WORKLOAD.sample(np.random.default_rng(2), len(arrival_s))
    records = simulate(limits, LAW, arrival_s, lengths, horizon_s)
    frames = run_frames(run, 0, round(horizon_s * 1e9), records.records, records.samples)
    measured = MeasuredRun(frames, fidelity(run, records.records, horizon_s, 0), overrun=0.0)
    return Evidence(
        name="x",
        mode="simulated",
        theta=0.1,
        prediction=claim,
        paper=claim,
        engine=claim,
        mechanisms=(),
        simulated=None,
        limits=limits,
        workload=WORKLOAD,
        runs=(measured,),
    )


@pytest.mark.parametrize("load", [0.8, 1.3])
def test_other_errors_of_the_drift_stand_beside_the_one_that_decides(load: float) -> None:
    found = evidence(MEMORY, load, 6.5, 40.0)
    judged = judge_run(found.runs[0], found)
    assert [check.name for check in judged.drift_checks] == ["HAC", "end point"]
    for check in judged.drift_checks:
        assert check.estimate.value == pytest.approx(judged.drift.value)
        assert check.estimate.low < check.estimate.value < check.estimate.high
    assert not [text for text in judged.warnings if "MSER-5" in text]


def test_a_run_too_short_for_a_slope_says_why() -> None:
    found = evidence(MEMORY, 1.3, 0.3, 10.0)
    judged = judge_run(found.runs[0], found)
    assert judged.verdict == "inconclusive"
    assert "before one mean residence time" in judged.text
    assert np.isnan(judged.drift.value)
    assert judged.drift_checks == ()


def test_a_warm_up_that_ends_while_departures_still_rise_is_warned_of() -> None:
    """A third of a residence, at 0.8 of critical: nothing has left."""
    found = evidence(MEMORY, 0.8, 0.3, 40.0)
    warnings = judge_run(found.runs[0], found).warnings
    assert any("MSER-5, the warm-up ended at 0.3 s" in text for text in warnings)


@pytest.mark.parametrize(
    ("limits", "method"),
    [(MEMORY, "KV demand served"), (SEQUENCES, "output tokens served")],
)
def test_work_is_counted_in_what_is_short(limits: EngineLimits, method: str) -> None:
    found = evidence(limits, 1.3, 6.5, 40.0)
    seen = capacity(found.runs[0], found)
    assert seen is not None
    assert seen.by_work.method.startswith(method)
    truth = found.prediction.critical_rate.value
    assert seen.by_work.value == pytest.approx(truth, rel=0.02)
    assert seen.by_work.half_width < seen.by_regression.half_width
    names = [other.name for other in judge(found).measurements]
    assert names[:2] == ["by count", "by regression"]
