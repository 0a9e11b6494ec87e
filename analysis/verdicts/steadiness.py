"""Did the engine keep its speed while its queue was never empty? Trends of its mean step, GPU clocks.

Under backlog the batch is always as full, so that the mean step of a steady engine has no trend,
whatever its noise. Noise is what is shorter than a batch, a tenth of the backlogged stretch: there
batches are independent. What is longer is a change of speed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.inference.capacity import Backlog
from analysis.inference.gpu_health import whole_gpus
from analysis.inference.growth import batch_edges
from analysis.numbers.estimate import Estimate
from analysis.numbers.quantiles import student_quantile
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.audit import Saturation
from analysis.verdicts.verdict import Check

LARGEST_CHANGE = 0.25
"""Share of theta by which the mean step may change. A server that drifts by theta over an experiment of
three runs shows 0.6 theta in the two that are overloaded."""
LEVEL = 0.99
THROTTLE_REASONS = {
    0x01: "idle",
    0x02: "application clocks",
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bits of a GPU sample's ``throttle_reasons`` (nvml.h, nvmlClocksEventReasons)."""
HELD_BACK = 0x04 | 0x08 | 0x20 | 0x40 | 0x80
"""Those by which a GPU that works runs slower than it was set to."""
CLOCKS = {"sm_clock_mhz": "SM clock", "memory_clock_mhz": "memory clock"}
SELDOM = 0.01
CLOCK_PARTS = 5


@dataclass(frozen=True, slots=True)
class Change:
    """By how much the mean step grew from one end of a stretch to the other, as a fraction.

    The estimate is that of a straight line: of a sudden change it makes up to half too much.
    """

    where: str
    estimate: Estimate
    first_s: float
    last_s: float
    """Mean step of the first and of the last batch."""

    @property
    def size(self) -> float:
        return abs(self.estimate.value)

    @property
    def certain_size(self) -> float:
        """What it is at least, whatever its sign; 0 where its interval holds 0."""
        return max(self.estimate.low, -self.estimate.high, 0.0)

    def text(self) -> str:
        value, *ends = (
            100 * x for x in (self.estimate.value, self.estimate.low, self.estimate.high)
        )
        low, high = ends
        seen = f"no certain trend, {value:+.1f} % [{low:+.1f}, {high:+.1f}]"
        if self.certain_size:
            low, high = sorted(abs(x) for x in ends)
            word = "slower" if value > 0 else "faster"
            seen = f"the engine became {abs(value):.1f} % {word} [{low:.1f}, {high:.1f}]"
        steps = f"{1e3 * self.first_s:.2f} ms at first, {1e3 * self.last_s:.2f} ms at last"
        return f"{self.where} {seen} (mean step {steps})"


def changes(saturated: Mapping[str, Saturation]) -> tuple[Change, ...]:
    """Trends of the mean step within each backlogged run, by its id, and from the first to the last.

    The logarithm of each batch's mean step over the time measured, least squares, each batch weighing as
    many steps as it had. The intervals hold together, at 99 %: Bonferroni over the trends, Student's t
    with two degrees of freedom fewer than batches.
    """
    runs = list(saturated.items())
    stretches = [(f"within run {name},", [s]) for name, s in runs]
    if len(runs) > 1:
        stretches.append((f"from run {runs[0][0]} to {runs[-1][0]},", [s for _, s in runs]))
    level = 1 - (1 - LEVEL) / len(stretches)
    return tuple(_trend(where, parts, level) for where, parts in stretches)


def _trend(where: str, parts: Sequence[Saturation], level: float) -> Change:
    steps = np.concatenate([s.batch_steps for s in parts])
    batch_s = np.concatenate(
        [np.full(len(s.batch_steps), s.window.duration_s / len(s.batch_steps)) for s in parts]
    )
    at_s = np.cumsum(batch_s) - batch_s / 2
    step_s = batch_s / steps
    slope, error = _slope(at_s, np.log(step_s), steps)
    whole_s = float(batch_s.sum())
    half = student_quantile(0.5 + level / 2, len(steps) - 2) * error
    value, low, high = (math.expm1(whole_s * x) for x in (slope, slope - half, slope + half))
    method = f"trend of {len(steps)} batches' mean steps, simultaneous intervals"
    estimate = Estimate(value, low, high, LEVEL, "", method)
    return Change(where, estimate, float(step_s[0]), float(step_s[-1]))


def _slope(
    x: NDArray[np.float64], y: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[float, float]:
    """Weighted least-squares slope and its standard error."""
    x = x - np.average(x, weights=weight)
    y = y - np.average(y, weights=weight)
    spread = float(np.sum(weight * x**2))
    slope = float(np.sum(weight * x * y)) / spread
    scatter = float(np.sum(weight * (y - slope * x) ** 2)) / (len(x) - 2)
    return slope, math.sqrt(scatter / spread)


def steady(
    saturated: Mapping[str, Saturation], frames: Mapping[str, RunFrames], theta: float
) -> Check:
    """The premise that the engine keeps its speed, for backlogged runs by their ids.

    It fails where a change is certain and larger than theta/4; where none is certain that large, but
    one may be by its estimate, the data cannot say. What the GPUs told of their clocks is added to
    the sentence and decides nothing: a clock held back all the time is a steady one.
    """
    allowed = LARGEST_CHANGE * theta
    found = changes(saturated)
    certain = [c for c in found if c.certain_size and c.size > allowed]
    worst = max(certain or found, key=lambda c: c.certain_size if certain else c.size)
    text = worst.text()
    if certain:
        text += ": a GPU that throttles, or other work on the machine"
    text += (
        f"; allowed {100 * allowed:.3g} %, {len(found)} trends under backlog were looked at, their "
        f"intervals hold together at {100 * LEVEL:.0f} %"
    )
    seen = [clock for name, s in saturated.items() for clock in clocks(frames[name], s.window)]
    return Check(
        name="steady step time",
        holds=False if certain else True if worst.size <= allowed else None,
        observed=worst.size,
        threshold=allowed,
        text="; ".join([text, *seen]),
    )


def clocks(frames: RunFrames, window: Backlog) -> list[str]:
    """What each GPU was held back by, and from which clock to which; none where nothing was.

    A clock is told where it changed by more than 1 % from the first fifth of the window to the last.
    """
    if frames.gpu.empty:
        return []
    inside = whole_gpus(frames.gpu[frames.gpu["t_s"].between(window.start_s, window.end_s)])
    texts = []
    for gpu, rows in inside.groupby("gpu"):
        parts = []
        bits = rows["throttle_reasons"].dropna().to_numpy(dtype=np.int64)
        shares = {
            name: float(np.mean(bits & bit > 0))
            for bit, name in THROTTLE_REASONS.items()
            if bit & HELD_BACK and len(bits)
        }
        held = [f"{name} in {100 * x:.0f} %" for name, x in shares.items() if x > SELDOM]
        if held:
            parts.append(f"held back by {', '.join(held)} of samples")
        edges = batch_edges(window.start_s, window.end_s, CLOCK_PARTS)
        for column, name in CLOCKS.items():
            if column not in rows:
                continue
            first, *_, last = [
                float(rows.loc[rows["t_s"].between(a, b), column].astype(float).mean())
                for a, b in itertools.pairwise(edges)
            ]
            if abs(last / first - 1) > SELDOM:
                parts.append(f"{name} from {first:.0f} to {last:.0f} MHz")
        if parts:
            texts.append(f"GPU {gpu} in run {frames.run.id}: " + ", ".join(parts))
    return texts
