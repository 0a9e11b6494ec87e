"""What a verdict rests on, and the moments of the workload that its statistics need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.calibration.pace import Pace
from analysis.inference.work import work_of
from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import RunFrames
from analysis.theory.kv_demand import kv_demand_blocks
from analysis.theory.prediction import Prediction
from analysis.theory.waterfall import Mechanism
from loadgen.processes import dispersion
from loadgen.records import LoadFidelity, Run
from loadgen.workload import Workload

OVERRUN_LIMIT = 0.01


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """One finished or interrupted run with the test of its load."""

    frames: RunFrames
    fidelity: LoadFidelity
    overrun: float | None
    """Share of a mock server's steps that ran late; None for a real engine."""
    warnings: tuple[str, ...] = ()
    pace: Pace | None = None
    """How a set step time was kept; None where none was set, or the run is too short to say."""

    @property
    def valid(self) -> bool:
        in_time = self.overrun is None or self.overrun <= OVERRUN_LIMIT
        paced = self.pace is None or self.pace.kept
        return self.fidelity.valid and in_time and paced


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything a verdict rests on. ``prediction`` is the claim; it was on disk before any run."""

    name: str
    mode: str
    """What kind of server answered, such as "mock server: ..." or "emulation: ..."."""
    theta: float
    prediction: Prediction
    paper: Prediction
    engine: Prediction
    mechanisms: tuple[Mechanism, ...]
    """What leads from the paper's rate to the engine's, by the prediction."""
    simulated: Estimate | None
    limits: EngineLimits
    workload: Workload
    runs: tuple[MeasuredRun, ...]
    arrival_variance: float = 1.0
    """ca2 of theory.md 6.1: 1 for Poisson arrivals, 1/N for every N-th of them."""
    replicas: Replicas | None = None
    """The servers behind it, where it is several: what is of one engine is then asked of each."""

    @property
    def variance_ratio(self) -> float:
        """ca2 + cd2 of theory.md 6.1. Of N replicas ca2 + N cd2: what their sum wanders by at most.

        Request i goes to number i mod N, so that their arrivals move together; departures may.
        """
        queues = 1 if self.replicas is None else len(self.replicas.each)
        return self.arrival_variance + queues * (variance_ratio(self.workload) - 1.0)

    def ca2(self, run: Run) -> float:
        """ca2 of one run, by the law of its arrivals; ``arrival_variance`` where they are Poisson."""
        together = run.arrival_rate / self.arrival_variance
        return self.arrival_variance * dispersion(run.arrivals, together)

    def variance_ratio_of(self, run: Run) -> float:
        """`variance_ratio` with the arrivals of this run."""
        return self.variance_ratio + self.ca2(run) - self.arrival_variance


@dataclass(frozen=True, eq=False)
class Replicas:
    """Servers behind one list of URLs; request i went to number i mod N.

    ``each`` is the evidence of one: its own requests, samples and prediction. ``balanced`` is what they
    are predicted to serve together behind a balancer that looks at the queues.
    """

    each: tuple[Evidence, ...]
    balanced: Estimate


def variance_ratio(workload: Workload) -> float:
    """ca2 + cd2 of theory.md 6.1: 1 for Poisson arrivals and CV^2 of the KV demand for departures."""
    demand = work_demand(workload)
    mean = workload.mean(demand)
    return 1.0 + workload.mean((demand / mean - 1.0) ** 2)


def work_demand(workload: Workload, binding: str = "kv_cache") -> NDArray[np.float64]:
    """Work per support point in the convention of `work.work_done`, shape (n,)."""
    prompt, declared, output = (
        np.asarray(column, dtype=float)
        for column in (workload.prompt_tokens, workload.max_tokens, workload.output_tokens)
    )
    return work_of(binding, prompt, declared, output)


def rounding(workload: Workload, block_size: int) -> float:
    """E[g in whole blocks] / E[g in tokens]."""
    s, o = workload.prompt_tokens, workload.output_tokens
    blocks = np.asarray(kv_demand_blocks(s, o, int(s.max()), block_size), dtype=float)
    return workload.mean(blocks) / workload.mean(work_demand(workload))
