"""``critrate explain`` on a results folder that holds what a simulated server gave."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from harness.cli import app
from harness.configs.config import load_config
from harness.experiments.predict import predictions
from harness.records.store import Store
from loadgen.arrivals import poisson
from loadgen.records import Run

LIMITS = EngineLimits(
    num_blocks=128, block_size=16, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=512
)
LAW = StepTime(b0_s=20e-3, b1_s_per_token=20e-6)
CONFIG = {
    "name": "small",
    "server": {"url": "http://127.0.0.1:1"},
    "workload": {"fixed": {"prompt": 40, "output": 30}},
}


def results(path: Path, load: float) -> Path:
    """A folder with one run of 30 s at ``load`` of the predicted rate; no verdict yet."""
    store = Store.create(path)
    store.write_text("config.yaml", yaml.safe_dump(CONFIG))
    config = load_config(path / "config.yaml")
    shown = {"engine": "vllm", "version": "9.9", "model_id": "tiny"}
    store.write_json("limits.json", {"shown": shown, "used": asdict(LIMITS)})
    fit = exact_step_time(LAW)
    store.write_json("calibration.json", {"fit": asdict(fit)})
    found = predictions(config, config.law(), LIMITS, fit, "P1", second_opinion=False)
    made_from = {name: store.digest(name) for name in ("config.yaml", "limits.json")}
    store.write_json("prediction.json", found | {"made_from": made_from})
    able = predict(config.law(), LIMITS, fit, "engine", "P1").critical_rate.value
    run = Run(id="00", arrival_rate=load * able, horizon_s=30.0, warmup_s=4.0, seed=1)
    arrival_s = poisson(run.arrival_rate, run.horizon_s, run.seed)
    lengths = config.law().sample(np.random.default_rng(1), len(arrival_s))
    simulated = simulate(LIMITS, LAW, arrival_s, lengths, run.horizon_s)
    store.begin_run(run, 0, "", store.digest("prediction.json"))
    for name, rows in (("requests", simulated.records), ("engine", simulated.samples)):
        lines = [json.dumps(asdict(row)) for row in rows]
        (path / "runs" / run.id / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    store.end_run(run.id, round(run.horizon_s * 1e9), "horizon")
    return path


def explain(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["explain", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def backlogged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return results(tmp_path_factory.mktemp("explain") / "out", 1.3)


def test_a_folder_is_explained_in_words_and_as_a_picture(backlogged: Path) -> None:
    before = digests(backlogged)
    status, text = explain(backlogged)
    assert status == 0, text
    assert "vLLM 9.9, model tiny, KV cache of 2 048 tokens in blocks of 16" in text
    assert "block rounding" in text and "accounts    for " in text
    assert (backlogged / "explain.png").read_bytes().startswith(b"\x89PNG")
    assert "block rounding" in (backlogged / "explain.svg").read_text()
    assert {n: d for n, d in digests(backlogged).items() if "explain" not in n} == before


def test_the_same_as_json(backlogged: Path) -> None:
    status, text = explain(backlogged, "--json")
    found = json.loads(text)
    assert status == 0 and found["schema"] == 1 and found["cannot_say"] is None
    product = found["paper"]["value"] * found["unexplained"]["factor"]["value"]
    for cause in found["causes"]:
        product *= cause["factor"]["value"] if cause["factor"] else 1.0
    assert product == pytest.approx(found["measured"]["value"])
    assert found["enough"] is (found["share"]["value"] >= 0.9)


def test_a_folder_without_a_backlog_says_so(tmp_path: Path) -> None:
    folder = results(tmp_path / "out", 0.5)
    status, text = explain(folder)
    assert status == 11
    assert "cannot say  the critical rate was not reached" in text
    assert "add a rate above" in text.replace("\n", " ")
    assert not (folder / "explain.png").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("calibration.json", "the calibration was not written yet"),
        ("schema.json", "no schema.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(
    tmp_path: Path, name: str, sentence: str, backlogged: Path
) -> None:
    for path in sorted(backlogged.rglob("*")):
        if path.is_file() and path.name != name:
            copy = tmp_path / path.relative_to(backlogged)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    done = CliRunner().invoke(app, ["explain", str(tmp_path)])
    assert done.exit_code == 1 and sentence in str(done.exception)


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
