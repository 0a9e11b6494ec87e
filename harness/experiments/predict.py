"""Predictions from what a config states, without a server: grade P0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTimeFit, exact_step_time
from analysis.theory.critical_rate import mixture_rate, predict
from analysis.theory.prediction import Grade, Prediction
from analysis.theory.roofline import Rates
from analysis.theory.waterfall import waterfall
from analysis.verdicts.second_opinion import simulated_rate
from harness.configs.config import ConfigError, ExperimentConfig
from harness.live.target import require_fitting
from loadgen.workload import Workload

SECOND_OPINION_REQUESTS = 3000
NARROW = 0.4
"""A right prediction with such an interval, of 90 %, is confirmed in 98 % of experiments: its error must
stay below 0.6 theta, 2.5 standard errors."""
HARDLY_WIDER = 1.1
"""Than with an exact step time: what else is unknown of the rate, no probe tells."""


def predictions(
    config: ExperimentConfig,
    workload: Workload,
    limits: EngineLimits,
    fit: StepTimeFit,
    grade: Grade,
    second_opinion: bool = True,
) -> dict[str, Any]:
    """The claim, and every other predictor beside it, as they go to prediction.json.

    ``mechanisms`` are the factors that lead from the paper's rate to the engine's. Raises ConfigError
    where there is no closed form.
    """
    both = {
        claim: claimed(
            config.model_copy(update={"claim": claim}), workload, limits, fit, grade
        ).to_dict()
        for claim in ("paper", "engine")
    }
    found: dict[str, Any] = {
        "claim": both[config.claim],
        **both,
        "mechanisms": [
            asdict(m)
            for m in waterfall(workload, limits, fit.law, prefill_chunk(config, workload, limits))[
                1
            ]
        ],
        "simulated": None,
    }
    if second_opinion:
        try:
            simulated = simulated_rate(
                workload, limits, fit.law, requests=SECOND_OPINION_REQUESTS, seed=config.load.seed
            )
        except ValueError as error:
            found["simulated_note"] = f"no second opinion: {error}"
        else:
            found["simulated"] = simulated.scaled(config.replicas).to_dict()
    return found


def claimed(
    config: ExperimentConfig,
    workload: Workload,
    limits: EngineLimits,
    fit: StepTimeFit,
    grade: Grade,
) -> Prediction:
    """The prediction that the config's claim is about. Raises ConfigError where there is none."""
    if config.claim == "paper":
        # The paper counts tokens; a stated pool that is no whole number of blocks is kept to the token.
        stated = config.limits.pool_tokens if config.server is None else None
        pool = stated or limits.pool_tokens
        limits = replace(limits, num_blocks=pool, block_size=1)
    try:
        return predict(
            workload,
            limits,
            fit,
            config.claim,
            grade,
            chunk=prefill_chunk(config, workload, limits),
            replicas=config.replicas,
        )
    except ValueError as error:
        raise ConfigError(f"no prediction of claim {config.claim}: {error}") from error


def prefill_chunk(config: ExperimentConfig, workload: Workload, limits: EngineLimits) -> int:
    """Prompt tokens of one step, for the paper's form."""
    longest_prompt = int(workload.prompt_tokens.max())
    return config.prefill_chunk_tokens or limits.max_num_batched_tokens or longest_prompt


def narrow_enough(
    config: ExperimentConfig, workload: Workload, limits: EngineLimits
) -> Callable[[StepTimeFit], bool]:
    """Is the 90 % interval of what a fit predicts narrower than `NARROW` of the band of agreement, or
    hardly wider than that of the same law if it were exact?"""

    def half_width(fit: StepTimeFit) -> tuple[float, float]:
        rate = claimed(config, workload, limits, fit, "P1").critical_rate.at_level(0.90)
        return rate.half_width, rate.value

    def enough(fit: StepTimeFit) -> bool:
        width, rate = half_width(fit)
        if width < NARROW * config.theta * rate:
            return True
        return width < HARDLY_WIDER * half_width(exact_step_time(fit.law))[0]

    return enough


def stated_limits(config: ExperimentConfig) -> EngineLimits:
    """Limits that the config states. Raises ConfigError when the pool is not among them."""
    given = config.limits
    if given.pool_tokens is None:
        raise ConfigError("limits.pool_tokens: a prediction without a server needs the KV pool")
    block_size = given.block_size or (16 if given.sglang is None else 1)
    if given.pool_tokens < block_size:
        raise ConfigError(
            f"limits.pool_tokens: {given.pool_tokens} do not fill a block of {block_size}"
        )
    return EngineLimits(
        num_blocks=given.pool_tokens // block_size,
        block_size=block_size,
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=given.max_num_batched_tokens,
        watermark=given.watermark or 0.0,
        async_scheduling=bool(given.async_scheduling),
        sglang=None if given.sglang is None else given.sglang.rules(),
    )


