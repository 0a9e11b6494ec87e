"""Is this machine ready for a config's experiment on its GPUs? Each check with what to do about it."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analysis.verdicts.steadiness import HELD_BACK, THROTTLE_REASONS
from harness.configs.config import ConfigError, ExperimentConfig, ServerConfig
from harness.configs.hardware import HardwareConfig
from harness.configs.launch import TINY_MODELS, LaunchConfig, place
from harness.live.gpu_choice import choose
from harness.machine.gpu import NoGpu
from harness.machine.gpu_reader import Device, GpuReader, GpuSample
from harness.servers.model_access import hub_cache, model_access
from harness.servers.server import ServerFailed, free_port, require_free
from loadgen.drive import TooFewFileDescriptors, require_file_descriptors

VLLM_UTILIZATION = 0.92
"""vLLM 0.32.0's gpu_memory_utilization where none is given."""
BUSY = 0.05
FREE_AT_FIRST_BYTES = 2 * 10**9
"""What a GPU may hold before the engine starts: the driver's own, and a small display."""
IN_FLIGHT = 4096
"""Requests whose connections must fit: an overloaded run of the largest config here holds fewer."""
RESULTS_BYTES = 5 * 10**9
"""For results, the engine's compiled kernels and graphs."""
SHARED_MEMORY_BYTES = 10**9
GB = 1e9

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: ``missing`` stops an experiment, ``warning`` may spoil it."""

    name: str
    state: State
    found: str
    mend: str = ""


def node_checks(config: ExperimentConfig, gpus: GpuReader | NoGpu, results: Path) -> list[Check]:
    """Everything that can be seen without starting anything; some seconds at most.

    ``results`` is where results will be written. Raises ConfigError for a config that starts no engine
    on a GPU.
    """
    server = config.server
    if server is None or server.launch is None or server.launch.runs_on != "gpu":
        raise ConfigError(
            "server.launch: this is for a config that starts an engine on a GPU: see docs/gpu.md"
        )
    launch = server.launch
    return [
        *gpu_checks(server, config.hardware, gpus),
        environment_check(launch),
        *_model_checks(launch, config.hardware, results),
        *_machine_checks(server, launch),
    ]


# -- GPUs ----------------------------------------------------------------------------------------


def gpu_checks(
    server: ServerConfig, hardware: HardwareConfig | None, gpus: GpuReader | NoGpu
) -> list[Check]:
    """Driver, number and kind of GPUs, and of each its memory, what it does now and its clocks."""
    launch = server.launch
    assert launch is not None
    if isinstance(gpus, NoGpu):
        mend = "run this on the GPU node, in a container with --gpus all"
        return [Check("GPU", "missing", gpus.reason, mend)]
    try:
        choice = choose(gpus.devices, server, os.environ)
    except ConfigError as error:
        return [Check("GPU", "missing", str(error), "nvidia-smi -L lists what is here")]
    chosen = choice.devices
    names = ", ".join(sorted({device.name for device in chosen}))
    found = f"driver {gpus.describe()['driver']}, {len(chosen)} to use ({choice.why}): {names}"
    if len(chosen) < launch.gpus:
        mend = f"the config needs {launch.gpus}: lower its data or tensor parallel size"
        return [Check("GPU", "missing", found, mend)]
    checks = [Check("GPU", "ok", found)]
    if hardware is not None and names != hardware.gpu:
        mend = "correct hardware.gpu, or predict with --probe: only the prediction P0 uses it"
        checks.append(Check("GPU kind", "warning", f"the config says {hardware.gpu}", mend))
    samples = {(s.gpu, s.mig): s for s in gpus.read().samples}
    for device in chosen[: launch.gpus]:
        sample = samples.get((device.gpu, device.mig))
        if sample is None:
            mend = "nvidia-smi shows its state: reset it or reboot"
            checks.append(Check(device.label, "missing", "it answers nothing", mend))
        else:
            checks += [memory_check(device, sample, launch, hardware), *_state(device, sample)]
    return [*checks, *_processes(chosen)]


def memory_check(
    device: Device, sample: GpuSample, launch: LaunchConfig, hardware: HardwareConfig | None
) -> Check:
    """Do weights and pool fit what the engine may take, and is that free now?

    Activations and graphs come on top; only the engine's log tells how much.
    """
    name = f"{device.label} memory"
    if device.memory_bytes is None or sample.memory_bytes is None:
        return Check(name, "warning", "not told", "see nvidia-smi")
    free = device.memory_bytes - sample.memory_bytes
    share = launch.gpu_memory_utilization
    if share is None:
        share = VLLM_UTILIZATION if launch.runs == "vllm" else 1.0
    # vLLM asks for a share of the whole memory, SGLang of what it finds free.
    asked = math.ceil(share * (device.memory_bytes if launch.runs == "vllm" else free))
    found = f"{free / GB:.1f} of {device.memory_bytes / GB:.1f} GB free, {asked / GB:.1f} for the engine"
    if free < asked:
        return Check(name, "missing", found, "end what holds it, or lower gpu_memory_utilization")
    if hardware is None or launch.pool_tokens is None:
        return Check(name, "ok", f"{found}; weights and pool are not stated, so not compared")
    weights = hardware.weight_bytes / launch.tensor_parallel_size
    pool = launch.pool_tokens * hardware.kv_bytes_per_token / launch.tensor_parallel_size
    found += f", of which {weights / GB:.1f} weights and {pool / GB:.1f} KV cache"
    if weights + pool > asked:
        return Check(name, "missing", found, "lower pool_tokens, or take more GPUs")
    return Check(name, "ok", found)


def _state(device: Device, sample: GpuSample) -> list[Check]:
    """What the GPU does and how it is held back, before the engine is started."""
    checks = []
    held = sample.memory_bytes
    busy = sample.utilization is not None and sample.utilization > BUSY
    if busy or (held is not None and held > FREE_AT_FIRST_BYTES):
        used = "" if sample.utilization is None else f"{100 * sample.utilization:.0f} % busy, "
        text = f"{used}{(held or 0) / GB:.1f} GB in use"
        mend = "end the others: a GPU that is shared has no critical rate of its own"
        checks.append(Check(f"{device.label} in use", "warning", text, mend))
    reasons = sample.throttle_reasons or 0
    slow = [name for bit, name in THROTTLE_REASONS.items() if reasons & bit & HELD_BACK]
    if slow:
        mend = "wait until it is cool, or see its power limit: nvidia-smi -q -d PERFORMANCE,POWER"
        checks.append(Check(f"{device.label} clocks", "warning", ", ".join(slow), mend))
    if sample.ecc_uncorrected:
        text = f"{sample.ecc_uncorrected} uncorrected memory errors"
        checks.append(Check(f"{device.label} ECC", "warning", text, "reset it, or take another"))
    return checks


def _processes(devices: Sequence[Device]) -> list[Check]:
    """Other programs on these GPUs, where nvidia-smi is there to tell."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Check("processes", "warning", f"nvidia-smi does not tell: {error}")]
    ours = {device.uuid for device in devices}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    others = [" ".join(row[1:]) for row in rows if row and row[0] in ours]
    if done.returncode or not others:
        return []
    return [Check("processes", "warning", "; ".join(others), "end them, or use other GPUs")]


