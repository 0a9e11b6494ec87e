"""From the paper's formula to the measured rate, on servers where one cause is known to act."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from rich.console import Console

from analysis.numbers.estimate import Estimate
from analysis.reports.explain_text import explanation_text
from analysis.reports.figures_of_explain import PIXELS_WIDE, explanation_png, explanation_svg, steps
from analysis.reports.summary import WIDTH
from analysis.schedulers.engine import EngineLimits, SGLangRules
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime, StepTimeFit, exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.reservation import reserving
from analysis.theory.waterfall import waterfall
from analysis.verdicts.evidence import Evidence
from analysis.verdicts.explain import Explanation, explain, share_of
from analysis.verdicts.judge import judge
from harness.rehearsals.rehearsal import SimulatedServer, offered
from loadgen.arrivals import run_arrivals
from loadgen.records import Run
from loadgen.workload import Workload, fixed, uniform

CONSTANT = StepTime(b0_s=20e-3)
TOKENS = StepTime(b0_s=10e-3, b1_s_per_token=200e-6)
WIDE = uniform((8, 56), (8, 56))
ROOMY = EngineLimits(num_blocks=4096, block_size=1, max_num_seqs=1024, max_num_batched_tokens=4096)
SGLANG = replace(ROOMY, sglang=SGLangRules())
ABOUT = ("vLLM 9.9, model tiny, KV cache of 4 096 tokens", "lengths wide", "simulated")


def evidence_of(
    workload: Workload,
    claimed: EngineLimits,
    law: StepTime = CONSTANT,
    *,
    true: EngineLimits | None = None,
    true_law: StepTime | None = None,
    from_law: Workload | None = None,
    load: float = 1.3,
    fit: StepTimeFit | None = None,
) -> Evidence:
    """One run of 40 s behind a warm-up of 5 s, at ``load`` of what the true server can do.

    The prediction is made with ``claimed``, ``law`` and ``from_law``.
    """
    server = SimulatedServer(true or claimed, true_law or law)
    able = predict(workload, server.limits, exact_step_time(server.law), "engine", "P1")
    rate = load * able.critical_rate.value
    run = Run(id="00", arrival_rate=rate, horizon_s=45.0, warmup_s=5.0, seed=1)
    fit = fit or exact_step_time(law)
    known = from_law or workload
    chunk = claimed.max_num_batched_tokens
    tokens = replace(claimed, num_blocks=claimed.pool_tokens, block_size=1)
    paper = predict(known, tokens, fit, "paper", "P1", chunk=chunk)
    engine = predict(known, claimed, fit, "engine", "P1")
    return Evidence(
        name="x",
        mode="simulated",
        theta=0.1,
        prediction=engine,
        paper=paper,
        engine=engine,
        mechanisms=waterfall(known, claimed, fit.law, chunk)[1],
        simulated=None,
        limits=claimed,
        workload=workload,
        runs=(offered(server, workload, run, test_load=False),),
    )


@cache
def usual() -> Evidence:
    """A server as it is predicted."""
    return evidence_of(WIDE, ROOMY)


def explained(evidence: Evidence, law: StepTime = CONSTANT, **how: float) -> Explanation:
    chunk = evidence.limits.max_num_batched_tokens
    assert chunk is not None
    return explain(evidence, judge(evidence), exact_step_time(law), chunk, **how)


def factors(found: Explanation) -> dict[str, float]:
    """Those found, by name; their product must be measured over the paper's rate."""
    assert found.unexplained is not None and found.measured is not None
    seen = {c.name: c.factor.value for c in (*found.causes, found.unexplained) if c.factor}
    product = found.paper.value * math.prod(seen.values())
    assert product == pytest.approx(found.measured.value)
    return seen


