"""One experiment from the evidence that is kept of it: judged again, beside every predictor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.numbers.estimate import Estimate, ratio
from analysis.schedulers.step_time import StepTime, StepTimeFit
from analysis.verdicts.audit import counter_at
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.explain import Explanation, explain
from analysis.verdicts.judge import judge
from analysis.verdicts.replica_verdict import verdict_of
from analysis.verdicts.replicas import backlogs
from analysis.verdicts.run_verdict import Capacity
from analysis.verdicts.second_opinion import simulated_rate
from analysis.verdicts.verdict import Verdict
from harness.configs.config import ExperimentConfig, load_config
from harness.configs.launch import PACE_LOG
from harness.experiments.analyse import load_evidence
from harness.experiments.predict import prefill_chunk
from harness.records.store import Store
from harness.records.streams import of_replica

SIMULATED = "simulated.json"
REQUESTS = 20_000
"""Of a simulation: at the 3 000 of a prediction it may be known less well than what was measured."""
"""Rate of the scheduler model under the law that an engine was set to: made later, decides nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One experiment: what was predicted, what was measured, and how the engine was while backlogged."""

    config: ExperimentConfig
    evidence: Evidence
    verdict: Verdict
    backlog: Capacity | None
    set_law: StepTime | None
    """The step time that the engine was set to; None for its own."""
    simulated: Estimate | None
    """req/s of the scheduler model, under the law that was set where one was."""
    recomputed_tokens: float | None
    """Tokens per request that were computed again, as counted; None where nothing counts them."""
    explanation: Explanation
    """What lies between the paper's formula and the measured rate, of ``server`` alone."""
    server: int = 0
    """Which of several servers ``backlog`` is of: the one whose queue lasted longest."""

    @property
    def servers(self) -> int:
        """How many share the requests."""
        return 1 if self.evidence.replicas is None else len(self.evidence.replicas.each)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def paper(self) -> Estimate:
        return self.evidence.paper.critical_rate

    @property
    def engine(self) -> Estimate:
        return self.evidence.engine.critical_rate

    @property
    def in_blocks(self) -> Estimate:
        """The paper's formula with the engine's own E[g], in whole blocks."""
        return self.paper.scaled(self.factor("rounding"))

    @property
    def valid(self) -> bool:
        return self.verdict.outcome != "invalid" and self.verdict.measured is not None

    def factor(self, mechanism: str) -> float:
        """By what a mechanism changes the predicted rate; 1 where it has no effect."""
        found = (m.factor for m in self.evidence.mechanisms if m.name == mechanism)
        return next(found, 1.0)

    def over(self, predicted: Estimate | None) -> Estimate | None:
        """Measured over a prediction; None where one of them is missing."""
        if self.verdict.measured is None or predicted is None:
            return None
        return ratio(self.verdict.measured, predicted, "measured over predicted")


def read_row(folder: Path) -> Row:
    """Judge the evidence of a folder again. Raises StoreError as `load_evidence`."""
    store = Store.open(folder)
    config = load_config(folder / "config.yaml")
    evidence = load_evidence(store)
    launch = None if config.server is None else config.server.launch
    law = None if launch is None or launch.step_time is None else launch.step_time.law()
    servers = (evidence,) if evidence.replicas is None else evidence.replicas.each
    seen = [(i, c) for i, own in enumerate(backlogs(evidence)) for c in own]
    server, backlog = max(
        seen, key=lambda found: found[1].saturated.window.duration_s, default=(0, None)
    )
    simulated = evidence.simulated
    if law is not None and store.has(SIMULATED):
        simulated = Estimate.from_dict(store.read_json(SIMULATED))
    recomputed = None
    log = of_replica(PACE_LOG, server, len(servers))
    if backlog is not None and law is not None and store.has(log):
        recomputed = _recomputed(store, log, backlog, law)
    verdict, one = verdict_of(evidence), servers[server]
    of_one = verdict if one is evidence else judge(one)
    fit = StepTimeFit.from_dict(store.read_json("calibration.json")["fit"])
    chunk = prefill_chunk(config, config.estimated_law(), evidence.limits)
    return Row(
        config=config,
        evidence=evidence,
        verdict=verdict,
        backlog=backlog,
        set_law=law,
        simulated=simulated,
        recomputed_tokens=recomputed,
        explanation=explain(one, of_one, fit, chunk, recomputed),
        server=server,
    )


def simulate_set_law(store: Store) -> Estimate | None:
    """req/s of the scheduler model under the law that an engine was set to, of all servers together;
    None where none was set."""
    config = load_config(store.path / "config.yaml")
    launch = None if config.server is None else config.server.launch
    if launch is None or launch.step_time is None:
        return None
    evidence = load_evidence(store)
    assert config.server is not None
    return simulated_rate(
        evidence.workload,
        evidence.limits,
        launch.step_time.law(),
        requests=REQUESTS,
        seed=config.load.seed,
    ).scaled(config.server.count)


def _recomputed(store: Store, log: str, backlog: Capacity, law: StepTime) -> float | None:
    """Tokens per request that were computed again under backlog.

    A step that is set to b0 + b1 tokens tells its tokens by its length; what requests need once, their
    prompts and outputs less the last, is subtracted. None for laws with other terms.
    """
    b0, b1, b2, b3 = law.coefficients()
    if not b1 or b2 or b3:
        return None
    run, window = backlog.run.frames, backlog.saturated.window
    start_ns = store.read_run(run.run.id).start_ns
    lines = [json.loads(line) for line in (store.path / log).read_text().splitlines()]
    at_s = np.array([(line["t_ns"] - start_ns) / 1e9 for line in lines])
    inside = np.flatnonzero((at_s >= window.start_s) & (at_s <= window.end_s))
    if len(inside) < 3:
        return None
    part = [lines[i] for i in inside[1:]]
    computed = sum(x["law_s"] - b0 * x["steps"] for x in part) / b1
    ends = at_s[inside[[0, -1]]]
    prompts, outputs, finished = (
        float(np.diff(counter_at(run, column, ends))[0])
        for column in ("prompt_tokens", "generation_tokens", "finished")
    )
    first = run.requests["first_token_s"].between(*ends).sum()
    return float(computed - (prompts + outputs - float(first))) / max(finished, 1.0)
