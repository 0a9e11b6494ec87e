from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.configs.config import ConfigError, ServerConfig
from harness.live.gpu_choice import VISIBLE, choose, engine_gpus, gpu_note
from harness.machine.gpu import NoGpu
from harness.machine.gpu_reader import Device
from harness.records.store import Store

ONE = Device(gpu=0, name="H100", uuid="GPU-0a1b")
TWO = Device(gpu=1, name="H100", uuid="GPU-0a2c")
OLD = Device(gpu=2, name="A100", uuid="GPU-77")
FIRST = Device(gpu=2, mig=0, name="A100 MIG 1g.10gb", uuid="MIG-5e")
THIRD = Device(gpu=2, mig=2, name="A100 MIG 1g.10gb", uuid="MIG-6f")
ALIKE, MIXED = (ONE, TWO), (ONE, TWO, OLD, FIRST, THIRD)
LAUNCHED: dict[str, Any] = {"launch": {"environment": "vllm", "model": "x"}}
RUNNING = {"url": "http://localhost:8000"}


def server(given: dict[str, Any], gpus: list[int | str] | None = None) -> ServerConfig:
    return ServerConfig.model_validate({**given, **({} if gpus is None else {"gpus": gpus})})


@pytest.mark.parametrize(
    ("devices", "given", "gpus", "visible", "chosen", "why"),
    [
        # The config goes before the environment, whoever started the server.
        (MIXED, RUNNING, [1], None, (TWO,), "server.gpus"),
        (MIXED, LAUNCHED, [1, 0], "2", (ONE, TWO), "server.gpus"),
        (MIXED, RUNNING, ["GPU-0a1"], None, (ONE,), "server.gpus"),
        (MIXED, RUNNING, [2], None, (OLD, FIRST, THIRD), "server.gpus"),
        (MIXED, RUNNING, ["MIG-6f"], None, (OLD, THIRD), "server.gpus"),
        (MIXED, RUNNING, ["MIG-6f", "MIG-5e"], None, (OLD, FIRST, THIRD), "server.gpus"),
        # Only an engine that is started here inherits the variable.
        (ALIKE, LAUNCHED, None, "1", (TWO,), f"{VISIBLE}=1, which the engine inherits"),
        (ALIKE, LAUNCHED, None, " 1 , 0", (ONE, TWO), "which the engine inherits"),
        (ALIKE, LAUNCHED, None, "GPU-0a2,GPU-0a1", (ONE, TWO), "which the engine inherits"),
        (ALIKE, RUNNING, None, "1", ALIKE, "which the server uses is not seen"),
        (ALIKE, LAUNCHED, None, None, ALIKE, "the engine may use fewer"),
        ((ONE,), RUNNING, None, None, (ONE,), "the only GPU here"),
        ((OLD, FIRST), LAUNCHED, None, None, (OLD, FIRST), "the only GPU here"),
        # CUDA stops at the first name that is none, and sees nothing where that is the first.
        (ALIKE, LAUNCHED, None, "0,-1,1", (ONE,), "which the engine inherits"),
        (ALIKE, LAUNCHED, None, "0,7,1", (ONE,), "which the engine inherits"),
        (ALIKE, LAUNCHED, None, "-1", (), "hides all GPUs"),
        (ALIKE, LAUNCHED, None, "", (), "hides all GPUs"),
        (ALIKE, LAUNCHED, None, "GPU-0a", (), "hides all GPUs"),
        (ALIKE, LAUNCHED, None, "none", (), "hides all GPUs"),
        # Indices of cards that differ are CUDA's own.
        (MIXED, LAUNCHED, None, "0", MIXED, "they differ, and CUDA counts the fastest first"),
        (MIXED, LAUNCHED, None, "GPU-77", (OLD, FIRST, THIRD), "which the engine inherits"),
    ],
)
def test_which_gpus_are_the_engines_and_why(
    devices: tuple[Device, ...],
    given: dict[str, Any],
    gpus: list[int | str] | None,
    visible: str | None,
    chosen: tuple[Device, ...],
    why: str,
) -> None:
    choice = choose(devices, server(given, gpus), {} if visible is None else {VISIBLE: visible})
    assert choice.devices == chosen
    assert why in choice.why


def test_by_bus_order_cudas_indices_are_nvmls() -> None:
    environment = {VISIBLE: "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert choose(MIXED, server(LAUNCHED), environment).devices == (TWO,)


@pytest.mark.parametrize("name", [3, "GPU-ff", "GPU-0a", "MIG-7"])
def test_a_gpu_of_the_config_that_is_not_there_is_refused(name: int | str) -> None:
    with pytest.raises(ConfigError, match=r"server\.gpus: .* is not one .*GPU 1 GPU-0a2c"):
        choose(MIXED, server(RUNNING, [name]), {})


@pytest.mark.parametrize("gpus", [[], [-1], [True], ["0"], ["gpu-1"], 1])
def test_names_of_gpus_that_cannot_be_any(gpus: Any) -> None:
    with pytest.raises(ValidationError):
        server(RUNNING, gpus)


@pytest.mark.parametrize(
    "given",
    [
        {"launch": {"environment": "vllm-cpu", "pool_tokens": 4096, "block_size": 32}},
        {"mock": {"num_blocks": 9, "block_size": 16, "step_time": {"b0_ms": 1}}},
    ],
)
def test_a_server_without_gpus_samples_none_and_takes_none(
    given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="this server uses none"):
        server(given, [0])
    store = Store.create(tmp_path / "out")
    store.write_json("environment.json", {"python": "3"})
    gpus = engine_gpus(server(given), "http://127.0.0.1:1", store)
    assert isinstance(gpus, NoGpu)
    recorded = store.read_json("environment.json")
    assert recorded == {"python": "3", "engine_gpus": {"none": gpus.reason}}


def test_a_server_elsewhere_has_none_that_can_be_seen(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "out")
    store.write_json("environment.json", {})
    there = "http://gpu-node:8000"
    gpus = engine_gpus(server({"url": there}), there, store)
    assert "another machine" in gpu_note(gpus)
    with pytest.raises(ConfigError, match=r"server\.gpus: they cannot be read: .*another machine"):
        engine_gpus(server({"url": there}, [0]), there, store)
