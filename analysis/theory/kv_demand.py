"""KV demand of one request: the memory-time that it takes out of the cache, in token-steps.

Every function takes integer arrays of one shape, ``s`` prompt tokens and ``o`` output tokens, both
at least 1, and returns one number per request. The demand is the sum, over the steps in which the
request is resident, of the tokens (or whole blocks) that it holds after the step. Closed forms:
theory.md 1.1.

Two conventions differ in what the last steps hold. The *paper* lets the prompt end in a step of its
own and then counts s+1, ..., s+o. An *engine* samples the first output in the step that ends the
prompt and never writes the KV of the last output: s, s+1, ..., s+o-1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def kv_demand_paper(s: Ints, o: Ints, chunk: int) -> Floats:
    """The paper's g = (1 + s/c) s/2 + s o + o (o+1)/2; exact only where ``chunk`` divides s."""
    _check(chunk)
    s, o = _ints(s), _ints(o)
    return np.asarray((1 + s / chunk) * s / 2 + s * o + o * (o + 1) / 2, dtype=np.float64)


def kv_demand_whole_chunk(s: Ints, o: Ints, chunk: int) -> Ints:
    """The paper's convention with the last chunk as short as it is: exact for every s."""
    s, o = _ints(s), _ints(o)
    demand: Ints = prefill_demand(s, chunk) + s * o + o * (o + 1) // 2
    return demand


def kv_demand_engine(s: Ints, o: Ints, chunk: int) -> Ints:
    """The engine's convention, without block rounding: `kv_demand_whole_chunk` less (s + o)."""
    s, o = _ints(s), _ints(o)
    return kv_demand_whole_chunk(s, o, chunk) - (s + o)


def kv_demand_blocks(
    s: Ints, o: Ints, chunk: int, block_size: int, async_scheduling: bool = False
) -> Ints:
    """The engine's convention with whole blocks: the tokens of all blocks held, summed over steps.

    With ``async_scheduling`` the finished request holds its last blocks for one step more.
    """
    _check(chunk)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    s, o = _ints(s), _ints(o)
    demand = _prefill_blocks(s, chunk, block_size)
    demand = demand + rounded_sum(s + o - 1, block_size) - rounded_sum(s, block_size)
    if async_scheduling:
        demand = demand + -(-(s + o - 1) // block_size) * block_size
    return demand


def prefill_steps(s: Ints, chunk: int) -> Ints:
    """P = ceil(s/c), the steps that compute the prompt."""
    _check(chunk)
    return -(-_ints(s) // chunk)


def prefill_demand(s: Ints, chunk: int) -> Ints:
    """c + 2c + ... + s: the token-steps of the prompt, the step that ends it included."""
    steps = prefill_steps(s, chunk)
    return chunk * (steps * (steps - 1) // 2) + _ints(s)


def residence_steps(s: Ints, o: Ints, chunk: int, async_scheduling: bool = False) -> Ints:
    """Steps in which the request is running: P + o - 1, and one more with ``async_scheduling``."""
    return prefill_steps(s, chunk) + _ints(o) - 1 + int(async_scheduling)


def second_moment(s: Ints, o: Ints, chunk: int) -> Ints:
    """Sum over steps of the squared footprint, tokens^2 steps, in the paper's convention.

    x times its mean is the variance of the occupancy of an unbounded cache at x Poisson arrivals
    per step (theory.md 2.7). Subtract (s + o)^2 for the engine's convention.
    """
    s, o = _ints(s), _ints(o)
    k = prefill_steps(s, chunk) - 1
    prefill = chunk * chunk * (k * (k + 1) * (2 * k + 1) // 6) + s * s
    decode = o * s * s + s * o * (o + 1) + o * (o + 1) * (2 * o + 1) // 6
    result: Ints = prefill + decode
    return result


def rounded_sum(n: Ints, block_size: int) -> Ints:
    """F(n) = sum over i = 1..n of i rounded up to whole blocks (theory.md 1.1)."""
    q, r = np.divmod(n, block_size)
    result: Ints = block_size * (block_size * (q * (q + 1) // 2) + (q + 1) * r)
    return result


def _prefill_blocks(s: Ints, chunk: int, block_size: int) -> Ints:
    """Tokens of whole blocks held during prefill; the remainders of k c to a block repeat."""
    full = prefill_steps(s, chunk) - 1
    period = block_size // int(np.gcd(chunk, block_size))
    k = np.arange(1, period + 1, dtype=np.int64)
    waste = np.concatenate([[0], np.cumsum(-(k * chunk) % block_size)])
    cycles, rest = np.divmod(full, period)
    held: Ints = chunk * (full * (full + 1) // 2) + cycles * waste[-1] + waste[rest]
    return held + -(-s // block_size) * block_size


def _ints(a: Ints) -> Ints:
    a = np.asarray(a)
    if a.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers, got {a.dtype}")
    return a.astype(np.int64, copy=False)


def _check(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"a prefill chunk is at least one token, got {chunk}")
