"""`critrate size`: what it answers from a folder and a config, what it refuses, and what-ifs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis.numbers.estimate import Estimate
from analysis.operation.sizing import CannotSize, Share, fleet
from harness.commands.size_command import advice, answer, cost, text_lines
from harness.configs.sections import ConfigError
from harness.rehearsals.size_source import Replica, changed, replica_of, scaled_fit
from harness.rehearsals.sizing import Demand, checked_fleet, even_lengths, trace_demand
from loadgen.length_laws import lognormal
from tests.harness.program import exit_status

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference" / "vllm_fixed_64_64"
HARDWARE = {"gpu": "NVIDIA H100 80GB HBM3", "parameters": 8 * 10**9, "kv_bytes_per_token": 131072}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    content = {
        "name": "small",
        "limits": {"pool_tokens": 40000, "block_size": 16, "max_num_batched_tokens": 2048},
        "hardware": HARDWARE,
        "workload": {"uniform": {"prompt": [10, 90], "output": [10, 90]}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def short_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.rehearsals.sizing.REQUESTS", 1200)
    monkeypatch.setattr("harness.rehearsals.sizing.LEAST_REQUESTS", 1200)


def test_a_measured_folder(short_days: None) -> None:
    pytest.importorskip("numba", reason="the simulated days take long without")
    replica = replica_of(REFERENCE)
    found = answer(replica, Demand(300.0), 0.5, 0.95, 1, price=2.0)
    fleet = found["fleet"]
    # 27.97 req/s measured, 95 % of it usable at most.
    assert fleet["low"] <= fleet["likely"] <= fleet["replicas"] <= fleet["high"]
    assert fleet["replicas"] in (11, 12, 13)
    assert found["critical_rate"]["value"] == pytest.approx(27.97, abs=0.01)
    assert any("critical rate" in line for line in found["measured"])
    assert found["waits"]["tail"]["value"] < 0.5 < found["one_lost"]["tail"]["value"] * 10
    assert found["cost"]["per_hour"] == 2.0 * fleet["replicas"]
    lines = dict(text_lines({"demand": vars(Demand(300.0)), "fleets": [found]}))
    assert lines["replicas"].startswith(str(fleet["replicas"]))
    assert "an hour [" in lines["cost"]
    json.dumps(found)


def test_changes_move_what_they_should(config: Path) -> None:
    plain = replica_of(config)
    rates: dict[str, float] = {}
    wishes = (
        "pool=80000",
        "seqs=8",
        "context=100",
        "kv=fp8",
        "tp=2",
        "gpu=NVIDIA H200",
        "tp=2,kv=fp8",
    )
    for wish in wishes:
        replica = changed(plain, wish)
        rates[wish] = replica.critical_rate().value
        assert len(replica.assumed) > len(plain.assumed)
    before = plain.critical_rate().value
    assert rates["seqs=8"] < before
    assert all(rates[wish] > before for wish in wishes if wish != "seqs=8")
    assert rates["tp=2,kv=fp8"] > max(rates["tp=2"], rates["kv=fp8"])
    two = changed(plain, "tp=2")
    assert two.gpus == 2
    # 2 x (40 000 tokens + weights) less the weights, in tokens.
    pool = 2 * 40000 + 2 * HARDWARE["parameters"] / HARDWARE["kv_bytes_per_token"]
    assert two.limits.pool_tokens == pytest.approx(pool, abs=16)
    assert changed(plain, "context=100").served == pytest.approx(0.5, abs=0.02)
    direct = two.hardware.step_time().law.coefficients()
    np.testing.assert_allclose(two.fit.law.coefficients(), direct)


def test_a_scaled_fit_has_scaled_errors(config: Path) -> None:
    fit = replica_of(config).fit
    half = scaled_fit(fit, (0.5, 1.0, 0.5, 1.0))
    np.testing.assert_allclose(half.standard_errors(), fit.standard_errors() * [0.5, 1, 0.5, 1])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("tensor=2", "write NAME=VALUE"),
        ("tp", "write NAME=VALUE"),
        ("tp=0", "whole number"),
        ("tp=8", "ranks"),
        ("kv=int4", "fp8"),
        ("gpu=abacus", "no data sheet"),
        ("context=3", "context=3"),
        ("pool=3", "a block alone"),
    ],
)
def test_changes_that_cannot_be(config: Path, wish: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(replica_of(config), wish)


def test_hardware_is_needed_to_change_it() -> None:
    with pytest.raises(ConfigError, match="no section hardware"):
        changed(replica_of(REFERENCE), "tp=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--rate"),
        (("--rate", "0"), "positive"),
        (("--rate", "5", "--trace", "x.csv"), "--rate"),
        (("--trace", "nowhere.csv"), "no such file"),
        (("--rate", "5", "--what-if", "magic=1"), "NAME=VALUE"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_status(monkeypatch, "size", REFERENCE, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_target_that_no_fleet_meets(short_days: None) -> None:
    pytest.importorskip("numba", reason="the simulated days take long without")
    with pytest.raises(CannotSize, match="at any rate"):
        answer(replica_of(REFERENCE), Demand(300.0), 0.001, 0.95, 1)


def test_the_busiest_stretch_of_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rng = np.random.default_rng(3)
    # An hour at 1 req/s, in it ten minutes at 5.
    instants_s = np.sort(
        np.concatenate([rng.uniform(0, 3600, 3600), rng.uniform(1200, 1800, 2400)])
    )
    rows = [
        f"{np.datetime64('2024-05-10') + np.timedelta64(int(t * 1e6), 'us')},9,9".replace("T", " ")
        for t in instants_s
    ]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    found = trace_demand(trace, "azure", 300.0)
    assert found.rate == pytest.approx(5.0, abs=0.6)
    assert found.mean == pytest.approx(6000 / 3600, rel=0.01)
    assert found.burstiness == pytest.approx(1.0, abs=0.4)
    assert found.scaled(2.0).rate == 2 * found.rate
    with pytest.raises(ConfigError, match="less than one --window"):
        trace_demand(trace, "azure", 7200.0)
    with pytest.raises(ConfigError, match="known are"):
        trace_demand(trace, "morse", 300.0)


def test_even_lengths_are_the_law() -> None:
    law = lognormal((60, 0.8), (60, 0.8), 0.2, (4, 300), (4, 300))
    drawn = even_lengths(law, np.random.default_rng(1), 2000)
    s, o = drawn[:, 0].astype(float), drawn[:, 1].astype(float)
    assert (s * o + o * (o + 1) / 2).mean() == pytest.approx(
        law.mean(law.decode_demand()), rel=2e-3
    )
    assert np.corrcoef(s * o, np.arange(2000))[0, 1] == pytest.approx(0.0, abs=0.1)


def test_a_checked_fleet_says_all_four_cases(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.rehearsals.sizing.CHECK_EACH", 60)
    monkeypatch.setattr("harness.rehearsals.sizing.CHECK_MEMORIES", 0)
    replica: Replica = replica_of(config)
    rate = replica.critical_rate().value
    found: list[dict[str, Any]] = checked_fleet(replica, 2, 0.3 * rate, 0.95, 1)
    assert [one["text"].split(",")[0] for one in found] == ["round-robin"] * 2 + [
        "least-loaded"
    ] * 2
    assert all(0 < one["wait"]["value"] < 10 for one in found)
    monkeypatch.setattr("harness.rehearsals.sizing.CHECK_REQUEST_STEPS", 10)
    with pytest.raises(ConfigError, match="leave it out"):
        checked_fleet(replica, 2, 0.3 * rate, 0.95, 1)


@pytest.mark.parametrize(("error", "said"), [(0.0, False), (0.02, False), (0.03, True)])
def test_who_hardly_knows_the_rate_is_told_what_the_fleet_costs_for_that(
    error: float, said: bool
) -> None:
    rate = Estimate.log_normal(10.0, error, "req/s", "predicted")
    found = fleet(400.0, rate, 1.0, lambda n, s: Share(0.9, 0.0))
    text = advice(rate, found)
    assert (text is not None) == said
    if text is not None:
        assert f"{found.replicas} replicas are taken, not {found.likely}" in text
        assert "critrate run" in text


def test_cost_is_of_the_fleet_and_its_interval() -> None:
    class Sized:
        replicas, low, high, demand = 10, 9, 12, 100.0

    found = cost(Sized(), 3.0)  # type: ignore[arg-type]
    assert (found["per_hour"], found["per_hour_low"], found["per_hour_high"]) == (30, 27, 36)
    assert found["per_million_requests"] == pytest.approx(30 / 360000 * 1e6)