def stated_step_time(config: ExperimentConfig, measured: Rates | None = None) -> StepTimeFit:
    """The step time that the config states, or that of its hardware: of the data sheet, or as measured.

    Raises ConfigError when the config states neither, or when ``measured`` would not be used.
    """
    if config.step_time is None and config.hardware is None:
        raise ConfigError("step_time: a prediction without a server needs it stated, or hardware")
    if config.step_time is None:
        assert config.hardware is not None
        return config.hardware.step_time(measured)
    if config.hardware is not None or measured is not None:
        raise ConfigError("step_time: it is stated: leave hardware and a probe out, or it")
    return exact_step_time(config.step_time.law())


def offline_predictions(config: ExperimentConfig, measured: Rates | None = None) -> dict[str, Any]:
    """Every predictor of a config that needs no server, ready for JSON.

    ``measured`` takes the place of the data sheet of the config's hardware.
    """
    limits = stated_limits(config)
    if config.regimes:
        return _mixed(config, limits)
    fit = stated_step_time(config, measured)
    workload = config.estimated_law()
    require_fitting(workload, limits)
    found = predictions(config, workload, limits, fit, "P0")
    summary = _summary(found, fit.method) | _published(
        config, found["paper"]["critical_rate"]["value"]
    )
    return {"name": config.name, **found, "summary": summary | _notes([workload])}


def _notes(workloads: Sequence[Workload]) -> dict[str, str]:
    """What was done to the laws of lengths, as a row of the summary if there is anything."""
    notes = "; ".join(dict.fromkeys(note for law in workloads for note in law.notes))
    return {"note": notes} if notes else {}


def _summary(found: Mapping[str, Any], method: str) -> dict[str, str]:
    rows: dict[str, str] = {}
    for claim in ("paper", "engine"):
        prediction = Prediction.from_dict(found[claim])
        rows[claim] = (
            f"{estimate_text(prediction.critical_rate)}   E[g] "
            f"{prediction.kv_demand.value:.0f} token-steps, bound by {prediction.binding}"
        )
    simulated = found["simulated"]
    step_time = Prediction.from_dict(found["engine"]).step_time_s
    if step_time.level < 1.0:
        rows["step time"] = f"{estimate_text(step_time)} at saturation: {method}"
    rows["simulated"] = (
        found["simulated_note"]
        if simulated is None
        else estimate_text(Estimate.from_dict(simulated))
    )
    return rows


def _published(config: ExperimentConfig, found: float) -> dict[str, str]:
    """The published number beside ours: reproduced when its printed digits are the same."""
    if config.published is None:
        return {}
    value = config.published.critical_rate
    decimals = len(f"{value:.10f}".rstrip("0").split(".")[1])
    same = f"{found:.{decimals}f}" == f"{value:.{decimals}f}"
    said = "reproduced" if same else "not reproduced, unexplained"
    return {"published": f"{value} req/s ({config.published.source}): {said}"}


def _mixed(config: ExperimentConfig, limits: EngineLimits) -> dict[str, Any]:
    """Piecewise-stationary traffic: the harmonic mean of the regimes (theory.md 2.2)."""
    parts = []
    workloads = [regime.workload.build() for regime in config.regimes]
    for regime, workload in zip(config.regimes, workloads, strict=True):
        require_fitting(workload, limits)
        fit = exact_step_time(regime.step_time.law())
        parts.append(predictions(config, workload, limits, fit, "P0"))
    shares = [regime.share for regime in config.regimes]
    rates = {
        name: _harmonic(shares, [p[name]["critical_rate"] for p in parts])
        for name in ("paper", "engine")
    }
    mixture = {name: rate.to_dict() for name, rate in rates.items()}
    summary = {name: estimate_text(rate) for name, rate in rates.items()}
    missing = [
        f"regime {number} has {part['simulated_note']}"
        for number, part in enumerate(parts, 1)
        if part["simulated"] is None
    ]
    if missing:
        summary["simulated"] = f"no rate of the mixture: {'; '.join(missing)}"
    else:
        simulated = _harmonic(shares, [p["simulated"] for p in parts])
        mixture["simulated"] = simulated.to_dict()
        summary["simulated"] = estimate_text(simulated)
    return {
        "name": config.name,
        "regimes": parts,
        "mixture": {"simulated": None, **mixture},
        "summary": summary | _published(config, rates["paper"].value) | _notes(workloads),
    }


def _harmonic(shares: Sequence[float], rates: Sequence[dict[str, Any]]) -> Estimate:
    estimates = [Estimate.from_dict(rate) for rate in rates]
    low, value, high = (
        mixture_rate(list(zip(shares, values, strict=True)))
        for values in zip(*((e.low, e.value, e.high) for e in estimates), strict=True)
    )
    level = min(e.level for e in estimates)
    return Estimate(value, low, high, level, "req/s", "harmonic mean of the regimes")
