"""How often is a verdict wrong? Experiments on simulated servers whose true critical rate is known.

The true ratio of measured to predicted is set by scaling the prediction. What a calibration predicts is
replaced by a number drawn from its own interval around that: so the decision is judged by what it is
given, and what the intervals of predictions are worth is another question (`scripts/known_truth`,
`scripts/hidden_truth`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.inference.capacity import backlogged_window, work_served
from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime, StepTimeFit
from analysis.theory.critical_rate import predict
from analysis.theory.prediction import Prediction
from analysis.verdicts.evidence import Evidence, MeasuredRun, work_demand
from analysis.verdicts.judge import judge
from analysis.verdicts.run_verdict import judge_run
from analysis.verdicts.search_result import search_result
from analysis.verdicts.search_verdict import SearchVerdict, search_verdict
from analysis.verdicts.verdict import RunJudgement, Verdict
from harness.experiments.experiment import MAX_EXTRA_RUNS, outside
from harness.experiments.plan import Plan, StartOption, make_plan
from harness.experiments.predict import NARROW
from harness.rehearsals.rehearsal import SimulatedServer, calibrated, offered
from harness.rehearsals.search_rehearsal import design_for, rehearse_search
from loadgen.length_laws import lognormal
from loadgen.records import Run
from loadgen.workload import Workload, fixed, uniform

LOADS = (0.85, 1.15, 1.3)
"""The rates of an experiment where a config names none (`harness.configs.config.LoadConfig`)."""
MAX_HORIZON_S = 600.0
LAW = StepTime(b0_s=14e-3, b1_s_per_token=10e-6, b2_s_per_kv_token=400e-9, b3_s_per_request=10e-6)
SEARCH_PRECISION = 0.02
"""What ``critrate search`` aims at where nothing is said."""
TRUTH_LOAD = 1.25
TRUTH_SEEDS = 8
TRUTH_FIRST_SEED = 900_000_000


@dataclass(frozen=True, eq=False)
class Setting:
    """One simulated server under one law of lengths."""

    name: str
    workload: Workload
    server: SimulatedServer


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a setting before any experiment: the truth, and one honest prediction."""

    truth: Estimate
    """req/s, the service rate under sustained Poisson overload."""
    prediction: Prediction
    probe_requests: int


def _vllm(pool_tokens: int, seqs: int = 256, budget: int = 2048) -> EngineLimits:
    return EngineLimits(
        num_blocks=pool_tokens // 16,
        block_size=16,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=4096,
    )


def _sglang(pool_tokens: int) -> EngineLimits:
    return replace(_vllm(pool_tokens), num_blocks=pool_tokens, block_size=1, sglang=SGLangRules())


_WIDE = uniform((16, 112), (16, 112))
_HEAVY = lognormal((48, 1.0), (48, 1.5), 0.0, (4, 256), (4, 256))
_TOKENS_COST = StepTime(
    b0_s=8e-3, b1_s_per_token=60e-6, b2_s_per_kv_token=600e-9, b3_s_per_request=30e-6
)
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("wide", _WIDE, SimulatedServer(_vllm(4096), LAW)),
        Setting("fixed", fixed(64, 64), SimulatedServer(_vllm(4096), LAW)),
        Setting("heavy tails", _HEAVY, SimulatedServer(_vllm(8192), LAW)),
        Setting("long outputs", uniform((8, 24), (96, 288)), SimulatedServer(_vllm(4096), LAW)),
        Setting("long prompts", uniform((128, 384), (12, 36)), SimulatedServer(_vllm(8192), LAW)),
        Setting("sequence-bound", _WIDE, SimulatedServer(_vllm(8192, seqs=32), LAW)),
        Setting("token-bound", _WIDE, SimulatedServer(_vllm(8192, budget=80), LAW)),
        Setting("costly tokens", _WIDE, SimulatedServer(_vllm(4096), _TOKENS_COST)),
        Setting("noisy steps", _WIDE, SimulatedServer(_vllm(4096), LAW, noise=0.1)),
        Setting("SGLang", _WIDE, SimulatedServer(_sglang(4096), LAW)),
        Setting("SGLang, noisy steps", _WIDE, SimulatedServer(_sglang(4096), LAW, noise=0.1)),
    )
}


