"""Predictions without a server: the paper's, mixed regimes, and what has no closed form."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis.numbers.estimate import Estimate
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTimeFit, exact_step_time
from harness.configs.config import ConfigError, ExperimentConfig, load_config
from harness.experiments import predict
from harness.experiments.predict import claimed, narrow_enough, offline_predictions
from tests.harness.program import exit_status

PAPER = Path(__file__).resolve().parents[2] / "configs" / "paper"


@pytest.mark.parametrize(
    ("name", "rate", "demand"),
    [("pd_1_1", 3.263, 1_079_151), ("pd_2_1", 3.956, 770_034), ("pd_1_2", 2.902, 1_339_675)],
)
def test_the_command_reproduces_the_paper(
    name: str,
    rate: float,
    demand: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def not_simulated(*_: object, **__: object) -> Estimate:
        raise ValueError("five seconds for the engine's rate, of which nothing is asked here")

    if name != "pd_1_1":
        monkeypatch.setattr(predict, "simulated_rate", not_simulated)
    assert exit_status(monkeypatch, "predict", PAPER / f"{name}.yaml", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert (both["simulated"] is None) == (name != "pd_1_1")
    found = both["paper"]
    assert round(found["critical_rate"]["value"], 3) == rate
    assert round(found["kv_demand"]["value"]) == demand


def test_a_prediction_is_made_from_the_estimated_law() -> None:
    """From 80 % of the chats, whatever is offered; the two sides are other laws."""
    sides = {
        side: {"shipped": "azure_2023_conv", "part": {"side": side}}
        for side in ("estimate", "test")
    }
    base = {
        "name": "parts",
        "limits": {"pool_tokens": 65536},
        "step_time": {"b0_ms": 20},
    }

    def demand(**laws: Any) -> float:
        config = ExperimentConfig.model_validate({**base, **laws}, context={"folder": Path()})
        return float(offline_predictions(config)["engine"]["kv_demand"]["value"])

    estimated, other = (demand(workload=sides[side]) for side in ("estimate", "test"))
    assert demand(predict_from=sides["estimate"], workload=sides["test"]) == estimated
    assert other != estimated
    assert other == pytest.approx(estimated, rel=0.05)


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


@pytest.mark.parametrize("name", ["vllm_uniform_1_1", "sglang_fixed"])
def test_probes_go_on_while_they_narrow_the_prediction(name: str) -> None:
    """SGLang's waves are not known to two fifths of the band: no probe tells more of them."""
    config = load_config(PAPER.parent / "experiments" / f"{name}.yaml")
    assert config.server is not None and config.server.launch is not None
    launch, law = config.server.launch, config.law()
    assert launch.pool_tokens is not None and launch.step_time is not None
    sglang = SGLangRules(radix_cache=False) if launch.runs == "sglang" else None
    block = launch.block_size or 1
    limits = EngineLimits(num_blocks=launch.pool_tokens // block, block_size=block, sglang=sglang)
    exact = exact_step_time(launch.step_time.law())
    enough = narrow_enough(config, law, limits)

    def known_to(share: float) -> StepTimeFit:
        """Every coefficient has this relative standard error."""
        errors = share * exact.law.coefficients()
        return replace(exact, covariance=np.diag(errors**2))

    rate = claimed(config, law, limits, exact, "P1").critical_rate.at_level(0.90)
    assert (rate.half_width > predict.NARROW * config.theta * rate.value) == (sglang is not None)
    assert not enough(known_to(0.05))
    assert enough(known_to(0.005)) and enough(exact)
