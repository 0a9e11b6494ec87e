"""Simulated servers that start full: what a preload does to their capacity, and to what lasts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from analysis.inference.capacity import backlogged_window, work_served
from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import SGLangRules
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.prediction import Prediction
from analysis.verdicts.branches import Branches, two_branches
from analysis.verdicts.evidence import MeasuredRun, variance_ratio, work_demand
from analysis.verdicts.run_verdict import capacity, judge_run
from harness.experiments.plan import WARMUP_RESIDENCES, preload_size
from harness.rehearsals import error_rates
from harness.rehearsals.error_rates import Known, Setting, evidence_of, planned, right
from harness.rehearsals.rehearsal import SimulatedServer, offered
from loadgen.records import Run
from loadgen.workload import Workload, fixed

OVERLOAD = 1.3
LEAST_BACKLOGGED = 0.8
"""Share of the time after the warm-up in which a queue must have stood without a break."""
HIGHEST_PAIR = 0.95
SLEPT = StepTime(b0_s=0.036)
"""Of SGLang on a CPU each step of which sleeps 20 ms: hardly depends on what is in it."""


def _like(name: str, other: str, workload: Workload, **changed: object) -> Setting:
    """A setting with another workload and other limits."""
    server = error_rates.SETTINGS[other].server
    limits = replace(server.limits, **changed)  # type: ignore[arg-type]
    return Setting(name, workload, replace(server, limits=limits))


_WIDE, _HEAVY = (error_rates.SETTINGS[name].workload for name in ("wide", "heavy tails"))
_LOOKS_AHEAD = SGLangRules(radix_cache=False)
_OVER_COMMITS = SGLangRules(whole_output_of_ignore_eos=False)
SETTINGS = {
    setting.name: setting
    for setting in (
        *error_rates.SETTINGS.values(),
        _like("fixed, long outputs", "fixed", fixed(20, 200)),
        _like("SGLang, fixed", "SGLang", fixed(64, 64)),
        _like("SGLang, heavy tails", "SGLang", _HEAVY, num_blocks=8192),
        _like("SGLang, sequence-bound", "SGLang", _WIDE, num_blocks=16384, max_num_seqs=32),
        _like("SGLang, over-commits", "SGLang", _WIDE, sglang=_OVER_COMMITS),
        _like("SGLang, looks ahead", "SGLang", _WIDE, sglang=_LOOKS_AHEAD),
        _like("SGLang, looks ahead, fixed", "SGLang", fixed(64, 64), sglang=_LOOKS_AHEAD),
        _like(
            "SGLang, looks ahead, few",
            "SGLang",
            fixed(200, 200),
            num_blocks=1590,
            sglang=_LOOKS_AHEAD,
        ),
        Setting(
            "SGLang, as measured",
            fixed(16, 64),
            SimulatedServer(
                replace(
                    error_rates.SETTINGS["SGLang"].server.limits,
                    num_blocks=2048,
                    max_num_batched_tokens=4096,
                    sglang=_LOOKS_AHEAD,
                ),
                SLEPT,
            ),
        ),
    )
}
"""Those of the error rates, and more with SGLang's rules and with fixed lengths, where waves last."""


@dataclass(frozen=True, slots=True)
class Capacities:
    """Of one seed, by work, req/s; ``preload`` is the size of the burst."""

    poisson: Estimate
    preloaded: Estimate
    preload: int


def capacities(setting: Setting, requests: int, seed: int) -> Capacities:
    """Saturated capacity from empty under sustained Poisson overload, and behind a burst.

    Both over what is left after three of the longest residence times, as long as ``requests``
    completions take. Raises ValueError where a queue did not stand.
    """
    step_time = exact_step_time(setting.server.law)
    predicted = predict(setting.workload, setting.server.limits, step_time, "engine", "P0")
    rate = predicted.critical_rate.value
    warmup_s = max(WARMUP_RESIDENCES * predicted.longest_residence_s, predicted.settling_s)
    empty = Run(
        id="poisson",
        arrival_rate=OVERLOAD * rate,
        horizon_s=warmup_s + requests / rate,
        warmup_s=warmup_s,
        seed=2 * seed,
    )
    size = preload_size(predicted, empty.horizon_s, variance_ratio(setting.workload))
    full = replace(empty, id="preloaded", seed=2 * seed + 1, preload=size)
    poisson, preloaded = (_capacity(setting, run) for run in (empty, full))
    return Capacities(poisson, preloaded, size)


def _capacity(setting: Setting, run: Run) -> Estimate:
    frames = offered(setting.server, setting.workload, run).frames
    window = backlogged_window(frames, run.warmup_s)
    least_s = LEAST_BACKLOGGED * (run.horizon_s - run.warmup_s)
    if window is None or window.duration_s < least_s:
        raise ValueError(f"{setting.name}: the queue of {run} emptied: raise OVERLOAD")
    demand = setting.workload.mean(work_demand(setting.workload))
    return work_served(frames, window, demand).estimate


def branches(setting: Setting, known: Known, rho: float, seed: int, theta: float) -> Branches:
    """Two runs at ``rho`` of the true critical rate, from empty and from full, as long as planned.

    A plan has pairs below the predicted rate alone: for a ``rho`` near 1 the prediction is too high.
    """
    factor = max(1.0, rho / HIGHEST_PAIR)
    claim = right(known, factor)
    plan = planned(setting, claim, (rho / factor,), theta, seed, start="both")
    runs = tuple(offered(setting.server, setting.workload, run) for run in plan.runs)
    return compared(setting, claim, runs, theta)


def compared(
    setting: Setting, claim: Prediction, runs: tuple[MeasuredRun, ...], theta: float
) -> Branches:
    """What the two runs of a pair say together."""
    evidence = evidence_of(setting, claim, theta, runs)
    served = {
        run.frames.run.id: found.by_work
        for run in runs
        if (found := capacity(run, evidence)) is not None
    }
    return two_branches([judge_run(run, evidence) for run in runs], served)[0]
