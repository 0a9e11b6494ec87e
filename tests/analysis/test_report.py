"""The report: one self-contained page that states every number and every gap in the records."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from analysis.calibration.pace import Pace
from analysis.inference.growth import drift
from analysis.numbers.estimate import Estimate, ratio
from analysis.numbers.formatting import (
    NO_BREAK,
    NOT_MEASURED,
    estimate_text,
    grouped,
    plus_minus,
    seconds,
)
from analysis.reports.figure_style import spread, thin
from analysis.reports.figures import engine_over_time, gpu_over_time
from analysis.reports.report import ReportContext, report_html, report_md
from analysis.schedulers.engine import EngineLimits
from analysis.schedulers.frames import RunFrames, run_frames
from analysis.schedulers.simulate import simulate
from analysis.schedulers.step_time import StepTime
from analysis.verdicts.verdict import (
    EXIT_CODES,
    AssumedObserved,
    Check,
    NamedEstimate,
    RunJudgement,
    Verdict,
)
from loadgen.records import FidelityCheck, LoadFidelity, Run

CRITICAL = 60.0
HORIZON_S = 12.0
VOID = {"meta", "link", "br", "hr", "img", "input", "use", "path"}


def one_run(load: float, seed: int) -> RunFrames:
    limits = EngineLimits(num_blocks=512, block_size=16)
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / (load * CRITICAL), 2000)
    arrivals = np.cumsum(gaps)[np.cumsum(gaps) < HORIZON_S]
    lengths = rng.integers(16, 113, (len(arrivals), 3))
    result = simulate(limits, StepTime(b0_s=0.02), arrivals, lengths, HORIZON_S)
    run = Run(
        id=f"run-{load:.2f}-{seed}\\g$1",
        arrival_rate=load * CRITICAL,
        horizon_s=HORIZON_S,
        warmup_s=3.0,
        seed=seed,
    )
    return run_frames(run, 0, round(HORIZON_S * 1e9), result.records, result.samples)


def judge(frames: RunFrames) -> RunJudgement:
    """A judgement with made-up words around the numbers of the run."""
    run, requests = frames.run, frames.requests
    check = FidelityCheck(
        name="send lag", passed=True, statistic=2.1, threshold=10.0, meaning="99th percentile, ms"
    )
    completed = int((requests["outcome"] == "completed").sum())
    return RunJudgement(
        id=run.id,
        arrival_rate=run.arrival_rate,
        load=run.arrival_rate / CRITICAL,
        warmup_s=run.warmup_s,
        end_s=frames.end_s,
        verdict="stable",
        text="stable (< 3.0 req/s over 9 s)",
        realised_rate=len(requests) / frames.end_s,
        drift=drift(frames, run.warmup_s, frames.end_s),
        stable_below=3.0,
        fidelity=LoadFidelity(
            valid=True,
            checks=(check,),
            achieved_rate=60.0,
            lag_p50_ms=0.3,
            lag_p99_ms=2.1,
            lag_max_ms=4.0,
        ),
        requests=len(requests),
        completed=completed,
        unfinished=len(requests) - completed,
        preemptions=7,
        kv_usage=0.913,
        running=61.2,
        waiting=4.5,
        backlogged=0.27,
        step_time_s=Estimate.normal(0.02, 4e-5, "s", "steps over time"),
        pace=Pace(0.0252, 0.025) if run.arrival_rate > CRITICAL else None,
        ttft_p50_s=0.034,
        ttft_p95_s=0.41,
    )


def verdict_of(runs: tuple[RunJudgement, ...]) -> Verdict:
    predicted = Estimate.normal(CRITICAL, 0.9, "req/s", "closed form <with> blocks")
    measured = Estimate.normal(58.4, 0.3, "req/s", "KV demand served under backlog")
    return Verdict(
        name="demo",
        mode="mock server: scheduler model, step time is set",
        claim="engine",
        grade="P1",
        theta=0.1,
        outcome="confirmed",
        headline="within 10 %",
        reasons=("The 90 % interval lies inside the band.",),
        advice=("fp8 KV would give about +90 %",),
        predicted=predicted,
        binding="kv_cache",
        binding_observed="kv_cache",
        predictions=(
            NamedEstimate(name="paper", estimate=predicted.scaled(1.07), note="tokens, not blocks"),
        ),
        measured=measured,
        measurements=(NamedEstimate(name="hinge", estimate=measured.scaled(0.99), note="drift"),),
        ratio=ratio(measured, predicted, "quotient"),
        gap=1.6 / 58.4,
        runs=runs,
        premises=(
            Check(
                name="KV binds", holds=True, observed=0.99, threshold=0.9, text="99 % of the pool"
            ),
            Check(name="steady step time", holds=None, observed=math.nan, threshold=0.1, text="?"),
            Check(name="exact lengths", holds=False, observed=12, threshold=0, text="12 ended"),
        ),
        audit=(Check(name="balance", holds=True, observed=0.0, threshold=0.01, text="tokens"),),
        from_paper=(
            NamedEstimate(
                name="rounding", estimate=Estimate.exact(0.97, "", "engine model"), note="predicted"
            ),
            NamedEstimate(
                name="unexplained",
                estimate=Estimate(1.01, 0.98, 1.04, 0.95, "", "ratio"),
                note="left",
            ),
        ),
        identity=(
            NamedEstimate(
                name="occupancy", estimate=Estimate.normal(0.98, 0.002, "", "gauge"), note=""
            ),
        ),
        table=(AssumedObserved(quantity="prompt", assumed="64", observed="63.7", agrees=True),),
        warnings=("a horizon of 12 s says nothing about longer runs",),
    )


CONTEXT = ReportContext(
    title="Scheduler model <&> company",
    created="2025-01-01T00:00:00+00:00",
    environment={"python": "3.11", "gpu": {"none": "no driver"}, "command": ["critrate", "run"]},
    limits={"num_blocks": 512, "block_size": 16, "max_model_len": None},
    calibration={
        "fit": {
            "law": {
                "b0_s": 0.02,
                "b1_s_per_token": 8e-8,
                "b2_s_per_kv_token": 1e-9,
                "b3_s_per_request": 0.0,
            },
            "covariance": [[1e-10 if i == j else 0.0 for j in range(4)] for i in range(4)],
            "method": "least squares",
        },
        "observations": [{"duration_s": 0.3, "steps": 12.0}] * 50,
    },
    config="name: demo\nnote: <script>alert(1)</script>\n",
    missing=("gpu.jsonl was not written.",),
)


@pytest.fixture(scope="module")
def frames() -> list[RunFrames]:
    return [one_run(0.8, 1), one_run(1.3, 2)]


@pytest.fixture(scope="module")
def verdict(frames: list[RunFrames]) -> Verdict:
    return verdict_of(tuple(judge(f) for f in frames))


@pytest.fixture(scope="module")
def page(verdict: Verdict, frames: list[RunFrames]) -> str:
    return report_html(verdict, frames, CONTEXT)


class Page(HTMLParser):
    """Open elements, references and text of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    seen = parsed(page)
    assert all(reference.startswith("#") for reference in seen.references)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert "script" not in seen.tags and "&lt;script&gt;" in page
    assert len(page.encode()) < 1_500_000