def held(s: int, o: int, block: int, late: int = 0) -> int:
    """Token-steps of whole blocks, step by step: the prompt in one, then a token more in each."""
    footprint = [s + j for j in range(o)] + [s + o - 1] * late
    return sum(-(-tokens // block) * block for tokens in footprint)


@pytest.mark.parametrize("late", [False, True])
def test_blocks_and_the_late_step_are_arithmetic(late: bool) -> None:
    blocks = replace(ROOMY, num_blocks=64, block_size=64, async_scheduling=late)
    found = explained(evidence_of(fixed(70, 70), blocks))
    seen = factors(found)
    paper = (1 + 70 / 4096) * 70 / 2 + 70 * 70 + 70 * 71 / 2
    assert seen["first token"] == pytest.approx(paper / held(70, 70, 1))
    assert seen["block rounding"] == pytest.approx(held(70, 70, 1) / held(70, 70, 64))
    if late:
        both = held(70, 70, 64) / held(70, 70, 64, late=1)
        assert seen["async scheduling"] == pytest.approx(both)
    assert seen["unexplained"] == pytest.approx(1.0, abs=0.02)
    assert {c.source for c in found.causes if c.name in ("first token", "block rounding")} == {
        "exact"
    }


ONE_CAUSE = {
    # The prompt at the head of the queue leaves half of E[s^2]/E[s] tokens free (theory.md 2.2).
    "under-fill": (
        uniform((100, 300), (20, 60)),
        replace(ROOMY, num_blocks=2048),
        1 - (200**2 + 200 * 202 / 12) / (2 * 200) / 2048,
    ),
    # 16 rows for E[o] steps each, beside M / E[g].
    "max_num_seqs": (
        WIDE,
        replace(ROOMY, max_num_seqs=16),
        16 / 32 / (4096 / np.mean([held(s, o, 1) for s in range(8, 57) for o in range(8, 57)])),
    ),
    "max_num_batched_tokens": (
        WIDE,
        replace(ROOMY, max_num_batched_tokens=64),
        64 / 63 / (4096 / np.mean([held(s, o, 1) for s in range(8, 57) for o in range(8, 57)])),
    ),
    # Held in the o - 1 decode steps, beside what the declared output makes of it.
    "output reservation": (
        WIDE,
        SGLANG,
        np.mean([held(s + 1, o - 1, 1) for s in range(8, 57) for o in range(8, 57)])
        / np.mean([(s + o - 1) * (o - 1) for s in range(8, 57) for o in range(8, 57)]),
    ),
    "prefill steps": (
        WIDE,
        SGLANG,
        1 / (1 + (lambda at: at.prefill_steps * at.requests)(reserving(WIDE, SGLANG))),
    ),
}


@pytest.mark.parametrize("name", ONE_CAUSE)
def test_a_cause_has_the_size_of_its_closed_form(name: str) -> None:
    workload, limits, expected = ONE_CAUSE[name]
    found = explained(evidence_of(workload, limits))
    seen = factors(found)
    assert seen[name] == pytest.approx(expected, rel=0.03)
    cause = next(c for c in found.causes if c.name == name)
    assert cause.source == "measured"
    assert cause.predicted == pytest.approx(seen[name], rel=0.04)
    assert seen["unexplained"] == pytest.approx(1.0, abs=0.025)
    assert seen["step time"] == pytest.approx(1.0, abs=0.01)
    known = {"first token", "block rounding", "recompute", "step time", "unexplained", name}
    known |= {"output reservation", "prefill steps", "under-fill", "mix of lengths"}
    others = {n: f for n, f in seen.items() if n not in known}
    assert not others, others


def test_a_slower_engine_is_found_in_its_steps_alone() -> None:
    slower = StepTime(b0_s=1.25 * CONSTANT.b0_s)
    seen = factors(explained(evidence_of(WIDE, ROOMY, true_law=slower)))
    assert seen["step time"] == pytest.approx(0.8, rel=0.005)
    assert seen["unexplained"] == pytest.approx(1.0, abs=0.02)


def test_tokens_computed_again_cost_what_the_law_says() -> None:
    """A counted number of tokens enters formula (*) beside those of the request."""
    small = replace(ROOMY, num_blocks=1024)
    evidence = evidence_of(WIDE, small, TOKENS)
    run = evidence.runs[0].frames.run
    arrival_s = run_arrivals(run)
    lengths = WIDE.sample(np.random.default_rng([run.seed, 1]), len(arrival_s))
    again = simulate(small, TOKENS, arrival_s, lengths, run.horizon_s)
    late = again.steps.start_s > 10.0
    requests = (evidence.runs[0].frames.departures_s > 10.0).sum()
    tokens = float(again.steps.recomputed_tokens[late].sum() / requests)
    assert tokens > 10
    without, counted = (
        factors(explained(evidence, TOKENS, recomputed_tokens=n)) for n in (0.0, tokens)
    )
    request_s = 1 / (
        evidence.paper.critical_rate.value
        * math.prod(without[n] for n in ("first token", "under-fill", "recompute"))
    )
    change = counted["recompute"] / without["recompute"]
    assert change == pytest.approx(request_s / (request_s + tokens * TOKENS.b1_s_per_token))
    # With them the law gives the step that was taken, and without them it does not.
    assert counted["step time"] == pytest.approx(1.0, abs=0.005)
    assert without["step time"] == pytest.approx(change, abs=0.01)
    modelled = explained(evidence, TOKENS)
    cause = next(c for c in modelled.causes if c.name == "recompute")
    assert cause.source == "modelled" and cause.factor is not None
    assert cause.factor.low < counted["recompute"] < cause.factor.high


def test_another_law_of_lengths_than_the_predicted_one_is_a_cause() -> None:
    longer = uniform((8, 56), (8, 104))
    seen = factors(explained(evidence_of(WIDE, ROOMY, from_law=longer)))

    def paper(law: Workload) -> float:
        s, o = law.prompt_tokens.astype(float), law.output_tokens.astype(float)
        return law.mean((1 + s / 4096) * s / 2 + s * o + o * (o + 1) / 2)

    assert seen["lengths"] == pytest.approx(paper(longer) / paper(WIDE))
    assert seen["unexplained"] == pytest.approx(1.0, abs=0.02)


def test_a_pool_that_is_not_the_claimed_one_stays_unexplained() -> None:
    found = explained(evidence_of(WIDE, ROOMY, true=replace(ROOMY, num_blocks=2867)))
    assert factors(found)["unexplained"] == pytest.approx(0.7, abs=0.02)
    assert found.unexplained is not None and "the server claims 4096" in found.unexplained.how
    assert found.share is not None and found.enough is False


def test_a_limit_that_nobody_named_stays_unexplained() -> None:
    found = explained(evidence_of(WIDE, ROOMY, true=replace(ROOMY, max_num_seqs=16)))
    assert found.unexplained is not None and "no known ceiling" in found.unexplained.how
    assert factors(found)["unexplained"] < 0.4
    assert found.enough is False


@pytest.mark.parametrize(
    ("left", "gap", "share"),
    [(1.0, 0.8, 1.0), (0.8, 0.8, 0.0), (0.8**0.05, 0.8, 0.95), (0.8**-0.2, 0.8, 0.8)],
)
def test_the_share_is_what_the_rest_leaves_of_the_gap(
    left: float, gap: float, share: float
) -> None:
    exact = share_of(Estimate.exact(left, "", ""), Estimate.exact(gap, "", ""))
    assert exact.value == pytest.approx(share)
    assert exact.low == pytest.approx(share) and exact.high == pytest.approx(share)
    loose = share_of(Estimate.log_normal(left, 0.01, "", ""), Estimate.exact(gap, "", ""))
    half = 1.96 * 0.01 / abs(math.log(gap))
    assert loose.low == pytest.approx(max(share - half, 0.0), abs=1e-3)


def test_without_a_gap_there_is_nothing_to_share_out() -> None:
    evidence = usual()
    rate = judge(evidence).measured
    assert rate is not None
    same = replace(evidence, paper=replace(evidence.paper, critical_rate=rate.scaled(1.0001)))
    found = explained(same)
    assert found.share is None and found.enough is None
    assert found.cannot_say is not None and "cannot be told from none" in found.cannot_say
    assert found.unexplained is not None


def test_without_a_backlog_only_what_was_predicted_is_left() -> None:
    found = explained(evidence_of(WIDE, ROOMY, load=0.5))
    assert found.measured is None and found.share is None and found.unexplained is None
    assert found.cannot_say is not None and "kept its queue non-empty" in found.cannot_say
    assert {c.name for c in found.causes} >= {"rounding", "under-fill"}
    text = explanation_text(found, ABOUT).plain
    assert "cannot say" in text and "no critical rate" in text


def test_an_uncertain_law_widens_what_rests_on_it() -> None:
    evidence = usual()
    covariance = np.diag([1e-3**2, 0.0, 0.0, 0.0])
    loose = replace(exact_step_time(CONSTANT), covariance=covariance)
    found = explain(evidence, judge(evidence), loose, 4096)
    seen = {c.name: c.factor for c in found.causes}
    step, first = seen["step time"], seen["first token"]
    assert step is not None and first is not None
    # 1 ms of 20 ms; how KV is counted scales all steps alike, so that it says nothing there.
    assert step.high / step.value == pytest.approx(math.exp(1.96 * 0.05), rel=0.01)
    assert first.level == 1.0


def test_text_and_picture_show_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explained(evidence_of(fixed(70, 70), replace(ROOMY, num_blocks=64, block_size=64)))
    monkeypatch.setenv("NO_COLOR", "1")
    sink = io.StringIO()
    Console(file=sink, width=300).print(explanation_text(found, ABOUT), soft_wrap=True)
    lines = sink.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH
    names = [c.name for c in found.causes] + ["unexplained"]
    svg = explanation_svg(found, ABOUT)
    for name in names:
        assert any(line.startswith(f"  {name}") for line in lines), name
        assert f">{name}<" in svg, name
    assert any(line.startswith("accounts    for ") for line in lines)
    rows = steps(found)
    assert [row.cause.name for row in rows] == names
    assert found.measured is not None
    assert rows[-1].after == pytest.approx(found.measured.value)
    png = explanation_png(found, ABOUT)
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == PIXELS_WIDE
