"""Did an engine whose step time was set keep to it?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.frames import RunFrames

PACE_LIMIT = 0.03
MIN_STEPS = 100
"""A stretch of steps is counted to within one of them."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Mean seconds per step of a run, beside those that the engine was set to.

    With ``sleeps`` every step sleeps for the set time on top of what it takes by itself, so that only
    a shorter one shows that this was not kept. Otherwise the set time is that of the whole step.
    """

    step_s: float
    set_s: float
    sleeps: bool = False

    @property
    def off(self) -> float:
        """Mean step over the set one, less 1."""
        return self.step_s / self.set_s - 1.0

    @property
    def kept(self) -> bool:
        """Is the mean step what it was set to, within `PACE_LIMIT`?"""
        return self.off >= -PACE_LIMIT and (self.sleeps or self.off <= PACE_LIMIT)

    def complaint(self) -> str:
        """What is wrong with a pace that was not kept."""
        if self.sleeps:
            return (
                f"slowed engine: its mean step took {1e3 * self.step_s:.2f} ms, less than the "
                f"{1e3 * self.set_s:.2f} ms that each was to sleep: the sleep was lost"
            )
        return (
            f"paced engine: its steps were {100 * self.off:+.1f} % off the time they were set to, "
            f"{100 * PACE_LIMIT:.0f} % are allowed"
        )

    def text(self) -> str:
        """The set step time, and what was made of it."""
        if self.sleeps:
            own_s = self.step_s - self.set_s
            return (
                f"sleeps {1e3 * self.set_s:.2f} ms, takes {1e3 * own_s:+.2f} ms of its own "
                f"({100 * self.off:+.1f} %)"
            )
        return f"{1e3 * self.set_s:.2f} ms by the law, kept within {100 * self.off:+.1f} %"


def busy_step_s(frames: RunFrames) -> float | None:
    """Mean seconds per step while requests were running; None for fewer than `MIN_STEPS` steps.

    Time is counted between samples that both show running requests: an idle engine takes no steps,
    and its time would make the others look longer.
    """
    engine = frames.engine[(frames.engine["t_s"] >= 0) & (frames.engine["t_s"] <= frames.end_s)]
    running = engine["running"].to_numpy() > 0
    busy = running[1:] & running[:-1]
    steps = int(np.diff(engine["steps"].to_numpy())[busy].sum())
    if steps < MIN_STEPS:
        return None
    return float(np.diff(engine["t_s"].to_numpy())[busy].sum()) / steps