def known(setting: Setting, requests: int, theta: float) -> Known:
    """The truth from ``TRUTH_SEEDS`` long runs of ``requests`` arrivals each, and a prediction.

    The prediction is that of one calibration through a client's jitter, until it is narrow enough for
    ``theta``.
    """
    server, workload = setting.server, setting.workload

    def predicted(fit: StepTimeFit) -> Prediction:
        return predict(workload, server.limits, fit, "engine", "P1")

    def enough(fit: StepTimeFit) -> bool:
        rate = predicted(fit).critical_rate.at_level(0.90)
        return rate.half_width < NARROW * theta * rate.value

    rng = np.random.default_rng(99)
    fit, probe_requests = calibrated(server, workload, server.limits, rng, enough)
    prediction = predicted(fit)
    return Known(_truth(setting, prediction, requests), prediction, probe_requests)


def _truth(setting: Setting, prediction: Prediction, requests: int) -> Estimate:
    rate = TRUTH_LOAD * prediction.critical_rate.value
    warmup_s = 5 * max(prediction.longest_residence_s, prediction.settling_s)
    unit = prediction.binding
    demand = setting.workload.mean(work_demand(setting.workload, unit))
    rates = []
    for seed in range(TRUTH_SEEDS):
        run = Run(
            id="truth",
            arrival_rate=rate,
            horizon_s=round(warmup_s + requests / rate, 1),
            warmup_s=warmup_s,
            seed=TRUTH_FIRST_SEED + seed,
        )
        frames = offered(setting.server, setting.workload, run, test_load=False).frames
        window = backlogged_window(frames, warmup_s)
        if window is None or window.duration_s < 0.9 * (frames.end_s - warmup_s):
            raise ValueError(f"{setting.name}: {rate:.3g} req/s do not keep its queue non-empty")
        rates.append(work_served(frames, window, demand, unit).mean)
    return Estimate.normal(
        float(np.mean(rates)),
        float(np.std(rates, ddof=1)) / math.sqrt(TRUTH_SEEDS),
        "req/s",
        f"{TRUTH_SEEDS} saturated runs of {requests} arrivals",
    )


def right(known: Known, factor: float = 1.0) -> Prediction:
    """A prediction of ``factor`` times the truth, with the interval of the calibrated one."""
    rate = known.prediction.critical_rate
    return replace(
        known.prediction, critical_rate=rate.scaled(factor * known.truth.value / rate.value)
    )


def drawn(known: Known, true_ratio: float, rng: np.random.Generator) -> Prediction:
    """A prediction that is off by 1/``true_ratio`` and by an error drawn from its own interval."""
    rate = known.prediction.critical_rate
    error = rate.standard_error / rate.value * float(rng.standard_normal())
    return right(known, math.exp(error) / true_ratio)


def experiment(
    setting: Setting, known: Known, true_ratio: float, seed: int, theta: float
) -> tuple[Verdict, int]:
    """One experiment as ``critrate run`` would carry it out; also the requests that it offered."""
    claim = drawn(known, true_ratio, np.random.default_rng([seed, 98]))
    plan = planned(setting, claim, LOADS, theta, seed)
    runs = [offered(setting.server, setting.workload, run, test_load=False) for run in plan.runs]
    verdict = judge(evidence_of(setting, claim, theta, tuple(runs)))
    for _ in range(MAX_EXTRA_RUNS):
        load = outside(verdict)
        if load is None:
            break
        more = planned(setting, claim, (load,), theta, seed, len(runs))
        runs.append(offered(setting.server, setting.workload, more.runs[0], test_load=False))
        verdict = judge(evidence_of(setting, claim, theta, tuple(runs)))
    return verdict, sum(len(run.frames.requests) for run in runs) + known.probe_requests


def searched(
    setting: Setting, known: Known, true_ratio: float, seed: int, theta: float
) -> SearchVerdict:
    """The same by ``critrate search --verdict``: one run whose rate is decided as it goes."""
    claim = drawn(known, true_ratio, np.random.default_rng([seed, 98]))
    design = design_for(
        setting.workload, SEARCH_PRECISION, theta, first_rate=claim.critical_rate.value
    )
    done = rehearse_search(setting.server, setting.workload, design, seed)
    result = search_result(design, done.search, done.looks)
    return search_verdict(claim, result, theta, known.probe_requests)


