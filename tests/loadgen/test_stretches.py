"""A load of stretches is one Poisson process on its own clock."""

import numpy as np
import pytest

from loadgen.fidelity import fidelity_of_stretches
from loadgen.records import RequestRecord
from loadgen.stretches import Stretch, operational, stretch_arrivals

RATES = (5.0, 40.0, 160.0, 80.0)


def stretches(seed: int = 1, rates: tuple[float, ...] = RATES) -> list[Stretch]:
    return [
        Stretch(index=i, start_s=2.0 * i, end_s=2.0 * (i + 1), rate=rate, seed=seed)
        for i, rate in enumerate(rates)
    ]


def records(instants_s: np.ndarray, lag_ms: float = 0.0) -> list[RequestRecord]:
    return [
        RequestRecord(
            id=i,
            scheduled_ns=round(t * 1e9),
            sent_ns=round(t * 1e9 + lag_ms * 1e6),
            first_token_ns=None,
            last_token_ns=None,
            prompt_tokens=8,
            output_tokens_designed=8,
            max_tokens=8,
            output_tokens=0,
            prompt_tokens_reported=None,
            outcome="unfinished",
        )
        for i, t in enumerate(instants_s.tolist())
    ]


def test_the_clock_counts_expected_arrivals():
    at_s = np.array([0.0, 2.0, 3.0, 8.0])
    assert operational(stretches(), at_s) == pytest.approx([0.0, 10.0, 50.0, 570.0])


def test_a_stretch_keeps_to_itself_and_to_its_seed():
    drawn = [stretch_arrivals(stretch) for stretch in stretches()]
    for stretch, instants in zip(stretches(), drawn, strict=True):
        assert (instants >= stretch.start_s).all() and (instants < stretch.end_s).all()
        assert (np.diff(instants) > 0).all()
    # A later decision leaves what was drawn before as it is.
    other = [stretch_arrivals(stretch) for stretch in stretches(rates=(5.0, 40.0, 9.0, 1.0))]
    assert all((a == b).all() for a, b in zip(drawn[:2], other[:2], strict=True))
    assert len(stretch_arrivals(stretches(seed=2)[2])) != len(drawn[2])


def test_an_honest_load_passes_at_every_seed():
    for seed in range(40):
        parts = stretches(seed)
        sent = np.concatenate([stretch_arrivals(stretch) for stretch in parts])
        verdict = fidelity_of_stretches(parts, records(sent), 8.0, 0)
        assert verdict.valid, [c for c in verdict.checks if c.passed is False]


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda sent: sent[::2], "schedule"),
        (lambda sent: np.sort(np.where(sent > 4, sent - 0.02, sent)), "schedule"),
    ],
)
def test_another_load_does_not(spoil, name):
    parts = stretches()
    sent = np.concatenate([stretch_arrivals(stretch) for stretch in parts])
    verdict = fidelity_of_stretches(parts, records(spoil(sent)), 8.0, 0)
    assert name in [c.name for c in verdict.checks if c.passed is False]


def test_late_sends_are_named():
    parts = stretches()
    sent = np.concatenate([stretch_arrivals(stretch) for stretch in parts])
    verdict = fidelity_of_stretches(parts, records(sent, lag_ms=50.0), 8.0, 0)
    assert "send lag" in [c.name for c in verdict.checks if c.passed is False]
