"""The hypotheses H1 to H10 of the theory, on simulators: each a function of its config.

Every verdict rests on intervals of 95 % from independent seeds: confirmed where one lies within what the
hypothesis allows, refuted where it lies outside, and "cannot say" where it lies on the edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from analysis.inference.capacity import backlogged_window
from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.quantiles import student_quantile
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.kv_demand import kv_demand_engine, kv_demand_paper
from analysis.theory.prediction import Prediction
from analysis.verdicts.audit import saturation
from analysis.verdicts.evidence import rounding
from analysis.verdicts.identity import identity
from analysis.verdicts.second_opinion import simulated_rate
from harness.hypotheses.hypotheses_of_slots import h6, h7
from harness.hypotheses.hypothesis_config import EngineConfig, HypothesisConfig
from harness.hypotheses.hypothesis_of_arrivals import h9
from harness.hypotheses.hypothesis_verdict import ANYWHERE, Part, Verdict, over_seeds
from harness.hypotheses.theory import slot_run
from harness.rehearsals.rehearsal import SimulatedServer, offered
from loadgen.arrivals import poisson
from loadgen.records import Run
from loadgen.workload import Workload


def saturated(
    engine: EngineConfig, workload: Workload, limits: EngineLimits, law: StepTime | None = None
) -> Estimate:
    """req/s under sustained Poisson overload, over seeds."""
    law = engine.step_time.law() if law is None else law
    rates = [
        simulated_rate(workload, limits, law, engine.requests, seed).value
        for seed in _seeds(engine)
    ]
    return over_seeds(rates, "req/s")


def predicted(
    engine: EngineConfig,
    workload: Workload,
    limits: EngineLimits,
    claim: Literal["paper", "engine"],
) -> Prediction:
    """In closed form, with the law that the simulation runs under."""
    return predict(workload, limits, exact_step_time(engine.step_time.law()), claim, "P1")


def h1(config: HypothesisConfig) -> Verdict:
    """Measured over the paper's mu within [1 - delta, 1], times 0.9 to 1 for recompute."""
    engine = _engine(config)
    parts = []
    for each in engine.workloads:
        workload, limits = each.build(), engine.limits()
        paper = predicted(engine, workload, limits, "paper")
        found = saturated(engine, workload, limits)
        over = found.scaled(1 / paper.critical_rate.value, "")
        what = f"{workload.name}: measured over M / (b E[g])"
        parts.append(Part(what, over, (0.9 * (1 - paper.delta), 1.0)))
        own = predicted(engine, workload, limits, "engine").critical_rate
        over = ratio(found, Estimate.exact(own.value, "req/s", "closed form"), "over closed form")
        parts.append(Part(f"{workload.name}: over the engine's closed form", over, ANYWHERE))
    return Verdict("H1", tuple(parts))


def h2(config: HypothesisConfig) -> Verdict:
    """Occupancy, step time and what is not wasted multiply to what was measured, within 2 %."""
    engine = _engine(config)
    parts = []
    for each in engine.workloads:
        workload, limits = each.build(), engine.limits()
        claim = predicted(engine, workload, limits, "engine")
        rate = 1.3 * claim.critical_rate.value
        warm_up_s = max(3 * claim.longest_residence_s, claim.settling_s)
        ratios = []
        for seed in _seeds(engine):
            horizon_s = warm_up_s + engine.requests / rate
            run = Run(
                id="h2", arrival_rate=rate, horizon_s=horizon_s, warmup_s=warm_up_s, seed=seed
            )
            server = SimulatedServer(limits, engine.step_time.law())
            frames = offered(server, workload, run, test_load=False).frames
            window = backlogged_window(frames, warm_up_s)
            seen = None if window is None else saturation(frames, window, limits, workload)
            if seen is None:
                raise ValueError(f"{workload.name}: the queue emptied; raise engine.requests")
            share = rounding(workload, limits.block_size)
            factors = identity(
                frames, seen, limits.pool_tokens, share, claim.step_time_s.value
            ).factors
            ratios.append(factors[3].estimate.value / factors[4].estimate.value)
        what = f"{workload.name}: three factors over the measured rate"
        parts.append(Part(what, over_seeds(ratios), (0.98, 1.02)))
    return Verdict("H2", tuple(parts))


