"""The reader of measured runs, on a folder of the same form written from a simulated server."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from analysis.inference.growth import why_no_slope
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.simulate import Simulation, simulate
from analysis.schedulers.step_time import StepTime, exact_step_time
from analysis.theory.critical_rate import predict
from harness.evidence.measured_runs import (
    MeasuredServer,
    backlog_after_one_residence,
    binding,
    departure_rates,
    read_measured,
)
from loadgen.arrivals import poisson
from loadgen.workload import uniform

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "measured_runs"
TRACES = Path(os.environ.get("CRITRATE_TRACES", ROOT.parent / "shared/traces"))
LAW = StepTime(b0_s=0.2, b1_s_per_token=1e-5, b2_s_per_kv_token=1e-6, b3_s_per_request=1e-5)
WORKLOAD = uniform((16, 112), (16, 112))
WALL_S, ENGINE_S = 1_787_267_980.0, 27_536.0
"""Two clocks, as the engine and the load generator have them."""


def limits(seqs: int, blocks: int = 128) -> EngineLimits:
    return EngineLimits(
        num_blocks=blocks, block_size=16, max_num_seqs=seqs, max_num_batched_tokens=2048
    )


def rate_of(bounds: EngineLimits) -> float:
    return predict(WORKLOAD, bounds, exact_step_time(LAW), "engine", "P1").critical_rate.value


def burst(bounds: EngineLimits, seconds: float) -> Simulation:
    """Twice what the server can serve for so long, then nothing until all have left."""
    arrival_s = poisson(2 * rate_of(bounds), seconds, 1)
    lengths = WORKLOAD.sample(np.random.default_rng(2), len(arrival_s))
    return simulate(bounds, LAW, arrival_s - arrival_s[0], lengths, 4 * seconds, 1.0)


def write(folder: Path, run: Simulation, bounds: EngineLimits, recorded: bool = True) -> Path:
    """The folder; the first request takes no time to the engine, the others 20 ms."""
    folder.mkdir()
    meta = {"engine_kwargs": {"max_num_seqs": bounds.max_num_seqs, "max_num_batched_tokens": 2048}}
    if recorded:
        meta["kv_cache"] = {"num_kv_tokens": bounds.pool_tokens}
    (folder / "meta.json").write_text(json.dumps(meta))
    with gzip.open(folder / "requests.jsonl.gz", "wt") as lines:
        for r in run.records:
            assert r.outcome == "completed" and r.first_token_ns and r.last_token_ns
            at_s = r.scheduled_ns / 1e9
            row = {
                "request_id": f"bench-{r.id}",
                "input_toks": r.prompt_tokens,
                "output_toks": r.output_tokens,
                "arrival_time": WALL_S + at_s,
                "queued_ts": ENGINE_S + at_s + (0.02 if r.id else 0.0),
                "scheduled_ts": ENGINE_S + r.first_token_ns / 1e9,
                "first_token_ts": ENGINE_S + r.first_token_ns / 1e9,
                "last_token_ts": ENGINE_S + r.last_token_ns / 1e9,
            }
            lines.write(json.dumps(row) + "\n")
    rows = ["t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct"]
    for s in run.samples:
        usage = 100 * s.kv_usage if recorded else 0.0
        rows.append(f"{s.t_ns / 1e9},0.0,0.0,{s.running},{s.waiting},{usage:.2f}")
    (folder / "timeseries.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One server short of memory, and one short of sequences that does not record its KV usage."""
    folder = tmp_path_factory.mktemp("measured")
    write(folder / "memory", burst(limits(256), 150.0), limits(256))
    few = limits(16, blocks=1024)
    write(folder / "sequences", burst(few, 150.0), few, recorded=False)
    return folder


@pytest.mark.parametrize(
    ("name", "bounds", "binds"),
    [
        ("memory", limits(256), "kv_cache"),
        ("sequences", limits(16, blocks=1024), "max_num_seqs"),
    ],
)
def test_what_binds_and_the_rate_of_departures(
    runs: Path, name: str, bounds: EngineLimits, binds: str
) -> None:
    server = read_measured(runs / name)
    window = backlog_after_one_residence(server)
    assert window.start_s >= server.frames.mean_residence_s
    assert binding(server, window) == binds
    counted, worked = departure_rates(server, window)
    left = server.frames.departures_s
    inside = np.sum((left >= window.start_s) & (left < window.end_s))
    assert counted.value == pytest.approx(inside / window.duration_s, abs=1.0 / window.duration_s)
    # The lengths of this run stand for the law: their mean is not that of the law.
    assert worked.value == pytest.approx(rate_of(bounds), rel=0.08)
    assert worked.half_width < counted.half_width / 2


