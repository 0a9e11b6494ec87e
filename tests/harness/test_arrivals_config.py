"""The section ``load.arrivals``: what is understood, refused, planned, kept and judged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis.inference.growth import DRIFT_BATCHES, growth_power, needed_requests
from analysis.schedulers.step_time import exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.prediction import Prediction
from analysis.verdicts.evidence import variance_ratio
from analysis.verdicts.run_verdict import judge_run
from analysis.verdicts.settling import near_critical
from harness.configs.config import ConfigError, ExperimentConfig, load_config
from harness.experiments.plan import GROWTH_POWER, HorizonTooShort, Plan, make_plan
from harness.records.store import Store
from harness.rehearsals.error_rates import SETTINGS, evidence_of
from harness.rehearsals.rehearsal import offered
from loadgen.processes import (
    POISSON,
    Gamma,
    OnOff,
    Piecewise,
    Process,
    Replay,
    Sinusoidal,
    Weibull,
    dispersion,
)
from loadgen.records import Run

WIDE = SETTINGS["wide"]
CLAIM: Prediction = predict(
    WIDE.workload, WIDE.server.limits, exact_step_time(WIDE.server.law), "engine", "P0"
)
TRACE = "request_id,timestamp,input_tokens,output_tokens\n" + "".join(
    f"{i},{i / 4},50,{5 + i % 3}\n" for i in range(4001)
)
LAWS: list[tuple[dict[str, Any], Process]] = [
    ({"kind": "poisson"}, POISSON),
    ({"kind": "gamma", "cv": 2}, Gamma(cv=2.0)),
    ({"kind": "weibull", "cv": 0.5}, Weibull(cv=0.5)),
    ({"kind": "on_off", "on_s": 2, "off_s": 5}, OnOff(on_s=2.0, off_s=5.0)),
    (
        {"kind": "on_off", "on_s": 2, "off_s": 5, "off_over_on": 0.1},
        OnOff(on_s=2.0, off_s=5.0, off_over_on=0.1),
    ),
    (
        {"kind": "piecewise", "pieces": [[3, 1], [2, 3]]},
        Piecewise(pieces=((3.0, 1.0), (2.0, 3.0))),
    ),
    (
        {"kind": "sinusoidal", "period_s": 60, "amplitude": 0.5},
        Sinusoidal(period_s=60.0, amplitude=0.5),
    ),
]


def config_of(folder: Path, load: dict[str, Any], **more: Any) -> ExperimentConfig:
    (folder / "trace.csv").write_text(TRACE)
    data = {"name": "x", "workload": {"fixed": {"prompt": 50, "output": 5}}, "load": load, **more}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return load_config(path)


@pytest.mark.parametrize(("section", "law"), LAWS, ids=lambda x: str(x)[:30])
def test_each_kind_is_its_law_also_after_it_was_written(
    tmp_path: Path, section: dict[str, Any], law: Process
) -> None:
    config = config_of(tmp_path, {"arrivals": section})
    assert config.arrivals() == law and config.loads(3.0) == config.load.rates
    shown = config.model_dump(mode="json", exclude_none=True)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(shown))
    assert load_config(tmp_path / "again.yaml").arrivals() == law


def test_nothing_said_is_poisson(tmp_path: Path) -> None:
    assert config_of(tmp_path, {}).arrivals() == POISSON


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"arrivals": {"kind": "gamma", "cv": 9}}, "cv of gamma gaps must be between"),
        ({"arrivals": {"kind": "gamma"}}, "load.arrivals.gamma.cv: field required"),
        ({"arrivals": {"kind": "gamma", "cv": 2, "shape": 3}}, "shape: unknown key"),
        ({"arrivals": {"kind": "pareto"}}, "load.arrivals:.*'pareto'"),
        ({"arrivals": {"kind": "on_off", "on_s": 0, "off_s": 1}}, "on_s: input should be greater"),
        ({"arrivals": {"kind": "piecewise", "pieces": [[1, 1]]}}, "at least two"),
        ({"arrivals": {"kind": "sinusoidal", "period_s": 9, "amplitude": 2}}, "amplitude: input"),
        (
            {"start": "full", "arrivals": {"kind": "piecewise", "pieces": [[1, 1], [1, 2]]}},
            "start: what a burst leaves is judged at one rate",
        ),
        ({"start": "both", "arrivals": {"kind": "replay"}}, "replayed from an empty server"),
        ({"arrivals": {"kind": "replay"}}, "name it in workload.trace"),
        ({"rates": [1], "arrivals": {"kind": "replay", "times": "own"}}, "own times has one rate"),
    ],
)
def test_impossible_sections_are_refused(
    tmp_path: Path, load: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, load)


def test_a_replay_has_the_lengths_and_the_rate_of_its_file(tmp_path: Path) -> None:
    trace = {"trace": {"file": "trace.csv", "format": "servegen"}}
    own = config_of(tmp_path, {"arrivals": {"kind": "replay", "times": "own"}}, workload=trace)
    law = own.arrivals()
    assert isinstance(law, Replay) and law.own_rate == pytest.approx(4.0)
    assert own.loads(8.0) == pytest.approx((0.5,))
    scaled = config_of(tmp_path, {"arrivals": {"kind": "replay"}}, workload=trace)
    assert scaled.loads(8.0) == scaled.load.rates
    part = {"trace": {"file": "trace.csv", "format": "servegen"}, "part": {"side": "test"}}
    with pytest.raises(ConfigError, match=r"without workload.part"):
        config_of(tmp_path, {"arrivals": {"kind": "replay"}}, workload=part)
    (tmp_path / "bare.csv").write_text("num_prefill_tokens,num_decode_tokens\n5,6\n")
    bare = {"trace": {"file": "bare.csv", "format": "vidur"}}
    without = config_of(tmp_path, {"arrivals": {"kind": "replay"}}, workload=bare)
    with pytest.raises(ConfigError, match=r"load.arrivals: .* have no instants"):
        without.arrivals()


# -- plans ----------------------------------------------------------------------------------------


def plan(
    arrivals: Process, *loads: float, most_s: float = 1e5, horizon_s: float | None = None
) -> Plan:
    return make_plan(
        CLAIM,
        CLAIM,
        WIDE.workload,
        loads=loads,
        horizon_s=horizon_s,
        max_horizon_s=most_s,
        theta=0.1,
        seed=1,
        prediction_digest="d",
        arrivals=arrivals,
    )


def test_runs_are_as_much_longer_as_the_arrivals_are_burstier() -> None:
    """Seconds after the warm-up grow like ca2 + cd2, and power counts with it."""
    even, bursty = (plan(law, 1.05).runs[0] for law in (POISSON, Gamma(cv=3.0)))
    cd2 = variance_ratio(WIDE.workload) - 1
    ratio = (bursty.horizon_s - bursty.warmup_s) / (even.horizon_s - even.warmup_s)
    assert ratio == pytest.approx((9 + cd2) / (1 + cd2), rel=0.01)
    assert bursty.arrivals == Gamma(cv=3.0) and bursty.ca2 == 9.0
    short = plan(Gamma(cv=3.0), 1.05, most_s=even.horizon_s).power[0]
    assert short < 0.5 < plan(POISSON, 1.05).power[0]
    requests = needed_requests(0.05, 9 + cd2, GROWTH_POWER)
    assert growth_power(0.05, 9 + cd2, requests) == pytest.approx(GROWTH_POWER)
    below = [plan(law, 0.85).runs[0].horizon_s for law in (POISSON, Gamma(cv=3.0))]
    assert below[1] > 2 * below[0]


@pytest.mark.parametrize("horizon_s", [None, 100.0])
def test_a_rate_that_follows_the_clock_is_judged_over_whole_periods(
    horizon_s: float | None,
) -> None:
    wave = Sinusoidal(period_s=4.0, amplitude=0.5)
    for run in plan(wave, 0.85, 1.15, most_s=300.0, horizon_s=horizon_s).runs:
        periods = (run.horizon_s - run.warmup_s) / wave.period_s
        assert periods == pytest.approx(round(periods), abs=1e-6)
        assert round(periods) % DRIFT_BATCHES == 0 and run.horizon_s <= 300.0
    with pytest.raises(HorizonTooShort, match=r"every 60 s.*load.max_horizon_s to at least"):
        plan(Sinusoidal(period_s=60.0, amplitude=0.5), 0.85, most_s=300.0)


def test_a_replay_lasts_as_long_as_its_trace_and_has_no_power() -> None:
    rate = 1.2 * CLAIM.critical_rate.value
    trace = Replay(file="t", format="azure", sha256="", own_rate=rate / 3, duration_s=300.0)
    found = plan(trace, 1.2)
    assert found.runs[0].horizon_s == pytest.approx(100.0, abs=0.11)
    assert math.isnan(found.power[0])
    assert plan(trace, 1.2, most_s=50.0).runs[0].horizon_s == 50.0


# -- what is judged -------------------------------------------------------------------------------


def judged(law: Process, load: float, seed: int, most_s: float = 400.0) -> Any:
    run = replace(plan(law, load, most_s=most_s).runs[0], seed=seed)
    measured = offered(WIDE.server, WIDE.workload, run, test_load=False)
    return judge_run(measured, evidence_of(WIDE, CLAIM, 0.1, (measured,)))


@pytest.mark.parametrize(
    "law",
    [
        Gamma(cv=2.0),
        OnOff(on_s=0.5, off_s=0.5, off_over_on=0.2),
        Sinusoidal(period_s=5.0, amplitude=0.6),
    ],
    ids=lambda law: law.kind,
)
def test_bursts_do_not_deceive_the_verdict(law: Process) -> None:
    """Never the wrong answer, and seldom none (the power was measured: docs/arrivals.md)."""
    said = {load: [judged(law, load, s).verdict for s in range(6)] for load in (0.8, 1.2)}
    assert "unstable" not in said[0.8] and said[0.8].count("stable") >= 4
    assert "stable" not in said[1.2] and said[1.2].count("unstable") >= 3


def test_growth_by_chance_is_that_of_the_arrivals() -> None:
    """At the critical rate bursts wander far; with ca2 = 1 many such runs would be said to grow."""
    law, bursty, blind = Gamma(cv=3.0), 0, 0
    for seed in range(20):
        run = Run(
            id="r",
            arrival_rate=CLAIM.critical_rate.value,
            horizon_s=60.0,
            warmup_s=6.0,
            seed=seed,
            arrivals=law,
        )
        measured = offered(WIDE.server, WIDE.workload, run, test_load=False)
        evidence = evidence_of(WIDE, CLAIM, 0.1, (measured,))
        bursty += judge_run(measured, evidence).verdict == "unstable"
        frames = replace(measured.frames, run=replace(run, arrivals=POISSON))
        poisson = replace(measured, frames=frames)
        blind += judge_run(poisson, evidence_of(WIDE, CLAIM, 0.1, (poisson,))).verdict == "unstable"
    assert bursty <= 2 and blind > bursty


def test_the_mean_over_whole_periods_is_meant() -> None:
    """A run that was cut off within a period is judged up to the last whole one."""
    law = Sinusoidal(period_s=5.0, amplitude=0.6)
    run = plan(law, 0.8, most_s=100.0).runs[0]
    measured = offered(WIDE.server, WIDE.workload, run, test_load=False)
    cut = replace(measured, frames=replace(measured.frames, end_s=run.horizon_s - 3.0))
    found = judge_run(cut, evidence_of(WIDE, CLAIM, 0.1, (cut,)))
    assert found.end_s == pytest.approx(run.horizon_s - 5.0)
    whole = judge_run(measured, evidence_of(WIDE, CLAIM, 0.1, (measured,)))
    assert whole.end_s == pytest.approx(run.horizon_s)
    assert whole.verdict == "stable" and whole.text.endswith("s of whole periods)")
    near = evidence_of(WIDE, CLAIM, 0.1, (measured,))
    assert near_critical(near, CLAIM.critical_rate.scaled(0.8), True) == ()


def test_a_replay_is_shown_and_not_judged(tmp_path: Path) -> None:
    trace = {"trace": {"file": "trace.csv", "format": "servegen"}}
    config = config_of(tmp_path, {"arrivals": {"kind": "replay"}}, workload=trace)
    workload, law = config.law(), config.arrivals()
    run = plan(law, 0.8).runs[0]
    measured = offered(WIDE.server, workload, run)
    assert measured.fidelity.valid
    lengths = measured.frames.requests["output_tokens_designed"].tolist()
    assert lengths == [5 + i % 3 for i in range(len(lengths))]
    evidence = replace(evidence_of(WIDE, CLAIM, 0.1, (measured,)), workload=workload)
    found = judge_run(measured, evidence)
    assert found.verdict == "inconclusive"
    assert found.text == "cannot say: a replayed trace has no rate that lasts, see its drift"
    assert [check.name for check in found.drift_checks] == ["HAC"]
    near = near_critical(evidence, CLAIM.critical_rate.scaled(0.8), True)
    assert near == ()


def test_the_results_folder_says_what_was_offered(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "results")
    run = plan(OnOff(on_s=2.0, off_s=5.0), 1.2, most_s=100.0).runs[0]
    store.begin_run(run, 0, "now", "digest")
    for name in ("requests", "engine", "gpu"):
        (tmp_path / f"results/runs/{run.id}/{name}.jsonl").write_text("")
    assert store.read_run(run.id).run == run
    assert run.ca2 == pytest.approx(dispersion(run.arrivals, run.arrival_rate))
    assert np.isfinite(run.ca2)
