"""The command as a person runs it, on mocks whose truth is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.waits

LAW = {"b0_ms": 10, "b1_us_per_token": 10, "b2_ns_per_kv_token": 500}
CONFIG = {
    "name": "small",
    "claim": "engine",
    # Three rounds of probes are enough for what is asked here, also on a machine that scatters.
    "theta": 0.2,
    "server": {
        "mock": {
            "num_blocks": 128,
            "block_size": 16,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 1024,
            "max_model_len": 512,
            "claimed_num_blocks": 160,
            "step_time": LAW,
        }
    },
    "workload": {"uniform": {"prompt": [16, 48], "output": [16, 48]}},
    "load": {"seed": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of a mock that claims a quarter more than it has."""
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "harness.cli", "calibrate", folder / "config.yaml"]
    ended = subprocess.run(
        [*command, "--out", folder / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (folder / "said").write_text(ended.stdout)
    return folder


def test_it_says_what_it_found(folder: Path) -> None:
    said = (folder / "said").read_text()
    for line in (
        "KV pool",
        "b0",
        "b3",
        "condition",
        "scatter",
        "lack of fit",
        "check 1",
        "saturated",
    ):
        assert f"\n{line:<12}" in f"\n{said}", line
    assert "not shown by this server" in said
    assert "over the most that a probe held per step" in said
    assert (folder / "out" / "calibration.svg").read_text().startswith("<svg")


def test_a_server_that_lies_about_its_pool_is_seen(folder: Path) -> None:
    record = json.loads((folder / "out" / "calibration.json").read_text())
    implied = record["pool_implied"]
    assert record["pool_shown_tokens"] == 160 * 16
    assert implied["low"] < 128 * 16 * 1.01 and implied["high"] > 128 * 16 * 0.99
    assert implied["high"] < 0.9 * record["pool_shown_tokens"]
    assert "THEY DISAGREE: the server holds another pool" in (folder / "said").read_text()


def test_the_record_holds_the_law_its_test_and_the_checks(folder: Path) -> None:
    record = json.loads((folder / "out" / "calibration.json").read_text())
    assert record["fit"]["law"]["b0_s"] == pytest.approx(0.010, rel=0.1)
    assert 0 <= record["fit"]["lack_of_fit"]["p_value"] <= 1
    counter = next(c for c in record["checks"] if c["source"] == "step counter")
    assert counter["ratio"]["value"] == pytest.approx(1.0, abs=0.03)
    point = record["saturated"]
    assert (
        point["step_time_s"]["low"] < point["step_time_s"]["value"] < point["step_time_s"]["high"]
    )
    assert point["kv_tokens"] < record["pool_shown_tokens"] and point["tokens"] > 0
