"""Several servers behind one list of URLs: from configs and folders to a verdict and a row."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from analysis.reports.replica_tables import imbalance_table, rates_table
from analysis.reports.summary import summary_lines
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.verdicts.verdict import Verdict
from harness.cli import app
from harness.configs.config import ConfigError, ExperimentConfig, load_config
from harness.evidence.evidence_rows import Row, read_row
from harness.evidence.reference import export
from harness.evidence.replica_page import replica_sections
from harness.experiments.analyse import load_evidence
from harness.experiments.replicas import at_once, predictions_of_all
from harness.live.calibrate import Calibration
from harness.live.prober import CalibrationFailed
from harness.live.target import own_gpus, require_alike, target_server
from harness.records.store import INPUTS, Store, StoreError
from harness.records.streams import of_replica
from harness.rehearsals.error_rates import SETTINGS
from harness.rehearsals.rehearsal import SimulatedServer
from harness.rehearsals.replica_rehearsal import rehearse_replicas
from harness.servers.server_limits import ServerLimits
from loadgen.arrivals import run_arrivals
from loadgen.records import Run
from tests.harness.judged import _paced, judged_folder

WORKLOAD = {"uniform": {"prompt": [32, 96], "output": [32, 96]}}
MOCK = {"num_blocks": 256, "step_time": {"b0_ms": 14}}
LIMITS = EngineLimits(num_blocks=128, block_size=32, max_num_seqs=256, max_num_batched_tokens=512)
HORIZON_S = 30.0


def config(**server: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "x", "server": server, "workload": WORKLOAD})


# -- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "count"),
    [
        ({"url": "http://a:1"}, 1),
        ({"urls": ["http://a:1", "http://a:2", "http://b:1"]}, 3),
        ({"mock": MOCK}, 1),
        ({"mock": MOCK, "replicas": 2}, 2),
    ],
)
def test_a_config_tells_how_many_servers_share_the_load(server: dict[str, Any], count: int) -> None:
    assert config(**server).server.count == count  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"urls": ["http://a:1"]}, "a single server goes by url"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "each once"),
        ({"urls": ["http://a:1", "ftp://a:2"]}, "must start with http"),
        ({"urls": ["http://a:1", "http://u:p@a:2"]}, "leave user and password out"),
        ({"urls": ["http://a:1", "http://a:2"], "replicas": 2}, "urls are counted by themselves"),
        ({"urls": ["http://a:1", "http://a:2"], "mock": MOCK}, "give one of url"),
        ({"url": "http://a:1", "replicas": 2}, "it goes with launch or mock"),
        ({"mock": MOCK, "replicas": 1}, "greater than or equal to 2"),
        ({"launch": {"environment": "vllm"}, "replicas": 2, "gpus": [0]}, "name 2"),
    ],
)
def test_an_impossible_list_is_refused(server: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**server)


def test_a_burst_and_commands_for_one_server_are_refused(tmp_path: Path) -> None:
    both = {"name": "x", "server": {"mock": MOCK, "replicas": 2}, "workload": WORKLOAD}
    with pytest.raises(ValueError, match="judged of one server"):
        ExperimentConfig.model_validate({**both, "load": {"start": "both"}})

    async def attach() -> None:
        async with target_server(config(mock=MOCK, replicas=2), Store(tmp_path)):
            pass

    with pytest.raises(ConfigError, match="only `critrate run` measures several"):
        asyncio.run(attach())


def test_each_has_files_and_gpus_of_its_own() -> None:
    assert [of_replica("engine.log", i, 2) for i in range(2)] == ["engine-0.log", "engine-1.log"]
    assert of_replica("engine.log", 0, 1) == "engine.log"
    shares = [own_gpus((4, 5, 6, 7), i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert shares == ["4,5", "6,7"]


def shown(**changes: Any) -> Any:
    limits = ServerLimits(
        engine="vllm",
        version="1",
        model_id="m",
        max_model_len=512,
        num_blocks=64,
        block_size=16,
        num_blocks_given=False,
        prefix_caching=False,
        cache_dtype=None,
    )
    return SimpleNamespace(url="http://a", shown=replace(limits, **changes))


def test_servers_that_differ_are_refused_with_what_differs() -> None:
    require_alike([shown(), shown()])
    with pytest.raises(ConfigError, match=r"shows num_blocks 64, http://a shows 63"):
        require_alike([shown(), shown(num_blocks=63)])


def test_ceilings_that_probes_met_must_agree() -> None:
    async def met(sequences: int | None) -> Calibration:
        blank = dict.fromkeys(Calibration.__slots__)
        return Calibration(**{**blank, "max_num_seqs": sequences})  # type: ignore[arg-type]

    async def both(one: int | None, other: int | None) -> list[Calibration]:
        return await at_once([met(one), met(other)])

    assert len(asyncio.run(both(8, 8))) == 2
    with pytest.raises(
        CalibrationFailed, match="max_num_seqs 8 on replica 0 and None on replica 1"
    ):
        asyncio.run(both(8, None))


# -- a whole experiment in virtual time ------------------------------------------------------------


def slower(server: SimulatedServer, factor: float) -> SimulatedServer:
    b0, b1, b2, b3 = (factor * b for b in server.law.coefficients())
    law = StepTime(b0_s=b0, b1_s_per_token=b1, b2_s_per_kv_token=b2, b3_s_per_request=b3)
    return SimulatedServer(server.limits, law)


def rehearsed(servers: Sequence[SimulatedServer]) -> Verdict:
    return rehearse_replicas(
        ExperimentConfig.model_validate(
            {
                "name": "x",
                "server": {"mock": MOCK, "replicas": 2},
                "limits": {"max_num_seqs": 256, "max_num_batched_tokens": 2048},
                "workload": {"uniform": {"prompt": [16, 112], "output": [16, 112]}},
                "load": {"rates": [0.85, 1.2], "max_horizon_s": 40},
            }
        ),
        servers,
        3,
    )


def test_two_alike_serve_twice_what_one_does_and_are_confirmed() -> None:
    one = SETTINGS["wide"].server
    verdict = rehearsed([one, one])
    assert (verdict.outcome, verdict.exit_code) == ("confirmed", 0)
    assert verdict.measured is not None
    assert verdict.measured.value == pytest.approx(
        sum(rate.measured.value for rate in verdict.replicas if rate.measured), rel=1e-9
    )
    assert [rate.bounds for rate in verdict.replicas] == [True, True]
    assert {check.holds for check in verdict.premises if check.name == "replicas alike"} == {True}
    audited = {check.name.partition(":")[0] for check in verdict.audit}
    assert audited == {"replica 0", "replica 1"}
    below, above = verdict.imbalance
    for seen in (below, above):
        first, second = seen.replicas
        assert first.offered == pytest.approx(second.offered, rel=0.02)
    # Near critical one waits while another does not; far above both always do.
    assert below.one_waits > 0.02 > above.one_waits
    assert [own.served is None for own in (*below.replicas, *above.replicas)] == [
        True,
        True,
        False,
        False,
    ]
    lines = summary_lines(verdict)
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("replicas ") for line in lines)
    assert len(imbalance_table(verdict).rows) == 6
    assert len(rates_table(verdict).rows) == 2


def test_the_slower_of_two_bounds_the_whole_where_the_balance_would_not() -> None:
    one = SETTINGS["wide"].server
    verdict = rehearsed([one, slower(one, 1.15)])
    assert verdict.outcome == "confirmed"
    fast, slow = verdict.replicas
    assert (fast.bounds, slow.bounds) == (False, True)
    assert verdict.predicted.value == pytest.approx(2 * slow.predicted.value)
    assert slow.measured is not None and verdict.measured is not None
    assert verdict.measured.value == pytest.approx(2 * slow.measured.value)
    balanced = next(other for other in verdict.predictions if other.name == "balanced")
    total = fast.predicted.value + slow.predicted.value
    assert balanced.estimate.value == pytest.approx(total)
    assert any("behind a balancer" in reason for reason in verdict.reasons)


def test_a_replica_that_is_slow_under_load_alone_is_found_and_named() -> None:
    one = SETTINGS["wide"].server
    verdict = rehearsed([one, replace(one, slowdown=lambda run: np.array([1.2]))])
    assert verdict.outcome == "refuted"
    assert [rate.bounds for rate in verdict.replicas] == [False, True]
    assert {check.holds for check in verdict.premises if check.name == "replicas alike"} == {False}
    assert any("do not serve alike" in reason for reason in verdict.reasons)
    assert any(other.name == "added up" for other in verdict.measurements)


# -- a folder ---------------------------------------------------------------------------------------


def replicated_folder(path: Path) -> Store:
    """As two paced engines would leave it, their records from the scheduler model."""
    store = Store.create(path)
    launch = {
        "environment": "vllm-cpu",
        "pool_tokens": LIMITS.pool_tokens,
        "block_size": LIMITS.block_size,
        "step_time": {"b0_ms": 20.0},
    }
    server = {"launch": launch, "replicas": 2}
    text = yaml.safe_dump({"name": path.name, "server": server, "workload": WORKLOAD})
    store.write_text("config.yaml", text)
    settings = load_config(path / "config.yaml")
    told = {"engine": "vllm", "version": "0.32.0", "model_id": "tiny"}
    store.write_json("limits.json", {"shown": told, "used": asdict(LIMITS)})
    store.write_json("environment.json", {})
    law = StepTime(b0_s=20e-3)
    fit = exact_step_time(law)
    store.write_json("calibration.json", {"fit": asdict(fit)})
    found = predictions_of_all(settings, settings.law(), LIMITS, [fit, fit], fit, (0, 1), False)
    found["made_from"] = {name: store.digest(name) for name in INPUTS}
    store.write_json("prediction.json", found)
    rate = found["engine"]["critical_rate"]["value"]
    runs = [
        Run(id=f"{i:02d}", arrival_rate=load * rate, horizon_s=HORIZON_S, warmup_s=6.0, seed=i)
        for i, load in enumerate((0.85, 1.25))
    ]
    store.write_json("plan.json", {"runs": [asdict(run) for run in runs]})
    paces: list[list[dict[str, float]]] = [[], []]
    for index, run in enumerate(runs):
        start_ns = round((1 + index * 2 * HORIZON_S) * 1e9)
        arrival_s = run_arrivals(run)
        lengths = settings.law().sample(np.random.default_rng(index), len(arrival_s))
        store.begin_run(run, start_ns, "", store.digest("prediction.json"))
        with store.stream(run.id, "requests") as requests:
            for i in range(2):
                seen = simulate(LIMITS, law, arrival_s[i::2], lengths[i::2], HORIZON_S)
                for record in seen.records:
                    moved = {
                        name: None if at is None else at + start_ns
                        for name in ("scheduled_ns", "sent_ns", "first_token_ns", "last_token_ns")
                        for at in (getattr(record, name),)
                    }
                    requests.write(replace(record, id=2 * record.id + i, **moved))
                with store.stream(run.id, "engine", replica=(i, 2)) as engine:
                    for sample in seen.samples:
                        at_ns = start_ns + sample.t_ns
                        engine.write(replace(sample, t_ns=at_ns, read_ns=at_ns))
                paces[i] += _paced(seen.steps.start_s, seen.steps.duration_s, start_ns)
        store.end_run(run.id, start_ns + round(HORIZON_S * 1e9), "horizon")
    for i, lines in enumerate(paces):
        name = of_replica("pace.jsonl", i, 2)
        store.write_text(name, "".join(json.dumps(line) + "\n" for line in lines))
    store.write_json("verdict.json", {})
    return store


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The evidence of a folder."""
    folder = tmp_path_factory.mktemp("replicas")
    judged = replicated_folder(folder / "judged")
    export(judged.path, folder / "two")
    return Store.open(folder / "two")


