"""A search on real sockets against the mock, and one that is interrupted."""

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from harness.commands.search_command import search_server
from harness.configs.config import ConfigError, load_config
from harness.experiments import search
from harness.machine.display import Display
from harness.records.store import Store

CONFIG = {
    "name": "small",
    "server": {
        "mock": {
            "num_blocks": 64,
            "block_size": 16,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 1024,
            "max_model_len": 512,
            "step_time": {"b0_ms": 10, "b1_us_per_token": 10, "b2_ns_per_kv_token": 1000},
        }
    },
    "workload": {"uniform": {"prompt": [16, 80], "output": [8, 40]}},
    "sample_interval_s": 0.05,
}
TRUE_RATE = 53.4
"""Departures of 20 000 simulated requests at 1.1 times this, same parameters."""


def config_file(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({"arrivals": {"kind": "gamma", "cv": 2}}, "which only Poisson arrivals allow"),
        ({"cluster": "local:2", "workers": 2}, "load.cluster: a search decides its load"),
    ],
)
def test_what_a_search_cannot_do_is_refused_before_any_load(
    tmp_path: Path, load: dict[str, object], words: str
) -> None:
    config = load_config(config_file(tmp_path)).model_validate(CONFIG | {"load": load})
    store = Store.create(tmp_path / "out")
    with (
        Display(Console(file=io.StringIO()), quiet=True) as display,
        pytest.raises(ConfigError, match=words),
    ):
        asyncio.run(search_server(config, store, display, 0.05, 3, (16.0, 500.0), 25.0))


@pytest.mark.live
def test_a_live_search_finds_the_critical_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LOOK_S", 0.2)
    config = load_config(config_file(tmp_path))
    store = Store.create(tmp_path / "out")
    with Display(Console(file=io.StringIO()), quiet=True) as display:
        result, _ = asyncio.run(search_server(config, store, display, 0.05, 3, (16.0, 500.0), 25.0))
    assert result.outcome in ("found", "invalid"), result.reason
    if result.outcome == "invalid":
        pytest.skip(f"this machine was too busy for the load: {result.reason}")
    assert result.critical_rate.value == pytest.approx(TRUE_RATE, rel=0.07)
    assert result.binding == "kv_cache"
    assert all(side.holds for side in result.sides)
    written = json.loads((tmp_path / "out" / "search.json").read_text())
    assert written["result"]["outcome"] == "found"
    assert written["looks"][-1]["phase"] == "finished"
    # Every request counted, once: those that were stopped at the end as well.
    records = store.read_run("search").records
    assert len({r.id for r in records}) == len(records) == result.requests
    assert written["stretches"][-1]["end_s"] >= result.duration_s - 0.2


@pytest.mark.waits
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "harness.cli", "search", config_file(tmp_path)),
            *("--out", tmp_path / "out", "--first-rate", "8"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    requests = tmp_path / "out" / "runs" / "search" / "requests.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if requests.exists() and requests.stat().st_size > 2000:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "interrupted" in printed and "Traceback" not in printed
    written = json.loads((tmp_path / "out" / "search.json").read_text())
    assert written["result"]["outcome"] in ("cannot say", "invalid")
    assert written["looks"] and written["result"]["requests"] > 0
    records = Store.open(tmp_path / "out").read_run("search").records
    assert len(records) >= written["result"]["requests"]
