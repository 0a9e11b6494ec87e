"""Is what arrives the drawn Poisson schedule, one for one? Each seed by itself, and all pooled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from generators.at_sink import window_counts
from generators.commands import Client
from generators.measured import Bench, Offered, offer, read_noted
from generators.schedule import OF_A_STREAM, drawn
from numpy.typing import NDArray
from scipy import stats

MOST_RATE = 1000.0
"""Of all streams side by side: what is judged here is the arrivals, not the load."""
TOKENS = 2


@dataclass(frozen=True)
class Asked:
    """``windows`` seconds in all, dealt out to the seeds from ``seed`` on."""

    rate: float
    seeds: int
    seed: int
    at_once: int
    windows: int

    @property
    def seconds(self) -> float:
        return float(math.ceil(self.windows / self.seeds))


@dataclass(frozen=True)
class Streams:
    """Of one client at one rate: gaps and counts of each seed as they arrived, and the lags."""

    gaps_s: list[NDArray[np.float64]]
    counts: list[NDArray[np.int64]]
    lag_ms: list[NDArray[np.float64]]
    one_for_one: bool
    problems: list[str]


def streams_of(bench: Bench, client: Client, asked: Asked) -> Streams:
    """Offer them, some side by side, and cut the sink's records into the seeds."""
    found = Streams([], [], [], True, [])
    side_by_side = max(1, min(asked.at_once, asked.seeds, int(MOST_RATE / asked.rate)))
    one_for_one = True
    for first in range(0, asked.seeds, side_by_side):
        seed = asked.seed + first
        count = min(side_by_side, asked.seeds - first)
        came = offer(bench, client, asked.rate, asked.seconds, seed, TOKENS, count)
        if came.problem:
            found.problems.append(came.problem)
        one_for_one &= add(found, came, asked, seed, count)
    return Streams(found.gaps_s, found.counts, found.lag_ms, one_for_one, found.problems)


def add(found: Streams, came: Offered, asked: Asked, seed: int, count: int) -> bool:
    """Are the arrivals the schedule of these seeds, drawn again here, one for one?"""
    instants_s, numbers = drawn(asked.rate, asked.seconds, seed, count)
    order = np.argsort(numbers)
    numbers, due_s = numbers[order], instants_s[order]
    noted, records = read_noted(came.load.records), came.sink.records
    records = records[np.argsort(records["number"], kind="stable")]
    if not (
        np.array_equal(numbers, noted["number"]) and np.array_equal(numbers, records["number"])
    ):
        return False
    start_ns = int(noted["due_ns"][0] - np.rint(due_s[0] * 1e9))
    drawn_ns = start_ns + np.rint(due_s * 1e9).astype(np.int64)
    arrived_s = (records["arrival_ns"] - start_ns) / 1e9
    for index in range(count):
        own = numbers // OF_A_STREAM == index
        found.gaps_s.append(np.diff(np.sort(arrived_s[own])))
        found.counts.append(window_counts(arrived_s[own], asked.seconds))
    found.lag_ms.append((records["arrival_ns"] - noted["due_ns"]) / 1e6)
    return bool((np.abs(noted["due_ns"] - drawn_ns) <= 1000).all())


FIDELITY = {
    "client": 31,
    "req/s": 6,
    "seeds": 6,
    "windows": 8,
    "one for one": 12,
    "KS p uniform: p": 16,
    "KS p < 0.05": 12,
    "dispersion": 17,
    "gap correlation": 19,
    "lag ms p50, p99, max": 21,
}


def fidelity_rows(bench: Bench, client: Client, loads: list[Asked]) -> Iterator[list[str]]:
    """A row of the table for each load."""
    for asked in loads:
        found = streams_of(bench, client, asked)
        head = [client.name, f"{asked.rate:g}", f"{asked.seeds}"]
        if not found.gaps_s:
            why = "; ".join(found.problems) or "arrivals are missing"
            yield [*head, "-", "no", why, *["-"] * (len(FIDELITY) - 6)]
            continue
        yield [*head, *judged(found, asked.rate)]


def judged(found: Streams, rate: float) -> list[str]:
    p = np.array([stats.kstest(gaps * rate, "expon").pvalue for gaps in found.gaps_s])
    counts = np.concatenate(found.counts)
    index, index_se = pooled_dispersion(counts)
    correlation, correlation_se = pooled_correlation(found.gaps_s)
    lag_ms = np.concatenate(found.lag_ms)
    return [
        f"{len(counts)}",
        "yes" if found.one_for_one else "no",
        f"{stats.kstest(p, 'uniform').pvalue:.2f}",
        f"{(p < 0.05).mean():.0%}",
        f"{index:.3f} +- {index_se:.3f}",
        f"{correlation:.4f} +- {correlation_se:.4f}",
        ", ".join(f"{value:.2f}" for value in np.quantile(lag_ms, [0.5, 0.99, 1.0])),
    ]


def pooled_dispersion(counts: NDArray[np.int64]) -> tuple[float, float]:
    """Variance over mean of the counts of all windows, and its standard error for a Poisson law of
    that mean: sqrt((2 + 1/mean) / n), from the fourth moment."""
    mean = float(counts.mean())
    return float(counts.var(ddof=1)) / mean, math.sqrt((2 + 1 / mean) / len(counts))


def pooled_correlation(gaps_s: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Lag-1 autocorrelation of the gaps within the streams, all pooled about their common mean."""
    mean = np.concatenate(gaps_s).mean()
    apart = [gaps - mean for gaps in gaps_s]
    products = sum(float(one[1:] @ one[:-1]) for one in apart)
    squares = sum(float(one @ one) for one in apart)
    return products / squares, 1 / math.sqrt(sum(len(one) for one in apart))
