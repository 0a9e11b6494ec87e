"""The experiment's YAML as frozen models. Unknown keys and impossible values are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, model_validator

from harness.configs.arrivals_config import ArrivalsConfig, PoissonConfig, ReplayConfig
from harness.configs.hardware import HardwareConfig
from harness.configs.launch import LaunchConfig
from harness.configs.mock_config import MockServerConfig, SGLangRulesConfig
from harness.configs.sections import ConfigError, File, Positive, Section, StepTimeConfig
from harness.configs.workload_config import WorkloadConfig
from harness.machine.sweep import cluster_arguments
from loadgen.processes import Process, Replay, stationary
from loadgen.prompts import FIRST_ORDINARY_ID
from loadgen.workload import Workload

__all__ = [
    "ConfigError",
    "ExperimentConfig",
    "LimitsConfig",
    "ServerConfig",
    "WorkloadConfig",
    "load_config",
    "load_mock_config",
]

SERVER_READY_S = 60.0
ENGINE_READY_S = 300.0
"""An engine loads its model first; on two busy cores SGLang was seen to take 130 s."""
SECRETS = ("server.headers", "server.api_key_env")
"""Keys whose values are not shown, not even when they are refused: somebody may have put a key there."""

GpuName = (
    Annotated[int, Field(strict=True, ge=0)] | Annotated[str, Field(pattern=r"^(GPU|MIG)-[\w/-]+$")]
)
"""NVML's index, or the beginning of a UUID as `nvidia-smi -L` shows it."""

SectionT = TypeVar("SectionT", bound=Section)


class LimitsConfig(Section):
    """What the server does not show, or what a prediction without a server has to state."""

    pool_tokens: Positive | None = None
    block_size: Positive | None = None
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    async_scheduling: bool | None = None
    watermark: Annotated[float, Field(ge=0, lt=1)] | None = None
    sglang: SGLangRulesConfig | None = None

    @model_validator(mode="after")
    def _one_engine(self) -> LimitsConfig:
        if self.sglang is not None and self.watermark is not None:
            raise ValueError("watermark is vLLM's: leave it out beside sglang")
        return self


