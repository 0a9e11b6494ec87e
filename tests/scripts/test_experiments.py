"""The table's experiments: each can be planned, and none is measured twice."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.step_time import StepTime, exact_step_time
from harness.configs.config import load_config
from harness.experiments.plan import make_plan
from harness.experiments.predict import claimed
from harness.live.target import require_fitting
from tests.scripts import program

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.stem: path for path in (ROOT / "configs" / "experiments").glob("*.yaml")}
OWN_STEP_S = {"tiny": 0.0065, "small": 0.0175}
"""Of engines whose step time is not set, as docs/engines.md measured it."""
LARGE = ("vllm_paper_1_1", "vllm_paper_2_1", "vllm_paper_1_2")
"""Millions of pairs of lengths: their plans take too long to be tested here."""
LONG_MIN = {
    "vllm_headroom": 19,
    "sglang_fixed": 30,
    "sglang_nearly_fixed": 16,
    "vllm_paper_1_2": 85,
    "sglang_may_end": 15,
}
"""Watched at three rates for minutes each; filled five times, and twice, a little above what is served,
until the waves are those that last; requests of a minute each; work that comes in swells."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return program.script("experiments")


def test_every_config_is_a_row_and_its_claim_is_fixed(script: ModuleType) -> None:
    rows = [row for group in script.GROUPS.values() for row in group]
    assert sorted(rows) == sorted(CONFIGS)
    for name, path in CONFIGS.items():
        config = load_config(path)
        assert (config.name, config.claim) == (name, "engine")
        assert not config.load.extend
        most_min = LONG_MIN.get(name, 50 if name in LARGE else 11)
        assert script.expected_s(name) < 60 * most_min


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(LARGE)))
def test_its_runs_are_long_enough(name: str) -> None:
    """Under the law that is set every load can be answered more often than not, and every request fits.

    Several runs at one load ask one question: one of them that answers will do.
    """
    config = load_config(CONFIGS[name])
    assert config.server is not None and config.server.launch is not None
    launch = config.server.launch
    assert launch.pool_tokens is not None
    block = launch.block_size or 1
    limits = EngineLimits(
        num_blocks=launch.pool_tokens // block,
        block_size=block,
        max_num_seqs=launch.max_num_seqs,
        max_num_batched_tokens=launch.max_num_batched_tokens,
        max_model_len=launch.max_model_len,
        sglang=SGLangRules(radix_cache=False) if launch.runs == "sglang" else None,
    )
    law = config.estimated_law()
    for offered in (law, config.law()):
        require_fitting(offered, limits)
    step = launch.step_time.law() if launch.step_time else StepTime(b0_s=OWN_STEP_S[launch.model])
    claim = claimed(config, law, limits, exact_step_time(step), "P1")
    plan = make_plan(
        claim,
        claim,
        law,
        loads=config.load.rates,
        horizon_s=config.load.horizon_s,
        max_horizon_s=config.load.max_horizon_s,
        theta=config.theta,
        seed=config.load.seed,
        prediction_digest="",
    )
    for load in set(config.load.rates):
        powers = [p for p, of in zip(plan.power, config.load.rates, strict=True) if of == load]
        assert 1 - math.prod(1 - p for p in powers) > 0.7
    expected = {"vllm_sequence_bound": "max_num_seqs", "vllm_token_bound": "max_num_batched_tokens"}
    usual = "output_reservation" if launch.runs == "sglang" else "kv_cache"
    assert claim.binding == expected.get(name, usual)


def test_what_has_evidence_is_not_measured_again(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured: list[str] = []
    verdict = json.dumps({"outcome": "confirmed", "headline": "within 10 %", "ratio": None})

    def measure(row: str, folder: Path) -> int:
        measured.append(row)
        folder.mkdir(parents=True)
        (folder / "verdict.json").write_text(verdict)
        return 1 if row == "vllm_h3_8192" else 0

    def export(folder: Path, kept: Path) -> int:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "verdict.json").write_text((folder / "verdict.json").read_text())
        return 5000

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "export", export)
    monkeypatch.setattr(script, "finished", lambda folder: False)

    def run(*words: str) -> str:
        folders = ["--out", str(tmp_path / "out"), "--reference", str(tmp_path / "kept")]
        monkeypatch.setattr(sys, "argv", ["experiments", *words, *folders])
        try:
            script.main()
        except SystemExit as left:
            return str(left)
        return ""

    assert run("vllm_h3_4096") == ""
    assert run("h3", "--minutes", "12") == "left: vllm_h3_8192"
    assert measured == ["vllm_h3_4096", "vllm_h3_16384", "vllm_h3_8192", "vllm_h3_5472"]
    assert run("vllm_h3_4096", "--again", "--minutes", "1") == "left: vllm_h3_4096"
    assert run("nothing").startswith("nothing is neither a row nor one of vllm, h3")
    assert "confirmed: within 10 %" in capsys.readouterr().out
