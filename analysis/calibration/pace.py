"""Did an engine whose step time was set keep to it?"""

from __future__ import annotations

from dataclasses import dataclass

PACE_LIMIT = 0.03


@dataclass(frozen=True, slots=True)
class Pace:
    """Mean seconds per step of a run, beside those that the engine was set to."""

    step_s: float
    set_s: float

    @property
    def off(self) -> float:
        """Mean step over the set one, less 1."""
        return self.step_s / self.set_s - 1.0

    @property
    def kept(self) -> bool:
        """Is the mean step what it was set to, within `PACE_LIMIT`?"""
        return abs(self.off) <= PACE_LIMIT

    def complaint(self) -> str:
        """What is wrong with a pace that was not kept."""
        return (
            f"paced engine: its steps were {100 * self.off:+.1f} % off the time they were set to, "
            f"{100 * PACE_LIMIT:.0f} % are allowed"
        )

    def text(self) -> str:
        """The set step time, and what was made of it."""
        return f"{1e3 * self.set_s:.2f} ms by the law, kept within {100 * self.off:+.1f} %"
