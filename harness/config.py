"""The experiment's YAML as frozen models. Unknown keys and impossible values are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from analysis.engine import EngineLimits
from analysis.step_time import StepTime
from loadgen.prompts import FIRST_ORDINARY_ID
from loadgen.workload import (
    Workload,
    clipped,
    fixed,
    mixture,
    read_azure,
    read_mooncake,
    read_sharegpt,
    read_vidur,
    uniform,
)

Positive = Annotated[int, Field(ge=1)]
Range = tuple[Positive, Positive]


READERS = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "sharegpt": read_sharegpt,
    "vidur": read_vidur,
}


class ConfigError(Exception):
    """The config cannot be used; the message names the key and the mend."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=_Section)


class StepTimeConfig(_Section):
    """b = b0 + b1*tokens + b2*KV + b3*running."""

    b0_ms: Annotated[float, Field(gt=0)]
    b1_us_per_token: Annotated[float, Field(ge=0)] = 0.0
    b2_ns_per_kv_token: Annotated[float, Field(ge=0)] = 0.0
    b3_us_per_request: Annotated[float, Field(ge=0)] = 0.0

    def law(self) -> StepTime:
        return StepTime(
            b0_s=self.b0_ms * 1e-3,
            b1_s_per_token=self.b1_us_per_token * 1e-6,
            b2_s_per_kv_token=self.b2_ns_per_kv_token * 1e-9,
            b3_s_per_request=self.b3_us_per_request * 1e-6,
        )


class LimitsConfig(_Section):
    """What the server does not show, or what a prediction without a server has to state."""

    pool_tokens: Positive | None = None
    block_size: Positive | None = None
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    async_scheduling: bool | None = None
    watermark: Annotated[float, Field(ge=0, lt=1)] | None = None


class MockServerConfig(_Section):
    """Parameters of a mock server. They go to its process alone; the prediction never sees them."""

    num_blocks: Positive
    block_size: Positive = 16
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 2048
    max_model_len: Positive = 4096
    watermark: Annotated[float, Field(ge=0, lt=1)] = 0.0
    reserve_full_prompt: bool = True
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    async_scheduling: bool = False
    stream_interval: Positive = 1
    claimed_num_blocks: Positive | None = None
    step_time: StepTimeConfig

    def limits(self) -> EngineLimits:
        return EngineLimits(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            watermark=self.watermark,
            reserve_full_prompt=self.reserve_full_prompt,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            async_scheduling=self.async_scheduling,
        )


class ServerConfig(_Section):
    """Where the requests go: a running server by ``url``, or a mock server started for the run."""

    engine: Literal["vllm"] = "vllm"
    url: str | None = None
    headers: dict[str, str] = {}
    mock: MockServerConfig | None = None
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    ready_timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _one_server(self) -> ServerConfig:
        if (self.url is None) == (self.mock is None):
            raise ValueError("give either url (a running server) or mock (one started here)")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url must start with http:// or https://")
        return self


class UniformConfig(_Section):
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


class FixedConfig(_Section):
    """Every request has these lengths."""

    prompt: Positive
    output: Positive


class TraceConfig(_Section):
    """Paired lengths from a public trace; a relative file is looked up beside the config."""

    file: Path
    format: Literal["azure", "mooncake", "vidur", "sharegpt"]

    @field_validator("file")
    @classmethod
    def _existing(cls, file: Path, info: ValidationInfo) -> Path:
        folder = (info.context or {}).get("folder", Path())
        path: Path = (folder / file).resolve()
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path