def one_run(setting: Setting, known: Known, rho: float, seed: int, theta: float) -> RunJudgement:
    """One run at ``rho`` of the true critical rate, as long as it would be planned, and its verdict."""
    claim = right(known)
    run = planned(setting, claim, (rho,), theta, seed).runs[0]
    measured = offered(setting.server, setting.workload, run, test_load=False)
    return judge_run(measured, evidence_of(setting, claim, theta, (measured,)))


def planned(
    setting: Setting,
    claim: Prediction,
    loads: tuple[float, ...],
    theta: float,
    seed: int,
    first_index: int = 0,
    start: StartOption = "empty",
) -> Plan:
    """The runs that a claim would be tested by, as long as they would be live."""
    return make_plan(
        claim,
        claim,
        setting.workload,
        loads=loads,
        horizon_s=None,
        max_horizon_s=MAX_HORIZON_S,
        theta=theta,
        seed=seed,
        prediction_digest="",
        first_index=first_index,
        start=start,
    )


def evidence_of(
    setting: Setting, claim: Prediction, theta: float, runs: tuple[MeasuredRun, ...]
) -> Evidence:
    """What a verdict about ``claim`` rests on, after these runs."""
    return Evidence(
        name=setting.name,
        mode="simulated",
        theta=theta,
        prediction=claim,
        paper=claim,
        engine=claim,
        mechanisms=(),
        simulated=None,
        limits=setting.server.limits,
        workload=setting.workload,
        runs=runs,
    )


# -- jobs of a sweep, and the rows that they give ---------------------------------------------------


@dataclass(frozen=True)
class Job:
    """``count`` experiments or runs of one cell, seeds from ``first_seed``."""

    setting: str
    known: Known
    cell: float
    """The true ratio of an experiment, or the load of a run in true critical rates."""
    theta: float
    first_seed: int
    count: int

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.count)


def measure_setting(job: tuple[str, int, float]) -> Known:
    """`known` of a named setting, an arrival count and theta."""
    name, requests, theta = job
    return known(SETTINGS[name], requests, theta)


def measure_experiments(job: Job) -> list[dict[str, Any]]:
    """One row for each experiment."""
    setting = SETTINGS[job.setting]
    return [
        _row(job, seed, *experiment(setting, job.known, job.cell, _own(job, seed), job.theta))
        for seed in job.seeds
    ]


def measure_searches(job: Job) -> list[dict[str, Any]]:
    """One row for each search with a verdict."""
    rows = []
    for seed in job.seeds:
        verdict = searched(SETTINGS[job.setting], job.known, job.cell, _own(job, seed), job.theta)
        rows.append(_row(job, seed, verdict, verdict.requests))
    return rows


def _row(job: Job, seed: int, verdict: Verdict | SearchVerdict, requests: int) -> dict[str, Any]:
    return {
        "cell": job.cell,
        "seed": seed,
        "outcome": verdict.outcome,
        "headline": verdict.headline,
        "covers_rate": _covers(verdict.measured, job.known.truth.value),
        "covers_ratio": _covers(verdict.ratio, job.cell),
        "measured": verdict.measured and verdict.measured.value,
        "requests": requests,
    }


def measure_runs(job: Job) -> list[dict[str, Any]]:
    """One row for each run. The true drift is what is offered above the critical rate."""
    rows = []
    for seed in job.seeds:
        run = one_run(SETTINGS[job.setting], job.known, job.cell, _own(job, seed), job.theta)
        grows = max(run.arrival_rate - job.known.truth.value, 0.0)
        rows.append(
            {
                "cell": job.cell,
                "seed": seed,
                "outcome": run.verdict,
                "headline": run.text,
                "covers_drift": _covers(run.drift, grows),
                "requests": run.requests,
            }
        )
    return rows


def _own(job: Job, seed: int) -> int:
    """A seed that no other cell or setting has, so that their errors are independent."""
    entropy = [seed, round(1000 * job.cell), *job.setting.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _covers(estimate: Estimate | None, truth: float) -> bool | None:
    """Does the interval hold the truth? None where there is none."""
    if estimate is None or math.isnan(estimate.value):
        return None
    return estimate.low <= truth <= estimate.high