def test_every_reference_inside_the_page_has_one_target(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert {r[1:] for r in parsed(page).references} <= set(ids)


def test_page_names_runs_outcome_and_gaps(page: str, verdict: Verdict) -> None:
    text = " ".join(parsed(page).text)
    for run in verdict.runs:
        assert run.id in text
    assert "confirmed" in text and "gpu.jsonl was not written." in text
    assert "No GPU was sampled" in text and "the first 40 of 50 rows" in text.lower()
    assert "premise" in text.lower() and "cannot say" in text and NOT_MEASURED in text


def test_what_was_set_is_said_wherever_the_result_is(page: str, verdict: Verdict) -> None:
    for text in (unescape(page), report_md(verdict, CONTEXT), str(verdict.to_dict())):
        assert verdict.mode in text
    for text in (unescape(page).replace(NO_BREAK, " "), report_md(verdict, CONTEXT)):
        assert "25.00 ms by the law, kept within +0.8 %" in text


def test_the_same_input_gives_the_same_bytes(verdict: Verdict, frames: list[RunFrames]) -> None:
    first, second = (engine_over_time(frames[1], verdict.runs[1]) for _ in range(2))
    assert first == second
    assert re.match(r'<svg [^>]*viewBox="[^"]+" role="img" aria-label="[^"]+"', first)
    assert "<metadata" not in first and "<style" not in first and first.endswith("</svg>")


def test_the_report_says_what_to_raise(verdict: Verdict) -> None:
    line = "max_num_seqs 256 binds: 391 gives +47 % [45, 49], then the KV cache"
    assert f"To raise it: {line}." in report_md(verdict, replace(CONTEXT, to_raise=line))
    assert "To raise it" not in report_md(verdict, CONTEXT)


def test_markdown_has_the_numbers_of_the_page(page: str, verdict: Verdict) -> None:
    shown = unescape(" ".join(parsed(page).text)).replace(NO_BREAK, " ")
    markdown = report_md(verdict, CONTEXT)
    numbers = re.findall(r"\d+(?:\.\d+)?", markdown)
    assert len(numbers) > 100
    assert [n for n in numbers if n not in shown] == []
    widths = {
        line.count(" | ") for line in markdown.splitlines() if line.startswith("| predicted crit")
    }
    assert widths == {3}


@pytest.mark.parametrize("outcome", list(EXIT_CODES))
def test_every_outcome_renders(verdict: Verdict, outcome: str) -> None:
    changed = replace(verdict, outcome=outcome, runs=())  # type: ignore[arg-type]
    text = " ".join(parsed(report_html(changed, [], CONTEXT)).text)
    assert outcome.replace("_", " ") in text and "No run was judged." in text
    assert outcome.replace("_", " ") in report_md(changed, CONTEXT)


def test_missing_pieces_are_stated(verdict: Verdict, frames: list[RunFrames]) -> None:
    nothing = Estimate(math.nan, math.nan, math.nan, 0.95, "req/s", "too few batches")
    empty = replace(
        frames[0], requests=frames[0].requests.iloc[:0], engine=frames[0].engine.iloc[:0]
    )
    run = replace(
        verdict.runs[0],
        verdict="invalid",
        drift=nothing,
        requests=0,
        completed=0,
        unfinished=0,
        kv_usage=math.nan,
        running=math.nan,
        waiting=math.nan,
        backlogged=math.nan,
        realised_rate=math.nan,
        stable_below=math.nan,
        step_time_s=None,
        ttft_p50_s=math.nan,
        ttft_p95_s=math.nan,
        fidelity=replace(
            verdict.runs[0].fidelity, valid=False, lag_p99_ms=math.nan, lag_max_ms=math.nan
        ),
    )
    bare = replace(
        verdict,
        outcome="invalid",
        measured=None,
        ratio=None,
        gap=None,
        measurements=(),
        predictions=(),
        premises=(),
        audit=(),
        from_paper=(),
        identity=(),
        table=(),
        reasons=(),
        advice=(),
        warnings=(),
        binding_observed=None,
        runs=(run,),
    )
    context = replace(CONTEXT, calibration=None, environment={}, missing=())
    text = " ".join(parsed(report_html(bare, [empty], context)).text)
    assert "No critical rate was measured." in text
    assert "There is no calibration record." in text
    assert "completed no request" in text
    assert "no engine samples" in text and "no request got that far" in text
    assert "nan" not in text.lower().replace("nanosec", "")
    assert NOT_MEASURED in report_md(bare, context)
    parsed(report_html(replace(bare, runs=()), [], context))


def test_a_sampled_gpu_is_drawn(verdict: Verdict, frames: list[RunFrames]) -> None:
    t = np.arange(0.0, HORIZON_S, 0.5)
    gpu = pd.DataFrame({"t_s": t, "gpu": 0, "utilization": 0.8, "power_w": 400.0})
    html = report_html(verdict, [replace(frames[0], gpu=gpu)], CONTEXT)
    assert f"The records of run {frames[1].run.id} are not here" in html
    assert "GPU busy (%)" in html and "No GPU was sampled" not in html
    assert "SM clock" not in html


def test_mig_instances_are_lines_of_their_own(verdict: Verdict, frames: list[RunFrames]) -> None:
    """Where a card and its instances have the same quantity, no line joins their values."""
    t = np.arange(0.0, HORIZON_S, 0.5)
    card = pd.DataFrame({"t_s": t, "gpu": 0, "mig": np.nan, "memory_bytes": 60.0 * 2**30})
    part = card.assign(mig=0.0, memory_bytes=5.0 * 2**30)
    run = replace(frames[0], gpu=pd.concat([card, part]).sort_values("t_s"))
    svg = gpu_over_time(run, verdict.runs[0])
    assert svg is not None and "memory (GiB)" in svg and "GPU busy" not in svg
    alone = gpu_over_time(replace(run, gpu=card), verdict.runs[0])
    assert alone is not None
    assert svg.lower().count("stroke: #0072b2") == 1 + alone.lower().count("stroke: #0072b2") == 2


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(1.62, 1.57, 1.67, 0.95, "req/s", ""), "1.62 req/s [1.57, 1.67]"),
        (Estimate(0.99, 0.95, 1.03, 0.95, "", ""), "0.990 [0.950, 1.030]"),
        (Estimate(0.99, 0.91, 1.07, 0.90, "", ""), "0.99 [0.91, 1.07] at 90 %"),
        (Estimate.exact(41408, "tokens", ""), "41 408 tokens (exact)"),
        (Estimate(0.02, 0.01992, 0.02008, 0.95, "s", ""), "20.00 ms [19.92, 20.08]"),
        (Estimate(8e-8, 2e-8, 14e-8, 0.95, "s/token", ""), "80 ns/token [20, 140]"),
        (Estimate(3.0, -math.inf, 4.0, 0.95, "req/s", ""), "3 req/s [-inf, 4.000]"),
        (Estimate(math.nan, 0.0, 0.0, 0.95, "req/s", ""), NOT_MEASURED),
        (None, NOT_MEASURED),
    ],
)
def test_digits_follow_the_interval(estimate: Estimate | None, text: str) -> None:
    assert estimate_text(estimate) == text


