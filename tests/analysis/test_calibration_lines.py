"""What a calibration's record says in words and in its picture."""

from __future__ import annotations

from copy import deepcopy
from typing import Any
from xml.etree import ElementTree

import pytest

from analysis.calibration.calibration_lines import calibration_lines, pool_differs
from analysis.reports.figures_of_steps import step_time_figure
from analysis.reports.report_figures import calibration_group
from analysis.reports.report_tables import trust_tables

DESIGNS = {"alone": (1, 30, 1), "short": (100, 2500, 100), "long": (8, 5000, 8)}


def record() -> dict[str, Any]:
    law = {
        "b0_s": 0.014,
        "b1_s_per_token": 1e-5,
        "b2_s_per_kv_token": 4e-7,
        "b3_s_per_request": 0.0,
    }
    observations = [
        {
            "probe": name,
            "steps": 40.0,
            "tokens": 40.0 * tokens,
            "kv_tokens": 40.0 * kv,
            "running": 40.0 * running,
            "duration_s": 40 * (0.014 + 1e-5 * tokens + 4e-7 * kv) * (1 + off),
        }
        for name, (tokens, kv, running) in DESIGNS.items()
        for off in (-0.002, 0.001, 0.002)
    ]
    step = {"value": 0.018, "low": 0.0176, "high": 0.0184, "level": 0.95, "unit": "s", "method": ""}
    pool = step | {"value": 8190.0, "low": 8150.0, "high": 8230.0, "unit": "tokens"}
    return {
        "fit": {
            "law": law,
            "covariance": [[1e-12 if i == j else 0.0 for j in range(4)] for i in range(4)],
            "condition_number": 4.9,
            "residual_relative": 0.002,
            "interval_dof": 5,
            "method": "least squares",
            "lack_of_fit": {
                "statistic": 1.5,
                "p_value": 0.3,
                "designs_dof": 5,
                "repeats_dof": 18,
            },
        },
        "observations": observations,
        "duration_s": 27.0,
        "pool_shown_tokens": 8192,
        "pool_implied": pool,
        "checks": [{"source": "step counter", "quantity": "steps", "text": "engine / client 1.00"}],
        "saturated": {
            "claim": "engine",
            "step_time_s": step,
            "tokens": 150.0,
            "kv_tokens": 7500.0,
            "running": 75.0,
        },
    }


def test_every_line_says_its_number() -> None:
    lines = dict(calibration_lines(record()))
    assert lines["b0"].startswith("14.0")
    # 1e-6 s less the widening from the normal distribution to Student's t for 5.
    assert lines["b0"].endswith("standard error 762 ns")
    assert "well apart" in lines["condition"] and "4.9" in lines["condition"]
    assert "9 probes of 3 designs" in lines["scatter"]
    assert "p = 0.3, F(5, 18) = 1.50" in lines["lack of fit"]
    assert lines["check 1"] == "step counter, steps: engine / client 1.00"
    assert lines["saturated"].startswith("18.0") and "[17.6" in lines["saturated"]
    assert "at 150 tokens, 7 500 KV tokens and 75.0 requests" in lines["saturated"]
    assert "tokens 1.50, KV 1.50, requests 0.75" in lines["reach"]


@pytest.mark.parametrize(
    ("low", "high", "differs"),
    [(8150.0, 8230.0, False), (8300.0, 8400.0, False), (8400.0, 8500.0, True), (7e3, 8e3, True)],
)
def test_a_pool_differs_beyond_its_error_and_two_percent(
    low: float, high: float, differs: bool
) -> None:
    changed = record()
    changed["pool_implied"] |= {"value": (low + high) / 2, "low": low, "high": high}
    assert pool_differs(changed) is differs
    assert ("DISAGREE" in dict(calibration_lines(changed))["KV pool"]) is differs


def test_what_is_not_known_is_said() -> None:
    changed = record()
    changed["pool_implied"] = None
    changed["fit"]["lack_of_fit"] = None
    del changed["saturated"]
    lines = dict(calibration_lines(changed))
    assert "too little" in lines["KV pool"] and "not tested" in lines["lack of fit"]
    assert "saturated" not in lines and not pool_differs(changed)


@pytest.mark.parametrize(("p", "statistic", "said"), [(0.002, 9.0, "9.00"), (0.0, None, "bound")])
def test_a_law_that_is_not_linear_is_said_to_be(p: float, statistic: Any, said: str) -> None:
    changed = record()
    changed["fit"]["lack_of_fit"] |= {"p_value": p, "statistic": statistic}
    for seen in changed["observations"]:
        if seen["probe"] == "short":
            seen["duration_s"] *= 1.05
    line = dict(calibration_lines(changed))["lack of fit"]
    assert "NOT LINEAR" in line and said in line
    assert "furthest off the law: 'short' +5" in line


def test_the_picture_names_every_design_and_the_extrapolated_step() -> None:
    svg = step_time_figure(record())
    assert svg is not None
    text = " ".join(e.text or "" for e in ElementTree.fromstring(svg).iter())
    for name in DESIGNS:
        assert name in text
    assert "saturated, extrapolated: 18.0" in text
    assert svg == step_time_figure(deepcopy(record()))
    unlike = step_time_figure(record() | {"saturated": None})
    assert unlike is not None and "extrapolated" not in unlike


@pytest.mark.parametrize("old", [{}, {"fit": {"law": {}}, "observations": [{"steps": 3.0}]}])
def test_an_older_record_shows_nothing_of_it(old: dict[str, Any]) -> None:
    assert calibration_lines(old) == [] and trust_tables(old) == []
    assert step_time_figure(old) is None and calibration_group(old) == []


def test_the_report_shows_lines_and_picture() -> None:
    (table,) = trust_tables(record())
    assert ("b0" not in {row[0] for row in table.rows}) and len(table.rows) == 7
    (group,) = calibration_group(record())
    assert "<svg" in group.panels[0].svg