# -- the rest of the machine ---------------------------------------------------------------------


def environment_check(launch: LaunchConfig) -> Check:
    """Is the engine installed, as the config wants it?"""
    try:
        where = place(launch, 0, Path("pace"))
    except ServerFailed as error:
        return Check("engine", "missing", str(error))
    return Check("engine", "ok", f"{launch.runs} of {where.python}")


def _model_checks(
    launch: LaunchConfig, hardware: HardwareConfig | None, results: Path
) -> list[Check]:
    disks = {results: RESULTS_BYTES}
    checks = []
    if launch.model not in TINY_MODELS:
        access = model_access(launch.model)
        state: State = "ok" if access.here else "warning" if access.reachable else "missing"
        checks.append(Check("model", state, access.found, access.mend))
        if not access.here and hardware is not None:
            disks[hub_cache()] = disks.get(hub_cache(), 0) + hardware.weight_bytes
    return [*checks, *(disk_check(folder, needed) for folder, needed in disks.items())]


def disk_check(folder: Path, needed_bytes: int) -> Check:
    """Does the disk of a folder, which need not exist yet, have so much room?"""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{free / GB:.1f} GB free at {folder}, {needed_bytes / GB:.1f} needed"
    if free < needed_bytes:
        return Check(
            "disk", "missing", found, "make room, or point HF_HOME or --out to another disk"
        )
    return Check("disk", "ok", found)


def _machine_checks(server: ServerConfig, launch: LaunchConfig) -> list[Check]:
    checks = []
    try:
        require_file_descriptors(IN_FLIGHT)
    except TooFewFileDescriptors as error:
        checks.append(Check("open files", "missing", str(error)))
    else:
        checks.append(Check("open files", "ok", f"room for {IN_FLIGHT} connections"))
    try:
        port = server.port or free_port()
        require_free(port)
    except (ServerFailed, OSError) as error:
        checks.append(Check("port", "missing", f"127.0.0.1: {error}", "let this user bind a port"))
    else:
        checks.append(Check("port", "ok", f"127.0.0.1:{port} can be listened on"))
    shared = Path("/dev/shm")
    if launch.gpus > 1 and shared.is_dir():
        free = shutil.disk_usage(shared).free
        if free < SHARED_MEMORY_BYTES:
            mend = "start the container with --ipc=host or --shm-size 8g"
            checks.append(Check("/dev/shm", "missing", f"{free / GB:.2f} GB free", mend))
    return checks


# -- the first run -------------------------------------------------------------------------------

FIRST_POOL_TOKENS = 32768
FIRST_LENGTHS = (64, 448)
FIRST_HORIZON_S = 45.0


def first_run(config: ExperimentConfig) -> dict[str, Any]:
    """The config as a short run: the same engine, model and flags on one rank, with a pool that a few
    seconds fill, for as much as can be said in minutes."""
    assert config.server is not None and config.server.launch is not None
    data = config.model_dump(mode="json", exclude_none=True)
    launch = data["server"]["launch"]
    launch.pop("data_parallel_size", None)
    if config.server.launch.runs == "vllm":
        launch.setdefault("block_size", 16)
    block = launch.get("block_size", 1)
    pool = min(FIRST_POOL_TOKENS, launch.get("pool_tokens", FIRST_POOL_TOKENS))
    launch["pool_tokens"] = pool // block * block
    for key in ("hardware", "predict_from", "published"):
        data.pop(key, None)
    low, high = FIRST_LENGTHS
    return data | {
        "name": f"{config.name}_first",
        "theta": 0.2,
        "workload": {"uniform": {"prompt": [low, high], "output": [low, high]}},
        "load": {
            "rates": [0.75, 1.3],
            "horizon_s": FIRST_HORIZON_S,
            "extend": False,
            "seed": config.load.seed,
            "vocabulary": list(config.load.vocabulary),
        },
    }