@pytest.fixture(scope="module")
def row(kept: Store) -> Row:
    return read_row(kept.path)


def test_kept_evidence_has_a_stream_and_a_pace_for_each(kept: Store) -> None:
    files = {str(p.relative_to(kept.path)) for p in kept.path.rglob("*") if p.is_file()}
    assert {"pace-0.jsonl", "pace-1.jsonl"} < files
    for run in ("00", "01"):
        assert {f"runs/{run}/engine-{i}.parquet" for i in range(2)} < files
        stored = kept.read_run(run)
        assert [len(own) for own in stored.by_replica] == [300, 300]
        assert len(stored.samples) == 600
    verdict = kept.read_json("verdict.json")
    assert len(verdict["replicas"]) == len(verdict["imbalance"]) == 2
    # The simulation of the set law is of both.
    both, predicted = kept.read_json("simulated.json"), verdict["predicted"]["value"]
    assert both["value"] == pytest.approx(predicted, rel=0.05)


def test_a_row_of_replicas_stands_beside_twice_one(row: Row, tmp_path: Path) -> None:
    assert row.servers == 2
    assert row.valid
    share = row.over(row.engine)
    assert share is not None and share.value == pytest.approx(1.0, abs=0.03)
    one = read_row(judged_folder(tmp_path / "one").path)
    head, rates, _, uneven = replica_sections([one, row])
    cells = rates.splitlines()[2].strip("| ").split(" | ")
    together, low, high = map(float, re.findall(r"[\d.]+", cells[3]))
    assert low <= 1.0 <= high
    assert together == pytest.approx(1.0, abs=0.02)
    assert len(uneven.splitlines()) == 4
    assert "Several replicas" in head
    assert replica_sections([one]) == []


def test_its_explanation_is_of_one_replica(kept: Store, row: Row) -> None:
    result = CliRunner().invoke(app, ["explain", str(kept.path), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["about"][-1].endswith("one of 2")
    assert said["paper"]["value"] == pytest.approx(row.paper.value / 2)


def test_a_replica_whose_samples_are_lost_is_named(kept: Store, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(kept.path, folder)
    (folder / "runs" / "00" / "engine-1.parquet").unlink()
    with pytest.raises(StoreError, match=r"samples of 1 servers, config.yaml lists 2"):
        load_evidence(Store.open(folder))
