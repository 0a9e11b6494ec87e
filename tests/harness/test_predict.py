"""Predictions without a server: mixed regimes, and what has no closed form."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.estimate import Estimate
from harness import predict
from harness.config import ConfigError, ExperimentConfig, load_config
from harness.predict import offline_predictions


def regime(output_tokens: int, b0_ms: float) -> dict[str, Any]:
    workload = {"fixed": {"prompt": 10, "output": output_tokens}}
    return {"share": 0.5, "workload": workload, "step_time": {"b0_ms": b0_ms}}


MIXED = {"limits": {"pool_tokens": 320}, "regimes": [regime(10, 10.0), regime(20, 20.0)]}


def config_of(tmp_path: Path, sections: dict[str, Any]) -> ExperimentConfig:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "x", **sections}))
    return load_config(path)


@pytest.mark.parametrize(
    ("rates", "summary"),
    [
        ((2.0, 6.0), "3 req/s"),
        ((2.0, None), "no rate of the mixture: regime 2 has no second opinion: the queue emptied"),
        ((None, 2.0), "no rate of the mixture: regime 1 has no second opinion: the queue emptied"),
    ],
)
def test_a_mixture_has_a_simulated_rate_where_every_regime_has_one(
    rates: tuple[float | None, ...],
    summary: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = list(rates)

    def simulated(*_: object, **__: object) -> Estimate:
        rate = left.pop(0)
        if rate is None:
            raise ValueError("the queue emptied")
        return Estimate.exact(rate, "req/s", "stub")

    monkeypatch.setattr(predict, "simulated_rate", simulated)
    found = offline_predictions(config_of(tmp_path, MIXED))
    assert found["summary"]["simulated"].startswith(summary)
    mixed = found["mixture"]["simulated"]
    assert (mixed is None) == (None in rates)
    if mixed is not None:
        assert mixed["value"] == pytest.approx(3.0)
    for claim in ("paper", "engine"):
        alone = [part[claim]["critical_rate"]["value"] for part in found["regimes"]]
        harmonic = 2 / sum(1 / rate for rate in alone)
        assert found["mixture"][claim]["value"] == pytest.approx(harmonic)


ONE_TOKEN = {
    "limits": {"pool_tokens": 320, "sglang": {}},
    "workload": {"fixed": {"prompt": 10, "output": 1}},
    "step_time": {"b0_ms": 10.0},
}
ONE_TOKEN_REGIME = {"limits": ONE_TOKEN["limits"], "regimes": [regime(1, 10.0) | {"share": 1.0}]}


@pytest.mark.parametrize("sections", [ONE_TOKEN, ONE_TOKEN_REGIME])
def test_what_has_no_closed_form_is_one_sentence(sections: dict[str, Any], tmp_path: Path) -> None:
    message = "^no prediction of claim engine: .* every output is one token"
    with pytest.raises(ConfigError, match=message):
        offline_predictions(config_of(tmp_path, sections))
