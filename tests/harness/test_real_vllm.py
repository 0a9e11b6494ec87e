"""A real vLLM, started, calibrated, overloaded and judged by the program itself.

Its environment is made by `scripts/engine-env vllm-cpu`; CI makes it before the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.servers.engine_environments import ENVIRONMENTS

pytestmark = pytest.mark.live
INVALID = 13
TRIES = 2

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "vllm_cpu.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of configs/vllm_cpu.yaml at two thirds of its speed, two short runs; once more where
    the machine was held up and critrate says so."""
    environment = ENVIRONMENTS["vllm-cpu"]
    if environment.variable not in os.environ and not (environment.folder / ".complete").exists():
        missing = "there is no vLLM here: scripts/engine-env vllm-cpu makes its environment"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    # Steps of 30 ms leave the engine room for its own work beside whatever else the machine does.
    config["server"]["launch"]["step_time"] = {"b0_ms": 30}
    # Three rounds of probes are enough for what is asked here.
    config["theta"] = 0.2
    config["load"] = {"rates": [0.75, 1.4], "horizon_s": 22, "extend": False, "seed": 1}
    for _ in range(TRIES):
        out = tmp_path_factory.mktemp("vllm")
        (out / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "harness.cli", "run", out / "config.yaml"]
        done = subprocess.run(
            [*command, "--out", out / "results"],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        if done.returncode != INVALID:
            break
    assert (out / "results" / "verdict.json").exists(), done.stdout + done.stderr
    return out / "results"


def test_its_critical_rate_is_as_predicted(folder: Path) -> None:
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["outcome"] in ("confirmed", "inconclusive"), verdict["reasons"]
    assert verdict["ratio"]["value"] == pytest.approx(1.0, abs=0.1)
    assert verdict["binding_observed"] == "kv_cache"
    assert [run["verdict"] for run in verdict["runs"]][1] == "unstable"
    assert all(check["holds"] is not False for check in verdict["audit"]), verdict["audit"]
    assert sum(run["preemptions"] for run in verdict["runs"]) > 0


def test_the_gap_to_the_papers_rate_is_split(folder: Path) -> None:
    verdict = json.loads((folder / "verdict.json").read_text())
    factors = {f["name"]: f["estimate"]["value"] for f in verdict["from_paper"]}
    # A step whose tokens cost nothing has no recompute to pay for.
    assert {"rounding", "under-fill", "unexplained"} <= set(factors)
    paper = next(p for p in verdict["predictions"] if p["name"].startswith("paper"))
    product = paper["estimate"]["value"]
    for factor in factors.values():
        product *= factor
    assert product == pytest.approx(verdict["measured"]["value"])


def test_its_requests_were_exact_and_it_is_gone(folder: Path) -> None:
    run = sorted((folder / "runs").iterdir())[0]
    records = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    completed = [r for r in records if r.get("outcome") == "completed"]
    assert completed and {r["output_tokens"] for r in completed} == {64}
    record = json.loads((folder / "environment.json").read_text())["engine"]
    assert "--num-gpu-blocks-override" in record["command"]
    assert json.loads((folder / "limits.json").read_text())["shown"]["version"].startswith("0.32.0")
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if _mentions(p, folder)]


def _mentions(command_line: Path, folder: Path) -> bool:
    """Is it a process that was started for this folder? The pace log's path is in its environment."""
    try:
        return str(folder).encode() in (command_line.parent / "environ").read_bytes()
    except OSError:
        return False
