"""A config that launches an engine predicts without it: its limits, and hardware for the step time."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis.numbers.estimate import Estimate
from analysis.theory.roofline import DATA_SHEETS, MEASURED_SHARE
from harness.cli import main
from harness.configs.config import ConfigError, ExperimentConfig, load_config
from harness.configs.hardware import measured_rates
from harness.configs.offline import stated
from harness.experiments import predict
from harness.experiments.first_hour import p0_text
from harness.experiments.predict import (
    claimed,
    offline_predictions,
    stated_limits,
    stated_step_time,
)
from harness.live.target import target_server
from harness.records.store import Store
from loadgen import workload as wl

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ON_GPUS = sorted(path.name for path in CONFIGS.glob("[ah]100*.yaml"))
HARDWARE = {"gpu": "NVIDIA H100 80GB HBM3", "parameters": 10**9, "kv_bytes_per_token": 1000}


def config_of(tmp_path: Path, launch: dict[str, Any], **more: Any) -> ExperimentConfig:
    path = tmp_path / "config.yaml"
    sections = {
        "name": "x",
        "server": {"launch": launch},
        "workload": {"fixed": {"prompt": 10, "output": 10}},
    }
    path.write_text(yaml.safe_dump(sections | more))
    return load_config(path)


LENGTHS = np.linspace(10, 1600, 16).astype(np.int64)
GRID = wl.pairs(np.repeat(LENGTHS, 16), np.tile(LENGTHS, 16), name="grid", source="stated")
"""256 points in place of the configs' 2.5 million: the same means to 5 %."""


def rate(name: str) -> float:
    config = stated(load_config(CONFIGS / name))
    assert config.workload is not None and config.workload.uniform is not None
    assert config.workload.uniform.prompt == config.workload.uniform.output == (10, 1600)
    found = claimed(config, GRID, stated_limits(config), stated_step_time(config), "P0")
    assert found.binding in ("kv_cache", "output_reservation"), "memory binds, as the config says"
    assert found.critical_rate.low < found.critical_rate.value < found.critical_rate.high
    assert found.longest_residence_s < 0.2 * load_config(CONFIGS / name).load.max_horizon_s
    return found.critical_rate.value


def test_the_configs_for_gpus_predict() -> None:
    assert len(ON_GPUS) == 5
    rates = {name: rate(name) for name in ON_GPUS}
    eight, one = rates["h100x8_llama3_8b_vllm_dp.yaml"], rates["h100_llama3_8b_vllm.yaml"]
    assert eight == pytest.approx(8 * one)
    for engine in ("vllm", "sglang"):
        assert rates[f"h100_llama3_8b_{engine}.yaml"] > 2 * rates[f"a100_llama3_8b_{engine}.yaml"]


VLLM = {
    "environment": "vllm",
    "pool_tokens": 4096,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
}


