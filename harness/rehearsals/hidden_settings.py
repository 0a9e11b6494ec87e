"""Servers and laws of lengths drawn at random, for benches whose method must not know them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.inference.capacity import backlogged_window, work_served
from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits, EngineSample, SGLangRules
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.kv_demand import kv_demand_engine, residence_steps
from analysis.theory.prediction import Prediction
from analysis.verdicts.evidence import work_demand
from harness.rehearsals.rehearsal import SimulatedServer, offered
from loadgen.length_laws import lognormal
from loadgen.records import Run
from loadgen.workload import Workload, uniform

BLOCK = 16
LONGEST = 8
"""Longest prompt and longest output, in means."""
OVERLOAD = 1.25
WARM_UP_RESIDENCES = 5
"""Longest residences before a server counts as settled."""


@dataclass(frozen=True, eq=False)
class HiddenSetting:
    """One server under one law of lengths, and at which share of its critical rate it is watched."""

    seed: int
    workload: Workload
    server: SimulatedServer
    load: float
    """Offered rate over the critical rate that the closed form gives for the true parameters."""

    @property
    def engine(self) -> str:
        """Whose scheduler it has."""
        return "vLLM" if self.server.limits.sglang is None else "SGLang"

    @cached_property
    def predicted(self) -> Prediction:
        """What the true parameters predict: to choose rates by, not to judge by."""
        return closed_form(self.workload, self.server)


def hidden_setting(seed: int) -> HiddenSetting:
    """Lengths, pool, sequences, token budget, step-time law and load, all from the seed.

    A third of the settings is SGLang; the limit drawn to bind first is the KV cache (with what SGLang
    sets aside) in half of them, max_num_seqs in a third, and, on vLLM, the token budget in the others.
    """
    rng = np.random.default_rng([seed, 9])
    sglang = bool(rng.random() < 1 / 3)
    law = _lengths(rng)
    s, o = law.prompt_tokens, law.output_tokens
    steps = law.mean(residence_steps(s, o, int(s.max())))
    held = law.mean(kv_demand_engine(s, o, int(s.max())))
    running = float(rng.uniform(25, 100))
    pool = running / steps * held
    if sglang:
        # What the outputs to come take beside what is held.
        pool += running / steps * law.mean(o * (o - 1) / 2)
    pool = max(pool, 4.0 * float((s + o).max()))
    running = pool / held * steps if not sglang else running
    binding = rng.choice(3, p=[0.5, 1 / 3, 1 / 6])
    if sglang and binding == 2:
        binding = 0
    seqs = running * (rng.uniform(0.4, 0.85) if binding == 1 else rng.uniform(1.3, 4.0))
    per_step = running / steps * law.mean(s + o - 1)
    budget = per_step * (rng.uniform(0.45, 0.8) if binding == 2 else rng.uniform(2.5, 8.0))
    limits = EngineLimits(
        num_blocks=round(pool) if sglang else math.ceil(pool / BLOCK),
        block_size=1 if sglang else BLOCK,
        max_num_seqs=round(seqs),
        max_num_batched_tokens=8192 if sglang else max(round(budget), 64),
        sglang=SGLangRules() if sglang else None,
    )
    return HiddenSetting(
        seed=seed,
        workload=law,
        server=SimulatedServer(limits, _step_law(rng, per_step, pool, running), noise=0.05),
        load=float(rng.uniform(0.3, 0.9)),
    )


def _lengths(rng: np.random.Generator) -> Workload:
    prompt, output = (math.exp(rng.uniform(math.log(40), math.log(400))) for _ in range(2))
    if rng.random() < 0.4:
        s, o = ((max(round(0.1 * mean), 1), round(1.9 * mean)) for mean in (prompt, output))
        return uniform(s, o)
    cv_s, cv_o = rng.uniform(0.4, 1.2, 2)
    ends = ((2, round(LONGEST * prompt)), (2, round(LONGEST * output)))
    return lognormal((prompt, cv_s), (output, cv_o), float(rng.uniform(-0.2, 0.3)), *ends)


def _step_law(rng: np.random.Generator, tokens: float, kv: float, running: float) -> StepTime:
    """A fixed part of 10-25 ms; tokens, KV and requests take up to 0.3 of it each at a full batch."""
    fixed_s = float(rng.uniform(10e-3, 25e-3))
    shares = rng.uniform(0.0, 0.3, 3) * fixed_s
    return StepTime(
        b0_s=fixed_s,
        b1_s_per_token=float(shares[0]) / tokens,
        b2_s_per_kv_token=float(shares[1]) / kv,
        b3_s_per_request=float(shares[2]) / running,
    )


def closed_form(workload: Workload, server: SimulatedServer) -> Prediction:
    """The prediction from the true parameters."""
    return predict(workload, server.limits, exact_step_time(server.law), "engine", "P0")


def true_rate(
    workload: Workload,
    server: SimulatedServer,
    requests: int,
    seed: int,
    predicted: Prediction | None = None,
) -> Estimate:
    """Service rate under sustained Poisson overload, req/s, from about ``requests`` completions.

    ``predicted`` is `closed_form` of the same, where it is known. Raises ValueError where the queue
    does not last.
    """
    first = predicted or closed_form(workload, server)
    rate = OVERLOAD * first.critical_rate.value
    warmup_s = WARM_UP_RESIDENCES * max(first.longest_residence_s, first.settling_s)
    run = Run(
        id="truth",
        arrival_rate=rate,
        horizon_s=warmup_s + OVERLOAD * requests / rate,
        warmup_s=warmup_s,
        seed=seed,
    )
    frames = offered(server, workload, run, test_load=False).frames
    window = backlogged_window(frames, warmup_s)
    if window is None or window.duration_s < 0.9 * (run.horizon_s - warmup_s):
        raise ValueError(f"{rate:.3g} req/s do not keep the queue non-empty")
    demand = workload.mean(work_demand(workload, first.binding))
    return work_served(frames, window, demand, first.binding).estimate


def watched(
    setting: HiddenSetting, seconds: float, interval_s: float, seed: int
) -> tuple[list[EngineSample], float]:
    """What somebody would read who watches the server at its load, and the rate that is offered."""
    first = setting.predicted
    rate = setting.load * first.critical_rate.value
    warmup_s = WARM_UP_RESIDENCES * first.longest_residence_s
    rng = np.random.default_rng([seed, 3])
    end_s = warmup_s + seconds
    wanted = rate * end_s
    gaps_s = rng.exponential(1 / rate, math.ceil(wanted + 10 * math.sqrt(wanted) + 10))
    arrival_s = np.cumsum(gaps_s)
    arrival_s = arrival_s[arrival_s < end_s]
    run = simulate(
        setting.server.limits,
        setting.server.law,
        arrival_s,
        setting.workload.sample(rng, len(arrival_s)),
        end_s,
        sample_interval_s=interval_s,
        ignore_eos=setting.workload.ignore_eos,
        step_factors=setting.server.step_factors(seed),
    )
    return [s for s in run.samples if s.t_ns >= warmup_s * 1e9], rate
