"""Is a node ready? Each check against small stand-ins: folders, a hub on a local port, opened GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.configs.config import ConfigError, ExperimentConfig, load_config
from harness.configs.launch import TINY_MODELS
from harness.experiments.first_hour import bounded, first_verdict
from harness.live.readiness import disk_check, first_run, gpu_checks, node_checks
from harness.machine.gpu import NoGpu, pynvml
from harness.machine.gpu_reader import Device, GpuReader, OpenedDevice
from harness.servers import model_access
from harness.servers.engine_environments import ENVIRONMENTS
from harness.servers.model_access import Access

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
H100, GIB = "NVIDIA H100 80GB HBM3", 2**30


def gpu_config(**launch: Any) -> ExperimentConfig:
    data = yaml.safe_load((CONFIGS / "h100_llama3_8b_vllm.yaml").read_text())
    data["server"]["launch"] |= launch
    return ExperimentConfig.model_validate(data)


def gpus(count: int = 1, name: str = H100, total_gib: float = 80.0, **now: Any) -> GpuReader:
    """Opened GPUs that answer what is given: bytes in use, share of time, throttle bits."""
    answers = {"memory_bytes": GIB, "utilization": 0.0, "throttle_reasons": 1} | now
    opened = [
        OpenedDevice(
            Device(gpu=i, name=name, uuid=f"GPU-{i}", memory_bytes=round(total_gib * GIB)),
            None,
            {field: (lambda _, v=value: v) for field, value in answers.items()},
            {},
        )
        for i in range(count)
    ]
    return GpuReader(pynvml, opened, {"driver": "580.1"}, None)


def looked(config: ExperimentConfig, found: GpuReader | NoGpu) -> dict[str, tuple[str, str]]:
    assert config.server is not None
    checks = gpu_checks(config.server, config.hardware, found)
    for check in checks:
        assert check.state == "ok" or check.mend or check.name == "processes", check
    return {c.name: (c.state, c.found) for c in checks if c.name != "processes"}


@pytest.mark.parametrize(
    ("config", "found", "name", "state", "text"),
    [
        ({}, NoGpu("no driver"), "GPU", "missing", "no driver"),
        ({}, gpus(), "GPU", "ok", "driver 580.1, 1 to use"),
        (
            {},
            gpus(),
            "GPU 0 memory",
            "ok",
            "84.8 of 85.9 GB free, 77.3 for the engine, of which 16.1",
        ),
        ({"data_parallel_size": 8}, gpus(4), "GPU", "missing", "4 to use"),
        ({"data_parallel_size": 2}, gpus(2), "GPU 1 memory", "ok", "free"),
        ({}, gpus(name="NVIDIA H100 PCIe"), "GPU kind", "warning", H100),
        ({}, gpus(memory_bytes=20 * GIB), "GPU 0 memory", "missing", "64.4 of 85.9 GB free"),
        ({}, gpus(memory_bytes=20 * GIB), "GPU 0 in use", "warning", "21.5 GB in use"),
        ({}, gpus(utilization=0.5), "GPU 0 in use", "warning", "50 % busy"),
        ({}, gpus(total_gib=40.0), "GPU 0 memory", "missing", "16.1 weights and 52.4 KV cache"),
        ({"tensor_parallel_size": 2}, gpus(2, total_gib=48.0), "GPU 1 memory", "ok", "8.0 weights"),
        (
            {},
            gpus(throttle_reasons=0x44),
            "GPU 0 clocks",
            "warning",
            "software power cap, hardware",
        ),
        ({}, gpus(ecc_uncorrected=3), "GPU 0 ECC", "warning", "3 uncorrected"),
        ({"pool_tokens": None, "block_size": None}, gpus(), "GPU 0 memory", "ok", "not compared"),
    ],
)
def test_gpus(
    config: dict[str, Any], found: GpuReader | NoGpu, name: str, state: str, text: str
) -> None:
    checks = looked(gpu_config(**config), found)
    assert checks[name][0] == state and text in checks[name][1], checks


def test_a_gpu_in_order_has_nothing_to_mend() -> None:
    assert set(looked(gpu_config(), gpus())) == {"GPU", "GPU 0 memory"}


def test_a_machine_without_a_gpu_is_told_all_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HOME", "HF_HUB_CACHE", ENVIRONMENTS["vllm"].variable):
        monkeypatch.delenv(name, raising=False)
    checks = {c.name: c for c in node_checks(gpu_config(), NoGpu("no driver"), tmp_path / "out")}
    assert [n for n, c in checks.items() if c.state == "missing"] == ["GPU", "engine", "model"]
    assert "scripts/engine-env vllm" in checks["engine"].found
    assert {checks[name].state for name in ("disk", "open files", "port")} == {"ok"}
    with pytest.raises(ConfigError, match=r"docs/gpu\.md"):
        node_checks(load_config(CONFIGS / "mock.yaml"), NoGpu("no driver"), tmp_path)


def test_a_taken_port_and_a_full_disk_are_missing(tmp_path: Path) -> None:
    assert disk_check(tmp_path / "not" / "yet", 1).state == "ok"
    assert disk_check(tmp_path, 2**60).state == "missing"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        data = gpu_config().model_dump(exclude_none=True)
        data["server"]["port"] = taken.getsockname()[1]
        config = ExperimentConfig.model_validate(data)
        found = {c.name: c for c in node_checks(config, NoGpu("no driver"), tmp_path)}
        assert found["port"].state == "missing" and "cannot listen" in found["port"].found


# -- the model -----------------------------------------------------------------------------------


def cached(tmp_path: Path, *names: str) -> None:
    folder = tmp_path / "hub" / "models--org--model" / "snapshots" / "0"
    folder.mkdir(parents=True)
    weights = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    for name in names:
        index = name == "model.safetensors.index.json"
        (folder / name).write_text(json.dumps(weights) if index else "{}")


@contextlib.contextmanager
def hub(status: int) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A hub that answers every question so; with it the paths and keys that it saw."""
    seen: list[tuple[str, str | None]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "here", "found"),
    [
        (("config.json", "model.safetensors"), True, "is in"),
        (("config.json", INDEX, "1.safetensors", "2.safetensors"), True, "is in"),
        (("config.json", INDEX, "1.safetensors"), False, "2.safetensors"),
        (("config.json",), False, "without weights"),
        (("model.safetensors",), False, "without config.json"),
        ((), False, "is not in it"),
    ],
)
def test_the_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], here: bool, found: str
) -> None:
    if files:
        cached(home, *files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    access = model_access.model_access("org/model")
    assert access.here is here and found in access.found


@pytest.mark.parametrize(
    ("status", "reachable", "mend"),
    [
        (200, True, "hf download org/model"),
        (302, True, "hf download"),
        (401, False, "accept its licence"),
        (403, False, "export HF_TOKEN"),
        (404, False, "correct server.launch.model"),
    ],
)
def test_the_hub(
    home: Path, monkeypatch: pytest.MonkeyPatch, status: int, reachable: bool, mend: str
) -> None:
    for token in (None, "hf_secret"):
        if token:
            (home / "token").write_text(f"{token}\n")
        with hub(status) as (url, seen):
            monkeypatch.setenv("HF_ENDPOINT", url)
            access = model_access.model_access("org/model")
        expected = None if token is None else f"Bearer {token}"
        assert seen == [("/org/model/resolve/main/config.json", expected)], (
            "no redirect is followed"
        )
        assert access == Access(False, reachable, access.found, access.mend)
        assert mend in access.mend and "hf_secret" not in access.found + access.mend


def test_no_way_to_the_hub_and_folders(home: Path) -> None:
    access = model_access.model_access("org/model")
    assert not access.reachable and "does not answer" in access.found
    assert "there is no folder" in model_access.model_access(str(home / "none")).found
    assert "lacks config.json" in model_access.model_access(str(home)).found


# -- the first run -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("[ah]100*.yaml")))
def test_the_first_run_is_the_same_engine_made_small(tmp_path: Path, name: str) -> None:
    config = load_config(CONFIGS / name)
    path = tmp_path / "first.yaml"
    path.write_text(yaml.safe_dump(first_run(config)))
    first = load_config(path)
    assert first.server is not None and config.server is not None
    ours, theirs = first.server.launch, config.server.launch
    assert ours is not None and theirs is not None
    changed = {f for f in type(ours).model_fields if getattr(ours, f) != getattr(theirs, f)}
    assert changed <= {"pool_tokens", "block_size", "data_parallel_size"}
    assert ours.data_parallel_size == 1 and ours.pool_tokens == 32768
    assert first.load.vocabulary == config.load.vocabulary
    assert len(first.load.rates) * (first.load.horizon_s or 1e9) < 120
    assert ours.model not in TINY_MODELS


@pytest.mark.parametrize(
    ("script", "seconds", "ended", "said"),
    [
        ("echo done", 30.0, None, "done"),
        ("trap 'echo verdict; exit 0' TERM; while :; do sleep 0.05; done", 0.5, "ended", "verdict"),
        ("trap '' TERM; echo deaf; while :; do sleep 0.05; done", 0.5, "killed", "deaf"),
    ],
)
def test_a_run_that_takes_too_long_is_ended(
    tmp_path: Path, script: str, seconds: float, ended: str | None, said: str
) -> None:
    output = tmp_path / "output.txt"
    begin_s = time.monotonic()
    found = bounded(["sh", "-c", script], seconds, output, grace_s=0.5)
    assert (found is None) if ended is None else (found or "").startswith(ended)
    assert time.monotonic() - begin_s < 20
    assert output.read_text().split()[-1] == said


RATE = {"value": 2.0, "low": 1.9, "high": 2.1, "level": 0.95, "unit": "req/s", "method": ""}


@pytest.mark.parametrize(
    ("verdict", "state", "text"),
    [
        (None, "missing", "no verdict (interrupted): starting | the engine ended"),
        (
            {"outcome": "confirmed", "predicted": RATE, "measured": RATE},
            "ok",
            "measured 2.00 req/s",
        ),
        ({"outcome": "inconclusive", "predicted": RATE, "measured": None}, "ok", "inconclusive"),
        ({"outcome": "refuted", "predicted": RATE, "measured": RATE}, "warning", "refuted"),
        ({"outcome": "invalid", "predicted": RATE, "reasons": ["late"]}, "missing", "late"),
    ],
)
def test_what_a_first_run_says_of_the_node(
    tmp_path: Path, verdict: dict[str, Any] | None, state: str, text: str
) -> None:
    (tmp_path / "output.txt").write_text("starting\n\nthe engine ended\n")
    results = tmp_path / "results"
    if verdict is not None:
        results.mkdir()
        (results / "verdict.json").write_text(json.dumps(verdict))
    check = first_verdict(results, "interrupted", tmp_path)
    assert check.state == state and text in check.found, check


def test_the_script_says_in_seconds_what_is_missing(tmp_path: Path) -> None:
    """Nothing is started, and nothing written, where a GPU, an engine or a model is missing."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CRITRATE_ENGINE"))}
    environ |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    begin_s = time.monotonic()
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-first", "--out", tmp_path / "out"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - begin_s < 60
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("not ready: ") and "engine" in last and "model" in last
    assert not (tmp_path / "out").exists()
