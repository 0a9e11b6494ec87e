"""How an engine is started: from a section of the config to a command line and its environment.

An engine is a process with a Python of its own; nothing of it is imported here. Flags are those of
vLLM 0.32.0 and SGLang 0.5.23.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from harness.configs.sections import Positive, Section, StepTimeConfig
from harness.servers.engine_environments import (
    ENVIRONMENTS,
    Device,
    Engine,
    NoEnvironment,
    engines_folder,
)
from harness.servers.server import ServerFailed

ENGINE_SIDE = Path(__file__).resolve().parents[2] / "scripts" / "engines"
"""What runs inside an engine's process: the paced scheduler, the stand-ins for a CPU."""
PACE_LOG = "pace.jsonl"
"""Where a paced engine writes how it kept its step time, in the results folder."""
TINY_MODELS = ("tiny", "small")
GPU_ONLY = (
    "dtype",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "data_parallel_size",
    "gpu_memory_utilization",
)
CPU_KV_CACHE_BYTES = "256M"
"""vLLM takes most of a CPU's memory otherwise; the pool itself is set in blocks."""

KEEP_ALIVE_S = "60"
"""uvicorn closes idle connections after 5 s: a client that was held up for so long would find one that
it is about to use closed, and the request would fail for no fault of the engine."""


