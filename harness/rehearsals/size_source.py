"""What a fleet is sized from: a config or a results folder as one replica, and that replica changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.formatting import grouped, percent
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTime, StepTimeFit
from analysis.theory.critical_rate import predict
from analysis.theory.prediction import Grade, Prediction
from harness.configs.config import ExperimentConfig, load_config
from harness.configs.hardware import HardwareConfig
from harness.configs.offline import stated
from harness.configs.sections import ConfigError
from harness.experiments.predict import stated_limits, stated_step_time
from harness.records.store import Store
from loadgen.workload import Workload, clipped

GPU_MEMORY_BYTES: Mapping[str, int] = {
    "NVIDIA A100-SXM4-40GB": 40 * 10**9,
    "NVIDIA A100-SXM4-80GB": 80 * 10**9,
    "NVIDIA A100 80GB PCIe": 80 * 10**9,
    "NVIDIA H100 80GB HBM3": 80 * 10**9,
    "NVIDIA H100 PCIe": 80 * 10**9,
    "NVIDIA H200": 141 * 10**9,
}
"""NVIDIA's data sheets of the GPUs in `analysis.theory.roofline.DATA_SHEETS`."""
UTILISATION = 0.9
"""Share of a GPU's memory that an engine takes, where another GPU is asked about (vLLM's default)."""
COEFFICIENTS = ("b0_s", "b1_s_per_token", "b2_s_per_kv_token", "b3_s_per_request")


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One server of the fleet, and where what is known of it comes from."""

    name: str
    workload: Workload
    limits: EngineLimits
    fit: StepTimeFit
    grade: Grade
    gpus: int
    """Of one replica."""
    hardware: HardwareConfig | None
    speed: Estimate | None
    """Measured critical rate over the engine's closed form; None where none was measured."""
    served: float
    """Share of the requests of the demand that it takes; the others are too long for it."""
    measured: tuple[str, ...]
    assumed: tuple[str, ...]

    def predicted(self) -> Prediction:
        """The closed form of one replica. Raises ConfigError where there is none."""
        try:
            return predict(self.workload, self.limits, self.fit, "engine", self.grade)
        except ValueError as error:
            raise ConfigError(f"no prediction: {error}") from error

    def critical_rate(self) -> Estimate:
        """req/s of one replica: as predicted, or that times the speed that was measured."""
        rate = self.predicted().critical_rate
        if self.speed is None:
            return rate
        if not self.assumed:
            return self.speed.scaled(rate.value, "req/s")
        relative = math.hypot(
            rate.standard_error / rate.value, self.speed.standard_error / self.speed.value
        )
        return Estimate.log_normal(
            rate.value * self.speed.value, relative, "req/s", "closed form, at the measured speed"
        )


def replica_of(source: Path) -> Replica:
    """The replica that a results folder or a config describes. Raises ConfigError, StoreError."""
    return _of_folder(Store.open(source)) if source.is_dir() else _of_config(load_config(source))


def _of_config(config: ExperimentConfig) -> Replica:
    config = stated(config)
    fit = stated_step_time(config)
    return Replica(
        name=config.name,
        workload=config.estimated_law(),
        limits=stated_limits(config),
        fit=fit,
        grade="P0",
        gpus=1 if config.hardware is None else config.hardware.gpus,
        hardware=config.hardware,
        speed=None,
        served=1.0,
        measured=(),
        assumed=(f"step time: {fit.method}", "limits and lengths: as the config states them"),
    )


def _of_folder(store: Store) -> Replica:
    config = load_config(store.path / "config.yaml")
    fit = StepTimeFit.from_dict(store.read_json("calibration.json")["fit"])
    found = Prediction.from_dict(store.read_json("prediction.json")["engine"])
    alone = Replica(
        name=config.name,
        workload=config.estimated_law(),
        limits=EngineLimits.from_dict(store.read_json("limits.json")["used"]),
        fit=fit,
        grade=found.grade,
        gpus=_gpus(config),
        hardware=config.hardware,
        speed=None,
        served=1.0,
        measured=(f"step time: {fit.method}", "limits: read back from the server"),
        assumed=(),
    )
    verdict = store.read_json("verdict.json") if store.has("verdict.json") else {"measured": None}
    if verdict["measured"] is None:
        return replace(alone, assumed=("critical rate: predicted, never measured",))
    measured = Estimate.from_dict(verdict["measured"])
    closed = alone.predicted().critical_rate.value * found.replicas
    speed = ratio(measured, Estimate.exact(closed, "req/s", ""), f"measured: {measured.method}")
    return replace(
        alone, speed=speed, measured=(*alone.measured, f"critical rate: {measured.method}")
    )


def _gpus(config: ExperimentConfig) -> int:
    launch = None if config.server is None else config.server.launch
    if launch is not None:
        return launch.tensor_parallel_size
    return 1 if config.hardware is None else config.hardware.gpus


# -- what if -------------------------------------------------------------------------------------


def changed(replica: Replica, wishes: str) -> Replica:
    """The replica with changes such as "tp=2,kv=fp8" in their order. Raises ConfigError."""
    for wish in wishes.split(","):
        name, _, value = wish.strip().partition("=")
        if name not in CHANGES or not value:
            raise ConfigError(
                f"--what-if {wish.strip()!r}: write NAME=VALUE, with a name of {', '.join(CHANGES)}"
            )
        replica = CHANGES[name](replica, value)
    return replace(replica, name=wishes)


