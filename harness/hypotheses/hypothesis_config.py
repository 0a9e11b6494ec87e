"""Configs of the hypotheses of the theory: what is said, what would refute it, what is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from analysis.schedulers.engine import EngineLimits
from harness.configs.arrivals_config import LawConfig
from harness.configs.sections import ConfigError, Positive, Section, StepTimeConfig
from harness.configs.workload_config import WorkloadConfig
from harness.hypotheses.theory_config import SlotCase


class EngineConfig(Section):
    """Simulated vLLM, synchronous: the scheduler model under a law of step times."""

    pool_tokens: Positive
    block_size: Positive = 16
    max_num_seqs: Positive = 2048
    max_num_batched_tokens: Positive = 8192
    step_time: StepTimeConfig
    workloads: Annotated[tuple[WorkloadConfig, ...], Field(min_length=1)]
    requests: Positive
    """Completions of one run after its warm-up."""
    seeds: Annotated[int, Field(ge=2)] = 4

    def limits(self, pool_tokens: int | None = None, **changed: int) -> EngineLimits:
        return EngineLimits(
            num_blocks=(pool_tokens or self.pool_tokens) // self.block_size,
            block_size=self.block_size,
            max_num_seqs=changed.get("max_num_seqs", self.max_num_seqs),
            max_num_batched_tokens=changed.get(
                "max_num_batched_tokens", self.max_num_batched_tokens
            ),
        )


class HypothesisConfig(Section):
    """One hypothesis of theory.md 8."""

    hypothesis: Annotated[str, Field(pattern=r"^H([1-9]|10)$")]
    says: str
    refuted_if: str
    engine: EngineConfig | None = None
    also: EngineConfig | None = None
    """Shown beside the first; it decides nothing."""
    slot_cases: tuple[SlotCase, ...] = ()
    pools: tuple[Positive, ...] = ()
    """Sizes of the pool in tokens, for a hypothesis that varies it."""
    arrivals: tuple[LawConfig, ...] = ()
    """Laws of arrivals beside the Poisson process, for a hypothesis that varies them."""
    factors: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Of a ceiling over where it should cross the KV cache, for a hypothesis that varies it."""


def load_hypothesis(path: Path) -> HypothesisConfig:
    """Read and check a config. Raises ConfigError that names the key and the mend."""
    try:
        data: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    defaults = data.pop("defaults", {})
    if "slot_cases" in data:
        data["slot_cases"] = [{**defaults, **case} for case in data["slot_cases"]]
    try:
        return HypothesisConfig.model_validate(data, context={"folder": path.parent})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}:\n  " + "\n  ".join(lines)) from error
