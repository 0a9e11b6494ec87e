"""The command lines of all configs that launch an engine, read by the parsers of the engines themselves.

One process for each engine, as importing one takes 10 s of CPU and more; nothing is started. The probe
of a GPU runs in the same, on the CPU. vLLM and SGLang come from `scripts/engine-env`.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from harness.configs.config import ConfigError, load_config
from harness.configs.hardware import measured_rates
from harness.configs.launch import LaunchConfig, Place, argv
from harness.servers.engine_environments import ENVIRONMENTS

pytestmark = pytest.mark.waits

ROOT = Path(__file__).resolve().parents[2]
VLLM = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
check = validate_parsed_serve_args
"""
SGLANG = """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
check = lambda parsed: None
"""
READ = """
import json, runpy, sys
found = {}
for name, line in json.load(sys.stdin).items():
    parsed = parser.parse_args(line)
    check(parsed)
    found[name] = {k: v for k, v in vars(parsed).items() if isinstance(v, (str, int, float, bool))}
print("PARSED" + json.dumps(found))
sys.argv = ["probe", "--small"]
runpy.run_path(PROBE, run_name="__main__")
"""
PROBE = ROOT / "scripts" / "engines" / "bandwidth_probe.py"
ENGINES = {"vllm": ("vllm-cpu", VLLM), "sglang": ("sglang-cpu", SGLANG)}
SAME_IN_BOTH = ("dtype", "kv_cache_dtype")
FIELDS = {
    "vllm": {
        "block_size": "block_size",
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "max_model_len": "max_model_len",
        "tensor_parallel_size": "tensor_parallel_size",
        "data_parallel_size": "data_parallel_size",
        "gpu_memory_utilization": "gpu_memory_utilization",
    },
    "sglang": {
        "block_size": "page_size",
        "pool_tokens": "max_total_tokens",
        "max_num_seqs": "max_running_requests",
        "max_num_batched_tokens": "chunked_prefill_size",
        "max_model_len": "context_length",
        "tensor_parallel_size": "tp_size",
        "data_parallel_size": "dp_size",
        "gpu_memory_utilization": "mem_fraction_static",
    },
}
EVERY_FIELD = {
    "model": "org/model",
    "pool_tokens": 4096,
    "block_size": 16,
    "max_num_seqs": 7,
    "max_num_batched_tokens": 512,
    "max_model_len": 2048,
    "dtype": "bfloat16",
    "kv_cache_dtype": "fp8_e4m3",
    "tensor_parallel_size": 2,
    "data_parallel_size": 4,
    "gpu_memory_utilization": 0.8,
}


@cache
def launches(engine: str) -> dict[str, LaunchConfig]:
    """By name, every config that launches this engine, and one that states every field."""
    found = {"every field": LaunchConfig(environment=engine, **EVERY_FIELD)}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if "launch:" in path.read_text():
            server = load_config(path).server
            assert server is not None and server.launch is not None
            if server.launch.runs == engine:
                found[str(path.relative_to(ROOT))] = server.launch
    return found


@cache
def seen(engine: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What the engine's own parser makes of each command line, and what the probe measures there."""
    name, program = ENGINES[engine]
    environment = ENVIRONMENTS[name]
    if environment.variable not in os.environ and not (environment.folder / ".complete").exists():
        pytest.skip(f"there is no {name} here: scripts/engine-env {name} makes it")
    lines, environ = {}, dict(os.environ)
    for config, launch in launches(engine).items():
        where = Place(
            python=Path("python"), model=launch.model, port=8123, pace_log=Path("pace.jsonl")
        )
        line, _ = argv(launch, where)
        lines[config] = line[3:]
    _, cpu = argv(LaunchConfig(environment=name, pool_tokens=4096, block_size=32), where)
    done = subprocess.run(
        [environment.python(), "-c", f"PROBE = {str(PROBE)!r}\n{program}{READ}"],
        input=json.dumps(lines),
        env=environ | cpu,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parsed, _, measured = done.stdout.partition("PARSED")[2].partition("\n")
    return json.loads(parsed), json.loads(measured)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_reads_what_the_config_says(engine: str) -> None:
    found, _ = seen(engine)
    asked = launches(engine)
    assert found.keys() == asked.keys()
    assert any("100" in name for name in found) and len(found) > 3
    names = FIELDS[engine] | {name: name for name in SAME_IN_BOTH}
    for config, launch in asked.items():
        for ours, theirs in names.items():
            value = getattr(launch, ours)
            if value is not None and not (launch.runs_on == "cpu" and ours in SAME_IN_BOTH):
                assert found[config][theirs] == value, (config, ours)
        if engine == "vllm" and launch.pool_tokens is not None:
            blocks = found[config]["num_gpu_blocks_override"]
            assert (blocks - 1) * found[config]["block_size"] == launch.pool_tokens, config
            assert found[config]["enable_prefix_caching"] is launch.prefix_caching
        if engine == "sglang":
            assert found[config]["disable_radix_cache"] is not launch.prefix_caching
            assert found[config]["enable_metrics"] is True
        assert found[config]["port"] == 8123 and found[config]["host"] == "127.0.0.1"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_probe_measures_a_cpu_and_says_so(engine: str, tmp_path: Path) -> None:
    _, measured = seen(engine)
    assert measured["kind"] == "cpu" and measured["matmul_dtype"] == "float32"
    for name in ("copy_bytes_per_s", "matmul_flop_per_s"):
        rate = measured[name]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"] and rate["repeats"] == 20
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(measured))
    with pytest.raises(ConfigError, match="measured on a CPU"):
        measured_rates(file)
    file.write_text(json.dumps(measured | {"kind": "gpu"}))
    found = measured_rates(file)
    assert found.bandwidth_bytes_per_s == measured["copy_bytes_per_s"]["median"]
    assert found.arithmetic_flop_per_s == measured["matmul_flop_per_s"]["median"]