def h3(config: HypothesisConfig) -> Verdict:
    """1/mu against 1/M: slope b0 E[g] and a positive intercept; with a constant b no intercept."""
    engine = _engine(config)
    workload = engine.workloads[0].build()
    law = engine.step_time.law()
    pace = law.b0_s
    parts = []
    for name, each in (("linear b", law), ("constant b", StepTime(b0_s=pace))):
        rates = [saturated(engine, workload, engine.limits(m), each) for m in config.pools]
        inverse = np.array([1 / m for m in config.pools])
        values = np.array([1 / r.value for r in rates])
        errors = np.array([r.standard_error / r.value**2 for r in rates])
        slope, intercept = _line(inverse, values, errors)
        area = predicted(engine, workload, engine.limits(), "engine").kv_demand.value
        over = slope.scaled(1 / (pace * area), "")
        parts.append(Part(f"{name}: slope over b0 E[g]", over, (0.98, 1.02)))
        edge = 0.02 * float(values[0])
        allowed = (1e-9, math.inf) if name == "linear b" else (-edge, edge)
        parts.append(Part(f"{name}: intercept, s per request", intercept, allowed))
    return Verdict("H3", tuple(parts))


def _line(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], errors: np.ndarray[Any, Any]
) -> tuple[Estimate, Estimate]:
    """Weighted least squares; errors widened where the points lie off the line by more."""
    design = np.vstack([x, np.ones_like(x)]).T / errors[:, None]
    covariance = np.linalg.inv(design.T @ design)
    best = covariance @ design.T @ (y / errors)
    chi2 = float((((y - best[0] * x - best[1]) / errors) ** 2).sum()) / (len(x) - 2)
    half = student_quantile(0.975, len(x) - 2) * np.sqrt(np.diag(covariance) * max(1.0, chi2))
    units = ("s token-steps per request", "s")
    slope, intercept = (
        Estimate(float(b), float(b - h), float(b + h), 0.95, unit, "weighted least squares")
        for b, h, unit in zip(best, half, units, strict=True)
    )
    return slope, intercept


def h4(config: HypothesisConfig) -> Verdict:
    """Past the crossing of another ceiling with the KV cache, raising it changes nothing."""
    engine = _engine(config)
    workload = engine.workloads[0].build()
    claim = predicted(engine, workload, engine.limits(), "engine")
    steps = claim.step_time_s.value * claim.critical_rate.value
    crossing = {
        "max_num_seqs": claim.running,
        "max_num_batched_tokens": steps
        * float(workload.mean(workload.prompt_tokens + workload.output_tokens - 1)),
    }
    parts = []
    for name, at in crossing.items():
        rates = [
            saturated(engine, workload, engine.limits(**{name: math.ceil(factor * at)}))
            for factor in config.factors
        ]
        for factor, rate in zip(config.factors[:-1], rates[:-1], strict=True):
            change = ratio(rates[-1], rate, "rates over seeds")
            # Below the crossing the ceiling has to bind, well past it it must not.
            allowed = (
                (1.05, math.inf) if factor < 1 else (0.98, 1.02) if factor >= 1.5 else ANYWHERE
            )
            what = f"{name} raised from {factor:g} to {config.factors[-1]:g} of the crossing ({at:.0f})"
            parts.append(Part(what, change, allowed))
    return Verdict("H4", tuple(parts))


def h5(config: HypothesisConfig) -> Verdict:
    """Fixed lengths: no memory-time lost with resume, (l1-1)/(2(l0+l1)) with restarts, and waves."""
    parts = []
    for case in config.slot_cases:
        runs = [slot_run(case, seed) for seed in range(1, case.seeds + 1)]
        lost, waves, again = [], [], []
        prompt, output = case.classes[0].prompt_tokens, case.classes[0].output_tokens
        for run in runs:
            part = run.slots[case.warm_up_slots :]
            held = float(part["used_tokens"].mean()) / case.memory_tokens
            wasted = float(part["lost_token_slots"].sum() / part["used_tokens"].sum())
            lost.append(1 - held * (1 - wasted))
            done = part["completed"].astype(float)
            again.append(float(part["recomputed_tokens"].sum() / max(done.sum(), 1)))
            if isinstance(output, int):
                waves.append(float(np.corrcoef(done[:-output], done[output:])[0, 1]))
        allowed = ANYWHERE
        if case.policy == "greedy_resume":
            allowed = (-0.01, 0.01)
        elif isinstance(prompt, int) and isinstance(output, int):
            loss = (output - 1) / (2 * (prompt + output))
            allowed = (loss - 0.01, loss + 0.01)
        parts.append(Part(f"{case.name}: throughput lost", over_seeds(lost), allowed))
        what = f"{case.name}: tokens computed again per completion"
        parts.append(Part(what, over_seeds(again, "tokens"), ANYWHERE))
        if waves:
            allowed = (0.9, 1.001) if case.policy == "greedy_restart" else ANYWHERE
            what = f"{case.name}: correlation of completions a residence apart"
            parts.append(Part(what, over_seeds(waves), allowed))
    engine = _engine(config)
    for each in engine.workloads:
        workload, limits = each.build(), engine.limits()
        own = predicted(engine, workload, limits, "engine").critical_rate
        over = saturated(engine, workload, limits).scaled(1 / own.value, "")
        what = f"vLLM, {workload.name}: measured over the closed form with recompute"
        parts.append(Part(what, over, (0.95, 1.05)))
    return Verdict("H5", tuple(parts))


