"""Do waves of admissions grow or die out? The spectrum of a full pool, for any law of output lengths.

With the pool full and nothing evicted, admissions a_t obey sum_j W_j a_(t-j) = M, where W_j is what a
request holds on average in its j-th iteration, 0 if it has left: a wave a_t = z^t lives on where z is a
root of sum_j W_j z^(L-1-j). The equilibrium is stable when all roots lie inside the unit circle
(theory.md 3.3, derived there for arXiv 2606.15555).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESOLUTION = 1e-9
"""Of a root: closer to the unit circle, a wave neither grows nor dies out."""


@dataclass(frozen=True, slots=True)
class Root:
    """The fastest wave: that of the largest root.

    ``value`` is 0 where requests last a single iteration. ``growing`` is how many roots lie outside the
    unit circle, by more than `RESOLUTION`.
    """

    value: complex
    growing: int

    @property
    def modulus(self) -> float:
        """By which factor the wave grows in an iteration."""
        return abs(self.value)

    @property
    def stable(self) -> bool:
        """Do all waves die out? A neutral one, as of fixed lengths in `max_num_seqs` slots, does not."""
        return self.modulus < 1 - RESOLUTION

    @property
    def e_folding_iterations(self) -> float:
        """Iterations in which the wave grows or dies out by a factor e; inf if it does neither."""
        rate = abs(math.log(self.modulus)) if self.modulus else math.inf
        return 1 / rate if rate else math.inf

    @property
    def period_iterations(self) -> float:
        """Iterations from one crest to the next; inf if there are none."""
        angle = abs(math.atan2(self.value.imag, self.value.real))
        return 2 * math.pi / angle if angle else math.inf


def survival_weights(
    prompt_tokens: float | Floats,
    output_tokens: NDArray[np.int64],
    shares: Floats,
    *,
    first: int = 1,
    block_size: int = 1,
    reserved_tokens: Floats | None = None,
) -> Floats:
    """W_j = E[tokens held in the j-th iteration, 0 after the last], shape (L,), L the longest output.

    ``output_tokens`` and ``shares`` have the shape (n,), as has ``prompt_tokens`` unless all are alike.
    A request holds prompt + ``first`` + j tokens in whole blocks: ``first`` is 1 in the paper's model, 0
    in vLLM and SGLang, whose prompt gives the first output. An engine that sets aside
    ``reserved_tokens`` of output, shape (n,), holds prompt + reserved throughout: with equal ones W_j is
    the share that lives on, and no wave of fixed lengths grows or dies out; so it is where
    `max_num_seqs` binds.

    Raises ValueError where an output has no token.
    """
    outputs = np.asarray(output_tokens, dtype=np.int64)
    if outputs.min() < 1:
        raise ValueError(f"an output has at least one token, got {outputs.min()}")
    longest = int(outputs.max())
    prompts = np.broadcast_to(np.asarray(prompt_tokens, dtype=float), outputs.shape)
    # Requests of one length are one class where all that they hold is linear in the prompt.
    if block_size == 1 and reserved_tokens is None:
        alive = _alive(shares, outputs, longest)
        return _alive(shares * prompts, outputs, longest) + alive * (first + np.arange(longest))
    if reserved_tokens is not None:
        held = block_size * np.ceil((prompts + reserved_tokens) / block_size)
        return _alive(shares * held, outputs, longest)
    weights = np.zeros(longest)
    for prompt, output, share in zip(prompts, outputs, shares, strict=True):
        tokens = prompt + first + np.arange(output)
        weights[:output] += share * block_size * np.ceil(tokens / block_size)
    return weights


def largest_root(weights: Floats) -> Root:
    """The root of sum_j W_j z^(L-1-j) that is largest in modulus.

    ``weights``: W, shape (L,), all positive. Roots are the eigenvalues of the companion matrix: 0.1 s
    for L = 300, 2 s for 1000. Raises ValueError where a weight is not positive.
    """
    weights = np.asarray(weights, dtype=float)
    if not (weights > 0).all():
        raise ValueError("weights must be positive up to the last iteration of the longest request")
    roots: NDArray[np.complex128] = np.roots(weights).astype(np.complex128)
    if not len(roots):
        return Root(0j, 0)
    value = complex(roots[np.argmax(np.abs(roots))])
    return Root(value, int((np.abs(roots) > 1 + RESOLUTION).sum()))


def _alive(values: Floats, outputs: NDArray[np.int64], longest: int) -> Floats:
    """Sum of ``values`` over requests with more than j outputs, j = 0..longest - 1."""
    by_length = np.zeros(longest + 1)
    np.add.at(by_length, outputs, values)
    result: Floats = np.cumsum(by_length[::-1])[::-1][1:]
    return result
