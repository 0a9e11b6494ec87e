"""NVML as samples: the only module that touches pynvml. "No GPU" is a stated fact, never zeros."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

try:
    import pynvml
except ImportError:
    pynvml = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One GPU at one instant. A quantity that the card cannot tell is None."""

    t_ns: int
    """When the read ended, monotonic."""
    gpu: int
    """NVML's index."""
    utilization: float | None
    """Share of the driver's last sampling period in which a kernel ran, 0 to 1."""
    memory_bytes: int | None
    power_w: float | None
    sm_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: int | None
    """Bits of `analysis.steadiness.THROTTLE_REASONS`; 0 means that the clock is not held back."""


@dataclass(frozen=True, slots=True)
class NoGpu:
    """There is nothing to sample, and why."""

    reason: str


class GpuLost(Exception):
    """A GPU that could be read no longer can."""


def _quantities(nvml: Any) -> dict[str, Callable[[Any], int | float]]:
    """Field of `GpuSample` -> how NVML tells it, for one device handle."""
    return {
        "utilization": lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100.0,
        "memory_bytes": lambda h: int(nvml.nvmlDeviceGetMemoryInfo(h).used),
        "power_w": lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000.0,
        "sm_clock_mhz": lambda h: int(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
        "temperature_c": lambda h: int(nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
        # The older name is the one that every driver exports.
        "throttle_reasons": lambda h: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
    }


class GpuReader:
    """The GPUs of this machine, opened. Reading blocks in the driver: call it from a thread."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._read = _quantities(nvml)
        # Queries that a card or its driver refuses for good, as opposed to now.
        self._refused = (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_FunctionNotFound,
        )
        count = nvml.nvmlDeviceGetCount()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self._handles)

    def read(self) -> list[GpuSample]:
        """One sample per GPU. Raises GpuLost when a card stops answering."""
        return [self._sample(index, handle) for index, handle in enumerate(self._handles)]

    def _sample(self, index: int, handle: Any) -> GpuSample:
        values: dict[str, Any] = {}
        for name, query in self._read.items():
            try:
                values[name] = query(handle)
            except self._refused:
                values[name] = None
            except self._nvml.NVMLError as error:
                raise GpuLost(f"GPU {index} no longer answers for {name}: {error}") from error
        return GpuSample(t_ns=time.monotonic_ns(), gpu=index, **values)

    def unsupported(self) -> dict[int, list[str]]:
        """Per GPU, the quantities that it does not tell; they are None in every sample."""
        fields = list(self._read)
        return {s.gpu: [f for f in fields if getattr(s, f) is None] for s in self.read()}

    def describe(self) -> dict[str, Any]:
        """Driver version, and name and memory of each GPU, for the environment record."""
        nvml = self._nvml
        return {
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "gpus": [
                {
                    "index": index,
                    "name": nvml.nvmlDeviceGetName(handle),
                    "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                }
                for index, handle in enumerate(self._handles)
            ],
            "unsupported": {str(k): v for k, v in self.unsupported().items() if v},
        }

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def open_gpus() -> GpuReader | NoGpu:
    """The NVIDIA GPUs of this machine, or the reason why there are none to read.

    They are this machine's: for a server elsewhere they say nothing about the engine.
    """
    if pynvml is None:
        return NoGpu("the package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NoGpu(f"NVML cannot start: {error}")
    try:
        reader = GpuReader(pynvml)
    except pynvml.NVMLError as error:
        pynvml.nvmlShutdown()
        return NoGpu(f"NVML started but lists no usable GPU: {error}")
    if not len(reader):
        reader.close()
        return NoGpu("NVML started and finds no GPU")
    return reader
