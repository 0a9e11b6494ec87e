"""Hypotheses that the slot model alone decides: two starts (H6), and a cap on admissions (H7)."""

from __future__ import annotations

import math

from analysis.theory.policy_rates import eviction_free
from harness.hypotheses.hypothesis_config import HypothesisConfig
from harness.hypotheses.hypothesis_verdict import ANYWHERE, Part, Verdict, over_seeds
from harness.hypotheses.theory import law_of, slot_rate, slot_run


def h6(config: HypothesisConfig) -> Verdict:
    """From empty and from full: the drifts differ in sign in a band with restarts, nowhere with resume.

    Cases come in pairs: the same from empty and preloaded. The figure is the drift from full less that
    from empty, over the offered rate.
    """
    parts = []
    for empty, full in zip(config.slot_cases[::2], config.slot_cases[1::2], strict=True):
        drifts = []
        for seed in range(1, empty.seeds + 1):
            pair = []
            for case in (empty, full):
                run = slot_run(case, seed)
                number = run.number_in_system[case.warm_up_slots :]
                pair.append(float(number[-1] - number[0]) / len(number))
            rate = slot_rate(empty)
            assert rate is not None, "pairs are open loops"
            drifts.append((pair[1] - pair[0]) / rate)
        # A draining queue falls faster than a stationary one: a negative difference is no second branch.
        grows = (0.02, math.inf) if "one branch" not in empty.name else (-math.inf, 0.02)
        what = f"{empty.name.replace(', one branch', '')}: drift from full less from empty"
        parts.append(Part(what, over_seeds(drifts), grows))
    return Verdict("H6", tuple(parts))


def h7(config: HypothesisConfig) -> Verdict:
    """A cap at x*: hardly an eviction, and throughput within 3 % of x*."""
    parts = []
    for case in config.slot_cases:
        free = eviction_free(law_of(case.classes), case.memory_tokens)
        evicted, done = [], []
        for seed in range(1, case.seeds + 1):
            part = slot_run(case, seed).slots[case.warm_up_slots :]
            evicted.append(float(part["evicted"].sum() / part["completed"].sum()))
            done.append(float(part["completed"].mean()) / free)
        capped = case.budget_of_free is not None
        allowed = (-0.01, 0.01) if capped else ANYWHERE
        parts.append(Part(f"{case.name}: evictions per completion", over_seeds(evicted), allowed))
        allowed = (0.95, 1.001) if capped else ANYWHERE
        parts.append(Part(f"{case.name}: throughput over x*", over_seeds(done), allowed))
    return Verdict("H7", tuple(parts))
