"""Probes that something else held up: a host that stood still, a kernel that was compiled.

One such probe among ninety moves a mean by more than all the others scatter. It is known by its repeats,
left out of the law, and the time that it took counts as an error of whatever the law predicts: nobody
knows how often it happens under load. What happens often is no disturbance but the engine's step time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.numbers.quantiles import normal_quantile
from analysis.schedulers.step_time import StepObservation

WIDTHS = 8.0
"""So many standard deviations of a repeat."""
LEAST = 0.05
"""Of its design's median: what a probe is off by at least."""
MOST = 0.1
"""Where more of all probes are off so far, none is left out."""
REPEATS = 3
"""Of two repeats nobody knows which was held up."""


def disturbed(observations: Sequence[StepObservation]) -> NDArray[np.bool_]:
    """Which of them lie far off the repeats of their design, shape (n,).

    The scatter is that of the median of what repeats are off by, in all designs or among the others of
    its own where that is larger; the repeat nearest to its median, which is mostly the median itself,
    does not count.
    """
    size = np.abs(off_repeats(observations))
    names = np.array([o.probe for o in observations])
    designs = [np.flatnonzero(names == name) for name in np.unique(names)]
    rest = np.concatenate([np.sort(size[own])[1:] for own in designs])
    far = np.zeros(len(size), dtype=bool)
    for own in designs:
        if len(own) < REPEATS:
            continue
        for i in own:
            others = np.sort(size[own[own != i]])[1:]
            scatter = max(np.median(rest), np.median(others)) / normal_quantile(0.75)
            far[i] = size[i] > max(WIDTHS * scatter, LEAST)
    return far if far.sum() <= MOST * len(far) else np.zeros_like(far)


def off_repeats(observations: Sequence[StepObservation]) -> NDArray[np.float64]:
    """Time per step over the median of the design's repeats, less 1; shape (n,)."""
    names = np.array([o.probe for o in observations])
    step_s = np.array([o.duration_s / o.steps for o in observations])
    median = np.empty_like(step_s)
    for name in np.unique(names):
        median[names == name] = np.median(step_s[names == name])
    return np.asarray(step_s / median - 1.0)


def disturbed_share(observations: Sequence[StepObservation]) -> float:
    """What those marked as disturbed were off by, over the time that all of them took."""
    off = off_repeats(observations)
    took_s = np.array([o.duration_s for o in observations])
    marked = np.array([o.disturbed for o in observations], dtype=bool)
    undisturbed_s = took_s / (1.0 + off)
    return float(np.abs(took_s - undisturbed_s)[marked].sum() / took_s.sum())
