"""The section ``load.arrivals`` of a config: one law of arrivals."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.configs.sections import ConfigError, Section
from harness.configs.workload_config import WorkloadConfig
from loadgen.processes import (
    POISSON,
    Gamma,
    OnOff,
    Piecewise,
    Poisson,
    Replay,
    Sinusoidal,
    Weibull,
)
from loadgen.replay import replay_of

More = Annotated[float, Field(gt=0)]


class PoissonConfig(Section):
    """Independent exponential gaps."""

    kind: Literal["poisson"] = "poisson"

    def law(self) -> Poisson:
        return POISSON


class GapsConfig(Section):
    """Independent gamma or Weibull gaps of a stated coefficient of variation."""

    kind: Literal["gamma", "weibull"]
    cv: float

    def law(self) -> Gamma | Weibull:
        """Raises ValueError where the CV is out of reach."""
        return Gamma(cv=self.cv) if self.kind == "gamma" else Weibull(cv=self.cv)


class OnOffConfig(Section):
    """Bursts and pauses of exponential length (MMPP), the latter at a share of the rate in bursts."""

    kind: Literal["on_off"]
    on_s: More
    off_s: More
    off_over_on: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def law(self) -> OnOff:
        return OnOff(on_s=self.on_s, off_s=self.off_s, off_over_on=self.off_over_on)


class PiecewiseConfig(Section):
    """A rate that steps: pairs of seconds and relative rate, over and over."""

    kind: Literal["piecewise"]
    pieces: tuple[tuple[More, Annotated[float, Field(ge=0)]], ...]

    def law(self) -> Piecewise:
        """Raises ValueError for fewer than two pieces, or none with a rate."""
        return Piecewise(pieces=self.pieces)


class SinusoidalConfig(Section):
    """A rate that swings: ``amplitude`` as a share of the mean, ``phase`` in periods."""

    kind: Literal["sinusoidal"]
    period_s: More
    amplitude: Annotated[float, Field(gt=0, le=1)]
    phase: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def law(self) -> Sinusoidal:
        return Sinusoidal(period_s=self.period_s, amplitude=self.amplitude, phase=self.phase)


class ReplayConfig(Section):
    """Instants and lengths of the file of ``workload.trace``, at its own rate or at that of the runs."""

    kind: Literal["replay"]
    times: Literal["own", "scaled"] = "scaled"
    from_s: Annotated[float, Field(ge=0)] = 0.0

    def law_of(self, workload: WorkloadConfig) -> Replay:
        """Reads the file. Raises ConfigError when it has no instants or nothing is left of it."""
        assert workload.trace is not None
        trace = workload.trace
        try:
            return replay_of(trace.file, trace.format, self.from_s, workload.max_total_tokens)
        except ValueError as error:
            raise ConfigError(f"load.arrivals: {error}") from error


LawConfig = Annotated[
    PoissonConfig | GapsConfig | OnOffConfig | PiecewiseConfig | SinusoidalConfig,
    Field(discriminator="kind"),
]
"""What needs no file."""
ArrivalsConfig = Annotated[LawConfig | ReplayConfig, Field(discriminator="kind")]
