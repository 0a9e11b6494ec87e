"""How far a serving engine is from its critical rate, from a window of its metrics alone.

In a window of T seconds S steps ran and something ran for B seconds. Each ceiling C (KV tokens,
sequences, tokens per step) had the area A taken out of it: so many steps, full, would have done the same
work, A/C of them. A step that is not needed saves its fixed part b0, and nothing else, as tokens, KV and
requests take their time whenever they come. At the critical rate no step is spare, so that

    rho = (B - b0 (S - A/C)) / T = busy share x (1 - phi (1 - fill)),   phi = b0 S / B, fill = A / (C S),

which is Little's law: lambda times the seconds per request of theory.md 2.5. For a flat step time it is
the mean occupancy; without any step-time line it still lies between that and the busy share. The largest
fill is the ceiling that binds. What saturation adds to it is in `analysis.operation.window_demand`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import normal_quantile
from analysis.operation.serving_window import ServingWindow, passive_fit, scheduled_kv
from analysis.operation.what_to_change import Change, what_to_change
from analysis.operation.window_demand import Asked, ceilings_of, demand_of, fullest, per_second
from analysis.schedulers.step_time import StepTimeFit
from analysis.theory.critical_rate import ONSET_QUANTILE
from analysis.theory.prediction import CeilingName

Floats = NDArray[np.float64]

QUEUE_SHARE = 0.95
"""With somebody waiting for more of the window than this it is at its critical rate or above."""
MOST_HALF_WIDTH = 0.15
"""A wider interval is no answer."""
HITS = 0.02
SPEED_OFF = 0.10
"""A calibration this far from the window's own step time is said to be of another server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CeilingUse:
    """How much of one ceiling was in use."""

    name: CeilingName
    limit: int | None
    """Its size: KV tokens, sequences or tokens per step. None: not known."""
    fill: float | None
    """Mean share of it that a step takes."""
    load: Estimate | None
    """Offered rate over the rate at which it alone would bind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """The answer. ``load`` is the offered over the critical rate, None where that cannot be said."""

    load: Estimate | None
    at_least: Estimate
    """Lower bound of ``load`` that needs no step-time line: the fullest ceiling's share."""
    binding: CeilingName | None
    """The ceiling that binds first; None where two are too close to tell."""
    rivals: tuple[CeilingName, ...]
    """Those that cannot be told from it."""
    ceilings: tuple[CeilingUse, ...]
    rate: float
    """Requests per second in the window."""
    fits: Estimate | None
    """So many times today's demand is the critical rate."""
    queueing_from: float | None
    """Share of the critical rate from which the binding ceiling is full 5 % of the time."""
    fixed_s: Estimate
    """b0: the part of a step's time that does not depend on what is in it."""
    fixed_share: Estimate
    """phi: the fixed part of a step over its mean time."""
    line: str
    """Where the step-time line comes from."""
    change: Change
    """What to raise, and what that gives."""
    seconds: float
    law: str
    notes: tuple[str, ...]
    reason: str = ""
    """Why ``load`` is None."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"schema": 1, **asdict(self), "change": self.change.to_dict()}


@dataclass(frozen=True, slots=True)
class _Line:
    """The step-time line at the window's own speed."""

    fixed_s: float
    error_s: float
    token_s: float


def headroom(
    window: ServingWindow, calibration: StepTimeFit | None = None, max_tokens: int | None = None
) -> Headroom:
    """The share of the critical rate at which the window's server worked.

    ``calibration`` is a step-time line measured before; None fits one to the window's own variation.
    ``max_tokens`` is what every request declares (SGLang sets room aside for it); its output length if
    None. Raises CannotSay where not even a lower bound can be given.
    """
    notes, reason = _notes(window), ""
    fit = passive_fit(window) if calibration is None else calibration
    line, speed = _line(window, fit)
    if abs(speed - 1) > SPEED_OFF:
        notes += (
            f"steps took {speed:.2f} of what the calibration says: it may be of another server, model "
            "or clock; its line was scaled to the window",
        )
    asked = demand_of(window, max_tokens)
    first, rivals = fullest(window, asked)
    load = _load(window, asked, line, first)
    at_least = _occupancy(window, asked, first)
    if window.queued > QUEUE_SHARE:
        reason = (
            f"somebody waited in {100 * window.queued:.0f} % of the samples: the server is at its "
            "critical rate or above, and a queue does not say how far"
        )
    elif load.half_width > MOST_HALF_WIDTH:
        reason = (
            f"the load lies in [{load.low:.2f}, {load.high:.2f}] of critical: the window does not vary "
            "enough to tell what of a step is fixed; watch longer, or give a calibration (--calibration)"
        )
    busy_s = float(window.busy @ window.duration_s)
    share = line.fixed_s * float(window.steps.sum()) / busy_s
    return Headroom(
        load=None if reason else load,
        at_least=at_least,
        binding=None if rivals else first,
        rivals=(first, *rivals) if rivals else (),
        ceilings=tuple(_use(window, asked, line, name, first) for name in ceilings_of(window)),
        rate=window.rate,
        fits=None if reason else _inverse(load),
        queueing_from=_queueing_from(window, asked, fit, first),
        fixed_s=Estimate.normal(line.fixed_s, line.error_s, "s", fit.method),
        fixed_share=Estimate.normal(
            share, share * line.error_s / max(line.fixed_s, 1e-12), "", fit.method
        ),
        line="calibrated" if calibration is not None else "fitted to the window's own variation",
        change=what_to_change(asked.law, window.limits, fit),
        seconds=window.seconds,
        law=asked.law.name,
        notes=notes,
        reason=reason,
    )


