"""Joint laws of prompt, output and declared lengths, with their provenance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_GRID_POINTS = 10_000_000


@dataclass(frozen=True, eq=False)
class Workload:
    """A discrete law over triples (prompt tokens, output tokens, declared ``max_tokens``).

    All arrays have the same shape (n,); ``weight`` sums to 1. A request declares the most that it
    may generate, and stops at its output length.
    """

    name: str
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    weight: NDArray[np.float64]
    observed: NDArray[np.float64]
    """Requests that were seen at each point; infinite where the point is stated, not seen."""
    source: str
    ignore_eos: bool = True
    """Whether the client asks the server to go on past an end-of-text token. Such a request always
    runs to its ``max_tokens``, and some servers reserve memory for it by another rule."""
    cycle_requests: int = 0
    """Requests of a cycle in which the parts of a mixture take turns, each its share of them: traffic
    that changes with time. 0: each request is of any part, independent of the others."""
    part_ends: tuple[float, ...] = (1.0,)
    """Share of the requests up to the end of each part of a mixture."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing that was done to the law and that a reader must know."""

    def __post_init__(self) -> None:
        arrays = (self.prompt_tokens, self.output_tokens, self.max_tokens, self.weight)
        if len({a.shape for a in (*arrays, self.observed)}) != 1 or self.weight.ndim != 1:
            raise ValueError("a workload needs five arrays of one common length")
        if not len(self.weight):
            raise ValueError("a workload needs at least one triple of lengths")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise ValueError("prompt and output lengths must be at least one token")
        if (self.max_tokens < self.output_tokens).any():
            raise ValueError("max_tokens must be at least the output length")
        if self.ignore_eos and self.declares_more:
            raise ValueError(
                "requests that ignore_eos run to their max_tokens: declare the output length, or "
                "set ignore_eos to false"
            )
        if (self.weight < 0).any() or not np.isclose(self.weight.sum(), 1.0):
            raise ValueError("weights must be non-negative and sum to 1")

    @cached_property
    def exact(self) -> bool:
        """Whether the triples are the law itself; else they are a sample and means have errors."""
        return bool(np.isinf(self.observed).all())

    @cached_property
    def declares_more(self) -> bool:
        """Whether some request declares more than it will generate."""
        return bool((self.max_tokens > self.output_tokens).any())

    def mean(self, values: NDArray[np.float64] | NDArray[np.int64]) -> float:
        """Expectation of ``values``, given per support point, shape (n,)."""
        return float(self.weight @ values)

    def standard_error(self, values: NDArray[np.float64] | NDArray[np.int64]) -> float:
        """Sampling error of `mean`; 0 where the law is exact.

        Each point contributes w^2/k (value - mean)^2 with its weight w and k requests seen there.
        In a mixture this counts the distance between the parts as scatter: it errs to the wide side.
        """
        if self.exact:
            return 0.0
        scatter = float((self.weight**2 / self.observed) @ (values - self.mean(values)) ** 2)
        count = float(self.observed[np.isfinite(self.observed)].sum())
        return math.sqrt(scatter * count / max(count - 1.0, 1.0))

    def decode_demand(self) -> NDArray[np.float64]:
        """s o + o (o+1)/2, shape (n,): the KV demand without its prefill, which needs a chunk size.

        In token-steps, in the convention of the paper (theory.md 1.1); only for comparing laws.
        """
        s, o = self.prompt_tokens.astype(float), self.output_tokens.astype(float)
        return np.asarray(s * o + o * (o + 1) / 2)

    def sample(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """``count`` draws, shape (count, 3): prompt, output, max_tokens.

        They are independent; in a cycle each is so given the part whose turn it is.
        """
        at = rng.random(count)
        if self.cycle_requests:
            turn = (np.arange(count) % self.cycle_requests + 0.5) / self.cycle_requests
            ends = np.array([0.0, *self.part_ends])
            part_index = np.searchsorted(ends[1:-1], turn, side="right")
            at = ends[part_index] + at * np.diff(ends)[part_index]
        index = np.searchsorted(self._cumulative, at, side="right")
        return np.stack(
            [self.prompt_tokens[index], self.output_tokens[index], self.max_tokens[index]], axis=1
        )

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        cumulative = np.cumsum(self.weight)
        return np.asarray(cumulative / cumulative[-1])


# -- making laws ---------------------------------------------------------------------------------


def stated(
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    weight: NDArray[np.float64],
    *,
    name: str,
    source: str = "stated law",
    notes: tuple[str, ...] = (),
) -> Workload:
    """The law with these pairs and weights, arrays of shape (n,); requests declare their output."""
    return Workload(
        name=name,
        prompt_tokens=prompt,
        output_tokens=output,
        max_tokens=output,
        weight=weight,
        observed=np.broadcast_to(np.inf, weight.shape),
        source=source,
        notes=notes,
    )


def fixed(prompt_tokens: int, output_tokens: int, max_tokens: int | None = None) -> Workload:
    """Every request has the same lengths; ``max_tokens`` is declared, the output length if None."""
    law = stated(
        np.array([prompt_tokens], dtype=np.int64),
        np.array([output_tokens], dtype=np.int64),
        np.ones(1),
        name=f"fixed {prompt_tokens}/{output_tokens}",
    )
    return law if max_tokens is None else declared(law, max_tokens=max_tokens)


def uniform(prompt: tuple[int, int], output: tuple[int, int]) -> Workload:
    """Independent lengths, each uniform on the integers of its range, both ends included.

    Every pair of the grid is a point of the law, so all means are exact. Each request declares its
    own output length. Raises ValueError for an empty range or for more than ten million pairs.
    """
    for what, (low, high) in (("prompt", prompt), ("output", output)):
        if not 1 <= low <= high:
            raise ValueError(f"{what} range [{low}, {high}] must satisfy 1 <= low <= high")
    s = np.arange(prompt[0], prompt[1] + 1, dtype=np.int64)
    o = np.arange(output[0], output[1] + 1, dtype=np.int64)
    points = len(s) * len(o)
    if points > MAX_GRID_POINTS:
        raise ValueError(
            f"a uniform law of {points} pairs of lengths is too large: narrow a range to get below "
            f"{MAX_GRID_POINTS}"
        )
    return stated(
        np.repeat(s, len(o)),
        np.tile(o, len(s)),
        np.full(points, 1.0 / points),
        name=f"uniform {prompt[0]}-{prompt[1]}/{output[0]}-{output[1]}",
    )


def pairs(
    prompt: ArrayLike,
    output: ArrayLike,
    max_tokens: ArrayLike | None = None,
    *,
    name: str,
    source: str,
    count: ArrayLike | None = None,
    notes: tuple[str, ...] = (),
) -> Workload:
    """The empirical law of observed requests, arrays of shape (n,); means have a sampling error.

    Lengths stay paired, since they are correlated in real traffic. ``max_tokens`` is declared per
    request, the output length if None; ``count`` says how often each pair was seen, once if None.
    """
    s, o = np.asarray(prompt, dtype=np.int64), np.asarray(output, dtype=np.int64)
    if s.shape != o.shape or s.ndim != 1 or not len(s):
        raise ValueError(f"{name}: prompt and output lengths must be two lists of one length")
    seen = np.ones(len(s)) if count is None else np.asarray(count, dtype=np.float64)
    declared_tokens = o if max_tokens is None else np.asarray(max_tokens, dtype=np.int64)
    return Workload(
        name=name,
        prompt_tokens=s,
        output_tokens=o,
        max_tokens=declared_tokens,
        weight=seen / seen.sum(),
        observed=seen,
        source=source,
        ignore_eos=bool((declared_tokens == o).all()),
        notes=notes,
    )


# -- changing laws -------------------------------------------------------------------------------


def mixture(parts: Sequence[tuple[float, Workload]], cycle_requests: int = 0) -> Workload:
    """Each request follows one of the laws, law i with probability q_i; the q_i sum to 1.

    With ``cycle_requests`` the laws take turns instead, law i for q_i of each cycle of so many requests.
    In the long run the law of lengths is the same, and with it 1/mu, which is linear in the law
    (theory.md 2.5): the harmonic mean of the parts. It is exact if all its parts are. Raises ValueError
    when the parts disagree on ``ignore_eos``, or when one of them gets no turn.
    """
    if not parts or any(q < 0 for q, _ in parts) or not np.isclose(sum(q for q, _ in parts), 1.0):
        raise ValueError("a mixture needs shares that are not negative and sum to 1")
    if any(law.cycle_requests for _, law in parts):
        raise ValueError("a part of a mixture has no cycle of its own")
    if cycle_requests and min(q for q, _ in parts) * cycle_requests < 1:
        raise ValueError(f"a cycle of {cycle_requests} requests has no turn for every part")
    laws = [law for _, law in parts]
    if len({law.ignore_eos for law in laws}) > 1:
        raise ValueError(
            "a mixture of laws with and without ignore_eos is not supported: set ignore_eos to false "
            "in every part"
        )
    return Workload(
        name=" + ".join(f"{q:g} x ({law.name})" for q, law in parts),
        prompt_tokens=np.concatenate([law.prompt_tokens for law in laws]),
        output_tokens=np.concatenate([law.output_tokens for law in laws]),
        max_tokens=np.concatenate([law.max_tokens for law in laws]),
        weight=np.concatenate([q * law.weight for q, law in parts]),
        observed=np.concatenate([law.observed for law in laws]),
        source="; ".join(dict.fromkeys(law.source for law in laws)),
        ignore_eos=laws[0].ignore_eos,
        cycle_requests=cycle_requests,
        part_ends=tuple(float(end) for end in np.cumsum([q for q, _ in parts])),
        notes=tuple(dict.fromkeys(note for law in laws for note in law.notes)),
    )


def clipped(workload: Workload, max_total_tokens: int) -> tuple[Workload, float]:
    """The law given that prompt and output together take at most ``max_total_tokens``.

    Returns it with the share of requests that was cut: a filtered workload is another workload, so
    its notes say the share and what became of the mean demand. Declared lengths are lowered to what
    is left of the limit. Raises ValueError if nothing is left, and for parts that take turns.
    """
    if workload.cycle_requests:
        raise ValueError(f"{workload.name}: limit each part of a cycle, not the whole")
    keep = workload.prompt_tokens + workload.output_tokens <= max_total_tokens
    share = float(workload.weight[keep].sum())
    if share <= 0.0:
        shortest = int((workload.prompt_tokens + workload.output_tokens).min())
        raise ValueError(
            f"no request of {workload.name} has at most {max_total_tokens} tokens in total: "
            f"the shortest has {shortest}"
        )
    room = np.maximum(max_total_tokens - workload.prompt_tokens, workload.output_tokens)
    lowered = workload.mean((keep & (workload.max_tokens > room)).astype(float)) / share
    fitting = replace(workload, max_tokens=np.minimum(workload.max_tokens, room))
    said = f"{workload.name}: at most {max_total_tokens} tokens in total"
    if lowered:
        note = f"{said}: {percent(lowered)} of the requests declare less, to fit"
        fitting = replace(fitting, notes=(*fitting.notes, note))
    if keep.all():
        return fitting if lowered else workload, 0.0
    law = _part_of(fitting, keep, f"{workload.name}, at most {max_total_tokens} in total")
    before, after = (w.mean(w.decode_demand()) for w in (workload, law))
    note = (
        f"{said}: {percent(1 - share)} of the requests cut; mean KV demand changes by "
        f"{percent(after / before - 1, sign=True)}"
    )
    return replace(law, notes=(*law.notes, note)), 1.0 - share


def declared(
    workload: Workload,
    *,
    max_tokens: int | None = None,
    factor: float | None = None,
    extra: int | None = None,
) -> Workload:
    """The law whose requests declare more than they generate; exactly one way must be given.

    ``max_tokens`` is one number for all, ``factor`` a multiple of the output length (rounded up),
    ``extra`` tokens more than it. A request that declares more cannot ignore end-of-text, so
    ``ignore_eos`` becomes False if any does. Raises ValueError when an output exceeds its
    declaration.
    """
    if sum(way is not None for way in (max_tokens, factor, extra)) != 1:
        raise ValueError("declare: give exactly one of max_tokens, factor, extra")
    o = workload.output_tokens
    longest = int(o.max())
    if max_tokens is not None:
        if max_tokens < longest:
            raise ValueError(
                f"declare: max_tokens {max_tokens} is below the longest output of {longest} tokens: "
                "raise it, or shorten the outputs"
            )
        limit, words = np.full_like(o, max_tokens), f"declare {max_tokens}"
    elif factor is not None:
        if not factor >= 1:
            raise ValueError(f"declare: a factor of {factor:g} is less than the output length")
        limit, words = _multiples(o, factor), f"declare {factor:g} x output"
    else:
        assert extra is not None
        if extra < 0:
            raise ValueError(f"declare: {extra} extra tokens are less than the output length")
        limit, words = o + extra, f"declare output + {extra}"
    if (limit == o).all():
        return replace(workload, max_tokens=o)
    return replace(workload, name=f"{workload.name}, {words}", max_tokens=limit, ignore_eos=False)


def _multiples(tokens: NDArray[np.int64], factor: float) -> NDArray[np.int64]:
    """``factor`` times each length, rounded up; the factor is the decimal number it was written as.

    In binary 1.1 lies above 11/10, so that 50 tokens would become 56.
    """
    exact = Fraction(str(factor))
    lengths, index = np.unique(tokens, return_inverse=True)
    multiples = [math.ceil(exact * length) for length in lengths.tolist()]
    return np.asarray(np.array(multiples, dtype=np.int64)[index])


Side = Literal["estimate", "test"]


def part(workload: Workload, share: float, seed: int, side: Side) -> Workload:
    """Random part of an observed law: ``share`` of its requests to estimate from, the rest to test.

    The two sides of one seed have no request in common; of a histogram, the requests of a bin are
    shared out. Raises ValueError for a law that was not observed, or when a side would be empty.
    """
    if not np.isfinite(workload.observed).all():
        raise ValueError(f"{workload.name}: only a law of observed requests can be split")
    bins = np.repeat(np.arange(len(workload.weight)), workload.observed.astype(int))
    count = len(bins)
    first = round(share * count)
    if not 0 < first < count:
        raise ValueError(f"{workload.name}: {share:g} of {count} requests leaves one side empty")
    order = np.random.default_rng(seed).permutation(count)
    mine = bins[order[:first] if side == "estimate" else order[first:]]
    seen = np.bincount(mine, minlength=len(workload.weight)).astype(float)
    size = len(mine)
    note = f"{workload.name}: the {size} of {count} requests to {side}, drawn with seed {seed}"
    counted = replace(workload, observed=seen, weight=seen / size)
    law = _part_of(counted, seen > 0, f"{workload.name}, {size} requests to {side}")
    return replace(law, notes=(*law.notes, note))


def percent(share: float, sign: bool = False) -> str:
    """A share as text with three significant digits, such as ``12.3 %``."""
    return f"{100 * share:{'+' if sign else ''}.3g} %"


def _part_of(workload: Workload, keep: NDArray[np.bool_], name: str) -> Workload:
    weight = workload.weight[keep]
    return replace(
        workload,
        name=name,
        prompt_tokens=workload.prompt_tokens[keep],
        output_tokens=workload.output_tokens[keep],
        max_tokens=workload.max_tokens[keep],
        weight=weight / weight.sum(),
        observed=workload.observed[keep],
    )
