"""docs/hypotheses.md: ten hypotheses, and what simulators and real engines say of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from analysis.numbers.estimate import Estimate
from analysis.schedulers.step_time import exact_step_time
from analysis.theory.critical_rate import predict
from analysis.theory.prediction import Claim
from analysis.verdicts.branches import two_branches
from harness.evidence.evidence_rows import Row, read_row
from harness.experiments.predict import prefill_chunk
from harness.hypotheses.hypothesis_config import HypothesisConfig
from harness.hypotheses.hypothesis_verdict import ANYWHERE, Part, Verdict

NOT_RUN = "not run"
CLAIMS: tuple[Claim, Claim] = ("paper", "engine")
REAL: dict[str, tuple[str, ...]] = {
    "H1": (
        "vllm_paper_1_1",
        "vllm_paper_2_1",
        "vllm_paper_1_2",
        "vllm_uniform_1_1",
        "vllm_uniform_2_1",
        "vllm_uniform_1_2",
        "sglang_uniform",
    ),
    "H5": ("vllm_fixed_64_64", "vllm_fixed_16_256"),
    "H6": ("vllm_two_starts",),
    "H9": ("vllm_bursts",),
    "H10": ("vllm_short_outputs",),
}
"""Rows of results/reference that bear on a hypothesis."""
ALSO_REAL = ("H1", "H5", "H6", "H9", "H10")
"""Hypotheses that are to be tested on real engines."""
HEAD = """\
# Hypotheses of the theory

Derived by `scripts/hypotheses` from `results/reference`; CI derives it anew and compares. Each row of
the first table is a config, `configs/theory/h<N>.yaml`, which `scripts/hypotheses --run` carries out on
simulators: the slot model of `analysis.slot_models.slots` (one token per request and slot, prompts
take no time) or the scheduler model of vLLM under a set law of step times. Every figure is a mean
over independent seeds with its interval of 95 %. Confirmed: each interval lies in the range that
the hypothesis allows. Refuted: one lies outside. Cannot say: one lies on the edge.
"""
REAL_HEAD = """
## On real engines

Real schedulers, step times set, on a CPU (`docs/results.md`), against the closed forms under the law
that was set; the same ranges. SGLang sets whole outputs aside, one of the cases in which the theory
itself expects the bracket of H1 to fail.
"""


def page(
    configs: Sequence[HypothesisConfig],
    simulated: dict[str, Verdict],
    real: Sequence[tuple[str, str, Verdict]],
) -> str:
    """The page; ``real``: hypothesis, row and verdict."""
    said = {config.hypothesis: config for config in configs}
    lines = [HEAD, "| | theory says | simulator | decided by |", "|---|---|---|---|"]
    for number in range(1, 11):
        name = f"H{number}"
        config, verdict = said.get(name), simulated.get(name)
        says = "-" if config is None else config.says
        outcome = NOT_RUN if verdict is None else f"**{verdict.outcome}**"
        lines.append(f"| {name} | {says} | {outcome} | {_decisive(verdict)} |")
    lines += [REAL_HEAD, "| | row | verdict | decided by |", "|---|---|---|---|"]
    for name in ALSO_REAL:
        rows = [(row, verdict) for h, row, verdict in real if h == name]
        for row, verdict in rows:
            lines.append(f"| {name} | `{row}` | **{verdict.outcome}** | {_decisive(verdict)} |")
        if not rows:
            lines.append(f"| {name} | - | {NOT_RUN} | - |")
    for name in sorted(simulated, key=lambda h: int(h[1:])):
        lines += _figures(said.get(name), simulated[name])
    return "\n".join(lines) + "\n"


def _figures(config: HypothesisConfig | None, verdict: Verdict) -> list[str]:
    lines = [f"\n## {verdict.hypothesis}: {verdict.outcome}\n"]
    if config is not None:
        lines.append(f"{config.says} Refuted if {config.refuted_if}.\n")
    lines += ["| figure | 95 % | allowed | |", "|---|---|---|---|"]
    for part in verdict.parts:
        outcome = part.outcome if part.decides else ""
        lines.append(f"| {part.what} | {_interval(part.estimate)} | {_range(part)} | {outcome} |")
    return lines


def _decisive(verdict: Verdict | None) -> str:
    """The figure that the outcome hangs on: of those with the outcome, the one furthest out or nearest
    to the edge."""
    if verdict is None:
        return "-"
    parts = [p for p in verdict.parts if p.decides and p.outcome == verdict.outcome]
    part = min(parts, key=_room)
    return f"{part.what} {_interval(part.estimate)}, allowed {_range(part)}"


def _room(part: Part) -> float:
    """How far the figure lies inside its range, in its own half widths; negative outside."""
    low, high = part.allowed
    value, half = part.estimate.value, max(part.estimate.half_width, 1e-12)
    return min(value - low, high - value) / half


def _interval(estimate: Estimate) -> str:
    if estimate.high - estimate.low < 1e-9 * max(abs(estimate.value), 1e-9):
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"


def _range(part: Part) -> str:
    low, high = part.allowed
    if part.allowed == ANYWHERE:
        return "-"
    if math.isinf(high):
        return f"above {low:.3g}"
    if math.isinf(low):
        return f"below {high:.3g}"
    return f"{low:.3g} to {high:.3g}"


def real_verdicts(reference: Path) -> list[tuple[str, str, Verdict]]:
    """Hypothesis, row and verdict for each row that is kept of a real engine."""
    found = []
    for name, rows in REAL.items():
        for row in rows:
            if (reference / row / "runs").is_dir():
                parts = _real_parts(name, read_row(reference / row))
                if parts:
                    found.append((name, row, Verdict(name, parts)))
    return found


def _real_parts(name: str, row: Row) -> tuple[Part, ...]:
    """Against the closed forms under the law that was set: their only error is the theory's."""
    if row.set_law is None or row.verdict.measured is None:
        return ()
    paper, engine = (_over(row, claim) for claim in CLAIMS)
    if name == "H1":
        allowed = (0.9 * (1 - row.evidence.paper.delta), 1.0)
        return (
            Part("measured over M / (b E[g])", paper, allowed),
            Part("over the engine's closed form", engine, ANYWHERE),
        )
    if name == "H6":
        # vLLM resumes what it preempted: both starts should agree.
        return tuple(
            Part(
                f"at {pair.load:.2f}: drift from full less from empty, over the offered rate",
                pair.difference.scaled(1 / pair.empty.arrival_rate, ""),
                (-math.inf, 0.02),
            )
            for pair in two_branches(row.verdict.runs, {})
        )
    if name == "H9":
        what = "measured over the closed form, which knows nothing of bursts"
        return (Part(what, engine, (0.95, 1.05)),)
    if name == "H5":
        what = "measured over the closed form with recompute"
        return (Part(what, engine, (0.95, 1.05)),)
    return (
        Part("measured over the closed form with the engine's g", engine, (0.95, 1.05)),
        Part("measured over the formula with the paper's g", paper, ANYWHERE),
    )


def _over(row: Row, claim: Claim) -> Estimate:
    assert row.set_law is not None and row.verdict.measured is not None
    workload, limits = row.evidence.workload, row.evidence.limits
    chunk = prefill_chunk(row.config, workload, limits)
    law = exact_step_time(row.set_law)
    predicted = predict(workload, limits, law, claim, "P1", chunk)
    return row.verdict.measured.scaled(1 / predicted.critical_rate.value, "")
