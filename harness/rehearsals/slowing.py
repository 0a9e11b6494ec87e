"""Experiments on simulated servers whose speed drifts: is the drift seen, and what is concluded?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.rehearsals.error_rates import LOADS, SETTINGS, Known, Setting, experiment
from loadgen.records import Run

Shape = Literal["steady", "ramp", "one ramp", "step", "throughout", "restless"]
SHAPES: dict[Shape, str] = {
    "steady": "no drift",
    "ramp": "ramp in each run",
    "one ramp": "ramp in the run at 1.15",
    "step": "step within the run at 1.15, lasting",
    "throughout": "ramp over the experiment",
    "restless": "no drift, every second another speed",
}
"""The size is the step time at the end over that at the start, less 1; of a restless server the standard
deviation of its step times. The step comes three quarters into its run: it is backlogged by then."""
STEP_AT = 1.75
PARTS = 400
VERY_NOISY = 0.3
SERVERS = {
    "vLLM": SETTINGS["wide"],
    "vLLM, noisy steps": SETTINGS["noisy steps"],
    "SGLang": SETTINGS["SGLang"],
    "SGLang, noisy steps": SETTINGS["SGLang, noisy steps"],
    "SGLang, very noisy": replace(
        SETTINGS["SGLang"], server=replace(SETTINGS["SGLang"].server, noise=VERY_NOISY)
    ),
}


@dataclass(frozen=True, slots=True)
class Drift:
    """How the speed of a server changes in the runs of one experiment, by their order."""

    shape: Shape
    size: float

    def __call__(self, run: Run) -> NDArray[np.float64]:
        """The factor of the step time in each part of a run, shape (parts,)."""
        index = int(run.id.split("-")[0])
        x = index + (np.arange(PARTS) + 0.5) / PARTS
        if self.shape == "ramp":
            return 1 + self.size * (x - index)
        if self.shape == "one ramp":
            return 1 + self.size * (x - index) * (index == 1)
        if self.shape == "step":
            return np.where(x < STEP_AT, 1.0, 1 + self.size)
        if self.shape == "throughout":
            return 1 + self.size * np.minimum(x / len(LOADS), 1.0)
        if self.shape == "restless":
            speeds = np.random.default_rng([run.seed, 6]).normal(
                0, self.size, round(run.horizon_s) + 1
            )
            return np.asarray(np.exp(speeds))
        return np.ones(1)


@dataclass(frozen=True, eq=False)
class Job:
    """Experiments with seeds from ``first_seed`` on. A type that travels to a sweep's workers."""

    server: str
    known: Known
    drift: Drift
    theta: float
    first_seed: int
    count: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What one experiment concluded."""

    outcome: str
    named: bool
    """A reason names the change of speed."""
    change: float
    """The largest trend that was measured, as a fraction; NaN where no run was backlogged."""


def experiments(job: Job) -> list[Seen]:
    """One row for each seed."""
    setting = drifting(SERVERS[job.server], job.drift)
    seeds = range(job.first_seed, job.first_seed + job.count)
    return [_seen(setting, job.known, seed, job.theta) for seed in seeds]


def drifting(setting: Setting, drift: Drift) -> Setting:
    """The same server, slowing down."""
    return replace(setting, server=replace(setting.server, slowdown=drift))


def _seen(setting: Setting, known: Known, seed: int, theta: float) -> Seen:
    verdict, _ = experiment(setting, known, 1.0, seed, theta)
    steady = next((c for c in verdict.premises if c.name == "steady step time"), None)
    return Seen(
        outcome=verdict.outcome,
        named=steady is not None and steady.holds is False and steady.text in verdict.reasons,
        change=float("nan") if steady is None else steady.observed,
    )
