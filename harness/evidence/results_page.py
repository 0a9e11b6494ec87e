"""The page of all experiments, derived from the evidence that is kept of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.numbers.estimate import Estimate
from analysis.numbers.formatting import estimate_text, grouped, value_text
from analysis.verdicts.explain import ENOUGH
from analysis.verdicts.run_verdict import Capacity
from harness.evidence.evidence_rows import Row
from harness.evidence.replica_page import replica_sections

NOTHING = "-"
H3 = "vllm_h3_"
PUBLISHED = {
    "vllm_paper_1_1": (3.263, 3.387),
    "vllm_paper_2_1": (3.956, 3.650),
    "vllm_paper_1_2": (2.902, 2.969),
}
"""Theory and measurement of arXiv 2605.04595, req/s, and the row that repeats the case."""
HEAD = """\
# Results on real engines

Derived from `results/reference` by `scripts/results_table`; CI derives it anew and compares. Each
row is a config of `configs/experiments`, whose claim and rates were fixed before it ran, carried
out by `scripts/experiments` with a real engine on a CPU: scheduler, block manager, HTTP server and
metrics are real, the step time is set where a law stands, and the steps are otherwise those of a
core. **Not run on a GPU**, and so never with asynchronous scheduling: both engines step
synchronously on a CPU. The prediction (claim engine, grade P1: a calibration by light load) was on
disk before the first run. Rates in req/s; intervals are of 95 %. Some rows were measured more than
once: `docs/predictors.md` has each of them, why, and what it had said before.

{summary}

- paper: M / (b E[g]), tokens, its own premises; in blocks: the same with the engine's own E[g], in
  whole blocks
- engine, P1: blocks, ceilings, reservation, recompute; this is the claim under test
- simulated: the scheduler model under saturated Poisson load, with the law that was set (else with
  the calibrated one)
- measured: the work that was served while the queue was never empty, over its mean per request
"""
RATIOS_HEAD = """
## Measured over predicted

Explained is the share of the gap between the paper's formula and the measured rate for which
`critrate explain` has a cause; none is given where there is no gap to speak of."""
BACKLOG_HEAD = """
## While the queue was never empty

Per request: preemptions, and tokens computed again as the engine model predicts them and as the
length of the steps tells them, which it does under a law of b0 and b1 alone; no engine counts them.
Then the pool, the three factors of measured over M / (b E[g]), and by how much the mean step
outlasted its law in the run farthest off: some rows ran beside another on the same two cores."""
H3_HEAD = """
## H3: 1/mu against 1/M

One law of step times with all three terms, pools over a factor of {factor:.3g}: least squares
through {count} rows, weighted by their errors, which are widened where they lie off the line by
more than these explain. Without b1 and b2 the line would pass through the origin."""
PUBLISHED_HEAD = """
## The distance to the published measurements

Nie, Si and Zhou measured the second column on A100. Each factor leads on from there: their formula
over their measurement; what our b and pool change of it; the mechanisms of the engine model; what
they leave. Lengths are theirs: 1."""


def page(rows: Sequence[Row]) -> str:
    """docs/results.md of these rows."""
    sections = [HEAD.format(summary=_summary(rows)), _table(RATES, rows)]
    sections += [RATIOS_HEAD, _table(RATIOS, rows), BACKLOG_HEAD, _table(BACKLOG, rows)]
    sections += [*_h3(rows), *_published(rows), *replica_sections(rows)]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _summary(rows: Sequence[Row]) -> str:
    """How far the engine's claim, and the simulation of known laws, lie from the measurements."""
    valid = [row for row in rows if row.valid]
    said = [f"{len(valid)} of {len(rows)} rows are valid."]
    paced = [row for row in valid if row.set_law is not None]
    cases: tuple[tuple[str, Sequence[Row], Callable[[Row], Estimate | None]], ...] = (
        ("The engine claim at grade P1", valid, lambda row: row.engine),
        ("The paper's own formula", valid, lambda row: row.paper),
        ("The simulated rate, where the law of step times was set,", paced, lambda r: r.simulated),
    )
    for name, some, of in cases:
        off = [
            (abs(predicted.value / row.verdict.measured.value - 1), row.name)
            for row in some
            if (predicted := of(row)) is not None and row.verdict.measured is not None
        ]
        if off:
            worst, where = max(off)
            said.append(
                f"{name} is off by {_percent(float(np.median([x for x, _ in off])))} in the median of "
                f"{len(off)} rows and by {_percent(worst)} at most (`{where}`)."
            )
    shares = [share.value for row in valid if (share := row.explanation.share) is not None]
    if shares:
        enough = sum(share >= ENOUGH for share in shares)
        said.append(
            f"`critrate explain` accounts for at least {100 * ENOUGH:.0f} % of the gap to the paper's "
            f"formula in {enough} of {len(shares)} rows that have one."
        )
    return " ".join(said)


