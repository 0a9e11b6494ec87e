"""How many steps SGLang spends on prompts under saturation, per request: its prefill steps.

Prompts are computed when a request leaves and the head of the queue then fits. On the line of room,
heads are a renewal process of density 1 / E[X], X being the prompt and the whole declared output, and
one decode step uncovers the stretch S of those that it completes, a Poisson number of them with mean
x: the chance of a head in it is E[min(X, S)] / E[X]. Long prompts are cut, and take as many steps as
they have chunks. Requests of one output leave with their prefill step: their room admits others at
once, a chain of passes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from analysis.schedulers.engine import EngineLimits
from loadgen.workload import Workload

Floats = NDArray[np.float64]

LATTICE = 2048
"""Points on which the law of X is put to convolve it; its mean is kept exactly."""


def heads_uncovered(workload: Workload, declared: Floats, x: float) -> float:
    """Passes of admission that admit somebody, per request, while the pool is what limits and every
    output to come is set aside.

    ``declared`` is X per support point, shape (n,); ``x`` the completions per decode step.
    """
    law, width = _on_lattice(declared, workload.weight)
    size = LATTICE * 2 ** math.ceil(math.log2(8 + 4 * x))
    completed = np.fft.irfft(np.exp(x * (np.fft.rfft(law, size) - 1)), size)
    longer = np.clip(1 - np.cumsum(completed)[: len(law)], 0, 1)
    beyond = np.clip(1 - np.cumsum(law), 0, 1)
    return float((longer * beyond).sum()) * width / workload.mean(declared) / x


def steps_per_pass(workload: Workload, limits: EngineLimits, prompts: float) -> float:
    """Prefill steps that one pass takes which admits so many prompts on average.

    Their number is taken as Poisson, given that it is not zero. A step takes a chunk of them, or,
    where ``max_prefill_tokens`` come first, whole prompts until they are reached: the last one then
    runs over by E[s^2] / (2 E[s]), or, where prompts are never cut, stays out.
    """
    assert limits.sglang is not None
    chunk, most = limits.max_num_batched_tokens, limits.sglang.max_prefill_tokens
    lengths = workload.prompt_tokens
    mean = workload.mean(lengths)
    if chunk is None or chunk > most:
        over = workload.mean(lengths * lengths) / (2 * mean)
        step = max(most - over, mean) if chunk is None else min(most + over, float(chunk))
        return max(1.0, prompts * mean / step)
    if prompts <= 1.0 + 1e-9 and lengths.max() <= chunk:
        return 1.0
    rate = float(brentq(lambda r: r / -math.expm1(-r) - prompts, 1e-9, prompts + 1.0))
    law, width = _on_lattice(lengths.astype(float), workload.weight)
    size = LATTICE * 2 ** math.ceil(math.log2(4 + 2 * rate + 8 * math.sqrt(rate)))
    once = np.fft.rfft(law, size)
    together = np.fft.irfft(np.expm1(rate * once) / math.expm1(rate), size)
    cumulative = np.cumsum(together)
    at = (np.arange(chunk, size * width, chunk) / width).astype(np.int64)
    return 1.0 + float(np.clip(1 - cumulative[np.minimum(at, size - 1)], 0, 1).sum())


def _on_lattice(values: Floats, weight: Floats) -> tuple[Floats, float]:
    """The law of ``values`` on multiples of a width, shape (LATTICE + 2,), its mean kept."""
    width = float(values.max()) / LATTICE
    below = np.floor(values / width).astype(np.int64)
    above = values / width - below
    law = np.zeros(LATTICE + 2)
    np.add.at(law, below, weight * (1 - above))
    np.add.at(law, below + 1, weight * above)
    return law, width


def passes_in_a_row(alone: float, events: float) -> float:
    """Passes of admission in a row, when a share ``alone`` of the requests leaves with its pass.

    The first pass admits (1 - alone) / events, each next one takes the room of those who left.
    """
    passes, admitted = 1.0, (1 - alone) / events
    for _ in range(1000):
        admitted *= alone
        if admitted < 1e-6:
            break
        passes -= math.expm1(-admitted)
    return passes
