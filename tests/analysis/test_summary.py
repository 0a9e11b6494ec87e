"""The terminal summary: aligned, at most 100 columns, complete without colour."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.formatting import NOT_MEASURED
from analysis.reports.summary import WIDTH, summary, summary_lines
from analysis.verdicts.verdict import EXIT_CODES, NamedEstimate, RunJudgement, Verdict
from loadgen.records import FidelityCheck, LoadFidelity

FIDELITY = LoadFidelity(
    valid=True, checks=(), achieved_rate=1.5, lag_p50_ms=0.2, lag_p99_ms=2.0, lag_max_ms=14.0
)


def run(load: float, drift: Estimate, text: str, **changes: object) -> RunJudgement:
    base = RunJudgement(
        id=f"run-{load}",
        arrival_rate=1.62 * load,
        load=load,
        warmup_s=60.0,
        end_s=960.0,
        verdict="stable" if load < 1 else "unstable",
        text=text,
        realised_rate=1.62 * load,
        drift=drift,
        stable_below=0.05,
        fidelity=FIDELITY,
        requests=1041,
        completed=1000,
        unfinished=41,
        preemptions=3,
        kv_usage=0.9,
        running=50.0,
        waiting=2.0,
        backlogged=0.1,
        step_time_s=None,
        pace=None,
        ttft_p50_s=0.1,
        ttft_p95_s=0.9,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


PREDICTED = Estimate(1.62, 1.57, 1.67, 0.95, "req/s", "closed form")
MEASURED = Estimate(1.600, 1.573, 1.627, 0.95, "req/s", "work served")
VERDICT = Verdict(
    name="demo",
    mode="emulation: the scheduler is real, the time is set",
    claim="engine",
    grade="P1",
    theta=0.1,
    outcome="confirmed",
    headline="within 10 %",
    reasons=(),
    advice=(
        "p95 wait stays under 1 s up to 0.86 of critical",
        "to raise it: the KV cache binds; fp8 KV would give about +90 %, then max_num_seqs 256 "
        "binds, and a second GPU would do as well",
    ),
    predicted=PREDICTED,
    binding="kv_cache",
    binding_observed="kv_cache",
    predictions=(NamedEstimate(name="paper", estimate=PREDICTED.scaled(1.055), note=""),),
    measured=MEASURED,
    measurements=(),
    ratio=ratio(MEASURED, PREDICTED, ""),
    gap=0.0125,
    runs=(
        run(
            0.90, Estimate(0.0, -0.06, 0.06, 0.95, "req/s", ""), "stable (< 0.05 req/s over 900 s)"
        ),
        run(
            1.10,
            Estimate(10.17, 10.11, 10.23, 0.95, "req/s", ""),
            "grows",
            warnings=("3 of 1 041 requests were sent more than 10 ms late (worst 14 ms)",),
        ),
    ),
    premises=(),
    audit=(),
    from_paper=(),
    identity=(),
    table=(),
)


def test_form_and_alignment() -> None:
    lines = summary_lines(VERDICT)
    assert lines[0] == (
        "claim       engine, P1   predicted 1.62 req/s [1.57, 1.67]   bound by the KV cache"
    )
    assert lines[1] == "server      emulation: the scheduler is real, the time is set"
    assert lines[2].startswith("  0.90      1.46 req/s   drift  0.00 +- 0.06 req/s   stable")
    assert lines[3].startswith("  1.10      1.78 req/s   drift 10.17 +- 0.06 req/s   grows")
    assert lines[4].strip().startswith("warning: 3 of 1 041 requests")
    starts = {line.index(word) for line, word in zip(lines[2:4], ("stable", "grows"), strict=True)}
    assert len(starts) == 1
    rest = "\n".join(lines[5:])
    assert "measured    1.600 req/s [1.573, 1.627]" in rest and "GAP 1.2 %" in rest
    assert "paper 1.71 req/s (GAP 6.8 %)" in rest
    assert "\nconfirmed   within 10 %\n  p95 wait" in rest


@pytest.mark.parametrize("outcome", list(EXIT_CODES))
def test_width_and_outcome(outcome: str) -> None:
    failed = FidelityCheck(
        name="send lag", passed=False, statistic=31.0, threshold=10.0, meaning="late " * 30
    )
    broken = run(
        1.3,
        Estimate(math.nan, math.nan, math.nan, 0.95, "req/s", ""),
        "invalid: the load was not the one that was asked for, see the warnings below this line",
        verdict="invalid",
        fidelity=replace(FIDELITY, valid=False, checks=(failed,)),
    )
    verdict = replace(
        VERDICT,
        outcome=outcome,  # type: ignore[arg-type]
        reasons=("because " * 30,),
        warnings=("long " * 40,),
        runs=(*VERDICT.runs, broken),
    )
    lines = summary_lines(verdict)
    assert max(map(len, lines)) <= WIDTH
    assert any(line.startswith(outcome.replace("_", " ")) for line in lines)
    text = "\n".join(lines)
    assert NOT_MEASURED in text and "load check send lag failed: 31 against 10" in text
    assert "nan" not in text


def test_what_to_raise_stands_under_the_outcome() -> None:
    line = "max_num_seqs 256 binds: 391 gives +47 % [45, 49], then the KV cache"
    text = " ".join(summary(VERDICT, line).plain.split())
    assert text.index("confirmed within 10 %") < text.index(f"to raise it: {line}")
    assert line not in " ".join(summary(VERDICT).plain.split())


def test_missing_pieces_are_stated() -> None:
    nothing = replace(VERDICT, measured=None, ratio=None, gap=None, runs=(), predictions=())
    text = "\n".join(summary_lines(nothing))
    assert "no critical rate" in text and "none was judged" in text


def test_rich_drops_colour_where_there_is_no_terminal() -> None:
    plain, coloured = io.StringIO(), io.StringIO()
    Console(file=plain, width=40).print(summary(VERDICT), soft_wrap=True)
    Console(file=coloured, force_terminal=True, color_system="standard").print(
        summary(VERDICT), soft_wrap=True
    )
    assert plain.getvalue().rstrip("\n").split("\n") == summary_lines(VERDICT)
    assert "\x1b[1;32mconfirmed" in coloured.getvalue()
