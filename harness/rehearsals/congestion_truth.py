"""Closed forms and spectra of service-induced congestion against the steps that they speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.theory.cohorts import Law, growth_per_iteration, run, spaced
from analysis.theory.congestion import (
    bell,
    cohort_evictions,
    cohort_rate,
    eviction_free_rate,
    least_stable_prompt,
    worst_loss,
)
from analysis.theory.spectrum import largest_root

FIXED = ((100, 100), (20, 200), (400, 40), (64, 64))
"""Prompt and output tokens of the closed forms' table."""
COHORTS = (2, 4)
POOL_REQUESTS = 20_000
"""Largest requests that the pool holds: rounding to whole ones is then below 0.1 %."""
NEAR = 1e-3
"""Closer to 1 than this, the largest root decides nothing."""
LAW_SEED = 8


@dataclass(frozen=True, slots=True)
class Compared:
    """One closed form beside the steps."""

    name: str
    lengths: str
    closed_form: float
    simulated: float

    @property
    def off(self) -> float:
        return self.simulated / self.closed_form - 1


@dataclass(frozen=True, slots=True)
class Grown:
    """The spectrum of one law beside the growth of a small disturbance, per iteration."""

    law: str
    root: float
    simulated: float

    @property
    def decides(self) -> bool:
        return abs(self.root - 1) > NEAR

    @property
    def right(self) -> bool:
        return (self.root > 1) == (self.simulated > 1)


def closed_forms(lengths: Sequence[tuple[int, int]] = FIXED) -> list[Compared]:
    """x*, theta_k, loss and evictions per completion of fixed lengths, whole requests.

    x* is read from a batch that admits at a cap of 0.99 x*, from the tokens it holds; theta_k from k
    cohorts over three residences, as they do not last; the worst cycle from a pool filled unevenly,
    after 40 of its slowest e-folding times.
    """
    found = []
    for prompt, output in lengths:
        law = Law.of(prompt, np.array([output]), np.ones(1))
        pool = float(POOL_REQUESTS * (prompt + output))
        best = eviction_free_rate(prompt, output, pool)
        pair = f"{prompt}/{output}"
        capped = run(law, pool, np.zeros(output), 4 * output, cap=0.99 * best)
        part = slice(2 * output, None)
        per_token = capped.completed[part].mean() / capped.held_tokens[part].mean()
        found.append(Compared("x*", pair, best, float(per_token * pool)))
        for k in COHORTS:
            steps = run(law, pool, spaced(law, pool, k), 3 * output)
            rate = cohort_rate(prompt, output, pool, k)
            found.append(Compared(f"theta_{k}", pair, rate, float(steps.completed.mean())))
        slowest = prompt + output
        start = np.linspace(0, 2, output) * law.equilibrium(pool)
        settle = 40 * slowest // output * output
        steps = run(law, pool, np.floor(start), settle + 10 * output, whole=True)
        completed, evicted = (
            float(x[settle:].sum()) / (10 * output) for x in (steps.completed, steps.evicted)
        )
        rate = cohort_rate(prompt, output, pool, 1)
        found += [
            Compared("theta_1", pair, rate, completed),
            Compared("loss", pair, worst_loss(prompt, output), 1 - completed / best),
            Compared(
                "evictions per completion",
                pair,
                cohort_evictions(prompt, output),
                evicted / completed,
            ),
        ]
    return found


def cubic_threshold() -> list[tuple[int, float]]:
    """l and l0_min / l^3 of equal mixes of l - 1 and l outputs: 0.2 for long outputs."""
    longer = (5, 9, 13, 17, 25, 33, 49, 65, 97)
    return [(output, least_stable_prompt(output - 1) / output**3) for output in longer]


def spectra(count: int = 50) -> list[Grown]:
    """The spectra of so many laws of lengths, drawn from `LAW_SEED`, beside simulated growth."""
    rng = np.random.default_rng(LAW_SEED)
    return [_grown(*_law(rng, i), rng) for i in range(count)]


def _law(rng: np.random.Generator, index: int) -> tuple[str, Law]:
    """One of five kinds of laws: fixed, two lengths, short tiers, uniform, bell-shaped."""
    output = int(rng.integers(8, 100))
    prompt = float(round(output * 10 ** rng.uniform(-1, 1.5)))
    kind = index % 5
    if kind == 0:
        outputs, shares, name = np.array([output]), np.ones(1), f"{output}"
    elif kind == 1:
        other = output + int(rng.integers(1, output))
        share = round(rng.uniform(0.2, 0.8), 2)
        outputs, shares = np.array([output, other]), np.array([share, 1 - share])
        name = f"{output} ({share:.2f}), {other}"
    elif kind == 2:
        outputs = np.sort(rng.choice(np.arange(3, 15), 4, replace=False))
        prompt = float(round(10 ** rng.uniform(1, 3)))
        shares, name = np.full(4, 1 / 4), ", ".join(str(o) for o in outputs)
    elif kind == 3:
        low = max(1, int(output * rng.uniform(0.01, 0.7)))
        outputs = np.arange(low, output + 2)
        shares, name = np.full(len(outputs), 1 / len(outputs)), f"U({low}, {output + 1})"
    else:
        cv = round(10 ** rng.uniform(-1.5, -0.3), 3)
        outputs, shares = bell(output, cv)
        name = f"normal {output}, CV {cv:.2g}"
    return f"prompt {prompt:.0f}, outputs {name}", Law.of(prompt, outputs, shares)


def _grown(name: str, law: Law, rng: np.random.Generator) -> Grown:
    start = 1e-10 * rng.standard_normal(len(law.weights))
    iterations = max(6000, 40 * len(law.weights))
    root = largest_root(law.weights).modulus
    return Grown(name, root, growth_per_iteration(law, start, iterations))
