"""One look at the GPUs: a sample for each, what befell them, what did not answer.

``nvml`` is always the module pynvml, or what stands in for it. What each query needs, and what MIG takes
away, is as NVIDIA's NVML API reference says.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

MOST_EVENTS = 100
"""XIDs taken in one reading; a storm of them must not become a reading without end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What can be read: a GPU, or with ``mig`` an instance of one that is in MIG mode."""

    gpu: int
    """NVML's index."""
    mig: int | None = None
    """NVML's index of the instance within its GPU."""
    name: str
    uuid: str
    memory_bytes: int | None = None
    """In all. None where it is not told, as to a user without rights on a GPU in MIG mode."""

    @property
    def label(self) -> str:
        return f"GPU {self.gpu}" + ("" if self.mig is None else f" MIG instance {self.mig}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One GPU or MIG instance at one instant. What it does not tell, or not this time, is None.

    A GPU in MIG mode tells no utilization and no ECC counts, an instance its memory alone; clocks,
    power and temperature are of the whole card.
    """

    t_ns: int
    """When the read ended, monotonic."""
    gpu: int
    """NVML's index."""
    mig: int | None = None
    """NVML's index of a MIG instance; None for the whole GPU."""
    utilization: float | None
    """Share of the driver's last sampling period in which a kernel ran, 0 to 1."""
    memory_bytes: int | None
    """Allocated, with what the driver keeps for itself."""
    power_w: float | None
    """Mean of the last second since Ampere, of the instant on an A100 and older cards."""
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: int | None
    """Bits of `analysis.verdicts.steadiness.THROTTLE_REASONS`; 0 means that the clock is not held
    back."""
    ecc_corrected: int | None
    ecc_uncorrected: int | None
    """Memory errors since the driver was loaded; None where the card has no ECC or has it off."""


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something that happened to a GPU: it was lost, or the driver reported an XID error of it."""

    t_ns: int
    """When it was noticed, monotonic."""
    gpu: int
    kind: Literal["lost", "xid"]
    text: str
    """NVML's words for a loss; the number of an XID."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one look at all GPUs gave. A GPU that is lost, or answers nothing, has no sample."""

    samples: tuple[GpuSample, ...]
    events: tuple[GpuEvent, ...] = ()
    failures: tuple[str, ...] = ()
    """Queries that usually answer and did not this time, one sentence each."""


@dataclass(frozen=True, slots=True)
class OpenedDevice:
    """A device with NVML's handle of it, and which of `QUANTITIES` it answers."""

    device: Device
    handle: Any
    queries: Mapping[str, Callable[[Any], int | float]]
    refused: Mapping[str, str]
    """Why it does not answer the others."""


QUANTITIES = tuple(f.name for f in fields(GpuSample) if f.name not in ("t_ns", "gpu", "mig"))


def quantities(nvml: Any) -> dict[str, Callable[[Any], int | float]]:
    """Field of `GpuSample` -> how NVML tells it, for one device handle."""

    def ecc(kind: int) -> Callable[[Any], int]:
        return lambda h: int(nvml.nvmlDeviceGetTotalEccErrors(h, kind, nvml.NVML_VOLATILE_ECC))

    def newest(new: Callable[[Any], int], old: Callable[[Any], int]) -> Callable[[Any], int]:
        """The old function is on its way out of the driver, the new one not in every driver yet."""

        def query(handle: Any) -> int:
            try:
                return int(new(handle))
            except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_ArgumentVersionMismatch):
                return int(old(handle))

        return query

    sensor = nvml.NVML_TEMPERATURE_GPU
    return {
        "utilization": lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100.0,
        "memory_bytes": lambda h: int(nvml.nvmlDeviceGetMemoryInfo(h).used),
        "power_w": lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000.0,
        "sm_clock_mhz": lambda h: int(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": lambda h: int(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_MEM)),
        "temperature_c": newest(
            lambda h: nvml.nvmlDeviceGetTemperatureV(h, sensor),
            lambda h: nvml.nvmlDeviceGetTemperature(h, sensor),
        ),
        "throttle_reasons": newest(
            nvml.nvmlDeviceGetCurrentClocksEventReasons,
            nvml.nvmlDeviceGetCurrentClocksThrottleReasons,
        ),
        "ecc_corrected": ecc(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        "ecc_uncorrected": ecc(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
    }


def _errors(nvml: Any, *names: str) -> tuple[type[Exception], ...]:
    return tuple(getattr(nvml, f"NVMLError_{name}") for name in names)


def refusals(nvml: Any) -> tuple[type[Exception], ...]:
    """A card or its driver refuses for good. A function that was removed answers "deprecated"."""
    return _errors(nvml, "NotSupported", "NoPermission", "FunctionNotFound", "Deprecated")


def losses(nvml: Any) -> tuple[type[Exception], ...]:
    """The card is gone until somebody resets it."""
    return _errors(nvml, "GpuIsLost", "ResetRequired", "DriverNotLoaded", "Uninitialized")


class GpuReader:
    """GPUs of this machine, opened, and ``why`` these. Reading blocks in the driver: call it from a
    thread."""

    def __init__(
        self,
        nvml: Any,
        opened: Sequence[OpenedDevice],
        record: Mapping[str, Any],
        xids: Any | None,
        why: str = "all GPUs of this machine",
    ) -> None:
        self._nvml, self._opened, self._record, self._xids = nvml, opened, record, xids
        self._losses = losses(nvml)
        self._lost: dict[int, GpuEvent] = {}
        self._gpu_at = {_address(o.handle): o.device.gpu for o in opened if o.device.mig is None}
        self.why = why

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(opened.device for opened in self._opened)

    @property
    def lost(self) -> tuple[GpuEvent, ...]:
        """The GPUs that were lost so far."""
        return tuple(self._lost.values())

    def only(self, devices: Collection[Device], why: str) -> GpuReader:
        """A reader of these alone."""
        opened = [o for o in self._opened if o.device in devices]
        return GpuReader(self._nvml, opened, self._record, self._xids, why)

    def read(self) -> Reading:
        """One sample for each that answers, and what happened to them since the last reading.

        A GPU that was lost is not asked again.
        """
        events, failures = self._new_xids()
        samples = []
        for opened in self._opened:
            if opened.device.gpu in self._lost:
                continue
            sample = self._sample(opened, failures)
            if isinstance(sample, GpuEvent):
                self._lost[sample.gpu] = sample
                events.append(sample)
            elif sample is not None:
                samples.append(sample)
        whole = [s for s in samples if s.gpu not in self._lost]
        return Reading(tuple(whole), tuple(events), tuple(failures))

    def _sample(self, opened: OpenedDevice, failures: list[str]) -> GpuSample | GpuEvent | None:
        device = opened.device
        values: dict[str, Any] = dict.fromkeys(QUANTITIES)
        for name, query in opened.queries.items():
            try:
                values[name] = query(opened.handle)
            except self._losses as error:
                return GpuEvent(time.monotonic_ns(), device.gpu, "lost", str(error))
            except self._nvml.NVMLError as error:
                failures.append(f"{device.label}: {name}: {error}")
        if all(value is None for value in values.values()):
            return None
        return GpuSample(t_ns=time.monotonic_ns(), gpu=device.gpu, mig=device.mig, **values)

    def _new_xids(self) -> tuple[list[GpuEvent], list[str]]:
        events: list[GpuEvent] = []
        for _ in range(MOST_EVENTS if self._xids is not None else 0):
            try:
                data = self._nvml.nvmlEventSetWait_v2(self._xids, 0)
            except self._nvml.NVMLError_Timeout:
                break
            except self._nvml.NVMLError as error:
                self._xids = None
                return events, [f"XID errors are no longer reported: {error}"]
            gpu = self._gpu_at.get(_address(data.device))
            if gpu is not None:
                events.append(GpuEvent(time.monotonic_ns(), gpu, "xid", str(data.eventData)))
        return events, []

    def describe(self) -> dict[str, Any]:
        """Driver and GPUs of the machine for the environment record, and what they do not tell."""
        return dict(self._record)

    def close(self) -> None:
        if self._xids is not None:
            self._nvml.nvmlEventSetFree(self._xids)
        self._nvml.nvmlShutdown()


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
