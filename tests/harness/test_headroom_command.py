"""``critrate headroom``: a record, a live mock, real engines' records, and the files for monitoring."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from analysis.operation.headroom import headroom
from analysis.operation.serving_window import serving_window
from analysis.schedulers.engine import EngineLimits, EngineSample
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime
from harness.cli import app
from harness.commands.headroom_command import recorded, watch
from harness.configs.config import ConfigError, ServerConfig
from harness.experiments.change_line import to_raise_it
from harness.machine.display import Display
from harness.mock.mock import MockConfig
from harness.mock.mock_http import serve
from harness.records.store import Store
from harness.servers.engines import SGLANG, VLLM
from loadgen.workload import uniform

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "docs" / "monitoring"
REFERENCE = ROOT / "results" / "reference"
LIMITS = EngineLimits(num_blocks=128, block_size=16, max_num_seqs=64, max_num_batched_tokens=1024)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(2)
    law = uniform((8, 56), (8, 56))
    arrival_s = np.cumsum(rng.exponential(1 / 15.0, 900))
    run = simulate(
        LIMITS,
        StepTime(b0_s=15e-3, b1_s_per_token=50e-6),
        arrival_s,
        law.sample(rng, 900),
        55.0,
        sample_interval_s=0.25,
        compiled=False,
    )
    path = tmp_path_factory.mktemp("headroom") / "samples.jsonl"
    lines = [{"limits": asdict(LIMITS)}, *(asdict(s) for s in run.samples if s.t_ns > 5e9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_record_gives_load_ceilings_and_what_to_raise(record: Path) -> None:
    shown = CliRunner().invoke(app, ["headroom", str(record)])
    assert shown.exit_code == 0, shown.output
    assert re.match(
        r"headroom +\d+ % \[\d+, \d+\] of critical   bound by the KV cache", shown.output
    )
    for name in ("room", "queueing", "ceiling", "step time", "to raise it", "lengths"):
        assert re.search(f"^{name}", shown.output, re.MULTILINE), name
    asked = CliRunner().invoke(app, ["headroom", str(record), "--json"])
    found = json.loads(asked.stdout)
    assert found["load"]["low"] < found["load"]["value"] < found["load"]["high"] < 1.0
    assert found["fits"]["value"] == pytest.approx(1 / found["load"]["value"])
    assert found["change"]["text"].startswith("the KV cache 2 048 tokens binds")


def test_a_short_record_cannot_say(record: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(record.read_text().splitlines(keepends=True)[:20]))
    shown = CliRunner().invoke(app, ["headroom", str(short)])
    assert shown.exit_code == 11 and shown.output.startswith("cannot say")
    as_json = CliRunner().invoke(app, ["headroom", str(short), "--json"])
    assert as_json.exit_code == 11 and json.loads(as_json.stdout)["load"] is None


@pytest.mark.parametrize("text", ["", '{"t_ns": 1}\n', '{"limits": {"pages": 3}}\n'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "no.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--record|no record"):
        recorded(path)
    with pytest.raises(ConfigError, match="neither a URL"):
        recorded(tmp_path / "none.jsonl")


@pytest.mark.live
def test_a_live_server_is_only_read(tmp_path: Path) -> None:
    config = MockConfig(limits=LIMITS, step_time=StepTime(b0_s=2e-3))

    async def talk() -> tuple[EngineLimits, list[EngineSample]]:
        stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
        server = asyncio.ensure_future(serve(config, port.set_result, stop))
        try:
            url = ServerConfig(url=f"http://127.0.0.1:{await port}")
            return await watch(url, 1.0, 0.1, tmp_path / "kept.jsonl", Display(Console(), True))
        finally:
            stop.set()
            await server

    limits, samples = asyncio.run(talk())
    assert limits.num_blocks == LIMITS.num_blocks and limits.block_size == LIMITS.block_size
    assert len(samples) >= 5 and samples[-1].finished == 0
    kept, again = recorded(tmp_path / "kept.jsonl")
    assert kept == limits and again == samples


@pytest.mark.parametrize(
    ("row", "index"),
    [
        ("vllm_fixed_64_64", 0),
        ("vllm_short_outputs", 0),
        ("sglang_uniform", 0),
        *(("vllm_headroom", i) for i in range(3)),
    ],
)
def test_real_engines_below_their_critical_rate(row: str, index: int) -> None:
    store = Store.open(REFERENCE / row)
    limits = EngineLimits.from_dict(store.read_json("limits.json")["used"])
    critical = store.read_json("verdict.json")["measured"]["value"]
    run = store.read_run(store.whole_runs()[index])
    begin = run.start_ns + run.run.warmup_s * 1e9
    samples = [s for s in run.samples if begin <= s.t_ns <= run.end_ns]
    found = headroom(serving_window(samples, limits))
    assert found.load is not None and found.load.half_width < 0.08
    assert found.load.low <= run.run.arrival_rate / critical <= found.load.high
    assert found.binding == store.read_json("prediction.json")["claim"]["binding"]


# -- files for monitoring ----------------------------------------------------------------------------


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "critrate-rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:vllm|sglang|critrate):\w+", expression))


def test_rules_read_what_engines_show_and_what_other_rules_record() -> None:
    recorded_names = {rule["record"] for rule in rules() if "record" in rule}
    shown = {
        name for facts in (VLLM, SGLANG) for m in facts.metrics.values() for name in m.all_names
    }
    for rule in rules():
        used = names_in(rule["expr"])
        assert used or rule["expr"].startswith("vector(")
        assert used <= recorded_names | shown, used - recorded_names - shown
        assert rule["expr"].count("(") == rule["expr"].count(")")
    assert {"critrate:load", "critrate:fill", "critrate:load_at_least"} <= recorded_names
    assert sum("alert" in rule for rule in rules()) == 2


def test_the_panel_shows_what_the_rules_record() -> None:
    panel = json.loads((MONITORING / "critrate-grafana.json").read_text())
    recorded_names = {rule["record"] for rule in rules() if "record" in rule}
    targets = [t["expr"] for p in panel["panels"] for t in p["targets"]]
    assert len(targets) >= 4
    for expression in targets:
        assert names_in(expression) and names_in(expression) <= recorded_names


def test_promtool_accepts_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [promtool, "check", "rules", str(MONITORING / "critrate-rules.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rule_is_the_formula_of_the_command(record: Path) -> None:
    limits, samples = recorded(record)
    found = headroom(serving_window(samples, replace(limits, max_num_seqs=10**6)))
    seconds = (samples[-1].t_ns - samples[0].t_ns) / 1e9
    steps = (samples[-1].steps - samples[0].steps) / seconds
    busy = float(np.mean([s.running > 0 for s in samples]))
    fill = float(np.mean([s.kv_usage for s in samples]))
    by_rule = busy - found.fixed_s.value * steps * (1 - fill)
    assert found.load is not None
    assert by_rule == pytest.approx(found.load.value, abs=0.05)


def test_a_results_folder_says_what_to_raise(tmp_path: Path) -> None:
    said = to_raise_it(Store.open(REFERENCE / "vllm_fixed_64_64"))
    assert said.startswith("the KV cache 4 096 tokens binds: 8 192 tokens gives +")
    assert to_raise_it(Store.create(tmp_path / "uncalibrated")) == ""
