"""The whole experiment in virtual time, against a mock server's parameters: for measured error rates.

Nothing is shared with the simulated server but what a live one would show: the pool that it claims, its
block size, its model length, the times of its tokens with a client's jitter, and its metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from analysis.engine import EngineLimits
from analysis.evidence import Evidence, MeasuredRun
from analysis.frames import run_frames
from analysis.judge import judge
from analysis.prediction import Prediction
from analysis.probe_readings import step_observation
from analysis.probes import Probe, design_probes
from analysis.simulate import simulate
from analysis.step_time import StepObservation, StepTimeFit, fit_step_time
from analysis.verdict import Verdict
from analysis.waterfall import Mechanism
from harness.calibrate import MAX_REPEATS, REPEATS, good_enough
from harness.config import ExperimentConfig
from harness.mock_config import MockServerConfig
from harness.plan import make_plan
from harness.predict import narrow_enough, predictions
from loadgen.arrivals import poisson
from loadgen.fidelity import fidelity
from loadgen.records import RequestRecord, Run
from loadgen.workload import Workload

JITTER_S = 0.001
"""Mean of the exponential delay with which a client sees a token."""


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
    fit = calibrated(
        mock,
        workload,
        shown,
        np.random.default_rng([seed, 99]),
        narrow_enough(config, workload, shown),
    )
    found = predictions(config, workload, shown, fit, "P1", second_opinion=False)
    claim = Prediction.from_dict(found["claim"])
    plan = make_plan(
        claim,
        Prediction.from_dict(found["engine"]),
        workload,
        loads=config.load.rates,
        horizon_s=config.load.horizon_s,
        max_horizon_s=config.load.max_horizon_s,
        theta=config.theta,
        seed=seed,
        prediction_digest="",
    )
    evidence = Evidence(
        name=config.name,
        mode="rehearsal: server and client are simulated",
        theta=config.theta,
        prediction=claim,
        paper=Prediction.from_dict(found["paper"]),
        engine=Prediction.from_dict(found["engine"]),
        mechanisms=tuple(Mechanism(**m) for m in found["mechanisms"]),
        simulated=None,
        limits=shown,
        workload=workload,
        runs=tuple(offered(mock, workload, run) for run in plan.runs),
    )
    return judge(evidence)


def calibrated(
    mock: MockServerConfig,
    workload: Workload,
    shown: EngineLimits,
    rng: np.random.Generator,
    enough: Callable[[StepTimeFit], bool],
) -> StepTimeFit:
    """The step-time law from simulated probes, seen through a client's jitter; rounds as if live."""
    probes = [p for p in design_probes(workload, shown) if p.output_tokens > 1]
    exact = [(p.name, _probed(p, mock)) for p in probes]
    observations: list[StepObservation] = []
    for done in range(1, MAX_REPEATS + 1):
        for name, records in exact:
            seen = step_observation(_jittered(records, rng), shown.prefill_chunk)
            observations.append(replace(seen, probe=name))
        if done >= REPEATS and good_enough(fit_step_time(observations), enough):
            break
    return fit_step_time(observations)


def offered(mock: MockServerConfig, workload: Workload, run: Run) -> MeasuredRun:
    """One run against the true parameters."""
    arrival_s = poisson(run.arrival_rate, run.horizon_s, run.seed)
    lengths = workload.sample(np.random.default_rng([run.seed, 1]), len(arrival_s))
    law = mock.step_time.law()
    simulated = simulate(
        mock.limits(), law, arrival_s, lengths, run.horizon_s, ignore_eos=workload.ignore_eos
    )
    end_ns = round(run.horizon_s * 1e9)
    frames = run_frames(run, 0, end_ns, simulated.records, simulated.samples)
    return MeasuredRun(frames, fidelity(run, simulated.records, run.horizon_s, 0), overrun=0.0)


def _probed(probe: Probe, mock: MockServerConfig) -> list[RequestRecord]:
    law = mock.step_time.law()
    lengths = [(probe.prompt_tokens, probe.output_tokens)] * probe.count
    lengths += [(probe.prompt_length, 1)] * probe.prompts
    # A prompt that follows another is sent when that one is answered: within every third step.
    turn_s = 2.5 * law(1, probe.prompt_tokens, 1)
    arrival_s = [0.0] * probe.count + [turn_s * (i + 1) for i in range(probe.prompts)]
    triples = np.array([(s, o, o) for s, o in lengths])
    return simulate(mock.limits(), law, np.array(arrival_s), triples, 3600.0, 3600.0).records


def _jittered(records: list[RequestRecord], rng: np.random.Generator) -> list[RequestRecord]:
    def late(t_ns: int | None) -> int | None:
        return None if t_ns is None else t_ns + round(rng.exponential(JITTER_S) * 1e9)

    return [
        replace(r, first_token_ns=late(r.first_token_ns), last_token_ns=late(r.last_token_ns))
        for r in records
    ]
