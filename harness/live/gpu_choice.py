"""Which GPUs are the engine's, and why: by the config, by CUDA_VISIBLE_DEVICES, or all that are here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.configs.config import ConfigError, ServerConfig
from harness.machine.gpu import NoGpu, open_gpus
from harness.machine.gpu_reader import Device, GpuReader
from harness.records.store import Store
from harness.servers.server import url_is_loopback

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Choice:
    """The GPUs and MIG instances to read; none where ``devices`` is empty. ``why`` ends a sentence."""

    devices: tuple[Device, ...]
    why: str


def engine_gpus(server: ServerConfig, url: str, store: Store) -> GpuReader | NoGpu:
    """The GPUs of the engine at ``url``, opened; which and why is added to environment.json.

    Raises ConfigError where the config names GPUs that cannot be read.
    """
    gpus = _engine_gpus(server, url)
    if isinstance(gpus, NoGpu):
        if server.gpus is not None:
            raise ConfigError(f"server.gpus: they cannot be read: {gpus.reason}")
        found: dict[str, Any] = {"none": gpus.reason}
    else:
        found = {"sampled": [device.label for device in gpus.devices], "why": gpus.why}
    store.write_json(
        "environment.json", {**store.read_json("environment.json"), "engine_gpus": found}
    )
    return gpus


def gpu_note(gpus: GpuReader | NoGpu) -> str:
    """One line for the terminal: what is sampled, and why that."""
    if isinstance(gpus, NoGpu):
        return f"no GPU is sampled: {gpus.reason}"
    return f"sampled: {', '.join(device.label for device in gpus.devices)} ({gpus.why})"


def _engine_gpus(server: ServerConfig, url: str) -> GpuReader | NoGpu:
    if not server.on_gpu:
        return NoGpu("a mock server uses none" if server.mock else "the engine runs on the CPU")
    if not url_is_loopback(url):
        return NoGpu("the server is on another machine, whose GPUs cannot be seen from here")
    gpus = open_gpus()
    if isinstance(gpus, NoGpu):
        return gpus
    choice = choose(gpus.devices, server, os.environ)
    if not choice.devices:
        gpus.close()
        return NoGpu(choice.why)
    return gpus.only(choice.devices, choice.why)


def choose(
    devices: Sequence[Device], server: ServerConfig, environment: Mapping[str, str]
) -> Choice:
    """Those of ``devices`` that the server uses, as far as this can be known.

    The config goes before CUDA_VISIBLE_DEVICES, which only an engine that is started here inherits.
    Raises ConfigError where the config names one that is not there.
    """
    if server.gpus is not None:
        return _by_config(devices, server.gpus)
    if server.launch is not None and VISIBLE in environment:
        return _by_environment(devices, environment)
    if len({device.gpu for device in devices}) == 1:
        return Choice(tuple(devices), "the only GPU here")
    unseen = "the engine may use fewer" if server.launch else "which the server uses is not seen"
    return Choice(tuple(devices), f"all GPUs here, {unseen}: server.gpus tells")


def _by_config(devices: Sequence[Device], names: Sequence[int | str]) -> Choice:
    chosen: list[Device] = []
    for name in names:
        found = _named(devices, name)
        if not found:
            have = ", ".join(f"{d.label} {d.uuid}" for d in devices)
            raise ConfigError(
                f"server.gpus: {name!r} is not one of the GPUs that can be read here: {have}"
            )
        chosen += found
    return Choice(_each_once(devices, chosen), "server.gpus")


def _by_environment(devices: Sequence[Device], environment: Mapping[str, str]) -> Choice:
    """As CUDA reads it: what follows the first name that is none of a GPU does not count."""
    value = environment[VISIBLE]
    names: list[int | str] = [
        int(part) if part.lstrip("-").isdigit() else part
        for part in map(str.strip, value.split(","))
    ]
    by_index = any(isinstance(name, int) for name in names)
    order = environment.get("CUDA_DEVICE_ORDER")
    if by_index and order != "PCI_BUS_ID" and len({d.name for d in devices if d.mig is None}) > 1:
        return Choice(
            tuple(devices),
            f"all GPUs here: they differ, and CUDA counts the fastest first in {VISIBLE}={value}; "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID makes its numbers NVML's",
        )
    chosen: list[Device] = []
    for name in names:
        found = _named(devices, name)
        if not found:
            break
        chosen += found
    why = f"{VISIBLE}={value}" + (", which the engine inherits" if chosen else " hides all GPUs")
    return Choice(_each_once(devices, chosen), why)


def _named(devices: Sequence[Device], name: int | str) -> list[Device]:
    """The GPU of an index or of the beginning of a UUID with its MIG instances, or a MIG instance with
    its GPU, which alone tells clocks and power; empty where none or several have the name."""
    if isinstance(name, int):
        return [device for device in devices if device.gpu == name]
    if not name.startswith(("GPU-", "MIG-")):
        return []
    matches = [device for device in devices if device.uuid.startswith(name)]
    if len(matches) != 1:
        return []
    (match,) = matches
    return [
        d
        for d in devices
        if d.gpu == match.gpu and (match.mig is None or d.mig in (None, match.mig))
    ]


def _each_once(devices: Sequence[Device], chosen: Sequence[Device]) -> tuple[Device, ...]:
    return tuple(device for device in devices if device in chosen)
