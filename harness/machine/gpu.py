"""The GPUs of this machine, opened: the only module that touches pynvml. "No GPU" is a stated fact."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.machine.gpu_reader import Device, GpuReader, OpenedDevice, losses, quantities, refusals

try:
    import pynvml
except ImportError:
    pynvml = None

OPEN_TIMEOUT_S = 30.0
"""NVML wakes every card up when it starts: seconds each where no persistence daemon runs."""
OF_AN_INSTANCE = "memory_bytes"
"""What is asked of a MIG instance: the rest is told of the whole card, or of nothing in MIG mode."""
MENDS = {
    "LibraryNotFound": "no NVIDIA driver is installed here, or a container was started without GPUs",
    "DriverNotLoaded": "load the driver's kernel modules, nvidia-smi shows whether they answer",
    "LibRmVersionMismatch": (
        "the driver's library and its kernel modules are of different versions, as after an update: "
        "reboot, or load the modules anew"
    ),
    "NoPermission": "give this user access to /dev/nvidia*",
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NoGpu:
    """There is nothing to sample, and why."""

    reason: str


def open_gpus(timeout_s: float = OPEN_TIMEOUT_S) -> GpuReader | NoGpu:
    """The NVIDIA GPUs of this machine, or the reason why there are none to read.

    They are this machine's: for a server elsewhere they say nothing about the engine.
    """
    if pynvml is None:
        return NoGpu("the package nvidia-ml-py is not installed")
    try:
        return in_daemon(lambda: _open(pynvml)).result(timeout_s)
    except TimeoutError:
        return NoGpu(
            f"the NVIDIA driver did not answer for {timeout_s:g} s: nvidia-smi will hang too, "
            "reset the GPU or reboot"
        )


def in_daemon(call: Callable[[], T]) -> Future[T]:
    """Run ``call`` in a thread of its own that nobody has to wait for, not even the end of the program:
    a driver that hangs never gives its caller back."""
    future: Future[T] = Future()

    def work() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name="nvml", daemon=True).start()
    return future


def _open(nvml: Any) -> GpuReader | NoGpu:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        mend = MENDS.get(type(error).__name__.removeprefix("NVMLError_"))
        said = f"NVML cannot start: {error}".rstrip(".")
        return NoGpu(f"{said}: {mend}" if mend else said)
    opened: list[OpenedDevice] = []
    unreadable: dict[int, str] = {}
    try:
        count = nvml.nvmlDeviceGetCount()
        driver = nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError as error:
        nvml.nvmlShutdown()
        return NoGpu(f"NVML started but lists no usable GPU: {error}")
    for gpu in range(count):
        try:
            opened += _open_gpu(nvml, gpu)
        except nvml.NVMLError as error:
            unreadable[gpu] = str(error)
    if not opened:
        nvml.nvmlShutdown()
        lost = "; ".join(f"GPU {gpu}: {text}" for gpu, text in unreadable.items())
        return NoGpu(f"NVML lists no GPU that can be read: {lost}" if lost else "NVML finds no GPU")
    xids, unwatched = _watch_xids(nvml, opened)
    return GpuReader(nvml, opened, _record(driver, opened, unreadable, unwatched), xids)


def _open_gpu(nvml: Any, gpu: int) -> list[OpenedDevice]:
    """A GPU and its MIG instances."""
    handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
    found = [(handle, None), *_instances(nvml, handle)]
    opened = []
    for each, mig in found:
        device = Device(
            gpu=gpu,
            mig=mig,
            name=nvml.nvmlDeviceGetName(each),
            uuid=nvml.nvmlDeviceGetUUID(each),
            memory_bytes=_total_memory_bytes(nvml, each),
        )
        asked = {n: q for n, q in quantities(nvml).items() if mig is None or n == OF_AN_INSTANCE}
        refused = {n: why for n, q in asked.items() if (why := _refusal(nvml, q, each)) is not None}
        queries = {n: q for n, q in asked.items() if n not in refused}
        opened.append(OpenedDevice(device, each, queries, refused))
    return opened


def _refusal(nvml: Any, query: Callable[[Any], object], handle: Any) -> str | None:
    """Why this query never answers for this card; None where it does, or may another time."""
    try:
        query(handle)
    except refusals(nvml) as error:
        return str(error)
    except losses(nvml):
        raise
    except nvml.NVMLError:
        return None
    return None


def _total_memory_bytes(nvml: Any, handle: Any) -> int | None:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except refusals(nvml):
        return None


def _instances(nvml: Any, handle: Any) -> list[tuple[Any, int]]:
    """Handles and indices of the GPU's MIG instances; none where MIG is off or unknown."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except refusals(nvml):
        return []
    if current != nvml.NVML_DEVICE_MIG_ENABLE:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append((nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index), index))
        except nvml.NVMLError_NotFound:
            continue
    return found


def _watch_xids(nvml: Any, opened: Sequence[OpenedDevice]) -> tuple[Any | None, dict[int, str]]:
    """NVML's set of XID events, and the GPUs of which none are told, with the reason.

    A GPU in MIG mode tells a user without rights only what befell it as a whole.
    """
    gpus = [o for o in opened if o.device.mig is None]
    try:
        events = nvml.nvmlEventSetCreate()
    except nvml.NVMLError as error:
        return None, {o.device.gpu: str(error) for o in gpus}
    unwatched = {}
    for each in gpus:
        try:
            nvml.nvmlDeviceRegisterEvents(each.handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as error:
            unwatched[each.device.gpu] = str(error)
    return (events if len(unwatched) < len(gpus) else None), unwatched


def _record(
    driver: str,
    opened: Sequence[OpenedDevice],
    unreadable: Mapping[int, str],
    unwatched: Mapping[int, str],
) -> dict[str, Any]:
    gpus: list[dict[str, Any]] = [{"index": i, "unreadable": why} for i, why in unreadable.items()]
    for device in (o.device for o in opened):
        row = {"name": device.name, "memory_bytes": device.memory_bytes}
        if device.mig is None:
            gpus.append({"index": device.gpu, **row})
        else:
            gpus[-1].setdefault("mig_instances", []).append({"index": device.mig, **row})
    unsupported = {}
    for each in opened:
        refused = dict(each.refused)
        if each.device.mig is None and each.device.gpu in unwatched:
            refused["xid events"] = unwatched[each.device.gpu]
        if refused:
            unsupported[each.device.label] = refused
    if any(each.device.mig is not None for each in opened):
        unsupported["MIG instances"] = {
            f"all but {OF_AN_INSTANCE}": "told of the whole card, if at all"
        }
    return {
        "driver": driver,
        "gpus": sorted(gpus, key=lambda row: int(row["index"])),
        "unsupported": unsupported,
    }