class WorkloadConfig(_Section):
    """Exactly one law of lengths, or a mixture of laws by weight."""

    uniform: UniformConfig | None = None
    fixed: FixedConfig | None = None
    trace: TraceConfig | None = None
    mixture: tuple[MixtureConfig, ...] | None = None
    max_total_tokens: Positive | None = None

    @model_validator(mode="after")
    def _one_law(self) -> WorkloadConfig:
        given = [
            n for n in ("uniform", "fixed", "trace", "mixture") if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, fixed, trace, mixture")
        return self

    def build(self) -> Workload:
        """The law of lengths. Raises ConfigError when it cannot be read or nothing is left of it."""
        try:
            workload = self._law()
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
        if self.trace is not None:
            return READERS[self.trace.format](self.trace.file)
        assert self.mixture is not None
        total = sum(part.weight for part in self.mixture)
        parts = [(part.weight / total, part.workload.build()) for part in self.mixture]
        return mixture(parts)


class MixtureConfig(_Section):
    """One law of a mixture; weights need not sum to 1."""

    weight: Annotated[float, Field(gt=0)]
    workload: WorkloadConfig


class LoadConfig(_Section):
    """Rates as multiples of the predicted critical rate, and how long each is driven."""

    rates: tuple[Annotated[float, Field(gt=0)], ...] = (0.85, 1.15, 1.3)
    horizon_s: Annotated[float, Field(gt=0)] | None = None
    max_horizon_s: Annotated[float, Field(gt=0)] = 600.0
    extend: bool = True
    seed: Annotated[int, Field(ge=0)] = 1
    vocabulary: tuple[Annotated[int, Field(ge=0)], Positive] = (FIRST_ORDINARY_ID, 900)
    send_delay_ms: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _ordered_vocabulary(self) -> LoadConfig:
        low, high = self.vocabulary
        if high - low < 2:
            raise ValueError(f"vocabulary: [{low}, {high}] holds fewer than two token ids")
        return self

    @model_validator(mode="after")
    def _some_rate(self) -> LoadConfig:
        if not self.rates:
            raise ValueError("rates: give at least one multiple of the predicted critical rate")
        return self


class RegimeConfig(_Section):
    """A stretch of time with its own lengths and step time, for predictions of mixed traffic."""

    share: Annotated[float, Field(gt=0, le=1)]
    workload: WorkloadConfig
    step_time: StepTimeConfig


class PublishedConfig(_Section):
    """A number that somebody published for the same inputs, to be set beside the prediction."""

    critical_rate: Annotated[float, Field(gt=0)]
    source: str


class ExperimentConfig(_Section):
    """One experiment. See configs/README.md for every key."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    claim: Literal["paper", "engine"] = "engine"
    theta: Annotated[float, Field(gt=0, lt=0.5)] = 0.10
    server: ServerConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    step_time: StepTimeConfig | None = None
    prefill_chunk_tokens: Positive | None = None
    replicas: Positive = 1
    workload: WorkloadConfig | None = None
    regimes: tuple[RegimeConfig, ...] = ()
    published: PublishedConfig | None = None
    load: LoadConfig = LoadConfig()
    sample_interval_s: Annotated[float, Field(ge=0.02, le=1.0)] = 0.1

    @model_validator(mode="after")
    def _some_workload(self) -> ExperimentConfig:
        if (self.workload is None) == (not self.regimes):
            raise ValueError("give either workload or regimes")
        if self.regimes and not math.isclose(sum(r.share for r in self.regimes), 1.0):
            raise ValueError("regimes: the shares must sum to 1")
        return self

    def law(self) -> Workload:
        """The one law of lengths of an experiment. Raises ConfigError if there are several."""
        if self.workload is None:
            raise ConfigError("regimes: only `critrate predict` takes them; give workload instead")
        return self.workload.build()


def load_config(path: Path) -> ExperimentConfig:
    """Read and check an experiment's YAML. Raises `ConfigError` with one line per mistake."""
    return _load(path, ExperimentConfig)


def load_mock_config(path: Path) -> MockServerConfig:
    """Read and check the YAML of a mock server. Raises `ConfigError`."""
    return _load(path, MockServerConfig)


def _load(path: Path, section: type[SectionT]) -> SectionT:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, see configs/mock.yaml")
    try:
        return section.model_validate(data, context={"folder": path.parent})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_sentence(e)}" for e in error.errors())) from error


def _sentence(error: object) -> str:
    assert isinstance(error, dict)
    key = ".".join(str(part) for part in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; see configs/README.md for the keys that exist"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    shown = f", got {given!r}" if not isinstance(given, dict) and error["type"] != "missing" else ""
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"