class LaunchConfig(Section):
    """An engine to start for the run. What is left out stays as the engine chooses."""

    environment: str
    """A name of `ENVIRONMENTS`, or the path of a Python that has the engine."""
    engine: Engine | None = None
    device: Device | None = None
    """Both only beside the path of a Python: a named environment says them itself."""
    model: str = "tiny"
    pool_tokens: Positive | None = None
    block_size: Positive | None = None
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    max_model_len: Positive | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel_size: Positive = 1
    data_parallel_size: Positive = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of each GPU: what vLLM may take in all, what SGLang may fill with weights and KV."""
    prefix_caching: bool = False
    step_time: StepTimeConfig | None = None
    """Makes it an emulation. It goes to the engine's process alone; the prediction never sees it."""
    arguments: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _known_engine(self) -> LaunchConfig:
        named = self.environment in ENVIRONMENTS
        if not named and not os.path.isabs(self.environment):
            raise ValueError(
                f"environment: {self.environment!r} is none of {', '.join(ENVIRONMENTS)}, and no "
                "absolute path of a Python"
            )
        if named and (self.engine or self.device):
            raise ValueError(f"{self.environment} says engine and device itself: leave them out")
        if not named and not (self.engine and self.device):
            raise ValueError(
                "beside the path of a Python, engine and device (cpu or gpu) are needed"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> LaunchConfig:
        if self.runs_on == "cpu" and self.pool_tokens is None:
            raise ValueError("pool_tokens: give it: on a CPU the engine takes most of the memory")
        if self.runs == "vllm" and self.pool_tokens is not None:
            if self.block_size is None:
                raise ValueError(
                    "block_size: vLLM's pool is set in blocks: give it with pool_tokens"
                )
            if self.pool_tokens % self.block_size:
                raise ValueError(
                    f"pool_tokens: {self.pool_tokens} is no whole number of blocks of "
                    f"{self.block_size} tokens"
                )
        if self.runs == "vllm" and self.runs_on == "cpu" and (self.block_size or 32) % 32:
            raise ValueError("block_size: on a CPU vLLM takes multiples of 32")
        return self

    @model_validator(mode="after")
    def _on_a_gpu(self) -> LaunchConfig:
        if self.runs_on == "cpu":
            for name in GPU_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: leave it out on a CPU, where it is set")
        return self

    @property
    def gpus(self) -> int:
        """How many GPUs it takes; on a CPU the same number of processes, which is one."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def runs(self) -> Engine:
        """The engine that this starts."""
        engine = ENVIRONMENTS[self.environment].engine if self.named else self.engine
        assert engine is not None
        return engine

    @property
    def runs_on(self) -> Device:
        device = ENVIRONMENTS[self.environment].device if self.named else self.device
        assert device is not None
        return device

    @property
    def named(self) -> bool:
        return self.environment in ENVIRONMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a command line needs of this machine."""

    python: Path
    model: str
    """Folder or public name of the model."""
    port: int
    pace_log: Path
    """Where a paced engine writes how it kept its step time."""


def place(launch: LaunchConfig, port: int, pace_log: Path) -> Place:
    """Looks the environment and the model up. Raises ServerFailed with what to do."""
    if not ENGINE_SIDE.is_dir():
        raise ServerFailed(
            f"server.launch: there is no {ENGINE_SIDE}: run critrate from a checkout"
        )
    if launch.named:
        try:
            python = ENVIRONMENTS[launch.environment].python()
        except NoEnvironment as error:
            raise ServerFailed(str(error)) from error
    else:
        python = Path(launch.environment)
        if not python.is_file():
            raise ServerFailed(f"server.launch.environment: there is no Python at {python}")
    model = launch.model
    if model in TINY_MODELS:
        folder = engines_folder() / "models" / model
        if not (folder / "config.json").is_file():
            which = launch.environment if launch.named else f"{launch.runs}-cpu"
            raise ServerFailed(
                f"server.launch: there is no model in {folder}: make it with scripts/engine-env {which}"
            )
        model = str(folder)
    return Place(python=python, model=model, port=port, pace_log=pace_log.absolute())


def argv(launch: LaunchConfig, where: Place) -> tuple[list[str], dict[str, str]]:
    """Command line of the engine, and what its environment needs beside this process's own."""
    line, env = _vllm(launch, where) if launch.runs == "vllm" else _sglang(launch, where)
    if launch.named:
        # It was installed without byte code: the first start has to write it.
        env["PYTHONDONTWRITEBYTECODE"] = ""
    return line, env


def _vllm(launch: LaunchConfig, where: Place) -> tuple[list[str], dict[str, str]]:
    # Not `vllm serve`: it looks for a distribution called vllm, and that of the CPU is called otherwise.
    line = [str(where.python), "-m", "vllm.entrypoints.openai.api_server", "--model", where.model]
    line += ["--served-model-name", Path(launch.model).name]
    line += ["--host", "127.0.0.1", "--port", str(where.port), "--disable-uvicorn-access-log"]
    line += _option("--block-size", launch.block_size)
    if launch.pool_tokens is not None and launch.block_size is not None:
        # One block is vLLM's null block.
        blocks = launch.pool_tokens // launch.block_size + 1
        line += ["--num-gpu-blocks-override", str(blocks)]
    line += _option("--max-num-seqs", launch.max_num_seqs)
    line += _option("--max-num-batched-tokens", launch.max_num_batched_tokens)
    line += _option("--max-model-len", launch.max_model_len)
    line += _option("--gpu-memory-utilization", launch.gpu_memory_utilization)
    line += _gpu_options(launch)
    line += ["--enable-prefix-caching" if launch.prefix_caching else "--no-enable-prefix-caching"]
    # /server_info, where it shows its scheduler's limits; it listens on this machine alone.
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = KEEP_ALIVE_S
    if launch.model in TINY_MODELS:
        line += ["--load-format", "dummy"]
        env["HF_HUB_OFFLINE"] = "1"
    if launch.runs_on == "cpu":
        # float32: bfloat16 ends in an illegal instruction on machines with AMX.
        line += ["--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"]
        line += ["--kv-cache-memory-bytes", CPU_KV_CACHE_BYTES]
        env |= {"OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1"}
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if launch.step_time is not None:
        line += ["--scheduler-cls", "critrate_paced.PacedScheduler", "--no-async-scheduling"]
        env |= _paced(launch.step_time, where, ENGINE_SIDE / "vllm_paced")
    return [*line, *launch.arguments], env


def _sglang(launch: LaunchConfig, where: Place) -> tuple[list[str], dict[str, str]]:
    line = [str(where.python), "-m", "sglang.launch_server", "--model-path", where.model]
    line += ["--served-model-name", Path(launch.model).name]
    line += ["--host", "127.0.0.1", "--port", str(where.port), "--log-level-http", "warning"]
    # Every decode step refreshes the gauges; the default is every 40th, and every 15th for the loads.
    line += [
        "--enable-metrics",
        "--decode-log-interval",
        "1",
        "--load-snapshot-publish-interval",
        "1",
    ]
    line += _option("--max-total-tokens", launch.pool_tokens)
    line += _option("--page-size", launch.block_size)
    line += _option("--max-running-requests", launch.max_num_seqs)
    line += _option("--chunked-prefill-size", launch.max_num_batched_tokens)
    line += _option("--context-length", launch.max_model_len)
    line += _option("--mem-fraction-static", launch.gpu_memory_utilization)
    line += _gpu_options(launch)
    if not launch.prefix_caching:
        line += ["--disable-radix-cache"]
    env = {"SGLANG_TIMEOUT_KEEP_ALIVE": KEEP_ALIVE_S}
    if launch.model in TINY_MODELS:
        line += ["--load-format", "dummy"]
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if launch.runs_on == "cpu":
        line += ["--device", "cpu", "--attention-backend", "torch_native"]
        line += ["--sampling-backend", "pytorch", "--dtype", "bfloat16"]
        line += ["--disable-cuda-graph", "--disable-overlap-schedule"]
        env |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(ENGINE_SIDE / "sglang_shims")
    if launch.step_time is not None:
        if launch.runs_on == "gpu":
            line += ["--disable-overlap-schedule"]
        env |= _paced(launch.step_time, where, ENGINE_SIDE / "sglang_shims")
    return [*line, *launch.arguments], env


def _paced(law: StepTimeConfig, where: Place, hooks: Path) -> dict[str, str]:
    """What holds the engine's steps, in its own process."""
    return {
        "PYTHONPATH": os.pathsep.join(map(str, (hooks, ENGINE_SIDE / "pacing"))),
        "CRITRATE_STEP_TIME": json.dumps(asdict(law.law())),
        "CRITRATE_PACE_LOG": str(where.pace_log),
    }


def _gpu_options(launch: LaunchConfig) -> list[str]:
    """What both engines call the same."""
    line = _option("--dtype", launch.dtype) + _option("--kv-cache-dtype", launch.kv_cache_dtype)
    for flag, size in (
        ("--tensor-parallel-size", launch.tensor_parallel_size),
        ("--data-parallel-size", launch.data_parallel_size),
    ):
        line += _option(flag, size if size > 1 else None)
    return line


def _option(flag: str, value: int | float | str | None) -> list[str]:
    return [] if value is None else [flag, str(value)]
