"""Service-induced congestion: what fixed lengths do to an engine that starts evicted requests anew.

The model is that of arXiv 2606.15555 as theory.md 3 states it. In each iteration every running request
takes one token more; those at their end leave; if the others exceed the pool, the least progressed are
evicted and lose their work; then the queue, which is never empty, is admitted while memory is free. A
request of l0 prompt and l1 output tokens holds l0 + 1 + j tokens in its j-th iteration, j = 0..l1 - 1.
Requests admitted together leave together, and what they free is filled at once: the pool is full in
every iteration, and part of it is work that will be thrown away.

Amounts are continuous, rates are requests per iteration. Engines that keep the outputs of a preempted
request (vLLM, SGLang) lose tokens to recompute instead, and hardly any memory-time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from analysis.theory.spectrum import largest_root, survival_weights

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def request_area(prompt_tokens: float, output_tokens: float) -> float:
    """A = l1 l0 + l1 (l1 + 1) / 2: memory-time of one request, in token-iterations."""
    return output_tokens * prompt_tokens + output_tokens * (output_tokens + 1) / 2


def eviction_free_rate(prompt_tokens: float, output_tokens: float, pool_tokens: float) -> float:
    """x* = M / A: the most that can complete per iteration, without any eviction (theory.md 3.3).

    For a law of lengths it is M / sum(W), W by `spectrum.survival_weights`.
    """
    return pool_tokens / request_area(prompt_tokens, output_tokens)


def cohort_rate(
    prompt_tokens: float, output_tokens: float, pool_tokens: float, cohorts: int
) -> float:
    """theta_k = M / (l1 (l0 + l1 (k+1) / (2k))): completions per iteration of k equally spaced cohorts.

    k = l1 gives x*, k = 1 the worst cycle, into which nearly all full pools settle (theory.md 3.3).
    Raises ValueError unless k divides l1.
    """
    _require_divisor(output_tokens, cohorts)
    held = prompt_tokens + output_tokens * (cohorts + 1) / (2 * cohorts)
    return pool_tokens / (output_tokens * held)


def cohort_evictions(prompt_tokens: float, output_tokens: float, cohorts: int = 1) -> float:
    """(l1 - k) / (l0 + 1): evictions per completion of k equally spaced cohorts.

    After a cohort has left, its room admits n (l0 + l1 - k + 1) / (l0 + 1) requests, of which n come to
    their end. Raises ValueError unless k divides l1.
    """
    _require_divisor(output_tokens, cohorts)
    return (output_tokens - cohorts) / (prompt_tokens + 1)


def worst_loss(prompt_tokens: float, output_tokens: float) -> float:
    """1 - theta_1 / x* = (l1 - 1) / (2 (l0 + l1)): share of the throughput that the worst cycle loses.

    As the pool is always full, it is the share of memory-time that is thrown away. Tends to 1/2.
    """
    return (output_tokens - 1) / (2 * (prompt_tokens + output_tokens))


def common_divisor(output_tokens: Ints) -> int:
    """Greatest common divisor g of all output lengths.

    With prompts long beside the outputs, g - 1 waves grow (theory.md 3.2): none if g = 1. How long is
    long enough, `least_stable_prompt` says.
    """
    return int(np.gcd.reduce(np.asarray(output_tokens, dtype=np.int64)))


def least_stable_prompt(output_tokens: int) -> float:
    """Shortest prompt with which an equal mix of outputs l and l + 1 keeps its equilibrium, tokens.

    About 0.2 l^3 (theory.md 3.3): lengths without a common divisor calm only outputs of a few tokens.
    Raises ValueError unless l >= 1.
    """
    if output_tokens < 1:
        raise ValueError(f"an output has at least one token, got {output_tokens}")
    outputs = np.array([output_tokens, output_tokens + 1])
    halves = np.full(2, 0.5)

    def excess(log_prompt: float) -> float:
        prompt = np.exp(log_prompt)
        return largest_root(survival_weights(prompt, outputs, halves)).modulus - 1

    longest = np.log(10.0 * (output_tokens + 1) ** 3)
    if excess(np.log(1e-3)) < 0:
        return 0.0
    return float(np.exp(brentq(excess, np.log(1e-3), longest, xtol=1e-6)))


def critical_cv(prompt_tokens: float, mean_output: float) -> float:
    """CV of bell-shaped output lengths below which the equilibrium is unstable (theory.md 3.3).

    The lengths are `bell` around ``mean_output``. Depends on l0 / E[o] and hardly on the scale.
    """

    def excess(cv: float) -> float:
        outputs, shares = bell(mean_output, cv)
        return largest_root(survival_weights(prompt_tokens, outputs, shares)).modulus - 1

    return float(brentq(excess, 1.0 / mean_output, 0.5, xtol=1e-4))


CRITICAL_CV = (
    (0.1, 0.300),
    (0.25, 0.277),
    (0.5, 0.237),
    (1.0, 0.189),
    (2.0, 0.144),
    (5.0, 0.096),
    (10.0, 0.069),
    (50.0, 0.032),
)
"""`critical_cv` of l0 / E[o], outputs of mean 100."""


def tabled_critical_cv(prompt_tokens: float, mean_output: float) -> float:
    """`critical_cv` from its table, at once: to 0.01 between the rows, the outermost row beyond them."""
    ratios, values = np.array(CRITICAL_CV).T
    at = np.log(prompt_tokens / mean_output)
    return float(np.exp(np.interp(at, np.log(ratios), np.log(values))))


def bell(mean: float, cv: float) -> tuple[Ints, Floats]:
    """Normal lengths of this mean and CV before rounding, of 1 token or more: lengths and shares.

    Both of shape (n,), within four standard deviations.
    """
    spread = mean * cv
    lengths = np.arange(max(1, int(mean - 4 * spread)), int(mean + 4 * spread) + 2)
    shares = np.diff(ndtr((np.append(lengths - 0.5, lengths[-1] + 0.5) - mean) / spread))
    return lengths, shares / shares.sum()


def _require_divisor(output_tokens: float, cohorts: int) -> None:
    if cohorts < 1 or output_tokens % cohorts:
        raise ValueError(f"{cohorts} cohorts cannot be spaced equally over {output_tokens} outputs")
