"""An experiment on several servers behind one list of URLs, in virtual time: for its error rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis.numbers.estimate import Estimate
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTimeFit
from analysis.theory.prediction import Prediction
from analysis.verdicts.evidence import MeasuredRun
from analysis.verdicts.replica_verdict import verdict_of
from analysis.verdicts.replicas import replicated, thinned, whole_run
from analysis.verdicts.verdict import Verdict
from harness.configs.config import ExperimentConfig
from harness.experiments.predict import narrow_enough
from harness.experiments.replicas import bounding, predictions_of_all
from harness.rehearsals.rehearsal import (
    SimulatedServer,
    by_construction,
    calibrated,
    rehearsed_evidence,
    rehearsed_plan,
)
from loadgen.arrivals import run_arrivals
from loadgen.records import Run
from loadgen.replay import run_lengths
from loadgen.workload import Workload


def rehearse_replicas(
    config: ExperimentConfig, servers: Sequence[SimulatedServer], seed: int
) -> Verdict:
    """One experiment as ``critrate run`` would carry it out, with every random number from ``seed``.

    ``servers`` may differ in speed. ``config`` names rates, horizons and lengths; the fits of servers
    that are alike are replaced by that of the first, which stands for the pooled one.
    """
    workload, shown = config.law(), servers[0].limits
    enough = narrow_enough(config, workload, shown)
    fits: list[StepTimeFit] = []
    for index, server in enumerate(servers):
        rng = np.random.default_rng([seed, 99, index])
        fits.append(calibrated(server, workload, shown, rng, enough)[0])
    slow = bounding(config, workload, shown, fits)
    found = predictions_of_all(
        config, workload, shown, fits, fits[slow[0]], slow, second_opinion=False
    )
    plan = rehearsed_plan(config, found, workload, seed)
    runs = [offered_replicas(servers, workload, run) for run in plan.runs]
    together = tuple(whole_run(own, run) for own, run in zip(runs, plan.runs, strict=True))
    whole = rehearsed_evidence(config, found, shown, workload, together)
    each = [
        (
            Prediction.from_dict(one["claim"]),
            Prediction.from_dict(one["paper"]),
            Prediction.from_dict(one["engine"]),
        )
        for one in found["replicas"]["each"]
    ]
    parts = [[own[i] for own in runs] for i in range(len(servers))]
    balanced = Estimate.from_dict(found["replicas"]["balanced"])
    return verdict_of(replicated(whole, each, parts, balanced))


def offered_replicas(
    servers: Sequence[SimulatedServer], workload: Workload, run: Run
) -> list[MeasuredRun]:
    """One run as each server has it: request i goes to number i mod N. Its load is valid."""
    arrival_s, count = run_arrivals(run), len(servers)
    lengths = run_lengths(run, workload, len(arrival_s))
    load = by_construction(len(arrival_s) / run.horizon_s)
    found = []
    for index, server in enumerate(servers):
        simulated = simulate(
            server.limits,
            server.law,
            arrival_s[index::count],
            lengths[index::count],
            run.horizon_s,
            ignore_eos=workload.ignore_eos,
            step_factors=server.step_factors(run.seed * 64 + index),
            slowdown=None if server.slowdown is None else server.slowdown(run),
        )
        frames = simulated.frames(thinned(run, index, count))
        frames = replace(
            frames, requests=frames.requests.assign(id=frames.requests["id"] * count + index)
        )
        found.append(MeasuredRun(frames, load, overrun=0.0))
    return found