@pytest.mark.parametrize(
    ("launch", "limits", "expected"),
    [
        (VLLM, {}, {"num_blocks": 128, "block_size": 32, "max_num_seqs": 8}),
        (VLLM, {}, {"max_num_batched_tokens": 512, "async_scheduling": True, "sglang": None}),
        (VLLM, {"max_num_seqs": 4, "pool_tokens": 64}, {"num_blocks": 2, "max_num_seqs": 4}),
        (VLLM | {"arguments": ["--no-async-scheduling"]}, {}, {"async_scheduling": False}),
        (VLLM | {"step_time": {"b0_ms": 20}}, {}, {"async_scheduling": False}),
        (VLLM | {"environment": "vllm-cpu"}, {}, {"async_scheduling": False}),
        ({"environment": "sglang", "pool_tokens": 99}, {}, {"num_blocks": 99, "block_size": 1}),
        ({"environment": "sglang", "pool_tokens": 99}, {}, {"async_scheduling": True}),
    ],
)
def test_limits_are_those_of_the_launch(
    tmp_path: Path, launch: dict[str, Any], limits: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = stated(config_of(tmp_path, launch, limits=limits, hardware=HARDWARE))
    found = stated_limits(config)
    for name, value in expected.items():
        assert getattr(found, name) == value, name
    assert config.server is None
    assert (found.sglang is None) == launch["environment"].startswith("vllm")
    assert found.sglang is None or not found.sglang.radix_cache


def test_the_set_step_time_of_an_emulation_is_not_taken(tmp_path: Path) -> None:
    config = stated(config_of(tmp_path, VLLM | {"step_time": {"b0_ms": 20}}))
    with pytest.raises(ConfigError, match=r"step_time: .* or hardware"):
        offline_predictions(config)


def test_ranks_share_or_multiply(tmp_path: Path) -> None:
    launch = VLLM | {"tensor_parallel_size": 2, "data_parallel_size": 3}
    config = stated(config_of(tmp_path, launch, hardware=HARDWARE, replicas=2))
    assert config.replicas == 6
    alone = stated(config_of(tmp_path, VLLM, hardware=HARDWARE))
    shared, whole = stated_step_time(config).law, stated_step_time(alone).law
    assert shared.coefficients() == pytest.approx(whole.coefficients() / 2)
    many = stated(config_of(tmp_path, VLLM | {"tensor_parallel_size": 8}, hardware=HARDWARE))
    with pytest.raises(ConfigError, match="hardware: 8 tensor-parallel ranks"):
        stated_step_time(many)


def test_a_run_measures_one_rank(tmp_path: Path) -> None:
    config = config_of(tmp_path, VLLM | {"data_parallel_size": 8})

    async def start() -> None:
        async with target_server(config, Store.create(tmp_path / "out")):
            raise AssertionError("nothing is started")

    with pytest.raises(ConfigError, match="measured of one engine"):
        asyncio.run(start())


PROBED = {
    "kind": "gpu",
    "device": "NVIDIA X",
    "copy_bytes_per_s": {"median": 2e12},
    "matmul_flop_per_s": {"median": 4e14},
}


def test_a_probe_takes_the_place_of_the_data_sheet(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(PROBED))
    found = measured_rates(file)
    config = stated(config_of(tmp_path, VLLM, hardware=HARDWARE))
    middle = (MEASURED_SHARE[0] * MEASURED_SHARE[1]) ** 0.5
    law = stated_step_time(config, found).law
    assert law.b0_s == pytest.approx(2e9 / (middle * 2e12))
    assert law.b1_s_per_token == pytest.approx(2e9 / (middle * 4e14))
    assert "measured on NVIDIA X" in p0_text(config, found)
    assert "data sheet of the H100" in p0_text(config)
    with pytest.raises(ConfigError, match="leave hardware"):
        stated_step_time(config_of(tmp_path, VLLM, step_time={"b0_ms": 9}), found)


def test_the_command_says_what_the_step_time_rests_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(PROBED))
    config_of(tmp_path, VLLM, hardware=HARDWARE)
    rate = Estimate.exact(1.0, "req/s", "stub")
    monkeypatch.setattr(predict, "simulated_rate", lambda *_, **__: rate)
    for option, said in (
        ([], "data sheet of the H100 SXM, 0.43 to"),
        (["--probe"], "NVIDIA X, 0.48"),
    ):
        line = ["critrate", "predict", str(tmp_path / "config.yaml"), *option]
        monkeypatch.setattr(sys, "argv", [*line, *([str(tmp_path / "gpu.json")] if option else [])])
        with pytest.raises(SystemExit, match="0"):
            main()
        out = capsys.readouterr().out
        assert said in out and "at saturation" in out and "bound by kv_cache" in out, out


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "cannot be read"),
        ("{", "not what scripts/gpu-bandwidth writes"),
        (json.dumps({**PROBED, "copy_bytes_per_s": 3}), "not what scripts/gpu-bandwidth writes"),
        (json.dumps({**PROBED, "kind": "cpu"}), "measured on a CPU"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, written: str | None, message: str) -> None:
    file = tmp_path / "gpu.json"
    if written is not None:
        file.write_text(written)
    with pytest.raises(ConfigError, match=message):
        measured_rates(file)


def test_an_unknown_gpu_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data sheet of 'RTX 4090' .* --probe"):
        config_of(tmp_path, VLLM, hardware={**HARDWARE, "gpu": "RTX 4090"})
    assert all(name.startswith("NVIDIA ") for name in DATA_SHEETS)
