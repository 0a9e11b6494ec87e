"""The workload section of a config: one law of lengths, and what its requests declare."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.configs.sections import ConfigError, File, Positive, Section
from loadgen.length_laws import lognormal
from loadgen.traces import (
    read_azure,
    read_burstgpt,
    read_marginals,
    read_mooncake,
    read_servegen,
    read_sharegpt,
    read_vidur,
    shipped,
)
from loadgen.workload import Side, Workload, clipped, declared, fixed, mixture, part, uniform

Range = tuple[Positive, Positive]
READERS = {
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "mooncake": read_mooncake,
    "servegen": read_servegen,
    "sharegpt": read_sharegpt,
    "vidur": read_vidur,
}


class UniformConfig(Section):
    """Independent uniform lengths, both bounds included."""

    prompt: Range
    output: Range

    @model_validator(mode="after")
    def _ordered(self) -> UniformConfig:
        for name in ("prompt", "output"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the first bound {low} exceeds the second {high}")
        return self


class FixedConfig(Section):
    """Every request has these lengths."""

    prompt: Positive
    output: Positive


class LengthConfig(Section):
    """One log-normal length: its mean and coefficient of variation, and where it is cut off."""

    mean: Annotated[float, Field(gt=0)]
    cv: Annotated[float, Field(gt=0)]
    bounds: Range


class LognormalConfig(Section):
    """Log-normal lengths with Pearson's correlation of the lengths themselves."""

    prompt: LengthConfig
    output: LengthConfig
    correlation: Annotated[float, Field(gt=-1, lt=1)] = 0.0


class PartConfig(Section):
    """A random share of the observed requests to estimate from; the other side is the rest."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.8
    seed: Annotated[int, Field(ge=0)] = 1
    side: Side


class TraceConfig(Section):
    """Paired lengths from a public trace; a relative file is looked up beside the config."""

    file: File
    format: Literal["azure", "burstgpt", "mooncake", "servegen", "sharegpt", "vidur"]


class MarginalsConfig(Section):
    """Two files of lengths and probabilities; prompt and output are taken as independent."""

    prompt: File
    output: File


class DeclareConfig(Section):
    """The ``max_tokens`` that a client declares beyond what it will use; exactly one key."""

    max_tokens: Positive | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    extra: Annotated[int, Field(ge=0)] | None = None


LAWS = ("uniform", "fixed", "lognormal", "shipped", "trace", "marginals", "mixture")


class WorkloadConfig(Section):
    """Exactly one law of lengths, or a mixture of laws by weight; and what its requests declare."""

    uniform: UniformConfig | None = None
    fixed: FixedConfig | None = None
    lognormal: LognormalConfig | None = None
    shipped: Literal["azure_2023_conv"] | None = None
    trace: TraceConfig | None = None
    marginals: MarginalsConfig | None = None
    mixture: tuple[MixtureConfig, ...] | None = None
    cycle_requests: Positive | None = None
    """The parts of a mixture take turns, each its share of so many requests; else they mix."""
    part: PartConfig | None = None
    """Of shipped or trace."""
    max_total_tokens: Positive | None = None
    declare: DeclareConfig | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _one_law(self) -> WorkloadConfig:
        if sum(getattr(self, name) is not None for name in LAWS) != 1:
            raise ValueError(f"give exactly one of {', '.join(LAWS)}")
        if self.cycle_requests is not None and self.mixture is None:
            raise ValueError("cycle_requests: it goes with mixture")
        return self

    def build(self) -> Workload:
        """The law of lengths. Raises ConfigError when it cannot be read or nothing is left of it."""
        try:
            workload = self._law()
            if self.part is not None:
                workload = part(workload, self.part.share, self.part.seed, self.part.side)
            if self.declare is not None:
                workload = declared(workload, **self.declare.model_dump())
            if self.ignore_eos is not None:
                workload = replace(workload, ignore_eos=self.ignore_eos)
            if self.max_total_tokens is not None:
                workload, _ = clipped(workload, self.max_total_tokens)
        except ValueError as error:
            raise ConfigError(f"workload: {error}") from error
        return workload

    def _law(self) -> Workload:
        if self.uniform is not None:
            return uniform(self.uniform.prompt, self.uniform.output)
        if self.fixed is not None:
            return fixed(self.fixed.prompt, self.fixed.output)
        if self.lognormal is not None:
            s, o = self.lognormal.prompt, self.lognormal.output
            return lognormal(
                (s.mean, s.cv), (o.mean, o.cv), self.lognormal.correlation, s.bounds, o.bounds
            )
        if self.shipped is not None:
            return shipped(self.shipped)
        if self.trace is not None:
            return READERS[self.trace.format](self.trace.file)
        if self.marginals is not None:
            return read_marginals(self.marginals.prompt, self.marginals.output)
        assert self.mixture is not None
        total = sum(part.weight for part in self.mixture)
        parts = [(part.weight / total, part.workload.build()) for part in self.mixture]
        return mixture(parts, self.cycle_requests or 0)


class MixtureConfig(Section):
    """One law of a mixture; weights need not sum to 1."""

    weight: Annotated[float, Field(gt=0)]
    workload: WorkloadConfig
