"""What every section of a config shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from analysis.schedulers.step_time import StepTime
from loadgen.mendable import Mendable

Positive = Annotated[int, Field(ge=1)]


class ConfigError(Mendable):
    """The config cannot be used; the message names the key and the mend."""


def _beside(file: Path, info: ValidationInfo) -> Path:
    """An existing file; a relative path starts at the folder of the config."""
    folder = (info.context or {}).get("folder", Path())
    path: Path = (folder / file).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


File = Annotated[Path, AfterValidator(_beside)]


class Section(BaseModel):
    """Frozen; unknown keys and numbers that are none are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StepTimeConfig(Section):
    """b = b0 + b1*tokens + b2*KV + b3*running."""

    b0_ms: Annotated[float, Field(gt=0)]
    b1_us_per_token: Annotated[float, Field(ge=0)] = 0.0
    b2_ns_per_kv_token: Annotated[float, Field(ge=0)] = 0.0
    b3_us_per_request: Annotated[float, Field(ge=0)] = 0.0

    def law(self) -> StepTime:
        return StepTime(
            b0_s=self.b0_ms * 1e-3,
            b1_s_per_token=self.b1_us_per_token * 1e-6,
            b2_s_per_kv_token=self.b2_ns_per_kv_token * 1e-9,
            b3_s_per_request=self.b3_us_per_request * 1e-6,
        )
