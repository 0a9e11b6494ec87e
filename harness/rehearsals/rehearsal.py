"""The whole experiment in virtual time, against a mock server's parameters: for measured error rates.

Nothing is shared with the simulated server but what a live one would show: the pool that it claims, its
block size, its model length, the times of its tokens with a client's jitter, and its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.calibration.probe_readings import read_probes
from analysis.calibration.probes import Probe, design_probes
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, StepTimeFit
from analysis.theory.prediction import Prediction
from analysis.theory.waterfall import Mechanism
from analysis.verdicts.evidence import Evidence, MeasuredRun
from analysis.verdicts.judge import judge
from analysis.verdicts.verdict import Verdict
from harness.configs.config import ExperimentConfig
from harness.experiments.plan import Plan, StartOption, make_plan
from harness.experiments.predict import narrow_enough, predictions
from harness.live.calibrate import MAX_REPEATS, REPEATS, good_enough
from loadgen.arrivals import run_arrivals
from loadgen.fidelity import fidelity
from loadgen.records import LoadFidelity, RequestRecord, Run
from loadgen.replay import run_lengths
from loadgen.workload import Workload

JITTER_S = 0.001
"""Mean of the exponential delay with which a client sees a token."""
NOISE_STEPS = 2**16
"""A row of noise is so long before it begins anew."""


@dataclass(frozen=True, slots=True)
class SimulatedServer:
    """What a simulated server is: its rules, its step time, and the noise on that."""

    limits: EngineLimits
    law: StepTime
    noise: float = 0.0
    """Relative standard deviation of one step's time; log-normal, independent, of mean 1."""
    slowdown: Callable[[Run], NDArray[np.float64]] | None = None
    """How a run's speed drifts, see `analysis.schedulers.simulate.simulate`; calibrations come
    before any drift."""

    def step_factors(self, seed: int) -> NDArray[np.float64] | None:
        """Noise from a seed, shape (NOISE_STEPS,); None without noise."""
        if not self.noise:
            return None
        sigma = math.sqrt(math.log1p(self.noise**2))
        return np.random.default_rng([seed, 5]).lognormal(-(sigma**2) / 2, sigma, NOISE_STEPS)


def rehearse(config: ExperimentConfig, seed: int) -> Verdict:
    """One experiment as ``critrate run`` would carry it out, with every random number from ``seed``."""
    assert config.server is not None, "a rehearsal needs the parameters of a mock server"
    assert config.server.mock is not None, "a rehearsal needs the parameters of a mock server"
    mock, workload = config.server.mock, config.law()
    shown = replace(mock.limits(), num_blocks=mock.claimed_num_blocks or mock.num_blocks)
    if shown.sglang is None:
        shown = EngineLimits(
            num_blocks=shown.num_blocks,
            block_size=shown.block_size,
            max_model_len=shown.max_model_len,
            max_num_seqs=config.limits.max_num_seqs,
            max_num_batched_tokens=config.limits.max_num_batched_tokens,
        )
    server = SimulatedServer(mock.limits(), mock.step_time.law())
    fit, _ = calibrated(
        server,
        workload,
        shown,
        np.random.default_rng([seed, 99]),
        narrow_enough(config, workload, shown),
    )
    found = predictions(config, workload, shown, fit, "P1", second_opinion=False)
    plan = rehearsed_plan(config, found, workload, seed, config.load.start)
    runs = tuple(offered(server, workload, run) for run in plan.runs)
    return judge(rehearsed_evidence(config, found, shown, workload, runs))


def rehearsed_plan(
    config: ExperimentConfig,
    found: Mapping[str, Any],
    workload: Workload,
    seed: int,
    start: StartOption = "empty",
) -> Plan:
    """The runs that `critrate run` would make of the predictions ``found``, as of prediction.json."""
    claim = Prediction.from_dict(found["claim"])
    return make_plan(
        claim,
        Prediction.from_dict(found["engine"]),
        workload,
        loads=config.loads(claim.critical_rate.value),
        horizon_s=config.load.horizon_s,
        max_horizon_s=config.load.max_horizon_s,
        theta=config.theta,
        seed=seed,
        prediction_digest="",
        start=start,
        arrivals=config.arrivals(),
    )