def h8(config: HypothesisConfig) -> Verdict:
    """At the predicted onset, memory is short for 5 % of the time: between 2.5 and 10 %."""
    first = _engine(config)
    parts = []
    settings = [(first, w) for w in first.workloads]
    settings += [] if config.also is None else [(config.also, w) for w in config.also.workloads]
    for engine, each in settings:
        workload, limits = each.build(), engine.limits()
        claim = predicted(engine, workload, limits, "engine")
        if claim.onset_rate is None:
            raise ValueError(
                f"{workload.name}: the KV cache does not bind, so that there is no onset"
            )
        rate = claim.onset_rate.value
        shares = []
        for seed in _seeds(engine):
            warm_up_s = 5 * claim.longest_residence_s
            horizon_s = warm_up_s + engine.requests / rate
            arrival_s = poisson(rate, horizon_s, seed)
            lengths = workload.sample(np.random.default_rng([seed, 1]), len(arrival_s))
            steps = simulate(
                limits, engine.step_time.law(), arrival_s, lengths, horizon_s, horizon_s
            ).steps
            inside = steps.start_s >= warm_up_s
            short = (steps.waiting > 0) | (steps.preempted > 0)
            shares.append(float(np.average(short[inside], weights=steps.duration_s[inside])))
        load = rate / claim.critical_rate.value
        law = "constant b" if not engine.step_time.b1_us_per_token else "b rises with tokens"
        what = f"{workload.name}, {law}, load {load:.2f}: share of time with memory short"
        parts.append(Part(what, over_seeds(shares), (0.025, 0.10) if engine is first else ANYWHERE))
    return Verdict("H8", tuple(parts))


def h10(config: HypothesisConfig) -> Verdict:
    """Short outputs: a request holds the engine's g of memory-time, 5 to 14 % less than the paper's.

    At a tenth of the critical rate prompts hardly ever share a step. At half of it they do: one that
    waits for the token budget holds what it has computed, more than either g says; shown beside.
    """
    engine = _engine(config)
    chunk = engine.max_num_batched_tokens
    parts = []
    for each in engine.workloads:
        workload, limits = each.build(), engine.limits()
        s, o = workload.prompt_tokens, workload.output_tokens
        areas = {
            "engine's": float(workload.mean(kv_demand_engine(s, o, chunk))),
            "paper's": float(workload.mean(kv_demand_paper(s, o, chunk))),
        }
        claim = predicted(engine, workload, limits, "engine")
        for load, decides in ((0.1, True), (0.5, False)):
            rate = load * claim.critical_rate.value
            held = [_held_per_request(engine, workload, rate, seed) for seed in _seeds(engine)]
            for name, area in areas.items():
                over = over_seeds([each / area for each in held])
                allowed = (0.98, 1.02) if name == "engine's" else (0.86, 0.95)
                what = f"{workload.name}, load {load}: memory-time per request over the {name} g"
                parts.append(Part(what, over, allowed if decides else ANYWHERE))
    return Verdict("H10", tuple(parts))


def _held_per_request(engine: EngineConfig, workload: Workload, rate: float, seed: int) -> float:
    """Token-steps that a completed request held on average, at this rate."""
    horizon_s = engine.requests / rate
    arrival_s = poisson(rate, horizon_s, seed)
    lengths = workload.sample(np.random.default_rng([seed, 1]), len(arrival_s))
    law, limits = engine.step_time.law(), engine.limits()
    run = simulate(limits, law, arrival_s, lengths, horizon_s, horizon_s)
    ended = run.rows["outputs"] == run.rows["designed"]
    return float(run.steps.used_blocks.sum()) * limits.block_size / float(ended.sum())


def _seeds(engine: EngineConfig) -> range:
    return range(1, engine.seeds + 1)


def _engine(config: HypothesisConfig) -> EngineConfig:
    if config.engine is None:
        raise ValueError(f"{config.hypothesis} needs the section engine")
    return config.engine


TESTS: dict[str, Callable[[HypothesisConfig], Verdict]] = {
    "H1": h1,
    "H2": h2,
    "H3": h3,
    "H4": h4,
    "H5": h5,
    "H6": h6,
    "H7": h7,
    "H8": h8,
    "H9": h9,
    "H10": h10,
}
