"""The part of a config that describes a mock server, and the YAML that its process is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from analysis.schedulers.engine import EngineLimits, SGLangRules
from harness.configs.sections import Positive, Section, StepTimeConfig
from harness.mock.mock import MockConfig, SGLangSettings
from harness.servers.limits_sglang import keeps_whole_output

VLLM_ONLY = ("watermark", "reserve_full_prompt", "long_prefill_token_threshold")


class SGLangRulesConfig(Section):
    """The rules of SGLang's scheduler; its own defaults."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+")] = "0.5.23"
    """From 0.5.22 on, the whole output of a request with ignore_eos is set aside."""
    max_prefill_tokens: Positive = 16384
    schedule_conservativeness: Annotated[float, Field(gt=0)] = 1.0
    radix_cache: bool = True
    clip_max_new_tokens: Positive = 4096

    def rules(self) -> SGLangRules:
        return SGLangRules(
            max_prefill_tokens=self.max_prefill_tokens,
            schedule_conservativeness=self.schedule_conservativeness,
            radix_cache=self.radix_cache,
            whole_output_of_ignore_eos=keeps_whole_output(self.version),
            clip_max_new_tokens=self.clip_max_new_tokens,
        )


class SGLangMockConfig(SGLangRulesConfig):
    """What makes a mock server SGLang: its scheduler's rules, and how stale its gauges are."""

    decode_log_interval: Positive = 40
    load_snapshot_publish_interval: Positive = 15


class MockServerConfig(Section):
    """Parameters of a mock server. They go to its process alone; the prediction never sees them."""

    num_blocks: Positive
    block_size: Positive | None = None
    """Default: 16, with ``sglang`` (where a block is a page) 1."""
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive | None = 2048
    max_model_len: Positive = 4096
    watermark: Annotated[float, Field(ge=0, lt=1)] = 0.0
    reserve_full_prompt: bool = True
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    async_scheduling: bool = False
    stream_interval: Positive = 1
    claimed_num_blocks: Positive | None = None
    sglang: SGLangMockConfig | None = None
    step_time: StepTimeConfig

    @model_validator(mode="after")
    def _one_engine(self) -> MockServerConfig:
        if self.sglang is None:
            if self.max_num_batched_tokens is None:
                raise ValueError("max_num_batched_tokens: null needs sglang: vLLM has a budget")
            return self
        for name in VLLM_ONLY:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is vLLM's: leave it out beside sglang")
        return self

    @property
    def engine(self) -> Literal["vllm", "sglang"]:
        return "vllm" if self.sglang is None else "sglang"

    def limits(self) -> EngineLimits:
        return EngineLimits(
            num_blocks=self.num_blocks,
            block_size=self.block_size or (16 if self.sglang is None else 1),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            watermark=self.watermark,
            reserve_full_prompt=self.reserve_full_prompt,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            async_scheduling=self.async_scheduling,
            sglang=None if self.sglang is None else self.sglang.rules(),
        )

    def server(self, port: int, step_log: Path | None) -> MockConfig:
        """The mock server to run. Raises ValueError on a combination that no server could show."""
        shown = self.sglang or SGLangMockConfig()
        return MockConfig(
            limits=self.limits(),
            step_time=self.step_time.law(),
            sglang=SGLangSettings(
                version=shown.version,
                decode_log_interval=shown.decode_log_interval,
                load_snapshot_publish_interval=shown.load_snapshot_publish_interval,
            ),
            port=port,
            stream_interval=self.stream_interval,
            claimed_num_blocks=self.claimed_num_blocks,
            step_log=step_log,
        )
