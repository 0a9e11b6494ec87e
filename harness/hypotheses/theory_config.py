"""Configs of the slot and batch models (configs/theory): cases of one published claim or table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from harness.configs.sections import ConfigError, Positive, Section

PolicyName = Literal[
    "greedy_resume",
    "greedy_restart",
    "look_ahead",
    "reserve_peak",
    "class_budgets",
    "flow_control",
]
RuleName = Literal["faster_transformer", "vanilla_vllm", "orca", "sarathi"]
Rate = Annotated[float, Field(gt=0)]
Whole = Annotated[int, Field(ge=0)]


class ClassConfig(Section):
    """Requests of one kind: lengths, alike or uniform between two bounds, and their share of all."""

    prompt_tokens: Whole | tuple[Whole, Whole]
    output_tokens: Positive | tuple[Positive, Positive]
    share: Rate = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> ClassConfig:
        for name in ("prompt_tokens", "output_tokens"):
            bounds = getattr(self, name)
            if isinstance(bounds, tuple) and bounds[0] > bounds[1]:
                raise ValueError(
                    f"{name}: the first bound {bounds[0]} exceeds the second {bounds[1]}"
                )
        return self


class SlotCase(Section):
    """One policy under one load in the slot model."""

    name: str
    policy: PolicyName
    memory_tokens: Positive
    classes: Annotated[tuple[ClassConfig, ...], Field(min_length=1)]
    rate: Rate | None = None
    """Poisson arrivals per slot, all classes together; None: the queue is never empty."""
    load: Rate | None = None
    """The same as a multiple of the rate M / E[w] that no policy can exceed."""
    budget: Rate | None = None
    """Admissions per slot, spread evenly."""
    budget_of_free: Rate | None = None
    """The same as a multiple of M / E[w]."""
    drawn_budget: tuple[Whole, Whole] | None = None
    """Admissions per slot, drawn uniformly between the two."""
    class_budgets: tuple[Whole, ...] | None = None
    shortest_first: bool = False
    preload: Whole = 0
    """Requests that wait when an open loop begins."""
    slots: Positive
    warm_up_slots: Whole
    seeds: Positive = 4
    published: str = ""

    @model_validator(mode="after")
    def _one_load_one_budget(self) -> SlotCase:
        if self.rate is not None and self.load is not None:
            raise ValueError("rate and load are the same thing: give one of them, or neither")
        budgets = (self.budget, self.budget_of_free, self.drawn_budget, self.class_budgets)
        if sum(x is not None for x in budgets) > 1:
            raise ValueError("give one budget at most")
        if (self.policy == "class_budgets") != (self.class_budgets is not None):
            raise ValueError("policy class_budgets goes with class_budgets, and no other does")
        if self.class_budgets is not None and len(self.class_budgets) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes need as many class_budgets")
        if self.shortest_first and self.class_budgets is not None:
            raise ValueError("shortest_first and class_budgets exclude each other")
        if self.warm_up_slots >= self.slots:
            raise ValueError("warm_up_slots: nothing is left of the run")
        return self


class StaircaseConfig(Section):
    """Milliseconds of a batch: c + a ceil(tokens / step)."""

    c_ms: Annotated[float, Field(ge=0)]
    a_ms: Annotated[float, Field(gt=0)]
    step_tokens: Positive


class BatchCase(Section):
    """One batching rule under one load in the batch model."""

    name: str
    rule: RuleName
    budget_tokens: Positive
    most_requests: Positive | None = None
    step_time: StaircaseConfig
    prefill_tokens: Positive
    decode_tokens: Positive
    interval_ms: Rate | None = None
    """Arrivals at equal intervals."""
    rate_per_s: Rate | None = None
    """Poisson arrivals."""
    load: Rate | None = None
    """Poisson arrivals, as a multiple of the boundary of work-conserving rules."""
    horizon_s: Rate
    warm_up_s: Annotated[float, Field(ge=0)]
    seeds: Positive = 4
    published: str = ""

    @model_validator(mode="after")
    def _one_load(self) -> BatchCase:
        if sum(x is not None for x in (self.interval_ms, self.rate_per_s, self.load)) != 1:
            raise ValueError("give one of interval_ms, rate_per_s and load")
        if self.warm_up_s >= self.horizon_s:
            raise ValueError("warm_up_s: nothing is left of the run")
        return self


class TheoryConfig(Section):
    """Cases of one table; what they share stands once, in ``defaults`` of the file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    about: str
    """What is claimed, and by whom."""
    slot_cases: tuple[SlotCase, ...] = ()
    batch_cases: tuple[BatchCase, ...] = ()

    @model_validator(mode="after")
    def _some_case(self) -> TheoryConfig:
        if not self.slot_cases and not self.batch_cases:
            raise ValueError("give slot_cases or batch_cases")
        return self


def load_theory(path: Path) -> TheoryConfig:
    """Read and check a config. Raises ConfigError that names the key and the mend."""
    try:
        data: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    defaults = data.pop("defaults", {})
    for kind in ("slot_cases", "batch_cases"):
        if kind in data:
            data[kind] = [{**defaults, **case} for case in data[kind]]
    try:
        return TheoryConfig.model_validate(data)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}:\n  " + "\n  ".join(lines)) from error
