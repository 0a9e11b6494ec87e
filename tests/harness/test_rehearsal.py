"""Whole experiments in virtual time: what they conclude of servers with known parameters."""

from pathlib import Path

import pytest

from harness.configs.config import load_config
from harness.rehearsals.rehearsal import rehearse

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("config", "outcome", "headline", "binding"),
    [
        ("mock_sglang", "confirmed", "within 10 %", "output_reservation"),
        ("mock_sglang_paper", "premise_violated", "output reservation", "output_reservation"),
        ("mock", "confirmed", "within 10 %", "kv_cache"),
    ],
)
def test_what_an_experiment_concludes(
    config: str, outcome: str, headline: str, binding: str
) -> None:
    verdict = rehearse(load_config(CONFIGS / f"{config}.yaml"), seed=5)
    assert verdict.outcome == outcome, verdict.reasons
    assert headline in verdict.headline
    assert verdict.binding_observed == binding
    premises = {p.name: p for p in verdict.premises}
    reserves = binding == "output_reservation"
    assert premises["no output reservation"].holds is not reserves
    assert premises["KV cache binds"].holds is True
    assert [c.text for c in verdict.audit if c.holds is False] == []
    if reserves:
        # What is in use and what is set aside make up the pool, but for the head of the queue.
        assert 0.2 < premises["no output reservation"].observed < 0.32
