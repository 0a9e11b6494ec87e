"""Which scheduler an engine has."""

from __future__ import annotations

from analysis.schedulers.engine import Engine, EngineLimits
from analysis.schedulers.sglang import SGLangEngine
from analysis.schedulers.vllm import VLLMEngine


def engine_of(limits: EngineLimits) -> Engine:
    """An idle engine with the scheduler that the limits name: SGLang's, or else vLLM's."""
    return SGLangEngine(limits) if limits.sglang is not None else VLLMEngine(limits)