class ServerConfig(Section):
    """Where the requests go: a running server by ``url``, or one started for the run: a real engine by
    ``launch``, or a mock. Several behind one list: ``urls``, or ``replicas`` of what is started."""

    engine: Literal["vllm", "sglang"] | None = None
    """Of the server at ``url``, vllm if not given; a launch and a mock say by their own section what
    they are."""
    url: str | None = None
    urls: tuple[str, ...] | None = None
    replicas: Annotated[int, Field(ge=2)] | None = None
    launch: LaunchConfig | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds the key."""
    tls_ca: File | None = None
    """Certificates of the authorities that are trusted in place of this machine's own."""
    mock: MockServerConfig | None = None
    gpus: tuple[GpuName, ...] | None = None
    """Those of this machine that the server uses; they are sampled."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    ready_timeout_s: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_server(self) -> ServerConfig:
        if sum(way is not None for way in (self.url, self.urls, self.launch, self.mock)) != 1:
            raise ValueError(
                "give one of url (a running server), urls (several of them), launch (an engine started "
                "here) and mock (a model of one started here)"
            )
        if self.launch is not None and self.engine is not None:
            raise ValueError("engine: server.launch says which engine it is: leave it out")
        if self.mock is not None and self.engine not in (None, self.mock.engine):
            raise ValueError(
                f"engine says {self.engine}, but the mock is {self.mock.engine}: a section mock.sglang "
                "makes it SGLang; leave engine out"
            )
        if not all(url.startswith(("http://", "https://")) for url in self.running):
            raise ValueError("url must start with http:// or https://")
        return self

    @model_validator(mode="after")
    def _some_replicas(self) -> ServerConfig:
        if self.urls is not None and len({url.rstrip("/") for url in self.urls}) < max(
            len(self.urls), 2
        ):
            raise ValueError("urls: give two or more, each once; a single server goes by url")
        if self.replicas is not None and self.running:
            raise ValueError(
                "replicas: it goes with launch or mock; urls are counted by themselves"
            )
        if self.replicas is None or self.launch is None or self.launch.runs_on == "cpu":
            return self
        if len(self.gpus or ()) != self.count * self.launch.gpus:
            raise ValueError(
                f"gpus: {self.count} replicas on {self.launch.gpus} GPUs each are given theirs in this "
                f"order: name {self.count * self.launch.gpus}"
            )
        return self

    @model_validator(mode="after")
    def _one_key(self) -> ServerConfig:
        if any("@" in urlsplit(url).netloc for url in self.running):
            raise ValueError("url: leave user and password out of it: use headers or api_key_env")
        if self.api_key_env is not None and "authorization" in map(str.lower, self.headers):
            raise ValueError("api_key_env: headers hold an Authorization already: give one of them")
        if self.tls_ca is not None and not (
            self.running and all(url.startswith("https://") for url in self.running)
        ):
            raise ValueError("tls_ca: it goes with a url that starts with https://")
        return self

    @model_validator(mode="after")
    def _some_gpu(self) -> ServerConfig:
        if self.gpus is not None and not self.gpus:
            raise ValueError("gpus: name at least one, or leave it out")
        if self.gpus and not self.on_gpu:
            raise ValueError("gpus: this server uses none: leave it out")
        return self

    @property
    def running(self) -> tuple[str, ...]:
        """URLs of the servers that somebody else started; empty where they are started here."""
        return self.urls or (() if self.url is None else (self.url,))

    @property
    def count(self) -> int:
        """How many servers share the requests: number i goes to number i mod count."""
        return len(self.running) or self.replicas or 1

    @property
    def timeout_s(self) -> float:
        """How long the server may take to answer."""
        default_s = ENGINE_READY_S if self.launch is not None else SERVER_READY_S
        return default_s if self.ready_timeout_s is None else self.ready_timeout_s

    @property
    def on_gpu(self) -> bool:
        """May it use GPUs? Of a server that somebody else started, this is not known."""
        if self.launch is not None:
            return self.launch.runs_on == "gpu"
        return self.mock is None

    @property
    def emulated(self) -> bool:
        """Is it a real engine whose step time is set?"""
        return self.launch is not None and self.launch.step_time is not None


class LoadConfig(Section):
    """Rates as multiples of the predicted critical rate, by which law requests arrive, and how long."""

    rates: tuple[Annotated[float, Field(gt=0)], ...] = (0.85, 1.15, 1.3)
    horizon_s: Annotated[float, Field(gt=0)] | None = None
    max_horizon_s: Annotated[float, Field(gt=0)] = 600.0
    arrivals: ArrivalsConfig = PoissonConfig()
    start: Literal["empty", "full", "both"] = "empty"
    extend: bool = True
    seed: Annotated[int, Field(ge=0)] = 1
    vocabulary: tuple[Annotated[int, Field(ge=0)], Positive] = (FIRST_ORDINARY_ID, 900)
    workers: Literal["auto"] | Positive = "auto"
    """Processes that offer the load; auto: as many as its streamed tokens take."""
    cluster: str | None = None
    """A Ray cluster whose machines offer it, in ``workers`` processes: auto, an address, or local:2."""
    send_delay_ms: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _ordered_vocabulary(self) -> LoadConfig:
        low, high = self.vocabulary
        if high - low < 2:
            raise ValueError(f"vocabulary: [{low}, {high}] holds fewer than two token ids")
        return self

    @model_validator(mode="after")
    def _senders_of_the_cluster(self) -> LoadConfig:
        if self.cluster is not None:
            if self.workers == "auto":
                raise ValueError("cluster: `workers` must say how many processes offer the load")
            cluster_arguments(self.cluster)
        return self

    @model_validator(mode="after")
    def _possible_arrivals(self) -> LoadConfig:
        if not isinstance(self.arrivals, ReplayConfig):
            law = self.arrivals.law()
            if self.start != "empty" and not stationary(law):
                raise ValueError(
                    "start: what a burst leaves is judged at one rate: leave it out beside a rate that "
                    "follows the clock"
                )
            return self
        if self.start != "empty":
            raise ValueError("start: a trace is replayed from an empty server: leave it out")
        if self.arrivals.times == "own" and self.rates != LoadConfig.model_fields["rates"].default:
            raise ValueError(
                "rates: a trace at its own times has one rate: leave it out, or set arrivals.times to "
                "scaled"
            )
        return self

    @model_validator(mode="after")
    def _some_rate(self) -> LoadConfig:
        if not self.rates:
            raise ValueError("rates: give at least one multiple of the predicted critical rate")
        return self


class RegimeConfig(Section):
    """A stretch of time with its own lengths and step time, for predictions of mixed traffic."""

    share: Annotated[float, Field(gt=0, le=1)]
    workload: WorkloadConfig
    step_time: StepTimeConfig


class PublishedConfig(Section):
    """A number that somebody published for the same inputs, to be set beside the prediction."""

    critical_rate: Annotated[float, Field(gt=0)]
    source: str


class ExperimentConfig(Section):
    """One experiment. See configs/README.md for every key."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    claim: Literal["paper", "engine"] = "engine"
    theta: Annotated[float, Field(gt=0, lt=0.5)] = 0.10
    server: ServerConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    step_time: StepTimeConfig | None = None
    hardware: HardwareConfig | None = None
    """For `critrate predict`, in place of ``step_time``; a run measures and does not use it."""
    prefill_chunk_tokens: Positive | None = None
    replicas: Positive = 1
    workload: WorkloadConfig | None = None
    predict_from: WorkloadConfig | None = None
    """The law of lengths that the prediction is made from, where it is another than the one offered."""
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

    @model_validator(mode="after")
    def _from_empty(self) -> ExperimentConfig:
        if self.server is not None and self.server.count > 1 and self.load.start != "empty":
            raise ValueError(
                "load.start: what a burst leaves is judged of one server: leave it out beside urls and "
                "replicas"
            )
        return self

    @model_validator(mode="after")
    def _lengths_of_the_replay(self) -> ExperimentConfig:
        if isinstance(self.load.arrivals, ReplayConfig):
            law = self.workload
            if law is None or law.trace is None or law.part is not None:
                raise ValueError(
                    "load.arrivals: a replay has the lengths of its file: name it in workload.trace, "
                    "without workload.part"
                )
        return self

    def arrivals(self) -> Process:
        """The law of arrivals. Raises ConfigError when a trace cannot be replayed."""
        section = self.load.arrivals
        if not isinstance(section, ReplayConfig):
            return section.law()
        assert self.workload is not None
        return section.law_of(self.workload)

    def loads(self, critical_rate: float) -> tuple[float, ...]:
        """Rates of the runs as multiples of the predicted critical one, req/s."""
        section, law = self.load.arrivals, self.arrivals()
        if isinstance(section, ReplayConfig) and section.times == "own" and isinstance(law, Replay):
            return (law.own_rate / critical_rate,)
        return self.load.rates

    @model_validator(mode="after")
    def _workers_speak_plain_http(self) -> ExperimentConfig:
        urls = () if self.server is None else self.server.running
        own = self.load.workers not in ("auto", 1) and self.load.cluster is None
        if own and any(url.startswith("https") for url in urls):
            raise ValueError("load.workers: several speak plain HTTP alone: leave it out for https")
        return self

    def law(self) -> Workload:
        """The one law of lengths that an experiment offers. Raises ConfigError if there are several."""
        if self.workload is None:
            raise ConfigError("regimes: only `critrate predict` takes them; give workload instead")
        return self.workload.build()

    def estimated_law(self) -> Workload:
        """The law that a prediction is made from. Raises ConfigError as `law`."""
        return self.law() if self.predict_from is None else self.predict_from.build()


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
    shown = f", got {given!r}"
    if isinstance(given, dict) or error["type"] == "missing" or key.startswith(SECRETS):
        shown = ""
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"