# -- the step-time line ------------------------------------------------------------------------------


def _line(window: ServingWindow, fit: StepTimeFit) -> tuple[_Line, float]:
    """The line scaled to the window's time, and by what: 1 where it was fitted to it."""
    requests = window.generation_tokens.sum()
    tokens = window.tokens.sum()
    steps = window.steps.sum()
    weights = np.array([steps, tokens, scheduled_kv(window).sum(), requests])
    took_s = float(window.busy @ window.duration_s)
    one = np.array([1.0, 0.0, 0.0, 0.0])
    expected_s = float(weights @ fit.law.coefficients())
    speed = took_s / expected_s
    fixed_s = fit.law.b0_s
    # Of the ratio of the fixed part to the whole: what both have in common cancels.
    error = fit.errors(one) - fixed_s / expected_s * fit.errors(weights)
    return (
        _Line(
            fixed_s=speed * fixed_s,
            error_s=speed * float(np.linalg.norm(error)),
            token_s=speed * fit.law.b1_s_per_token,
        ),
        speed,
    )


# -- loads -------------------------------------------------------------------------------------------


def _load(
    window: ServingWindow, asked: Asked, line: _Line, name: CeilingName, binds: bool = True
) -> Estimate:
    """rho of one ceiling; ``binds``: with what an engine leaves free or computes again there."""
    full = asked.full_steps[name]
    busy_s = window.busy * window.duration_s
    requests = window.generation_tokens / window.mean_output
    needed = full * (asked.stretched[name] if binds else 1.0) + asked.more_steps * requests
    again_s = line.token_s * asked.again * requests if binds else 0.0
    spare = window.steps - needed
    series = busy_s - line.fixed_s * spare + again_s
    found = per_second(window, series).estimate
    by_line = line.error_s * float(spare.sum()) / window.seconds
    by_model = asked.point.model_error * found.value if binds else 0.0
    half = math.hypot(found.half_width, normal_quantile(0.975) * math.hypot(by_line, by_model))
    low, high = found.value - half, found.value + half
    return Estimate(found.value, max(low, 0.0), high, 0.95, "", "steps that could be spared")


def _occupancy(window: ServingWindow, asked: Asked, name: CeilingName) -> Estimate:
    """Mean share of a ceiling over time: rho for a flat step time, less than rho for any other."""
    full = asked.full_steps[name]
    fill = np.divide(full, window.steps, out=np.zeros_like(full), where=window.steps > 0)
    found = per_second(window, window.busy * window.duration_s * fill).estimate
    return replace(found, low=max(found.low, 0.0), method="mean occupancy over time")


def _use(
    window: ServingWindow, asked: Asked, line: _Line, name: CeilingName, first: CeilingName
) -> CeilingUse:
    limits = window.limits
    sizes: dict[CeilingName, int | None] = {
        "kv_cache": limits.pool_tokens,
        "output_reservation": limits.pool_tokens,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
    }
    if name not in asked.full_steps:
        return CeilingUse(name=name, limit=sizes[name], fill=None, load=None)
    fill = float(asked.full_steps[name].sum()) / float(window.steps.sum())
    load = _load(window, asked, line, name, binds=name == first)
    return CeilingUse(name=name, limit=sizes[name], fill=fill, load=load)


def _inverse(load: Estimate) -> Estimate:
    low = 1 / load.high
    high = 1 / load.low if load.low > 0 else math.inf
    return Estimate(1 / load.value, low, high, 0.95, "times", "1 / load")


def _queueing_from(
    window: ServingWindow, asked: Asked, fit: StepTimeFit, name: CeilingName
) -> float | None:
    """Share of the critical rate at which an unbounded server would exceed the ceiling 5 % of the time.

    The normal law of theory.md 2.7, in tokens or sequences; None for the token budget, which delays
    prompts at any load.
    """
    law, demand = asked.law, asked.point.demand
    if name == "max_num_batched_tokens":
        return None
    size, mean, square = float(window.limits.pool_tokens), demand.crowded, demand.square
    if name == "max_num_seqs":
        assert window.limits.max_num_seqs is not None
        size, mean, square = float(window.limits.max_num_seqs), demand.slots, demand.slots
    m, spread = law.mean(mean), ONSET_QUANTILE * math.sqrt(law.mean(square))
    x = ((math.sqrt(spread**2 + 4 * m * size) - spread) / (2 * m)) ** 2
    saturated = asked.point.operation
    held = [law.mean(d) for d in (demand.tokens, demand.resident, demand.steps)]
    seconds = fit.combination([1 / x, *held])[0]
    again_s = fit.law.b1_s_per_token * saturated.recomputed_tokens
    at_once = fit.combination([1 / saturated.requests_per_step, *held])[0] + again_s
    return min(at_once / seconds, 1.0)


def _notes(window: ServingWindow) -> tuple[str, ...]:
    notes = []
    limits = window.limits
    if limits.max_num_seqs is None:
        notes.append("max_num_seqs is not known: it may bind earlier (--max-num-seqs)")
    if limits.max_num_batched_tokens is None and limits.sglang is None:
        notes.append(
            "max_num_batched_tokens is not known: it may bind earlier (--max-num-batched-tokens)"
        )
    if window.hit_share > HITS:
        notes.append(
            f"{100 * window.hit_share:.0f} % of the prompt tokens were prefix hits: the answer holds "
            "while they stay as frequent, and a fuller pool keeps fewer"
        )
    return tuple(notes)
