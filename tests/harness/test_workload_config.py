"""The workload section of a config: every law, declared lengths, and the page about them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from harness.configs.config import ConfigError, WorkloadConfig
from harness.experiments.predict import offline_predictions
from loadgen.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
TRACES = Path(os.environ.get("CRITRATE_TRACES", ROOT.parent / "shared/traces"))
PAGE = (ROOT / "docs" / "workloads.md").read_text()
FIXED = {"fixed": {"prompt": 10, "output": 4}}
LENGTH = {"mean": 100, "cv": 0.5, "bounds": [1, 400]}


def law(section: object, folder: Path = Path()) -> Workload:
    return WorkloadConfig.model_validate(section, context={"folder": folder}).build()


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (FIXED, "fixed 10/4"),
        ({"lognormal": {"prompt": LENGTH, "output": LENGTH}}, "log-normal 100 (cv 0.5) / 100"),
        ({"shipped": "azure_2023_conv"}, "azure_2023_conv"),
        ({"trace": {"file": "b.csv", "format": "burstgpt"}}, "b"),
        (
            {"trace": {"file": "b.csv", "format": "burstgpt"}, "part": {"side": "test"}},
            "b, 2 requests to test",
        ),
        ({"marginals": {"prompt": "m.csv", "output": "m.csv"}}, "m x m"),
        (FIXED | {"declare": {"max_tokens": 9}}, "fixed 10/4, declare 9"),
        (FIXED | {"declare": {"factor": 2}}, "fixed 10/4, declare 2 x output"),
        (FIXED | {"declare": {"extra": 3}}, "fixed 10/4, declare output + 3"),
        (
            {"mixture": [{"weight": 1, "workload": FIXED | {"ignore_eos": False}}]},
            "1 x (fixed 10/4)",
        ),
    ],
)
def test_every_law_is_built(tmp_path: Path, section: object, name: str) -> None:
    rows = "".join(f"{i},{i + 1}\n" for i in range(1, 11))
    (tmp_path / "b.csv").write_text("Request tokens,Response tokens\n" + rows)
    (tmp_path / "m.csv").write_text("length,probability\n5,0.5\n7,0.5\n")
    found = law(section, tmp_path)
    assert found.name.startswith(name)
    declares = isinstance(section, dict) and "declare" in section
    assert found.declares_more == declares
    assert found.ignore_eos == (not declares and "mixture" not in section)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "give exactly one of uniform, fixed, lognormal, shipped, trace, marginals, mixture"),
        (FIXED | {"shipped": "azure_2023_conv"}, "give exactly one of"),
        (FIXED | {"declare": {}}, "exactly one of max_tokens, factor, extra"),
        (FIXED | {"declare": {"max_tokens": 3}}, "below the longest output of 4"),
        (FIXED | {"declare": {"extra": 3}, "ignore_eos": True}, "set ignore_eos to false"),
        ({"shipped": "burstgpt"}, "azure_2023_conv"),
        (FIXED | {"cycle_requests": 9}, "cycle_requests: it goes with mixture"),
        (FIXED | {"part": {"side": "test"}}, "only a law of observed requests"),
        ({"marginals": {"prompt": "no.csv", "output": "no.csv"}}, "there is no file"),
        (
            {"lognormal": {"prompt": LENGTH, "output": LENGTH, "correlation": -0.95}},
            "have a correlation between",
        ),
    ],
)
def test_a_law_that_cannot_be_is_refused_by_name(section: object, message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        law(section)


def test_declarations_come_before_the_limit() -> None:
    """As a client does: it asks for 400 tokens, or for what the context still has room for."""
    uniform = {"uniform": {"prompt": [90, 100], "output": [1, 10]}}
    found = law(uniform | {"declare": {"max_tokens": 40}, "max_total_tokens": 132})
    assert (found.prompt_tokens + found.max_tokens).max() == 132
    assert (found.max_tokens >= found.output_tokens).all()
    assert "declare less, to fit" in found.notes[0]


def test_a_prediction_says_what_was_cut(tmp_path: Path) -> None:
    from harness.configs.config import load_config

    path = tmp_path / "config.yaml"
    path.write_text(
        "name: x\nlimits: {pool_tokens: 320}\nstep_time: {b0_ms: 10}\n"
        "workload: {uniform: {prompt: [1, 10], output: [1, 10]}, max_total_tokens: 10}\n"
    )
    note = offline_predictions(load_config(path))["summary"]["note"]
    assert "at most 10 tokens in total: 55 % of the requests cut" in note
    assert "mean KV demand changes by -" in note


# -- docs/workloads.md -----------------------------------------------------------------------------

BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
SETS: dict[str, Any] = {name: section for block in BLOCKS for name, section in block.items()}
ROWS = {
    cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
    for line in PAGE.splitlines()
    if (cells := line.strip("|").split("|")) and len(cells) == 7 and "`" in cells[0]
}


@pytest.mark.parametrize("name", SETS)
def test_the_figures_of_the_page(name: str) -> None:
    files = re.findall(r"'([^']*\.(?:csv|jsonl)\.gz)'", str(SETS[name]))
    for file in files:
        if not (TRACES / "lengths" / file).exists():
            pytest.skip(f"no {file}: set CRITRATE_TRACES to the folder with the traces")
    found = law(SETS[name], TRACES / "lengths")
    if name not in ROWS:
        assert found.declares_more != (name == "careful")
        return
    s, o = found.prompt_tokens.astype(float), found.output_tokens.astype(float)
    demand, mean = found.decode_demand(), found.mean
    sd = {k: np.sqrt(max(mean(v * v) - mean(v) ** 2, 0)) for k, v in (("s", s), ("o", o))}
    product = mean(s * o) - mean(s) * mean(o)
    correlation = "none" if name.startswith("fixed") else f"{product / (sd['s'] * sd['o']):.2f}"
    cv = np.sqrt(max(mean(demand**2) / mean(demand) ** 2 - 1, 0))
    error = found.standard_error(demand) / mean(demand)
    assert ROWS[name] == [
        f"{mean(s):.0f}",
        f"{mean(o):.0f}",
        correlation.replace("-0.00", "0.00"),
        f"{mean(demand) / 1e3:.1f}",
        f"{cv:.2f}",
        f"{100 * error:.1f} %" if error else "none",
    ]


def test_the_page_has_a_figure_for_every_recommended_law() -> None:
    assert len(ROWS) == 7 and set(ROWS) <= set(SETS)


def test_every_key_is_listed_in_the_readme_of_the_configs() -> None:
    listed = (ROOT / "configs" / "README.md").read_text()
    for key in WorkloadConfig.model_fields:
        assert f"`workload.{key}`" in listed, key