Column = tuple[str, Callable[[Row], str]]


def _text(estimate: Estimate | None) -> str:
    return NOTHING if estimate is None else estimate_text(estimate).replace(" req/s", "")


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _percent(share: float, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.1f} %"


def _pools(row: Row) -> str:
    each = grouped(row.evidence.limits.pool_tokens)
    return each if row.servers == 1 else f"{row.servers} x {each}"


def _law(row: Row) -> str:
    if row.set_law is None:
        return "its own"
    b0, b1, b2, b3 = row.set_law.coefficients()
    terms = ((b1, 1e6, "us/token"), (b2, 1e9, "ns/KV token"), (b3, 1e6, "us/request"))
    return " + ".join([f"{1e3 * b0:g} ms", *(f"{b * k:g} {u}" for b, k, u in terms if b)])


def _seen(of: Callable[[Capacity], float], form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        return NOTHING if row.backlog is None else format(of(row.backlog), form)

    return cell


def _identity(index: int) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        factors = row.verdict.identity
        return _share(factors[index].estimate) if factors else NOTHING

    return cell


def _counted(row: Row) -> str:
    return NOTHING if row.recomputed_tokens is None else f"{row.recomputed_tokens:.0f}"


RATES: tuple[Column, ...] = (
    ("row", lambda row: f"`{row.name}`"),
    ("lengths", lambda row: row.evidence.workload.name),
    ("M", lambda row: _pools(row)),
    ("step time set", _law),
    ("paper", lambda row: _text(row.paper)),
    ("in blocks", lambda row: value_text(row.in_blocks).replace(" req/s", "")),
    ("engine, P1", lambda row: _text(row.engine)),
    ("simulated", lambda row: _text(row.simulated)),
    ("measured", lambda row: _text(row.verdict.measured)),
    ("verdict", lambda row: f"{row.verdict.outcome}: {row.verdict.headline}"),
)
RATIOS: tuple[Column, ...] = (
    RATES[0],
    ("over paper", lambda row: _share(row.over(row.paper))),
    ("over blocks", lambda row: _share(row.over(row.in_blocks))),
    ("over engine, P1", lambda row: _share(row.over(row.engine))),
    ("over simulated", lambda row: _share(row.over(row.simulated))),
    ("explained", lambda row: _explained(row)),
    ("runs", lambda row: ", ".join(f"{j.load:.2f} {j.verdict}" for j in row.verdict.runs)),
)
BACKLOG: tuple[Column, ...] = (
    RATES[0],
    ("preemptions", _seen(lambda c: c.saturated.preemptions_per_request, ".2f")),
    ("recomputed, predicted", lambda row: f"{row.evidence.engine.recomputed_tokens:.0f}"),
    ("recomputed, counted", _counted),
    ("KV in use", _seen(lambda c: c.saturated.kv_usage, ".3f")),
    ("set aside", _seen(lambda c: c.saturated.set_aside, ".3f")),
    ("occupancy U/M", _identity(0)),
    ("b predicted/measured", _identity(1)),
    ("not wasted 1-w", _identity(2)),
    ("three multiplied", lambda row: _product(row)),
    ("measured over M/(b E[g])", _identity(4)),
    ("steps over the law", lambda row: _late(row)),
)


def _explained(row: Row) -> str:
    """Share of the gap to the paper's formula that has a cause."""
    share = row.explanation.share
    if share is None:
        return NOTHING
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _late(row: Row) -> str:
    """What steps took over the time that they were set to, in the run of a row farthest off."""
    paces = [run.pace for run in row.evidence.runs if run.pace is not None]
    if not paces:
        return NOTHING
    return f"{100 * max((pace.off for pace in paces), key=abs):+.2f} %"


def _product(row: Row) -> str:
    return f"{row.verdict.identity[3].estimate.value:.3f}" if row.verdict.identity else NOTHING


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    lines = [[name for name, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -- H3 ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """1/mu = intercept + slope/M, seconds per request and token-seconds per request."""

    slope: Estimate
    intercept: Estimate


def line(pools: Sequence[float], rates: Sequence[Estimate]) -> Line:
    """Least squares of 1/mu on 1/M, weighted by the errors of the rates; 95 % intervals.

    Errors are widened by the root of the reduced chi-square where that exceeds 1. Raises ValueError for
    fewer than three points: two always lie on a line.
    """
    if len(pools) < 3:
        raise ValueError(f"a line needs three pools or more to be tested, got {len(pools)}")
    seconds = np.array([1 / rate.value for rate in rates])
    errors = seconds * np.array([rate.standard_error / rate.value for rate in rates])
    design = np.column_stack([np.ones(len(pools)), 1 / np.array(pools, dtype=float)])
    weighted = design / errors[:, None]
    covariance = np.linalg.inv(weighted.T @ weighted)
    found = covariance @ weighted.T @ (seconds / errors)
    residual = (seconds - design @ found) / errors
    widened = max(1.0, float(residual @ residual) / (len(pools) - 2))
    error = np.sqrt(np.diag(covariance) * widened)
    method = f"weighted least squares of {len(pools)} rows"
    return Line(
        slope=Estimate.normal(float(found[1]), float(error[1]), "token s", method),
        intercept=Estimate.normal(float(found[0]), float(error[0]), "s", method),
    )


def _h3(rows: Sequence[Row]) -> list[str]:
    some = [row for row in rows if row.name.startswith(H3) and row.valid and row.set_law]
    if len(some) < 3:
        return []
    pools = [row.evidence.limits.pool_tokens for row in some]
    first = some[0]
    assert first.set_law is not None
    b0, b1, b2, _ = first.set_law.coefficients()
    law = first.evidence.workload
    tokens = law.mean(law.prompt_tokens + law.output_tokens - 1)
    demands = {
        "paper": first.evidence.paper.kv_demand,
        "in blocks": first.evidence.engine.kv_demand,
    }
    head = H3_HEAD.format(factor=max(pools) / min(pools), count=len(some))
    lines = [
        "| line | slope | intercept |",
        "| --- | --- | --- |",
    ]
    measured = [row.verdict.measured for row in some if row.verdict.measured is not None]
    fitted = (
        ("measured", line(pools, measured)),
        ("of the engine claims, P1", line(pools, [row.engine for row in some])),
    )
    for name, found in fitted:
        intercept = estimate_text(found.intercept.scaled(1e3, "ms"))
        lines.append(f"| {name} | {estimate_text(found.slope)} | {intercept} |")
    for name, demand in demands.items():
        g = demand.value
        lines.append(
            f"| b0 E[g] and b1 E[tokens] + b2 E[g], E[g] {name} | {b0 * g:.0f} token s | "
            f"{1e3 * (b1 * tokens + b2 * g):.1f} ms |"
        )
    lines.append("| a constant b | | 0 ms |")
    return [head, "\n".join(lines)]


# -- the published cases -------------------------------------------------------------------------


def _published(rows: Sequence[Row]) -> list[str]:
    some = [row for row in rows if row.name in PUBLISHED]
    if not some:
        return []
    mechanisms = ("rounding", "ceiling", "under-fill", "recompute")
    head = ["row", "published", "formula", "b and pool", *mechanisms, "unexplained", "measured"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in some:
        theory, measured = PUBLISHED[row.name]
        cells = [
            f"`{row.name}`",
            f"{measured:.3f}",
            f"{theory / measured:.3f}",
            f"{row.paper.value / theory:.3f}",
            *(f"{row.factor(name):.3f}" for name in mechanisms),
            _share(row.over(row.engine)),
            _text(row.verdict.measured),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [PUBLISHED_HEAD, "\n".join(lines)]