def rehearsed_evidence(
    config: ExperimentConfig,
    found: Mapping[str, Any],
    shown: EngineLimits,
    workload: Workload,
    runs: tuple[MeasuredRun, ...],
) -> Evidence:
    """What the verdict of a rehearsal rests on; ``found`` as of prediction.json."""
    return Evidence(
        name=config.name,
        mode="rehearsal: server and client are simulated",
        theta=config.theta,
        prediction=Prediction.from_dict(found["claim"]),
        paper=Prediction.from_dict(found["paper"]),
        engine=Prediction.from_dict(found["engine"]),
        mechanisms=tuple(Mechanism(**m) for m in found["mechanisms"]),
        simulated=None,
        limits=shown,
        workload=workload,
        runs=runs,
    )


def calibrated(
    server: SimulatedServer,
    workload: Workload,
    shown: EngineLimits,
    rng: np.random.Generator,
    enough: Callable[[StepTimeFit], bool],
) -> tuple[StepTimeFit, int]:
    """The step-time law from simulated probes, seen through a client's jitter; rounds as if live.

    Also returned: the requests that they took.
    """
    probes = [p for p in design_probes(workload, shown) if p.output_tokens > 1]
    seen: list[tuple[str, list[RequestRecord], tuple[()]]] = []
    exact = [] if server.noise else [_probed(p, server, 0) for p in probes]
    for done in range(1, MAX_REPEATS + 1):
        for i, probe in enumerate(probes):
            records = exact[i] if exact else _probed(probe, server, int(rng.integers(2**32)))
            seen.append((probe.name, _jittered(records, rng), ()))
        if done < REPEATS:
            continue
        fit, _ = read_probes(seen, shown.prefill_chunk)
        if good_enough(fit, enough):
            break
    return fit, done * sum(len(p.lengths) for p in probes)


def offered(
    server: SimulatedServer, workload: Workload, run: Run, test_load: bool = True
) -> MeasuredRun:
    """One run against the true parameters.

    Its load follows its law by construction: without ``test_load`` it is taken to be valid, which takes
    less time.
    """
    arrival_s = run_arrivals(run)
    lengths = run_lengths(run, workload, len(arrival_s))
    simulated = simulate(
        server.limits,
        server.law,
        arrival_s,
        lengths,
        run.horizon_s,
        ignore_eos=workload.ignore_eos,
        step_factors=server.step_factors(run.seed),
        slowdown=None if server.slowdown is None else server.slowdown(run),
    )
    load = by_construction(len(arrival_s) / run.horizon_s)
    if test_load:
        load = fidelity(run, simulated.records, run.horizon_s, 0)
    return MeasuredRun(simulated.frames(run), load, overrun=0.0)


def by_construction(rate: float) -> LoadFidelity:
    """Of a simulated load, which is what it claims to be."""
    return LoadFidelity(
        valid=True,
        checks=(),
        achieved_rate=rate,
        lag_p50_ms=0.0,
        lag_p99_ms=0.0,
        lag_max_ms=0.0,
    )


def _probed(probe: Probe, server: SimulatedServer, seed: int) -> list[RequestRecord]:
    law = server.law

    def run(lengths: list[tuple[int, int]], arrival_s: list[float]) -> list[RequestRecord]:
        triples = np.array([(s, o, o) for s, o in lengths])
        return simulate(
            server.limits,
            law,
            np.array(arrival_s),
            triples,
            3600.0,
            3600.0,
            step_factors=server.step_factors(seed),
        ).records

    together = [0.0] * probe.count
    if not probe.prompts:
        return run(probe.lengths, together)
    # The prompts that follow are sent one after another when the one before is answered, the first when
    # the batch is in: each meets a step under way, and is computed in or after the next.
    n, held = probe.count, probe.count * (probe.prompt_tokens + probe.output_tokens)
    turn_s = 1.5 * law(n, held, n) + law(n + probe.prompt_length, held + probe.prompt_length, n + 1)
    batch = run(probe.lengths[:n], together)
    in_s = max(r.first_token_ns for r in batch if r.first_token_ns is not None) / 1e9
    return run(probe.lengths, [*together, *(in_s + turn_s * i for i in range(probe.prompts))])


def _jittered(records: list[RequestRecord], rng: np.random.Generator) -> list[RequestRecord]:
    def late(t_ns: int | None) -> int | None:
        return None if t_ns is None else t_ns + round(rng.exponential(JITTER_S) * 1e9)

    return [
        replace(r, first_token_ns=late(r.first_token_ns), last_token_ns=late(r.last_token_ns))
        for r in records
    ]
