"""Verdicts at a known true ratio; `scripts/bench/error_rates` counts them by the thousand."""

from functools import cache

import pytest

from harness.rehearsals.error_rates import (
    SETTINGS,
    Job,
    Known,
    known,
    measure_experiments,
    measure_runs,
    measure_searches,
)

COUNT = 12
MOST_MISSED = 4
"""Of 12, more than 4 misses have a probability below 0.5 % where the rate of misses is 10 %."""


@cache
def truth(name: str) -> Known:
    return known(SETTINGS[name], 3000, 0.10)


@pytest.mark.parametrize(
    ("cell", "right", "wrong"),
    [(1.0, "confirmed", "refuted"), (1.25, "refuted", "confirmed"), (0.8, "refuted", "confirmed")],
)
def test_experiments_find_what_is_true(cell: float, right: str, wrong: str) -> None:
    job = Job("wide", truth("wide"), cell, 0.10, 1, COUNT)
    outcomes = [row["outcome"] for row in measure_experiments(job)]
    assert outcomes.count(right) >= COUNT - MOST_MISSED
    assert outcomes.count(wrong) == 0


def test_searches_find_it_with_a_fifth_of_the_requests() -> None:
    rows = measure_searches(Job("wide", truth("wide"), 1.0, 0.05, 1, COUNT))
    assert sum(row["outcome"] == "confirmed" for row in rows) >= COUNT - MOST_MISSED
    assert max(row["requests"] for row in rows) < 14_300 / 5
    wrong = measure_searches(Job("wide", truth("wide"), 1.1, 0.05, 1, COUNT))
    assert sum(row["outcome"] == "refuted" for row in wrong) >= COUNT - MOST_MISSED


@pytest.mark.parametrize(
    ("rho", "right", "wrong"), [(0.9, "stable", "unstable"), (1.1, "unstable", "stable")]
)
def test_runs_of_the_planned_length_are_judged_right(rho: float, right: str, wrong: str) -> None:
    rows = measure_runs(Job("SGLang", truth("SGLang"), rho, 0.10, 1, COUNT))
    outcomes = [row["outcome"] for row in rows]
    assert outcomes.count(right) >= COUNT - MOST_MISSED
    assert outcomes.count(wrong) == 0


def test_cells_and_settings_have_independent_errors() -> None:
    """Equal seeds of two cells would make their predictions err alike."""
    first, second = (
        [row["measured"] for row in measure_searches(Job("wide", truth("wide"), c, 0.05, 1, 6))]
        for c in (0.95, 1.05)
    )
    assert not set(first) & set(second)
