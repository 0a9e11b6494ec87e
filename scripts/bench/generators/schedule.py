"""What the bench's own clients share: a drawn schedule, its requests, and what they note of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadgen.arrivals import poisson

START_S = 0.05
"""From here to the first arrival's time zero."""
PROMPT = list(range(10, 26))
OF_A_STREAM = 10_000_000
NOTED = np.dtype([("number", "<i8"), ("due_ns", "<i8"), ("sent_ns", "<i8"), ("done_ns", "<i8")])


def drawn(
    rate: float, seconds: float, seed: int, streams: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Poisson arrivals of so many seeds from ``seed`` on, side by side: ascending instants in s, and the
    number of each: `OF_A_STREAM` times its stream's index plus its index there."""
    parts = [poisson(rate, seconds, seed + index) for index in range(streams)]
    numbers = [index * OF_A_STREAM + np.arange(len(part)) for index, part in enumerate(parts)]
    instants, numbered = np.concatenate(parts), np.concatenate(numbers)
    order = np.argsort(instants, kind="stable")
    return instants[order], numbered[order]


def bodies(numbers: NDArray[np.int64], tokens: int) -> list[bytes]:
    """Requests for ``tokens`` tokens; the sink notes the seed: it is the request's number."""
    body = {
        "model": "sink",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    text = json.dumps(body)[:-1]
    return [f'{text}, "seed": {number}}}'.encode() for number in numbers.tolist()]


def write_notes(
    path: Path,
    numbers: NDArray[np.int64],
    due_ns: NDArray[np.int64],
    sent_ns: Sequence[int],
    done_ns: Sequence[int],
) -> None:
    """One row per request; 0 where it was not sent or not finished."""
    noted = np.zeros(len(due_ns), NOTED)
    noted["number"], noted["due_ns"] = numbers, due_ns
    noted["sent_ns"], noted["done_ns"] = sent_ns, done_ns
    noted.tofile(path)
