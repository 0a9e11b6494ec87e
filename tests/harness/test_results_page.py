"""docs/results.md is what the kept evidence says, and nothing else."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.numbers.estimate import Estimate
from analysis.verdicts.judge import judge
from harness.configs.config import load_config
from harness.evidence.evidence_rows import SIMULATED, Row, read_row, simulate_set_law
from harness.evidence.reference import MOST_BYTES
from harness.evidence.results_page import line, page
from harness.records.store import Store
from tests.harness.judged import judged_folder, simulated

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "results" / "reference").glob("*/runs"))
PAGE = ROOT / "docs" / "results.md"
POOLS = (4096, 5472, 8192, 16384)


def rates(slope: float, intercept: float, errors: list[float], share: float) -> list[Estimate]:
    """Rates on the line 1/mu = intercept + slope/M, each off by its error."""
    values = [1 / (intercept + slope / m) for m in POOLS]
    return [
        Estimate.normal(v * (1 + share * e), v * share, "req/s", "")
        for v, e in zip(values, errors, strict=True)
    ]


def test_a_line_is_found_and_its_interval_covers_as_often_as_it_says() -> None:
    """1 000 sets of rates with errors of 1 %: four points on a line widen by chance, never narrow."""
    exact = line(POOLS, rates(530.0, 0.05, [0.0] * 4, 0.01))
    assert exact.slope.value == pytest.approx(530.0)
    assert exact.intercept.value == pytest.approx(0.05)
    rng = np.random.default_rng(3)
    covered = np.zeros(2)
    for _ in range(1000):
        found = line(POOLS, rates(530.0, 0.05, rng.normal(0, 1, 4).tolist(), 0.01))
        covered += [
            found.slope.low <= 530.0 <= found.slope.high,
            found.intercept.low <= 0.05 <= found.intercept.high,
        ]
    assert (covered > 0.94 * 1000).all()
    assert (covered < 0.995 * 1000).all()
    with pytest.raises(ValueError, match="three pools or more"):
        line(POOLS[:2], rates(530.0, 0.05, [0.0] * 4, 0.01)[:2])


def test_rates_off_the_line_widen_its_interval() -> None:
    straight = line(POOLS, rates(530.0, 0.05, [0.0] * 4, 0.01))
    bent = line(POOLS, rates(530.0, 0.05, [9.0, -9.0, -9.0, 9.0], 0.01))
    assert bent.slope.half_width > 5 * straight.slope.half_width


# -- rows of the scheduler model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Three pools under one law, a case of the paper's name, and an engine that is not told apart."""
    folder = tmp_path_factory.mktemp("rows")
    law = {"b0_ms": 20.0, "b1_us_per_token": 80.0, "b2_ns_per_kv_token": 800.0}
    for pool in (2048, 4096, 8192):
        judged_folder(folder / f"vllm_h3_{pool}", pool, **law)
    judged_folder(folder / "vllm_paper_1_1", b0_ms=20.0, b1_us_per_token=80.0)
    return [read_row(path) for path in sorted(folder.iterdir())]


def test_recomputed_tokens_are_told_by_the_steps(rows: list[Row]) -> None:
    """Against the log of the scheduler model, over the whole run where the row has its backlog."""
    *others, row = rows
    assert [other.recomputed_tokens for other in others] == [None] * 3, "b2 is in the steps too"
    assert row.backlog is not None and row.recomputed_tokens is not None
    seen = simulated(row.config, row.evidence.limits, row.backlog.run.frames.run)
    window = row.backlog.saturated.window
    inside = (seen.steps.start_s >= window.start_s) & (seen.steps.start_s < window.end_s)
    left = row.backlog.run.frames.departures_s
    finished = ((left >= window.start_s) & (left < window.end_s)).sum()
    truth = seen.steps.recomputed_tokens[inside].sum() / finished
    assert truth > 10
    assert row.recomputed_tokens == pytest.approx(truth, rel=0.1, abs=3)


