import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.configs.config import ConfigError, ExperimentConfig, load_config
from harness.configs.launch import PACE_LOG, LaunchConfig, Place, argv, place
from harness.experiments.analyse import _pace
from harness.live.target import require_as_asked
from harness.records.store import Store, StoredRun
from harness.servers.engine_environments import ENVIRONMENTS
from harness.servers.server import ServerFailed
from harness.servers.server_limits import ServerLimits
from loadgen.records import Run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HERE = Place(
    python=Path("/env/python"), model="/models/tiny", port=8123, pace_log=Path("/out/pace")
)
VLLM = {
    "environment": "vllm-cpu",
    "pool_tokens": 4096,
    "block_size": 32,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
    "max_model_len": 1024,
}
SGLANG = {"environment": "sglang-cpu", "pool_tokens": 2048}
PYTHON = {"environment": "/my/python", "device": "gpu"}
ON_GPU = {
    "environment": "vllm",
    "dtype": "bfloat16",
    "kv_cache_dtype": "fp8",
    "tensor_parallel_size": 2,
    "data_parallel_size": 4,
    "gpu_memory_utilization": 0.9,
}


def command(fields: dict[str, Any]) -> tuple[str, dict[str, str]]:
    line, env = argv(LaunchConfig.model_validate(fields), HERE)
    return " ".join(line) + " ", env


@pytest.mark.parametrize(
    ("fields", "there", "absent"),
    [
        # One block more than asked for: the null block.
        (VLLM, "--num-gpu-blocks-override 129", "--scheduler-cls"),
        (VLLM, "--max-num-seqs 128 --max-num-batched-tokens 2048 --max-model-len 1024", ""),
        (VLLM, "--no-enable-prefix-caching", " --enable-prefix-caching"),
        (
            {**VLLM, "prefix_caching": True},
            " --enable-prefix-caching",
            "--no-enable-prefix-caching",
        ),
        (VLLM, "--dtype float32 --enforce-eager", "bfloat16"),
        (VLLM, "--load-format dummy", ""),
        ({**VLLM, "step_time": {"b0_ms": 20}}, "--no-async-scheduling", ""),
        ({**VLLM, "arguments": ["--watermark", "0.1"]}, "--watermark 0.1 ", ""),
        ({"environment": "vllm", "model": "org/m"}, "--served-model-name m ", "--load-format"),
        (
            {"environment": "vllm"},
            "vllm.entrypoints.openai.api_server",
            "--num-gpu-blocks-override",
        ),
        ({"environment": "vllm"}, "--port 8123", "--kv-cache-memory-bytes"),
        (SGLANG, "--max-total-tokens 2048", "--page-size"),
        (SGLANG, "--enable-metrics --decode-log-interval 1 --load-snapshot-publish-interval 1", ""),
        (SGLANG, "--disable-radix-cache", "--chunked-prefill-size"),
        (SGLANG, "--attention-backend torch_native", ""),
        ({**SGLANG, "prefix_caching": True}, "--max-total-tokens", "--disable-radix-cache"),
        ({**SGLANG, "max_num_batched_tokens": 512}, "--chunked-prefill-size 512", ""),
        ({"environment": "sglang"}, "sglang.launch_server", "--disable-overlap-schedule"),
        ({**PYTHON, "engine": "sglang"}, "/env/python -m sglang.launch_server", "torch_native"),
        ({"environment": "vllm"}, "--no-enable-prefix-caching ", "parallel-size"),
        (ON_GPU, "--gpu-memory-utilization 0.9 --dtype bfloat16 --kv-cache-dtype fp8 ", "fraction"),
        (ON_GPU, "--tensor-parallel-size 2 --data-parallel-size 4 ", ""),
        (
            {**ON_GPU, "environment": "sglang"},
            "--mem-fraction-static 0.9 --dtype bfloat16",
            "gpu-mem",
        ),
    ],
)
def test_command_line(fields: dict[str, Any], there: str, absent: str) -> None:
    line, _ = command(fields)
    assert there in line
    assert not absent or absent not in line


