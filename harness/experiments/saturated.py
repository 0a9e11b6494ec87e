"""The step at saturation that a calibration is extrapolated to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.prediction import Prediction
from harness.configs.config import ExperimentConfig
from harness.experiments.predict import claimed
from harness.live.calibrate import Calibration
from harness.records.streams import as_json, finite
from loadgen.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturatedStep:
    """Means over steps at saturation, of one engine, in the convention of the claim."""

    claim: str
    step_time_s: Estimate
    tokens: float
    kv_tokens: float
    running: float
    """Requests scheduled in a step."""


def saturated_step(
    config: ExperimentConfig, workload: Workload, limits: EngineLimits, prediction: Prediction
) -> SaturatedStep:
    """Where ``prediction`` takes the step-time law to.

    The mean step time is linear in the law, so a law that counts one second per token gives the
    tokens per step, and so on.
    """

    def per_step(law: StepTime) -> float:
        counted = claimed(config, workload, limits, exact_step_time(law), prediction.grade)
        return counted.step_time_s.value

    return SaturatedStep(
        claim=prediction.claim,
        step_time_s=prediction.step_time_s,
        tokens=per_step(StepTime(b0_s=0.0, b1_s_per_token=1.0)),
        kv_tokens=per_step(StepTime(b0_s=0.0, b2_s_per_kv_token=1.0)),
        running=per_step(StepTime(b0_s=0.0, b3_s_per_request=1.0)),
    )


def calibration_record(
    config: ExperimentConfig, workload: Workload, shown: EngineLimits, calibration: Calibration
) -> dict[str, Any]:
    """What goes to calibration.json, in plain types: the calibration, and the step it is made for.

    Raises ConfigError where the config's claim has no prediction.
    """
    limits = calibration.limits(shown)
    prediction = claimed(config, workload, limits, calibration.fit, "P1")
    saturated = saturated_step(config, workload, limits, prediction)
    record = calibration.to_dict() | {"saturated": asdict(saturated)}
    plain: dict[str, Any] = finite(json.loads(as_json(record)))
    return plain
