"""Theory configs: what they refuse, and what their cases give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.configs.sections import ConfigError
from harness.hypotheses.theory import (
    batch_condition,
    law_of,
    run_case,
    slot_condition,
    slot_rate,
    slot_run,
)
from harness.hypotheses.theory_config import BatchCase, SlotCase, load_theory

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "theory"
TABLES = sorted(p for p in CONFIGS.glob("*.yaml") if p.stem[:2] in ("pb", "pc", "da"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_every_config_is_read_and_has_its_condition(path: Path) -> None:
    config = load_theory(path)
    assert config.name == path.stem
    conditions = [slot_condition(case) for case in config.slot_cases]
    conditions += [batch_condition(case) for case in config.batch_cases]
    assert all(0 <= c.below <= c.above and c.source for c in conditions)


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_theory(path)
    return str(error.value)


CASE = """
name: c
about: a
defaults:
  memory_tokens: 100
  classes: [{prompt_tokens: 10, output_tokens: 5}]
  slots: 400
  warm_up_slots: 100
  seeds: 2
slot_cases:
  - {name: x, policy: greedy_restart%s}
"""


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (", rate: 1, load: 0.5", "the same thing"),
        (", budget: 1, drawn_budget: [0, 2]", "one budget at most"),
        (", class_budgets: [1]", "policy class_budgets"),
        (", warm_up_slots: 400", "nothing is left"),
        (", colour: red", "slot_cases.0.colour"),
        (", memory_tokens: 0", "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, more: str, reason: str) -> None:
    assert reason in refused(tmp_path, CASE % more)


def test_defaults_are_those_of_every_case_and_seeds_repeat(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CASE % ", load: 0.5")
    (case,) = load_theory(path).slot_cases
    assert slot_rate(case) == pytest.approx(0.5 * 100 / 65)
    first, again, other = (slot_run(case, seed).slots for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first["arrived"] != other["arrived"]).any()
    assert abs(first["arrived"].mean() - slot_rate(case)) < 0.2


def test_a_law_of_ranges() -> None:
    case = SlotCase.model_validate(
        {
            "name": "x",
            "policy": "look_ahead",
            "memory_tokens": 1000,
            "classes": [
                {"prompt_tokens": [1, 3], "output_tokens": [2, 5], "share": 3},
                {"prompt_tokens": 0, "output_tokens": 7},
            ],
            "slots": 10,
            "warm_up_slots": 0,
        }
    )
    law = law_of(case.classes)
    assert law.shares.sum() == pytest.approx(1.0)
    assert law.shares @ law.output_tokens == pytest.approx(0.75 * 3.5 + 0.25 * 7)
    assert not law.fixed


def test_cases_of_both_models_give_what_their_papers_say() -> None:
    pytest.importorskip("numba")
    flow = load_theory(CONFIGS / "pc_classes.yaml").slot_cases[4]
    found = run_case(flow.model_copy(update={"slots": 2500, "warm_up_slots": 500, "seeds": 2}))
    assert found.growth is not None and found.growth.verdict == "grows"
    assert found.growth.drift.value == pytest.approx(3.0, abs=0.25)
    assert found.quantities["most used"].value == 16_240
    by_name = {c.name: c for c in load_theory(CONFIGS / "dai_batching.yaml").batch_cases}
    for name, verdict in (("Sarathi 128, 290/990", "stable"), ("Orca 128, 290/990", "grows")):
        case = by_name[name]
        assert isinstance(case, BatchCase)
        short = case.model_copy(update={"horizon_s": 600.0, "warm_up_s": 200.0, "seeds": 2})
        seen = run_case(short)
        assert seen.growth is not None and seen.growth.verdict == verdict, seen