@pytest.mark.parametrize("engine", [VLLM, SGLANG, {"environment": "sglang"}])
def test_the_law_of_a_paced_engine_is_in_its_environment_alone(engine: dict[str, Any]) -> None:
    law = {"b0_ms": 20, "b1_us_per_token": 10, "b2_ns_per_kv_token": 400, "b3_us_per_request": 5}
    line, env = command({**engine, "step_time": law})
    assert json.loads(env["CRITRATE_STEP_TIME"]) == pytest.approx(
        {
            "b0_s": 0.02,
            "b1_s_per_token": 1e-5,
            "b2_s_per_kv_token": 4e-7,
            "b3_s_per_request": 5e-6,
        }
    )
    assert env["CRITRATE_PACE_LOG"] == "/out/pace"
    hooks, pacing = map(Path, env["PYTHONPATH"].split(os.pathsep))
    assert (hooks / "critrate_paced.py").is_file() and (pacing / "critrate_pace.py").is_file()
    assert "0.02" not in line
    assert ("--no-async-scheduling" in line) or ("--disable-overlap-schedule" in line)
    # The prediction's modules do not know that such a section exists.
    for module in ("experiments/predict", "live/calibrate", "experiments/plan"):
        assert "launch" not in (CONFIGS.parent / "harness" / f"{module}.py").read_text()


def test_what_a_cpu_needs_is_in_the_environment() -> None:
    for fields, names in (
        (VLLM, ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_SERVER_DEV_MODE")),
        (SGLANG, ("OMP_NUM_THREADS", "SGLANG_USE_CPU_ENGINE", "PYTHONPATH")),
    ):
        assert set(names) <= set(command(fields)[1])
    assert "OMP_NUM_THREADS" not in command({"environment": "vllm"})[1]
    # Named environments are installed without byte code; a Python of one's own is left as it is.
    assert command({"environment": "vllm"})[1]["PYTHONDONTWRITEBYTECODE"] == ""
    assert "PYTHONDONTWRITEBYTECODE" not in command({**PYTHON, "engine": "vllm"})[1]
    shims = Path(command(SGLANG)[1]["PYTHONPATH"])
    assert (shims / "sitecustomize.py").is_file()
    assert (shims / "sgl_kernel" / "__init__.py").is_file()


LAUNCH = "name: x\nworkload: {fixed: {prompt: 4, output: 4}}\nserver: "


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("{}", "one of url"),
        ("{url: 'http://h:1', launch: {environment: vllm}}", "one of url"),
        ("{engine: vllm, launch: {environment: vllm}}", "leave it out"),
        ("{launch: {environment: tensorrt}}", "vllm-cpu, sglang-cpu, vllm, sglang"),
        ("{launch: {environment: vllm, device: gpu}}", "leave them out"),
        ("{launch: {environment: /p/python}}", "engine and device"),
        ("{launch: {environment: vllm-cpu}}", "pool_tokens"),
        ("{launch: {environment: vllm, pool_tokens: 64}}", "block_size"),
        (
            "{launch: {environment: vllm, pool_tokens: 65, block_size: 16}}",
            "whole number of blocks",
        ),
        ("{launch: {environment: vllm-cpu, pool_tokens: 64, block_size: 16}}", "multiples of 32"),
        ("{launch: {environment: vllm, step_time: {b0_ms: 0}}}", "greater than 0"),
        ("{launch: {environment: vllm, pool: 4}}", "unknown key"),
        ("{launch: {environment: vllm, gpu_memory_utilization: 1.1}}", "less than or equal to 1"),
        (
            "{launch: {environment: sglang-cpu, pool_tokens: 64, dtype: float16}}",
            "dtype: leave it out",
        ),
        (
            "{launch: {environment: sglang-cpu, pool_tokens: 64, tensor_parallel_size: 2}}",
            "tensor_parallel_size: leave it out on a CPU",
        ),
    ],
)
def test_a_config_is_refused_in_a_sentence(tmp_path: Path, server: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(LAUNCH + server)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


@pytest.mark.parametrize("name", ["vllm_cpu", "sglang_cpu"])
def test_the_configs_can_be_read(name: str) -> None:
    server = load_config(CONFIGS / f"{name}.yaml").server
    assert server is not None
    assert server.emulated
    assert server.timeout_s == 300.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for made in ENVIRONMENTS.values():
        monkeypatch.delenv(made.variable, raising=False)
    return tmp_path / "critrate" / "engines"


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = LaunchConfig.model_validate(VLLM)

    def refusal() -> str:
        with pytest.raises(ServerFailed) as error:
            place(launch, 1, Path("pace"))
        return str(error.value)

    assert "scripts/engine-env vllm-cpu" in refusal()
    folder = cache / "vllm-cpu-0.32.0"
    folder.mkdir(parents=True)
    assert "no environment" in refusal(), "an installation that was cut off does not count"
    (folder / ".complete").touch()
    assert "no model" in refusal()
    model = cache / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    found = place(launch, 1, Path("pace"))
    assert found.python == folder / "bin" / "python"
    assert found.model == str(model)
    assert found.pace_log.is_absolute()
    monkeypatch.setenv("CRITRATE_ENGINE_VLLM_CPU", "/nowhere/python")
    assert "CRITRATE_ENGINE_VLLM_CPU" in refusal()
    launch = LaunchConfig.model_validate({**PYTHON, "engine": "vllm", "environment": "/no/python"})
    assert "/no/python" in refusal()


SHOWN = ServerLimits(
    engine="vllm",
    version="0.32.0+cpu",
    model_id="tiny",
    max_model_len=1024,
    num_blocks=128,
    block_size=32,
    num_blocks_given=False,
    prefix_caching=False,
    cache_dtype="auto",
    max_num_seqs=128,
    max_num_batched_tokens=2048,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 127}, "pool_tokens: 4096 was asked for, the server shows 4064"),
        ({"max_num_seqs": 64}, "max_num_seqs: 128 .* shows 64"),
        ({"max_num_batched_tokens": None}, "max_num_batched_tokens: 2048 .* shows None"),
        ({"max_model_len": 2048}, "max_model_len"),
        ({"prefix_caching": True}, "prefix_caching: False .* shows True"),
        ({"version": "0.31.0"}, "engine-env"),
    ],
)
def test_a_server_that_shows_other_limits_is_refused(change: dict[str, Any], message: str) -> None:
    launch = LaunchConfig.model_validate(VLLM)
    require_as_asked(launch, SHOWN)
    with pytest.raises(ConfigError, match=message):
        require_as_asked(launch, replace(SHOWN, **change))


