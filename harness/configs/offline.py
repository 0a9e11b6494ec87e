"""What a config states of a server that is not there yet: one file serves a prediction and a run."""

from __future__ import annotations

from harness.configs.config import ExperimentConfig, LimitsConfig
from harness.configs.launch import LaunchConfig
from harness.configs.mock_config import SGLangRulesConfig

SYNCHRONOUS = {"vllm": "--no-async-scheduling", "sglang": "--disable-overlap-schedule"}
"""Flags that turn off what both engines have on by default on a GPU."""


def stated(config: ExperimentConfig) -> ExperimentConfig:
    """The config without its server, the limits of ``server.launch`` where ``limits`` says nothing.

    Only limits are taken over, never the step time of an emulation. Servers behind one list, and
    data-parallel ranks, become replicas; tensor-parallel ranks share the hardware.
    """
    if config.server is None:
        return config
    replicas = config.replicas * config.server.count
    if config.server.launch is None:
        return config.model_copy(update={"replicas": replicas})
    launch = config.server.launch
    given = {k: v for k, v in config.limits if v is not None}
    hardware = config.hardware
    if hardware is not None:
        hardware = hardware.model_copy(update={"gpus": launch.tensor_parallel_size})
    return config.model_copy(
        update={
            "server": None,
            "limits": LimitsConfig.model_validate({**_limits(launch), **given}),
            "hardware": hardware,
            "replicas": replicas * launch.data_parallel_size,
        }
    )


def _limits(launch: LaunchConfig) -> dict[str, object]:
    names = ("pool_tokens", "block_size", "max_num_seqs", "max_num_batched_tokens")
    limits: dict[str, object] = {name: getattr(launch, name) for name in names}
    if launch.runs == "sglang":
        limits["sglang"] = SGLangRulesConfig(radix_cache=launch.prefix_caching)
    if launch.runs_on == "gpu":
        paced = launch.runs == "vllm" and launch.step_time is not None
        limits["async_scheduling"] = not paced and SYNCHRONOUS[launch.runs] not in launch.arguments
    return limits
