"""Verdicts of growth, by their error rates on a reflected walk."""

from __future__ import annotations

import numpy as np

from analysis.inference.slot_growth import growth

SLOTS, TRIALS, SEEDS = 2000, 250, 3


def words(load: float) -> list[str]:
    """Verdicts on sets of queues (Q + n - 4)+ with Poisson n."""
    rng = np.random.default_rng(round(100 * load))
    walk = np.cumsum(rng.poisson(4 * load, (TRIALS * SEEDS, SLOTS)) - 4.0, axis=1)
    low = np.minimum(np.minimum.accumulate(walk, axis=1), 0.0)
    sets = (walk - low).reshape(TRIALS, SEEDS, SLOTS)
    return [growth(list(numbers), SLOTS, 4 * load, 1.0, "per slot").verdict for numbers in sets]


def test_error_rates() -> None:
    critical, below, above = words(1.0), words(0.85), words(1.1)
    assert critical.count("grows") <= 0.07 * TRIALS
    assert below.count("grows") == 0
    assert below.count("stable") >= 0.95 * TRIALS
    assert above.count("grows") >= 0.95 * TRIALS
    assert above.count("stable") == 0