def test_two_clocks_are_laid_over_each_other(runs: Path) -> None:
    server = read_measured(runs / "memory")
    first = server.frames.requests.iloc[0]
    assert first["scheduled_s"] == pytest.approx(0.0, abs=1e-6)
    assert (server.frames.requests["first_token_s"] > server.frames.requests["scheduled_s"]).all()
    assert server.load_end_s == pytest.approx(150.0, rel=0.02)
    assert server.pool_tokens == limits(256).pool_tokens


def test_a_load_shorter_than_a_residence_gives_no_slope(tmp_path: Path) -> None:
    folder = write(tmp_path / "short", burst(limits(256), 8.0), limits(256))
    server = read_measured(folder)
    assert server.load_end_s < server.frames.mean_residence_s
    reason = why_no_slope(server.frames, 0.0, server.load_end_s)
    assert reason is not None and "before one mean residence time" in reason


def test_the_script_prints_what_was_found(runs: Path) -> None:
    out = subprocess.run([SCRIPT, runs], capture_output=True, text=True, check=True).stdout
    memory, sequences = out.split("sequences\n", 1)
    assert "binds       KV cache (" in memory
    assert "binds       sequences (KV usage not recorded; " in sequences
    server = read_measured(runs / "memory")
    counted, _ = departure_rates(server, backlog_after_one_residence(server))
    line = next(line for line in memory.splitlines() if line.startswith("  departures"))
    assert float(line.split()[1]) == pytest.approx(counted.value, rel=0.02)


@pytest.mark.parametrize(
    ("name", "binds", "low", "high"),
    [
        ("RTX4090_Llama-3.1-8B", "kv_cache", 1.7, 1.8),
        ("RTXPRO6000_Llama-3.1-8B", "max_num_seqs", 5.4, 5.6),
    ],
)
def test_the_two_measured_runs(name: str, binds: str, low: float, high: float) -> None:
    """vLLM 0.19 of LLMServingSim (MIT): what binds, the rate of departures, and no slope of 29 s."""
    folder = TRACES / "vllm_measured" / name
    if not folder.exists():
        pytest.skip(f"no {folder}: set CRITRATE_TRACES to the folder with the traces")
    server = read_measured(folder)
    window = backlog_after_one_residence(server)
    assert binding(server, window) == binds
    counted, worked = departure_rates(server, window)
    assert low <= counted.value <= high
    assert worked.low <= counted.high and worked.high >= counted.low
    for start_s in (0.0, server.frames.mean_residence_s):
        assert why_no_slope(server.frames, start_s, server.load_end_s) is not None


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("meta.json", "{}", "does not tell the engine's limits"),
        ("meta.json", '{"engine_kwargs": {"max_num_seqs": null}}', "max_num_seqs is None"),
        (
            "timeseries.csv",
            "t,running\n1.0,3\n",
            "not a CSV file with the columns t, running, wait",
        ),
        ("requests.jsonl", '{"input_toks": 3}\n', "line 1: not a JSON object with the numbers"),
        ("requests.jsonl", "", "fewer than two requests"),
    ],
)
def test_a_file_of_another_form_is_named(
    runs: Path, tmp_path: Path, file: str, text: str, why: str
) -> None:
    for path in (runs / "memory").iterdir():
        if not path.name.startswith(file):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=why) as caught:
        read_measured(tmp_path)
    assert file in str(caught.value)


def test_a_run_that_was_never_overloaded_gives_no_rate(runs: Path) -> None:
    server = read_measured(runs / "memory")
    frames = server.frames
    idle = type(frames)(
        frames.run, frames.end_s, frames.requests, frames.engine.assign(waiting=0), frames.gpu
    )
    calm = MeasuredServer(
        name="calm",
        frames=idle,
        load_end_s=server.load_end_s,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        pool_tokens=None,
    )
    with pytest.raises(ValueError, match="calm: no queue waited"):
        backlog_after_one_residence(calm)