def test_the_page_says_what_the_rows_say(rows: list[Row]) -> None:
    text = page(rows)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    heads = [table[0] for table in tables]
    assert [len(table) - 2 for table in tables] == [4, 4, 4, 5, 1]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert "4 of 4 rows are valid." in text
    shares = [row.over(row.engine) for row in rows]
    worst = max(abs(1 / share.value - 1) for share in shares if share is not None)
    assert f"in the median of 4 rows and by {100 * worst:.1f} % at most" in text
    assert "three multiplied" in heads[2]
    # The paper's 1:1 with another engine: the factors lead from their measurement to ours.
    cells = tables[4][2].strip("| ").split(" | ")
    factors = [float(cell.split(" ")[0]) for cell in cells[1:10]]
    assert math.prod(factors[:-1]) == pytest.approx(factors[-1], rel=0.02)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_row_is_the_config_that_stands_there(folder: Path) -> None:
    stands = ROOT / "configs" / "experiments" / f"{folder.name}.yaml"
    assert load_config(folder / "config.yaml") == load_config(stands)


def test_whose_prediction_is_the_wide_one_is_told_to_calibrate() -> None:
    """A row whose claim is widened to 10.6 %: longer runs would not help it."""
    row = read_row(ROOT / "results" / "reference" / "vllm_distserve_law")
    predicted = row.evidence.prediction
    wide = Estimate.log_normal(1.03 * predicted.critical_rate.value, 0.0514, "req/s", "")
    verdict = judge(replace(row.evidence, prediction=replace(predicted, critical_rate=wide)))
    assert verdict.measured is not None
    known = 100 * verdict.measured.half_width / verdict.measured.value
    assert verdict.headline == "the interval straddles the 10 % band"
    assert verdict.advice[0].startswith(
        f"calibrate on an idle machine: the measured rate is known to {known:.1f} %, the predicted one "
        f"to {100 * wide.half_width / wide.value:.1f} %"
    )


def test_the_readme_quotes_the_page() -> None:
    readme, text = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    engine, paper = re.findall(r"is off by ([\d.]+ %) in the median of (\d+) rows", text)[:2]
    quoted = " ".join(readme.split())
    assert f"In {engine[1]} experiments with real engines" in quoted
    assert f"off by {engine[0]} in the median and the paper's formula by {paper[0]}" in quoted


def test_pools_under_one_law_lie_on_the_line_of_their_claims(rows: list[Row]) -> None:
    """1/mu against 1/M: slope b0 E[g] within what under-fill and recompute add, a positive intercept."""
    some = rows[:3]
    pools = [row.evidence.limits.pool_tokens for row in some]
    measured = [row.verdict.measured for row in some if row.verdict.measured is not None]
    found, claimed = line(pools, measured), line(pools, [row.engine for row in some])
    assert found.intercept.low > 0
    assert found.slope.value == pytest.approx(claimed.slope.value, rel=0.06)
    assert found.slope.value == pytest.approx(
        0.02 * some[0].evidence.engine.kv_demand.value, rel=0.1
    )


# -- what is committed -----------------------------------------------------------------------------


def close(one: Any, other: Any) -> bool:
    """The same JSON, numbers to a millionth: other machines add in another order."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float) or isinstance(other, float):
        if one is None or other is None:
            return one is other
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)


@pytest.mark.skipif(not FOLDERS, reason="no evidence is kept yet")
def test_the_page_and_every_verdict_are_derived_again() -> None:
    rows = [read_row(folder) for folder in FOLDERS]
    assert page(rows) == PAGE.read_text(), "run scripts/results_table"
    for folder, row in zip(FOLDERS, rows, strict=True):
        kept = Store.open(folder)
        kept_verdict = kept.read_json("verdict.json")
        assert row.name == folder.name
        assert kept_verdict["outcome"] == row.verdict.outcome
        for name in ("predicted", "measured", "ratio"):
            found = getattr(row.verdict, name)
            found = None if found is None else json.loads(json.dumps(found.to_dict()))
            assert close(kept_verdict[name], found), (
                f"{row.name}: {name}; run scripts/results_table"
            )
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        assert size <= MOST_BYTES


@pytest.mark.skipif(not FOLDERS, reason="no evidence is kept yet")
def test_a_kept_simulation_is_found_again() -> None:
    """Of one row; `scripts/results_table --simulate` does all."""
    store = next(Store.open(f) for f in FOLDERS if (f / SIMULATED).exists())
    found = simulate_set_law(store)
    assert found is not None
    assert close(store.read_json(SIMULATED), json.loads(json.dumps(found.to_dict())))
