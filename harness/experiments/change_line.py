"""The line under a verdict that says what binds, what raising it gives, and what binds next."""

from __future__ import annotations

from analysis.operation.what_to_change import what_to_change
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.step_time import StepTimeFit
from harness.configs.config import load_config
from harness.records.store import Store


def to_raise_it(store: Store) -> str:
    """The line for a results folder; empty where it holds no calibration to say it from."""
    if not store.has("calibration.json"):
        return ""
    fit = StepTimeFit.from_dict(store.read_json("calibration.json")["fit"])
    limits = EngineLimits.from_dict(store.read_json("limits.json")["used"])
    law = load_config(store.path / "config.yaml").law()
    return what_to_change(law, limits, fit).text
