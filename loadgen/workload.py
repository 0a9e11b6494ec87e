"""Joint laws of prompt, output and declared lengths, with their provenance."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_GRID_POINTS = 10_000_000


@dataclass(frozen=True, eq=False)
class Workload:
    """A discrete law over triples (prompt tokens, output tokens, declared ``max_tokens``).

    The four arrays have the same shape (n,); ``weight`` sums to 1. ``exact`` says whether the
    triples are the law itself or a sample of an unknown one: then every mean has a sampling error.
    """

    name: str
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    weight: NDArray[np.float64]
    exact: bool
    source: str

    def __post_init__(self) -> None:
        shapes = {
            a.shape for a in (self.prompt_tokens, self.output_tokens, self.max_tokens, self.weight)
        }
        if len(shapes) != 1 or self.prompt_tokens.ndim != 1 or not len(self.weight):
            raise ValueError("a workload needs four arrays of one common length")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise ValueError("prompt and output lengths must be at least one token")
        if (self.max_tokens < self.output_tokens).any():
            raise ValueError("max_tokens must be at least the output length")
        if (self.weight < 0).any() or not np.isclose(self.weight.sum(), 1.0):
            raise ValueError("weights must be non-negative and sum to 1")

    def mean(self, values: NDArray[np.float64] | NDArray[np.int64]) -> float:
        """Expectation of ``values``, given per support point, shape (n,)."""
        return float(self.weight @ values)

    def standard_error(self, values: NDArray[np.float64] | NDArray[np.int64]) -> float:
        """Sampling error of `mean`; 0 where the law is exact."""
        if self.exact:
            return 0.0
        variance = self.weight @ (values - self.mean(values)) ** 2
        effective = 1.0 / float(self.weight @ self.weight)
        return float(np.sqrt(variance / max(effective - 1.0, 1.0)))

    def sample(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """``count`` independent draws, shape (count, 3): prompt, output, max_tokens."""
        index = np.searchsorted(self._cumulative, rng.random(count), side="right")
        return np.stack(
            [self.prompt_tokens[index], self.output_tokens[index], self.max_tokens[index]], axis=1
        )

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        cumulative = np.cumsum(self.weight)
        return np.asarray(cumulative / cumulative[-1])


# -- laws that are stated ------------------------------------------------------------------------


def fixed(prompt_tokens: int, output_tokens: int, max_tokens: int | None = None) -> Workload:
    """Every request has the same lengths; ``max_tokens`` is declared, the output length if None."""
    declared = output_tokens if max_tokens is None else max_tokens
    return Workload(
        name=f"fixed {prompt_tokens}/{output_tokens}",
        prompt_tokens=np.array([prompt_tokens], dtype=np.int64),
        output_tokens=np.array([output_tokens], dtype=np.int64),
        max_tokens=np.array([declared], dtype=np.int64),
        weight=np.ones(1),
        exact=True,
        source="stated law",
    )


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
    outputs = np.tile(o, len(s))
    return Workload(
        name=f"uniform {prompt[0]}-{prompt[1]}/{output[0]}-{output[1]}",
        prompt_tokens=np.repeat(s, len(o)),
        output_tokens=outputs,
        max_tokens=outputs,
        weight=np.full(points, 1.0 / points),
        exact=True,
        source="stated law",
    )


def mixture(parts: Sequence[tuple[float, Workload]]) -> Workload:
    """Each request follows one of the laws, law i with probability q_i; the q_i sum to 1.

    It is exact if all its parts are; otherwise its sampling error is that of the pooled parts.
    """
    if not parts or any(q < 0 for q, _ in parts) or not np.isclose(sum(q for q, _ in parts), 1.0):
        raise ValueError("a mixture needs shares that are not negative and sum to 1")
    laws = [law for _, law in parts]
    return Workload(
        name=" + ".join(f"{q:g} x ({law.name})" for q, law in parts),
        prompt_tokens=np.concatenate([law.prompt_tokens for law in laws]),
        output_tokens=np.concatenate([law.output_tokens for law in laws]),
        max_tokens=np.concatenate([law.max_tokens for law in laws]),
        weight=np.concatenate([q * law.weight for q, law in parts]),
        exact=all(law.exact for law in laws),
        source="; ".join(dict.fromkeys(law.source for law in laws)),
    )


def clipped(workload: Workload, max_total_tokens: int) -> tuple[Workload, float]:
    """The law given that prompt and output together take at most ``max_total_tokens``.

    Returns it with the share of requests that was cut: a filtered workload is another workload, so
    the share belongs into every report. Raises ValueError if nothing is left.
    """
    keep = workload.prompt_tokens + workload.output_tokens <= max_total_tokens
    share = float(workload.weight[keep].sum())
    if share <= 0.0:
        shortest = int((workload.prompt_tokens + workload.output_tokens).min())
        raise ValueError(
            f"no request of {workload.name} has at most {max_total_tokens} tokens in total: "
            f"the shortest has {shortest}"
        )
    if keep.all():
        return workload, 0.0
    law = Workload(
        name=f"{workload.name}, at most {max_total_tokens} in total",
        prompt_tokens=workload.prompt_tokens[keep],
        output_tokens=workload.output_tokens[keep],
        max_tokens=np.minimum(
            workload.max_tokens[keep], max_total_tokens - workload.prompt_tokens[keep]
        ),
        weight=workload.weight[keep] / share,
        exact=workload.exact,
        source=workload.source,
    )
    return law, 1.0 - share


# -- laws that were observed -----------------------------------------------------------------------


def pairs(
    prompt: ArrayLike,
    output: ArrayLike,
    max_tokens: ArrayLike | None = None,
    *,
    name: str,
    source: str,
) -> Workload:
    """The empirical law of observed requests, arrays of shape (n,); means have a sampling error.

    Lengths stay paired, since they are correlated in real traffic. ``max_tokens`` is declared per
    request, the output length if None.
    """
    s, o = np.asarray(prompt, dtype=np.int64), np.asarray(output, dtype=np.int64)
    if s.shape != o.shape or s.ndim != 1 or not len(s):
        raise ValueError(f"{name}: prompt and output lengths must be two lists of one length")
    return Workload(
        name=name,
        prompt_tokens=s,
        output_tokens=o,
        max_tokens=o if max_tokens is None else np.asarray(max_tokens, dtype=np.int64),
        weight=np.full(len(s), 1.0 / len(s)),
        exact=False,
        source=source,
    )


def read_azure(path: Path) -> Workload:
    """Azure LLM inference trace 2023: columns ``ContextTokens`` and ``GeneratedTokens``."""
    return _read(path, lambda p: _csv_rows(p, "ContextTokens", "GeneratedTokens"))


def read_vidur(path: Path) -> Workload:
    """Processed trace of vidur: columns ``num_prefill_tokens`` and ``num_decode_tokens``."""
    return _read(path, lambda p: _csv_rows(p, "num_prefill_tokens", "num_decode_tokens"))


def read_sharegpt(path: Path) -> Workload:
    """ShareGPT lengths of LLMServingSim: columns ``prompt_tokens`` and ``output_tokens``."""
    return _read(path, lambda p: _csv_rows(p, "prompt_tokens", "output_tokens"))


def read_mooncake(path: Path) -> Workload:
    """Mooncake trace, one JSON object a line: ``input_length`` and ``output_length``.

    The shared prefixes that ``hash_ids`` describes are ignored: only lengths are read.
    """
    return _read(path, lambda p: _json_rows(p, "input_length", "output_length"))


Rows = Iterator[tuple[int, object, object]]


def _read(path: Path, rows: Callable[[Path], Rows]) -> Workload:
    """Lengths of all rows; ValueError names file and line of the first that is not a request."""
    lengths: list[tuple[int, int]] = []
    try:
        for line, prompt, output in rows(path):
            lengths.append((_length(path, line, prompt), _length(path, line, output)))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a trace: {error}") from error
    if not lengths:
        raise ValueError(f"{path}: the trace has no requests")
    name = path.name.split(".")[0]
    return pairs([s for s, _ in lengths], [o for _, o in lengths], name=name, source=path.name)


def _length(path: Path, line: int, text: object) -> int:
    try:
        value = int(str(text))
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{path}, line {line}: a length must be a positive integer, got {text!r}")
    return value


def _csv_rows(path: Path, prompt: str, output: str) -> Rows:
    with _open(path) as lines:
        reader = csv.DictReader(lines)
        for column in (prompt, output):
            if column not in (reader.fieldnames or []):
                found = ", ".join(reader.fieldnames or [])
                raise ValueError(f"{path}, line 1: no column {column!r} among {found}")
        for row in reader:
            yield reader.line_num, row[prompt], row[output]


def _json_rows(path: Path, prompt: str, output: str) -> Rows:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield number, row[prompt], row[output]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with {prompt} and {output}"
                ) from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
