"""What binds a server, what raising it gives, and what binds next.

Every answer is the closed form of the critical rate, from a law of lengths and a step-time line, at two
sets of limits. Requests per step grow in
proportion to the ceiling that binds until the next one is met; the rate grows by less, as only the fixed
part of a step is shared by more requests.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import grouped, words
from analysis.numbers.quantiles import normal_quantile
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTimeFit
from analysis.theory.operating_point import Point, vllm_point
from analysis.theory.prediction import CeilingName
from analysis.theory.reservation import sglang_point
from loadgen.workload import Workload

MOST_FACTOR = 2.0
"""No limit is proposed beyond this multiple: halving the bytes of a value doubles the pool."""
TOGETHER = 1.15
"""Ceilings this close bind together: raising one alone gives next to nothing."""
Part = tuple[CeilingName, ...]
POOL: Part = ("kv_cache", "output_reservation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Raise:
    """One limit, as it is and as it should be."""

    name: CeilingName
    now: int
    to: int

    @property
    def factor(self) -> float:
        """New size over old."""
        return self.to / self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to raise, what that gives, and what binds then."""

    raises: tuple[Raise, ...]
    """One limit, or those that bind together; the one that binds first."""
    gain: Estimate
    """New critical rate over the old one, less 1."""
    then: CeilingName
    """What binds after that."""
    limits: EngineLimits
    """The limits with the change."""

    @property
    def text(self) -> str:
        """One line, such as "max_num_seqs 256 binds: 391 gives +47 % [44, 50], then the KV cache"."""
        now = " and ".join(f"{words(r.name)} {_size(r.name, r.now)}" for r in self.raises)
        to = " and ".join(_size(r.name, r.to) for r in self.raises)
        binds = "bind together" if len(self.raises) > 1 else "binds"
        alone = self.then in {r.name for r in self.raises}
        then = "which still binds then" if alone else f"then {words(self.then)}"
        gain, low, high = (100 * v for v in (self.gain.value, self.gain.low, self.gain.high))
        line = f"{now} {binds}: {to} gives {gain:+.0f} % [{low:.0f}, {high:.0f}], {then}"
        if self.raises[0].name in POOL and self.raises[0].factor > 1.9:
            line += "; fp8 values instead of 16 bits make the pool twice as large"
        return line

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"text": self.text, **asdict(self)}


def what_to_change(workload: Workload, limits: EngineLimits, step_time: StepTimeFit) -> Change:
    """The smallest change of limits that moves the critical rate up to the next ceiling.

    The interval (95 %) of the gain holds the errors of the step-time line and of the closed form; the
    lengths are taken as they are. Raises what `analysis.theory.critical_rate.predict` raises.
    """
    point = _point(workload, limits)
    order = sorted(_ceilings(point).items(), key=lambda item: item[1])
    first, lowest = order[0]
    raised, factor = [first], MOST_FACTOR
    for name, value in order[1:]:
        if value / lowest >= TOGETHER:
            factor = min(value / lowest, MOST_FACTOR)
            break
        raised.append(name)
    raises = tuple(
        Raise(name=name, now=_limit(limits, name), to=_raised(limits, name, factor, lowest, value))
        for name, value in order
        if name in raised
    )
    changed = limits
    for r in raises:
        changed = _with(changed, r)
    after = _point(workload, changed)
    beyond = {name: value for name, value in _ceilings(after).items() if name not in raised}
    nearest = min(beyond, key=lambda name: beyond[name], default=first)
    met = bool(beyond) and beyond[nearest] <= 1.02 * factor * lowest
    return Change(
        raises=raises,
        gain=_gain(workload, step_time, point, after),
        then=nearest if met else min(_ceilings(after).items(), key=lambda item: item[1])[0],
        limits=changed,
    )


def _point(workload: Workload, limits: EngineLimits) -> Point:
    return (sglang_point if limits.sglang is not None else vllm_point)(workload, limits, None)


def _ceilings(point: Point) -> dict[CeilingName, float]:
    """Requests per step by ceiling; what is held and what is set aside are one pool, one ceiling."""
    found = {name: estimate.value for name, estimate in point.supply.items()}
    if "output_reservation" in found:
        held = found.pop("kv_cache")
        found["output_reservation"] = min(found["output_reservation"], held)
    return found


def _limit(limits: EngineLimits, name: CeilingName) -> int:
    size = limits.pool_tokens if name in POOL else getattr(limits, name)
    assert isinstance(size, int)
    return size


def _raised(
    limits: EngineLimits, name: CeilingName, factor: float, lowest: float, value: float
) -> int:
    """The size at which this ceiling is ``factor`` times the lowest one."""
    return math.ceil(_limit(limits, name) * factor * lowest / value)


def _with(limits: EngineLimits, change: Raise) -> EngineLimits:
    if change.name in POOL:
        return replace(limits, num_blocks=math.ceil(change.to / limits.block_size))
    if change.name == "max_num_seqs":
        return replace(limits, max_num_seqs=change.to)
    return replace(limits, max_num_batched_tokens=change.to)


def _gain(workload: Workload, step_time: StepTimeFit, before: Point, after: Point) -> Estimate:
    old, new = (_weights(workload, point) for point in (before, after))
    was, becomes = step_time.combination(old)[0], step_time.combination(new)[0]
    ratio = was / becomes
    # What both have in common cancels, of the line as of the closed form where the same ceiling binds.
    by_line = float(np.linalg.norm(step_time.errors(old) / was - step_time.errors(new) / becomes))
    by_model = math.hypot(before.model_error, after.model_error)
    half = normal_quantile(0.975) * math.hypot(by_line, by_model) * ratio
    method = f"closed form at both limits; step time: {step_time.method}"
    return Estimate(ratio - 1, ratio - 1 - half, ratio - 1 + half, 0.95, "", method)


def _weights(workload: Workload, point: Point) -> NDArray[np.float64]:
    """What one request takes of a step's fixed time, and its tokens, KV and steps, at saturation."""
    demand, operation = point.demand, point.operation
    again = operation.recomputed_tokens
    return np.array(
        [
            1 / operation.requests_per_step,
            workload.mean(demand.tokens) + again,
            workload.mean(demand.resident),
            workload.mean(demand.steps),
        ]
    )


def _size(name: CeilingName, size: int) -> str:
    return f"{grouped(size)} tokens" if name in POOL else grouped(size)
