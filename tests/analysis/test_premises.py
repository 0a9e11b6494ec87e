"""Premises, each by its own count."""

from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest

from analysis.schedulers.frames import RunFrames
from analysis.verdicts.premises import _inexact


@pytest.mark.parametrize(
    ("outcomes", "lengths", "wrong"),
    [
        (["completed", "completed"], [8, 8], 0),
        (["completed", "completed"], [8, 7], 1),
        (["completed", "unfinished"], [9, 3], 1),
    ],
)
def test_lengths_are_those_that_the_client_received(
    outcomes: list[str], lengths: list[int], wrong: int
) -> None:
    """Whatever reasons an engine gives: SGLang counts none, and clips without a word."""
    requests = pd.DataFrame(
        {"outcome": outcomes, "output_tokens": lengths, "output_tokens_designed": [8, 8]}
    )
    frames = RunFrames(cast(Any, None), 1.0, requests, pd.DataFrame(), pd.DataFrame())
    run = SimpleNamespace(frames=frames)
    assert _inexact(cast(Any, SimpleNamespace(runs=[run]))) == wrong
