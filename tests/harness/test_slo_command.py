"""``critrate slo`` on the record of a real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import harness.commands.slo_command
from harness.cli import app
from harness.commands.slo_command import drawn

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


@pytest.fixture(autouse=True)
def short_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        harness.commands.slo_command,
        "drawn",
        lambda law, seed: drawn(law, seed, count=2, requests=700),
    )


def test_what_is_predicted_stands_beside_what_was_measured() -> None:
    asked = ["slo", str(REFERENCE / "sglang_uniform"), "--ttft", "0.5"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert 0.6 < found["share"]["value"] < 0.9
    assert found["rate"] == pytest.approx(found["share"]["value"] * found["critical_rate"]["value"])
    (run,) = found["runs"]
    predicted = run["predicted_p95_s"]["value"]
    assert run["share"] == pytest.approx(0.8, abs=0.04)
    # One run of 1700 requests, in which p95 itself wanders by a third.
    assert run["measured_p95_s"] / predicted == pytest.approx(1.0, abs=0.5)


def test_a_target_below_a_step_holds_at_no_rate() -> None:
    shown = CliRunner().invoke(app, ["slo", str(REFERENCE / "sglang_uniform"), "--ttft", "0.001"])
    assert shown.exit_code == 11
    assert "under 1.00 ms at no rate" in shown.output