def paced(law: dict[str, float] | None, launch: dict[str, Any] = VLLM) -> ExperimentConfig:
    launch = {**launch, "step_time": law}
    lengths = {"fixed": {"prompt": 4, "output": 4}}
    return ExperimentConfig.model_validate(
        {"name": "x", "server": {"launch": launch}, "workload": lengths}
    )


@pytest.mark.parametrize(("took_s", "off"), [(1.0, 0.0), (1.02, 0.02), (1.05, 0.05)])
def test_the_pace_of_a_run_is_that_of_its_own_steps(
    tmp_path: Path, took_s: float, off: float
) -> None:
    run = Run(
        id="r",
        arrival_rate=1.0,
        horizon_s=10.0,
        warmup_s=1.0,
        seed=1,
    )
    stored = StoredRun(
        run=run,
        start_ns=10,
        end_ns=30,
        prediction_digest="",
        end=None,
        records=[],
        samples=[],
        gpu=[],
        warnings=(),
    )
    store = Store.create(tmp_path / "out")
    lines = [(10, 9.0), (20, took_s), (30, took_s), (31, 9.0)]
    (store.path / PACE_LOG).write_text(
        "".join(
            json.dumps({"t_ns": t, "steps": 50, "law_s": 1.0, "took_s": s}) + "\n" for t, s in lines
        )
    )
    pace = _pace(store, paced({"b0_ms": 20}), stored)
    assert pace is not None
    assert (pace.off, pace.set_s) == (pytest.approx(off), pytest.approx(0.02))
    assert pace.kept == (off < 0.03)
    assert _pace(store, paced({"b0_ms": 20}, SGLANG), stored) == pace
    assert _pace(store, paced(None), stored) is None
