"""What the papers say of the policies of `analysis.slot_models.policies`: below which rate a policy
is stable, and above which nothing is, in requests per slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.slot_models.slots import evenly, memory_time
from analysis.theory.congestion import cohort_rate
from analysis.theory.spectrum import largest_root, survival_weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """Classes of requests: lengths and shares of all arrivals, arrays of shape (classes,)."""

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    shares: NDArray[np.float64]

    @property
    def mean_work(self) -> float:
        """E[w], token-slots of a request."""
        return float(self.shares @ memory_time(self.prompt_tokens, self.output_tokens))

    @property
    def longest_tokens(self) -> int:
        return int((self.prompt_tokens + self.output_tokens).max())

    @property
    def fixed(self) -> bool:
        """All requests are alike."""
        return len(set(zip(self.prompt_tokens, self.output_tokens, strict=True))) == 1


@dataclass(frozen=True, slots=True)
class Stability:
    """A policy is stable at rates below ``below`` and unstable above ``above``, requests per slot.

    ``below`` is 0 where no theorem covers the policy. Between the two it depends on the start, or
    nothing is known. ``source`` says whose statement it is.
    """

    below: float
    above: float
    source: str


def eviction_free(law: Law, memory_tokens: int) -> float:
    """x* = M / E[w]: the most that any policy completes per slot."""
    return memory_tokens / law.mean_work


def work_conserving_bracket(law: Law, memory_tokens: int) -> Stability:
    """[x* (1 - delta), x*] with delta = sup(l + o) / M: theorems 4.1 and 4.2 of arXiv 2605.04595.

    Its proof lets memory-time decrease only, so that it covers evictions that keep the tokens and none
    that throw them away.
    """
    most = eviction_free(law, memory_tokens)
    left = max(0.0, 1 - law.longest_tokens / memory_tokens)
    return Stability(most * left, most, "arXiv 2605.04595, theorems 4.1 and 4.2")


def worst_cycle(law: Law, memory_tokens: int) -> Stability:
    """[theta_1, x*] for requests that are all alike: below theta_1 = M / (l1 (l0 + l1)) every start
    recovers, above it one that has locked into a single cohort does not (arXiv 2606.15555). Requests
    are whole: a cohort is floor(M / (l0 + l1)) of them."""
    most = eviction_free(law, memory_tokens)
    if not law.fixed:
        return Stability(0.0, most, "arXiv 2604.11001, proposition 3.2; no condition that suffices")
    whole = memory_tokens // law.longest_tokens * law.longest_tokens
    locked = cohort_rate(float(law.prompt_tokens[0]), float(law.output_tokens[0]), float(whole), 1)
    return Stability(locked, most, "arXiv 2606.15555, theorem 2")


def reserved_rate(law: Law, memory_tokens: int) -> Stability:
    """M / E[(l + o) o]: each request holds its peak from admission to its end. The head of the queue
    may leave up to one peak unused: the lower end has M - sup(l + o) + 1 in place of M."""
    held = float(law.shares @ ((law.prompt_tokens + law.output_tokens) * law.output_tokens))
    return Stability(
        max(0, memory_tokens - law.longest_tokens + 1) / held,
        memory_tokens / held,
        "peak (l + o) held for o slots",
    )


def capped(law: Law, memory_tokens: int, cap: float) -> Stability:
    """Rate-limited admission, ``cap`` per slot: at or below x* it evicts nobody and passes its cap
    (arXiv 2606.15555); above x* the cap alone promises nothing.

    Of requests that are all alike. A cap that is not whole admits unevenly, and what is used then rises
    above its mean: it is the highest use that has to fit (`used_at_most`).
    """
    if used_at_most(law, cap) <= memory_tokens:
        return Stability(cap, cap, "arXiv 2606.15555, rate-limited admission")
    locked = worst_cycle(law, memory_tokens)
    return Stability(min(cap, locked.below), min(cap, locked.above), "the cap overflows memory")


def used_at_most(law: Law, cap: float) -> int:
    """Most tokens in use in any slot with ``cap`` admissions per slot, evenly spread, nobody evicted;
    requests all alike."""
    output = int(law.output_tokens[0])
    ages = law.prompt_tokens[0] + np.arange(1, output + 1)
    admitted = evenly(cap, 20 * output)[:, 0]
    return int(np.convolve(admitted, ages).max())


def class_budget_rate(law: Law, memory_tokens: int, budgets: NDArray[np.int64]) -> Stability:
    """Algorithm 1 of arXiv 2604.11001: arrivals in these shares are stable below min b_k / share_k,
    if sum b_k w_k <= M (theorem 3.3); the other end is its own budget, or x* (proposition 3.2)."""
    used = int(budgets @ memory_time(law.prompt_tokens, law.output_tokens))
    drained = float((budgets / law.shares).min())
    if used > memory_tokens:
        return Stability(0.0, eviction_free(law, memory_tokens), "budgets overflow memory")
    return Stability(drained, drained, "arXiv 2604.11001, theorem 3.3")


def stability(
    policy: str,
    law: Law,
    memory_tokens: int,
    cap: float | None = None,
    budgets: NDArray[np.int64] | None = None,
) -> Stability:
    """The condition of a policy of `analysis.slot_models.policies.POLICIES`; ``cap`` is its mean
    budget per slot."""
    if policy == "class_budgets":
        if budgets is None:
            raise ValueError("class_budgets needs a budget for each class")
        return class_budget_rate(law, memory_tokens, budgets)
    if policy == "reserve_peak":
        found = reserved_rate(law, memory_tokens)
    elif policy == "greedy_resume":
        found = work_conserving_bracket(law, memory_tokens)
    else:
        found = worst_cycle(law, memory_tokens)
    if cap is None:
        return found
    if policy == "greedy_restart" and law.fixed:
        return capped(law, memory_tokens, cap)
    return Stability(min(found.below, cap), min(found.above, cap), f"{found.source}; its budget")


def growth_per_slot(law: Law) -> float:
    """max |z| of the equilibrium of a full pool under greedy admission with restarts: above 1 the
    single cohort builds up (arXiv 2606.15555; `analysis.theory.spectrum`)."""
    weights = survival_weights(law.prompt_tokens.astype(np.float64), law.output_tokens, law.shares)
    return largest_root(weights).modulus
