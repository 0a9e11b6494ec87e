"""Several servers behind one list of URLs: calibrated together, and predicted as one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from analysis.numbers.estimate import Estimate, combined
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTimeFit, fit_step_time
from analysis.theory.prediction import Prediction
from analysis.verdicts.replicas import of_one, slowest, sum_of
from harness.configs.config import ExperimentConfig
from harness.experiments.predict import predictions
from harness.live.calibrate import Calibration
from harness.live.prober import CalibrationFailed
from loadgen.workload import Workload

CLAIMS = ("claim", "paper", "engine")
CEILINGS = ("max_num_seqs", "max_num_batched_tokens")


async def at_once(
    calibrations: Sequence[Coroutine[Any, Any, Calibration]],
) -> list[Calibration]:
    """Each server's own calibration, all at the same time: what they share, such as cores, they share
    under the load as well. Raises what one of them raises, CalibrationFailed where they met other
    ceilings."""
    tasks = [asyncio.ensure_future(one) for one in calibrations]
    try:
        found = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    require_same_ceilings(found)
    return found


def require_same_ceilings(calibrations: Sequence[Calibration]) -> None:
    """Raise CalibrationFailed where the probes of two servers met another ceiling."""
    first, *others = calibrations
    for index, other in enumerate(others, 1):
        for name in CEILINGS:
            met, theirs = getattr(first, name), getattr(other, name)
            if met != theirs:
                raise CalibrationFailed(
                    f"the probes met {name} {met} on replica 0 and {theirs} on replica {index}: servers "
                    f"behind one list must be alike; where they are, state it: limits.{name}"
                )


def pooled(calibrations: Sequence[Calibration]) -> Calibration:
    """One calibration of servers that are taken to be alike: all their probes, fitted together."""
    first = calibrations[0]
    observations = tuple(seen for one in calibrations for seen in one.observations)
    implied = [one.pool_implied for one in calibrations if one.pool_implied is not None]
    return replace(
        first,
        fit=fit_step_time(observations),
        observations=observations,
        probes=tuple(probe for one in calibrations for probe in one.probes),
        pool_implied=combined(implied),
        checks=tuple(
            replace(check, source=f"replica {index}: {check.source}")
            for index, one in enumerate(calibrations)
            for check in one.checks
        ),
        duration_s=max(one.duration_s for one in calibrations),
        notes=tuple(dict.fromkeys(note for one in calibrations for note in one.notes)),
    )


def bounding(
    config: ExperimentConfig,
    workload: Workload,
    limits: EngineLimits,
    fits: Sequence[StepTimeFit],
) -> tuple[int, ...]:
    """Which servers bound the whole by their own calibrations, see
    `analysis.verdicts.replicas.slowest`."""
    rates = [_rate(_plain(config, workload, limits, fit)) for fit in fits]
    return slowest(rates, config.theta)


def predictions_of_all(
    config: ExperimentConfig,
    workload: Workload,
    limits: EngineLimits,
    fits: Sequence[StepTimeFit],
    together: StepTimeFit,
    bound_by: Sequence[int],
    second_opinion: bool = True,
) -> dict[str, Any]:
    """As `harness.experiments.predict.predictions`, of all servers under stateless round-robin: N
    times the slowest.

    ``fits`` are the servers' own, ``together`` is that of those in ``bound_by``. Under ``replicas``
    stand who bounds the whole, the claims for each, and the rate behind a balancer that looks at the
    queues.
    """
    count = len(fits)
    shared = config.model_copy(update={"replicas": count})
    found = predictions(shared, workload, limits, together, "P1", second_opinion)
    alike = {name: of_one(Prediction.from_dict(found[name])).to_dict() for name in CLAIMS}
    each = [
        alike if index in bound_by else _plain(config, workload, limits, fit)
        for index, fit in enumerate(fits)
    ]
    rates = [_rate(one) for one in each]
    # Alike, they have one fit and one error.
    balanced = (
        _rate(found)
        if len(bound_by) == count
        else sum_of(rates, "each server's own rate, errors in quadrature")
    )
    found["replicas"] = {
        "bounding": list(bound_by),
        "balanced": balanced.to_dict(),
        "each": each,
    }
    return found


def _plain(
    config: ExperimentConfig, workload: Workload, limits: EngineLimits, fit: StepTimeFit
) -> dict[str, Any]:
    found = predictions(config, workload, limits, fit, "P1", second_opinion=False)
    return {name: found[name] for name in CLAIMS}


def _rate(found: dict[str, Any]) -> Estimate:
    return Prediction.from_dict(found["claim"]).critical_rate