def test_small_formats() -> None:
    assert plus_minus(Estimate(0.17, 0.11, 0.23, 0.95, "req/s", "")) == "0.17 +- 0.06 req/s"
    assert plus_minus(Estimate(0.17, 0.11, 0.23, 0.9, "req/s", "")) == "0.17 +- 0.06 req/s (90 %)"
    assert plus_minus(Estimate(-0.001, -0.07, 0.068, 0.95, "req/s", "")) == "0.00 +- 0.07 req/s"
    assert [seconds(x) for x in (0.0, 1.234, 0.0412, 3e-5)] == [
        "0 s",
        "1.23 s",
        "41.2 ms",
        "30.0 µs",
    ]
    assert grouped(1234567.891, 1) == "1 234 567.9"


def test_thinning_keeps_the_extremes() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x / 50)
    y[5003], y[7001] = 40.0, -40.0
    few_x, few_y = thin(x, y, 600)
    assert len(few_x) <= 600 and few_y.max() == 40.0 and few_y.min() == -40.0
    assert (np.diff(few_x) > 0).all()


def test_labels_are_moved_apart_in_order() -> None:
    placed = spread([1.0, 1.1, 5.0], 1.0)
    assert placed[1] - placed[0] >= 1.0 - 1e-9 and placed[2] > placed[1]
