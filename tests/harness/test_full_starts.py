"""What a burst does to simulated servers: nothing that lasts, waves, or a second branch."""

from functools import cache
from pathlib import Path

import pytest

from analysis.reports.summary import summary_lines
from analysis.verdicts.branches import Branches
from harness.configs.config import load_config
from harness.rehearsals.error_rates import Known, known
from harness.rehearsals.full_starts import SETTINGS, branches, capacities
from harness.rehearsals.rehearsal import rehearse

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("wide", 0.98, 1.02),
        ("SGLang", 0.97, 1.03),
        # Requests of one length that arrive together leave together: one prefill step for many.
        ("SGLang, fixed", 1.10, 1.30),
        # Looking ahead admits more of those that do not peak at once.
        ("SGLang, looks ahead, few", 0.70, 0.85),
    ],
)
def test_a_preload_keeps_the_capacity_of_some_servers_alone(
    name: str, low: float, high: float
) -> None:
    found = capacities(SETTINGS[name], requests=800, seed=1)
    assert low <= found.preloaded.value / found.poisson.value <= high
    assert found.preload > 100


@cache
def truth(name: str) -> Known:
    return known(SETTINGS[name], requests=500, theta=0.1)


def seen(name: str, rho: float, seeds: int) -> list[Branches]:
    return [branches(SETTINGS[name], truth(name), rho, seed, 0.1) for seed in range(seeds)]


@pytest.mark.parametrize(("name", "rho"), [("wide", 0.85), ("SGLang", 0.85), ("fixed", 1.02)])
def test_one_branch_is_not_taken_for_two(name: str, rho: float) -> None:
    assert all(pair.same is not False for pair in seen(name, rho, 2))


def test_looking_ahead_has_two_branches_for_requests_of_one_length() -> None:
    for pair in seen("SGLang, looks ahead, few", 0.9, 2):
        assert pair.same is False
        assert pair.empty.verdict != "unstable"
        assert pair.full_capacity is not None
        share = pair.full_capacity.value / pair.empty.arrival_rate
        assert share == pytest.approx(0.76 / 0.9, abs=0.03)
    assert all(pair.same for pair in seen("SGLang, looks ahead, few", 0.7, 1))


def test_an_experiment_from_both_starts_names_the_band() -> None:
    verdict = rehearse(load_config(CONFIGS / "branches.yaml"), seed=1)
    assert [run.start for run in verdict.runs] == ["empty", "full", "empty", "full", "empty"]
    assert verdict.outcome == "confirmed"
    assert any(r.startswith("no second branch seen at 0.70") for r in verdict.reasons)
    assert any(r.startswith("two branches at 0.90") for r in verdict.reasons)
    held = {p.name: p.holds for p in verdict.premises}
    assert held["one branch at 0.70"] is True
    assert held["one branch at 0.90"] is False
    band, capacity = verdict.warnings
    assert "bistable band" in band
    assert "under sustained Poisson overload" in capacity
    # The burst's capacity, a quarter lower, is not what counts as measured.
    assert verdict.ratio is not None
    assert verdict.ratio.value == pytest.approx(1.0, abs=0.05)
    text = " ".join(" ".join(summary_lines(verdict)).split())
    assert band in text


def test_a_full_start_alone_measures_with_a_warning() -> None:
    config = load_config(CONFIGS / "mock.yaml")
    load = config.load.model_copy(update={"start": "full", "rates": (0.85, 1.15)})
    verdict = rehearse(config.model_copy(update={"load": load}), seed=1)
    assert [run.verdict for run in verdict.runs] == ["stable", "unstable"]
    assert verdict.outcome == "confirmed"
    (warning,) = verdict.warnings
    assert "from a full start alone" in warning
