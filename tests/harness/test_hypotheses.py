"""Hypotheses: the rule of their verdicts, their configs, and the page that is derived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.numbers.estimate import Estimate
from harness.hypotheses.hypotheses import TESTS
from harness.hypotheses.hypotheses_page import page, real_verdicts
from harness.hypotheses.hypothesis_config import load_hypothesis
from harness.hypotheses.hypothesis_verdict import ANYWHERE, Part, Verdict, over_seeds

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "theory").glob("h[0-9]*.yaml"))
KEPT = ROOT / "results" / "reference"


def estimate(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, 0.95, "", "test")


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (1.1, 1.9, "confirmed"),
        (0.5, 0.9, "refuted"),
        (2.1, 2.2, "refuted"),
        (0.9, 1.2, "cannot say"),
        (0.5, 2.5, "cannot say"),
    ],
)
def test_a_figure_is_judged_by_its_interval(low: float, high: float, outcome: str) -> None:
    assert Part("x", estimate(low, high), (1.0, 2.0)).outcome == outcome


def test_a_verdict_is_that_of_its_worst_figure_and_survives_json() -> None:
    good, bad, unsure = (estimate(*x) for x in ((1.1, 1.2), (3.0, 4.0), (0.9, 1.1)))
    parts = [Part("good", good, (1.0, 2.0)), Part("shown", bad, ANYWHERE)]
    assert Verdict("H1", tuple(parts)).outcome == "confirmed"
    parts.append(Part("unsure", unsure, (1.0, 2.0)))
    assert Verdict("H1", tuple(parts)).outcome == "cannot say"
    parts.append(Part("bad", bad, (-float("inf"), 2.0)))
    verdict = Verdict("H1", tuple(parts))
    assert verdict.outcome == "refuted"
    again = Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False)))
    assert again == verdict


def test_an_interval_over_seeds_is_students() -> None:
    found = over_seeds([1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5
    assert found.half_width == pytest.approx(3.182 * 1.29099 / 2, rel=1e-3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_read(path: Path) -> None:
    config = load_hypothesis(path)
    assert config.hypothesis.lower() == path.stem
    assert config.hypothesis in TESTS


def test_the_page_is_what_the_results_say() -> None:
    configs = sorted(
        (load_hypothesis(path) for path in CONFIGS), key=lambda c: int(c.hypothesis[1:])
    )
    verdicts = {
        path.stem.upper(): Verdict.from_dict(json.loads(path.read_text()))
        for path in (KEPT / "hypotheses").glob("*.json")
    }
    text = page(configs, verdicts, real_verdicts(KEPT))
    assert text == (ROOT / "docs" / "hypotheses.md").read_text(), "run scripts/hypotheses"
    rows = [line for line in text.splitlines() if line.startswith("| H")]
    assert [row.split(" | ")[0] for row in rows[:10]] == [f"| H{k}" for k in range(1, 11)]


def test_small_runs_end_as_the_theory_says() -> None:
    """H7's fixed lengths: a cap at x* evicts nobody. H9: bursts leave the critical rate alone and
    lengthen the queue. H10: the engine's g is what a request holds."""
    pytest.importorskip("numba")
    by_name = {path.stem: load_hypothesis(path) for path in CONFIGS}
    seven = by_name["h7"]
    cases = tuple(
        case.model_copy(update={"slots": 2000, "warm_up_slots": 1000, "seeds": 2})
        for case in seven.slot_cases[:3]
    )
    assert TESTS["H7"](seven.model_copy(update={"slot_cases": cases})).outcome == "confirmed"
    ten = by_name["h10"]
    assert ten.engine is not None
    engine = ten.engine.model_copy(
        update={"requests": 300, "seeds": 2, "workloads": ten.engine.workloads[:1]}
    )
    parts = {
        part.what: part.estimate.value
        for part in TESTS["H10"](ten.model_copy(update={"engine": engine})).parts
        if part.decides
    }
    ours, papers = parts.values()
    assert ours == pytest.approx(1.0, abs=0.01) and papers < 0.95
    nine = by_name["h9"]
    assert nine.engine is not None
    engine = nine.engine.model_copy(update={"requests": 3000, "seeds": 3})
    bursts = nine.model_copy(update={"engine": engine, "arrivals": nine.arrivals[1:2]})
    critical, _, _, queue = (p.estimate.value for p in TESTS["H9"](bursts).parts)
    assert critical == pytest.approx(1.0, abs=0.01) and queue > 3
