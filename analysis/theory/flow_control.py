"""Flow control (arXiv 2604.11001): admit so few per slot that memory suffices, and when that is stable.

A class k of requests with l prompt and o output tokens needs w_k = l o + o (o + 1) / 2 token-slots, and
lambda_k of them arrive per slot. Whatever the policy, sum lambda_k w_k <= M is necessary (their
proposition 3.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, pdtrc

from analysis.slot_models.slots import memory_time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def needed_memory(rates: Floats, prompt_tokens: Ints, output_tokens: Ints) -> float:
    """sum lambda_k w_k: mean tokens in use if everybody is served. Above M nothing is stable."""
    return float(np.asarray(rates) @ memory_time(prompt_tokens, output_tokens))


@dataclass(frozen=True, slots=True)
class Condition:
    """The two halves of the condition of algorithm 1 (their theorem 3.3, sufficient)."""

    peak_tokens: int
    """sum b_k w_k: never exceeded, and reached while every class has a queue."""
    fits: bool
    """The peak lies within memory."""
    drains: bool
    """b_k > lambda_k for every class."""
    drift: float
    """sum (lambda_k - b_k)+: growth of the queues, requests per slot."""

    @property
    def stable(self) -> bool:
        return self.fits and self.drains


def class_budgets_hold(
    budgets: Ints, rates: Floats, prompt_tokens: Ints, output_tokens: Ints, memory_tokens: int
) -> Condition:
    """Algorithm 1 with b_k admissions of class k per slot; all arrays of shape (classes,).

    The paper asks for sum b_k w_k < M; a pool that is exactly full has not overflowed, so that <= M
    is enough.
    """
    peak = int(budgets @ memory_time(prompt_tokens, output_tokens))
    excess = np.asarray(rates) - budgets
    return Condition(
        peak_tokens=peak,
        fits=peak <= memory_tokens,
        drains=bool((excess < 0).all()),
        drift=float(np.maximum(excess, 0.0).sum()),
    )


def mean_queue(rate: float, budget: int) -> float:
    """Stationary mean of Q_t = (Q_{t-1} + n_t - b)+, n Poisson: the queue of a class after admission.

    Spitzer's identity, sum over n of E[(S_n)+] / n with S_n = Poisson(n rate) - n b; the classes of
    algorithm 1 do not touch each other. Infinite unless rate < b.
    """
    if rate >= budget:
        return math.inf
    # Terms fall like exp(-n (b - rate)^2 / (2 rate)).
    steps = np.arange(1, 64 + int(80 * rate / (budget - rate) ** 2))
    total, at = steps * rate, steps * budget
    # E[(X - c)+] = m P(X >= c) - c P(X > c) for a Poisson X of mean m.
    excess = total * pdtrc(at - 1, total) - at * pdtrc(at, total)
    return float((np.maximum(excess, 0.0) / steps).sum())


@dataclass(frozen=True, slots=True)
class Overflow:
    """How often a policy that admits by budget alone would use more than M (theory.md 4)."""

    mean_tokens: float
    deviation_tokens: float
    slack_tokens: float
    """M less the mean."""
    gaussian: float
    """Share of slots, by the normal tail."""
    hoeffding: float
    """Upper bound of the same; 1 where there is no slack."""


def overflow(
    budget_shares: Floats,
    prompt_tokens: Ints,
    output_tokens: Ints,
    shares: Floats,
    memory_tokens: float,
) -> Overflow:
    """Usage of a queue that is never empty, with independent budgets: ``budget_shares[b]`` is P(B = b).

    Those admitted tau - 1 slots ago hold X_tau = (l + tau) 1{o >= tau} each, so that usage is a sum of
    independent terms: mean E[B] E[w], variance sum over tau of E[B] Var X_tau + Var B (E X_tau)^2. The
    bound is Hoeffding's, exp(-2 slack^2 / sum of (B_max (l_max + tau))^2). Lengths and their shares have
    shape (classes,). Exact independence needs requests that nobody evicts: it is the rate at which
    algorithm 2 first has to.
    """
    numbers = np.arange(len(budget_shares))
    mean = float(budget_shares @ numbers)
    variance = float(budget_shares @ numbers**2) - mean**2
    ages = np.arange(1, int(output_tokens.max()) + 1)
    held = (prompt_tokens[:, None] + ages) * (output_tokens[:, None] >= ages)
    first, second = shares @ held, shares @ held**2
    usage = mean * float(first.sum())
    spread = math.sqrt(float((mean * (second - first**2) + variance * first**2).sum()))
    slack = memory_tokens - usage
    reach = numbers[budget_shares > 0].max() * held.max(axis=0)
    lowest = numbers[budget_shares > 0].min() * held.min(axis=0)
    widths = float(((reach - lowest) ** 2).sum())
    bound = 1.0 if slack < 0 else math.exp(-2 * slack**2 / widths) if widths else 0.0
    tail = float(ndtr(-slack / spread)) if spread else float(slack < 0)
    return Overflow(usage, spread, slack, tail, bound)
