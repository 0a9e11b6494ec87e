"""The part of a config that names a GPU and a model's size, and what a probe measured of a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from analysis.schedulers.step_time import StepTimeFit
from analysis.theory.roofline import DATA_SHEETS, MEASURED_SHARE, Rates, roofline
from harness.configs.sections import ConfigError, Positive, Section


def _known(name: str) -> str:
    if name not in DATA_SHEETS:
        raise ValueError(
            f"no data sheet of {name!r} is known here, only of {', '.join(DATA_SHEETS)}: measure with "
            "scripts/gpu-bandwidth and give its file to critrate predict --probe"
        )
    return name


class HardwareConfig(Section):
    """A GPU and what a model asks of it: a step time before any measurement."""

    gpu: Annotated[str, AfterValidator(_known)]
    """As NVML calls it."""
    gpus: Positive = 1
    """That share one copy of the model (tensor parallel)."""
    parameters: Positive
    bytes_per_parameter: Positive = 2
    kv_bytes_per_token: Positive
    """Over all layers: `critrate kv-cache` derives it."""

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_parameter

    def step_time(self, measured: Rates | None = None) -> StepTimeFit:
        """From the data sheet, or from what was measured. Raises ConfigError for too many GPUs."""
        rates = DATA_SHEETS[self.gpu] if measured is None else measured
        try:
            return roofline(
                rates, self.parameters, self.weight_bytes, self.kv_bytes_per_token, self.gpus
            )
        except ValueError as error:
            raise ConfigError(f"hardware: {error}") from error


def measured_rates(path: Path) -> Rates:
    """What `scripts/gpu-bandwidth` wrote to ``path``. Raises ConfigError for anything else, and for what
    it measured on a CPU."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, device = found["kind"], found["device"]
        bandwidth = float(found["copy_bytes_per_s"]["median"])
        arithmetic = float(found["matmul_flop_per_s"]["median"])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not what scripts/gpu-bandwidth writes: {error!r}") from error
    if kind != "gpu":
        raise ConfigError(f"{path}: was measured on a CPU ({device}), which says nothing of a GPU")
    low, high = MEASURED_SHARE
    return Rates(
        name=device,
        bandwidth_bytes_per_s=bandwidth,
        arithmetic_flop_per_s=arithmetic,
        share_low=low,
        share_high=high,
        source=f"measured on {device}",
    )