def _count(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--what-if {name}={value}: it takes a whole number from 1 on")
    return int(value)


def _pool(replica: Replica, value: str) -> Replica:
    tokens, block = _count("pool", value), replica.limits.block_size
    if tokens < block:
        raise ConfigError(f"--what-if pool={value}: a block alone has {block} tokens")
    limits = replace(replica.limits, num_blocks=tokens // block)
    return _assuming(replace(replica, limits=limits), "the larger or smaller pool is to be had")


def _sequences(replica: Replica, value: str) -> Replica:
    limits = replace(replica.limits, max_num_seqs=_count("seqs", value))
    return _assuming(
        replace(replica, limits=limits), "the step-time line holds at that many requests"
    )


def _chunk(replica: Replica, value: str) -> Replica:
    limits = replace(replica.limits, max_num_batched_tokens=_count("chunk", value))
    return _assuming(
        replace(replica, limits=limits), "the step-time line holds at that many tokens"
    )


def _context(replica: Replica, value: str) -> Replica:
    longest, law = _count("context", value), replica.workload
    try:
        shorter, cut = clipped(law, longest)
    except ValueError as error:
        raise ConfigError(f"--what-if context={value}: {error}") from error
    limits = replace(replica.limits, max_model_len=longest)
    changed = replace(replica, workload=shorter, limits=limits, served=replica.served * (1 - cut))
    return _assuming(changed, f"{percent(cut)} of the requests are too long and go elsewhere")


def _kv(replica: Replica, value: str) -> Replica:
    if value != "fp8":
        raise ConfigError(f"--what-if kv={value}: known is fp8, in place of 16 bits")
    hardware = replica.hardware
    if hardware is not None:
        halved = {"kv_bytes_per_token": max(hardware.kv_bytes_per_token // 2, 1)}
        hardware = hardware.model_copy(update=halved)
    limits = replace(replica.limits, num_blocks=2 * replica.limits.num_blocks)
    fit = scaled_fit(replica.fit, (1.0, 1.0, 0.5, 1.0))
    return _assuming(
        replace(replica, limits=limits, fit=fit, hardware=hardware),
        "KV of 16 bits until now: fp8 holds twice the tokens, each read in half the time",
    )


def _ranks(replica: Replica, value: str) -> Replica:
    return _other_hardware(replica, {"gpus": _count("tp", value)})


def _gpu(replica: Replica, value: str) -> Replica:
    if value not in GPU_MEMORY_BYTES:
        raise ConfigError(
            f"--what-if gpu={value}: no data sheet of it is known here, only of "
            f"{', '.join(GPU_MEMORY_BYTES)}"
        )
    return _other_hardware(replica, {"gpu": value})


def _other_hardware(replica: Replica, update: dict[str, object]) -> Replica:
    """The step time by the ratio of the rooflines, the pool by what the GPUs' memory has left."""
    before = replica.hardware
    if before is None:
        raise ConfigError(
            "--what-if tp, gpu: the config has no section hardware, which says on what GPU the model "
            "runs and how large it is: add it"
        )
    after = before.model_copy(update=update)
    old, new = before.step_time().law, after.step_time().law
    factors = [
        1.0 if getattr(old, name) == 0 else getattr(new, name) / getattr(old, name)
        for name in COEFFICIENTS
    ]
    kv, weights = before.kv_bytes_per_token, before.weight_bytes
    more = UTILISATION * (GPU_MEMORY_BYTES[after.gpu] - GPU_MEMORY_BYTES[before.gpu])
    each = (replica.limits.pool_tokens * kv + weights) / before.gpus + more
    pool = int((after.gpus * each - weights) / kv)
    if pool < replica.limits.block_size:
        raise ConfigError(f"{after.gpus} x {after.gpu} leave no room for KV beside the weights")
    limits = replace(replica.limits, num_blocks=pool // replica.limits.block_size)
    fit = scaled_fit(replica.fit, factors)
    return _assuming(
        replace(replica, limits=limits, fit=fit, hardware=after, gpus=after.gpus),
        f"step time by the ratio of data sheets; {grouped(pool)} tokens of pool: memory beside the "
        "weights as now",
    )


def scaled_fit(fit: StepTimeFit, factors: tuple[float, ...] | list[float]) -> StepTimeFit:
    """The fit with each coefficient (b0, b1, b2, b3) times its factor, errors along with them."""
    values = (float(b * f) for b, f in zip(fit.law.coefficients(), factors, strict=True))
    law = StepTime(**dict(zip(COEFFICIENTS, values, strict=True)))
    return replace(fit, law=law, covariance=fit.covariance * np.outer(factors, factors))


def _assuming(replica: Replica, what: str) -> Replica:
    return replace(replica, assumed=(*replica.assumed, what))


CHANGES: Mapping[str, Callable[[Replica, str], Replica]] = {
    "pool": _pool,
    "seqs": _sequences,
    "chunk": _chunk,
    "context": _context,
    "kv": _kv,
    "tp": _ranks,
    "gpu": _gpu,
}
"""What may stand in --what-if."""
